package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestBadSettings(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, takenPort, _ := net.SplitHostPort(taken.Addr().String())

	const long = "hunter2-which-is-long-enough-for-a-secret"
	for _, setting := range []string{
		"DATABASE_URL=",
		"DATABASE_URL=mysql://todo:hunter2@localhost/todo",
		"DATABASE_URL=host=localhost password=hunter2",
		"DATABASE_URL=postgres://todo:hunter2@local host/todo",
		"DATABASE_URL=postgres://todo:hunter2@localhost:port/todo",
		"DATABASE_URL=postgres://todo:hunter2@localhost:99999/todo",
		"DATABASE_URL=postgres://todo:hunter2/more@localhost/todo", // what should have been escaped in the password
		"DATABASE_URL=postgres://todo:hunter2%@localhost/todo",
		"DATABASE_URL=postgres://todo:x%hunter2@localhost/todo",
		"DATABASE_URL=postgres://todo:hunter2`: hunter2@localhost:port/todo",
		"DATABASE_URL=postgres://todo:hunter2@[localhost/todo",
		"DATABASE_URL=postgres://localhost/todo?user=todo&password=hunter2&sslmode=hunter2",
		"DATABASE_URL=postgres://localhost/todo?password=hunter2&connect_timeout=soon",
		"DATABASE_URL=postgres://todo:hunter2@db.example.com/todo?sslmode=disable",
		"DATABASE_URL=postgres://todo:hunter2@db.example.com/todo?sslmode=prefer",
		"BETTER_AUTH_SECRET=",
		"BETTER_AUTH_SECRET=hunter2",
		"BETTER_AUTH_SECRET=better-auth-secret-123456789",
		"BETTER_AUTH_SECRET=better-auth-secret-12345678901234567890",
		"BETTER_AUTH_SECRETS=" + long,
		"BETTER_AUTH_SECRETS=1:hunter2",
		"BETTER_AUTH_SECRETS=1:" + long + ",1:" + long,
		"BETTER_AUTH_SECRETS=2:" + long + ",",
		"PORT=http", "PORT=0", "PORT=-1", "PORT=65536", "PORT=80 80", "PORT=" + takenPort, "METRICS_PORT=x", "METRICS_PORT=" + takenPort,
		"LOG_LEVEL=verbose", "LOG_LEVEL=0", "LOG_LEVEL=info+2", "LOG_LEVEL=warning",
		"DATABASE_URL=postgres://",
	} {
		t.Run(setting, func(t *testing.T) {
			p := startProcess(t, setting)
			status := p.wait(10 * time.Second)
			output, lines := p.output.String(), p.output.lines(t)
			if status != 1 || len(lines) != 1 || strings.Count(output, "\n") != 1 || lines[0]["severity"] != "ERROR" {
				t.Fatalf("exit status %d with %q, want 1 with one line of severity ERROR", status, output)
			}
			name, _, _ := strings.Cut(setting, "=")
			if message, _ := lines[0]["message"].(string); !strings.HasPrefix(message, name+" ") && !strings.HasPrefix(message, name+":") {
				t.Errorf("%q, want the setting named first", message)
			}
			for _, secret := range []string{"hunter2", "%hu", testSecret} {
				if strings.Contains(output, secret) {
					t.Errorf("%q shows %q", output, secret)
				}
			}
		})
	}
}

func TestStartAndIdle(t *testing.T) {
	t.Parallel()
	start := time.Now()
	p := startProcess(t)
	p.waitLive()
	took := time.Since(start)
	c := newClientOf(t, p.url, "test-"+rand.Text())
	a := c.do("GET", "", "")
	t.Logf("live after %v, first list after %v", took, time.Since(start))
	if took > 2*time.Second || a.status != 200 {
		t.Errorf("live after %v, then list = %d %s, want under 2 s and 200", took, a.status, a.body)
	}
	if ready := c.send("GET", "/health/ready", ""); ready.status != 200 {
		t.Errorf("/health/ready = %d %s, want 200", ready.status, ready.body)
	}

	if rss := p.memory("VmRSS"); rss > 30<<20 {
		t.Errorf("idle with %d bytes resident, want under 30 MiB", rss)
	}
}

func TestUnreachableDatabase(t *testing.T) {
	t.Parallel()
	start := time.Now()
	nowhere := "DATABASE_URL=postgres://todo:hunter2@127.0.0.1:" + freePort(t) + "/todo"
	p, stopped := startProcess(t, nowhere), startProcess(t, nowhere)
	p.waitLive()
	stopped.waitLive()
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("live after %v, want it before the database answers", took)
	}
	stopped.signal(syscall.SIGTERM)
	if status := stopped.wait(5 * time.Second); status != 0 {
		t.Errorf("SIGTERM before the database answers: exit status %d, want 0: %s", status, stopped.output.String())
	}

	c := newClientOf(t, p.url, "test-"+rand.Text())
	for _, path := range []string{"/health/ready", "/api/" + c.user + "/tasks"} {
		sent := time.Now()
		a := c.send("GET", path, "", "X-Request-Id", path)
		if a.status != 503 || a.header.Get("Retry-After") == "" || detail(t, a) == "" || time.Since(sent) > 20*time.Second {
			t.Errorf("GET %s = %d %v %s after %v, want 503 with Retry-After within 20 s", path, a.status, a.header, a.body, time.Since(sent))
		}
		if line := p.request(path); line["severity"] != "WARNING" {
			t.Errorf("GET %s is logged as %v, want severity WARNING", path, line)
		}
	}
	if a := c.send("GET", "/health/live", ""); a.status != 200 {
		t.Errorf("/health/live = %d %s, want 200", a.status, a.body)
	}
	// The end of the process finds a request that still waits.
	sent := time.Now()
	if a := c.do("GET", "", ""); a.status != 503 || time.Since(sent) > 14*time.Second {
		t.Errorf("a list at the end = %d %s after %v, want 503 before its deadline", a.status, a.body, time.Since(sent))
	}

	status := p.wait(15 * time.Second)
	took := time.Since(start)
	lines := p.output.lines(t)
	last := lines[len(lines)-1]
	message, _ := last["message"].(string)
	if status != 1 || took < 25*time.Second || took > 45*time.Second || last["severity"] != "ERROR" ||
		!strings.Contains(message, "DATABASE_URL") || !strings.Contains(message, "refused") {
		t.Errorf("exit status %d after %v with %v, want 1 after 30 s with an ERROR that names DATABASE_URL and the reason", status, took, last)
	}
	if output := p.output.String() + stopped.output.String(); strings.Contains(output, "hunter2") {
		t.Errorf("the log shows the password: %s", output)
	}
}

func TestDatabaseComesUpLater(t *testing.T) {
	t.Parallel()
	config, _, err := poolConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	nowhere := "127.0.0.1:" + freePort(t)
	var up atomic.Bool
	var refused atomic.Int32
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		if !up.Load() {
			refused.Add(1)
			return (&net.Dialer{}).DialContext(ctx, "tcp", nowhere)
		}
		return dial(ctx, network, address)
	}
	db, err := newDatabase(config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer db.pool.Close()
	prepared := make(chan error, 1)
	go func() { prepared <- db.start(t.Context()) }()
	service := httptest.NewServer(newServer(sharedAuth, db, slog.New(slog.DiscardHandler), nil, ""))
	defer service.Close()
	c := newClientOf(t, service.URL, "test-"+rand.Text())

	waiting := make(chan answer, 1)
	go func() {
		a, err := c.try("POST", "/api/"+c.user+"/tasks", `{"title": "patience"}`)
		if err != nil {
			t.Error(err)
		}
		waiting <- a
	}()
	eventually(t, "twelfth try to connect", func() bool { return refused.Load() >= 12 }) // the pause has grown by then
	start := time.Now()
	up.Store(true)
	a := c.do("GET", "", "")
	if took := time.Since(start); a.status != 200 || took > 3*time.Second {
		t.Errorf("list = %d %s, %v after the database came up, want 200 in about a second", a.status, a.body, took)
	}
	if a := <-waiting; a.status != 201 {
		t.Errorf("a create that waited for the database = %d %s, want 201", a.status, a.body)
	}
	if err := <-prepared; err != nil {
		t.Errorf("prepare = %v, want nil: its error ends the process", err)
	}
}

// Not even a database that has gone silent keeps the process longer.
func TestStopDespiteSilence(t *testing.T) {
	t.Parallel()
	d, r := openDatabaseOver(t, sharedDatabaseURL())
	port := freePort(t)
	c := newClientOf(t, "http://127.0.0.1:"+port, "test-"+rand.Text())
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "").serve(ctx, port, "") }()
	eventually(t, "first list", func() bool {
		a, err := c.try("GET", "/api/"+c.user+"/tasks", "")
		return err == nil && a.status == 200
	})
	r.stalled.Store(true)
	answered := make(chan answer, 1)
	go func() {
		a, err := c.try("GET", "/api/"+c.user+"/tasks", "")
		if err != nil {
			t.Error(err)
		}
		answered <- a
	}()
	eventually(t, "list under way", func() bool { return d.pool.Stat().AcquiredConns() == 1 })
	start := time.Now()
	stop()
	if err := <-ended; err != nil || time.Since(start) > stopLimit {
		t.Errorf("the stop = %v after %v, want none within %v", err, time.Since(start), stopLimit)
	}
	if a := <-answered; a.status != http.StatusServiceUnavailable {
		t.Errorf("the list = %d %s, want 503", a.status, a.body)
	}
	r.heal()
}

func TestStopCancelsStatement(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	c := newClientOf(t, p.url, "test-"+rand.Text())
	task := c.create("locked")
	tx, err := sharedDB.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	var holder int
	if err := tx.QueryRow(t.Context(), `SELECT pg_backend_pid() FROM tasks WHERE user_id = $1 AND id = $2 FOR UPDATE`, c.user, task.ID).Scan(&holder); err != nil {
		t.Fatal(err)
	}
	blocked := func() (n int) {
		err := sharedDB.pool.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))`, holder).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}

	start := time.Now() // set anew before the signal
	answered := make(chan time.Duration, 1)
	go func() {
		a, err := c.try("PATCH", fmt.Sprintf("/api/%s/tasks/%d", c.user, task.ID), `{"title": "changed"}`)
		if err != nil || a.status != 503 || a.header.Get("Retry-After") == "" {
			t.Errorf("blocked PATCH = %d %v %s, %v, want 503 with Retry-After", a.status, a.header, a.body, err)
		}
		answered <- time.Since(start)
	}()
	eventually(t, "blocked statement", func() bool { return blocked() == 1 })
	late := time.Since(start)
	p.signal(syscall.SIGTERM)
	if status := p.wait(stopLimit); status != 0 {
		t.Errorf("exit status %d, want 0: %s", status, p.output.String())
	}
	if took := <-answered - late; took < 6*time.Second || took > stopLimit {
		t.Errorf("the blocked PATCH is answered %v after the signal, want 7 s", took)
	}
	eventually(t, "end of the statement", func() bool { return blocked() == 0 })
}

func TestStopWithStalledBody(t *testing.T) {
	t.Parallel()
	patient, hasty, idle := startProcess(t), startProcess(t), startProcess(t)
	var answer *bufio.Reader // the patient's
	for _, p := range []*process{hasty, patient} {
		p.waitLive()
		c := newClientOf(t, p.url, "test-"+rand.Text())
		conn := raw(t, p.url, c.post(`{"title":`, "Content-Length: 30", "Expect: 100-continue"))
		answer = bufio.NewReader(conn)
		// The interim answer says that the service waits for the body.
		if line, err := answer.ReadString('\n'); !strings.Contains(line, " 100 ") {
			t.Fatalf("interim answer = %q, %v, want 100", line, err)
		}
	}
	idle.waitLive()

	start := time.Now()
	patient.signal(syscall.SIGTERM)
	hasty.signal(syscall.SIGTERM)
	idle.signal(syscall.SIGINT)
	if status := idle.wait(5 * time.Second); status != 0 {
		t.Errorf("SIGINT: exit status %d, want 0: %s", status, idle.output.String())
	}
	eventually(t, "line about the shutdown", func() bool { return strings.Contains(hasty.output.String(), `"shutting down"`) })
	hasty.signal(syscall.SIGTERM)
	if status := hasty.wait(3 * time.Second); status == 0 {
		t.Errorf("a second SIGTERM: exit status 0, want the signal's")
	}
	if status := patient.wait(stopLimit - time.Since(start)); status != 0 {
		t.Errorf("SIGTERM with a stalled body: exit status %d, want 0: %s", status, patient.output.String())
	}
	if text, _ := io.ReadAll(answer); !strings.Contains(string(text), "HTTP/1.1 408 ") {
		t.Errorf("a stalled body at a stop is answered %q, want 408", text)
	}
}

func TestLog(t *testing.T) {
	t.Parallel()
	const trace = "105445aa7843bc8bf206b12000100000"
	const parent = "00-" + trace + "-b7ad6b7169203331-01"
	project, plain, quiet := startProcess(t, "GOOGLE_CLOUD_PROJECT=some-project"), startProcess(t), startProcess(t, "LOG_LEVEL=error")
	for _, p := range []*process{project, plain, quiet} {
		p.waitLive()
		c := newClientOf(t, p.url, "test-"+rand.Text())
		tasks := "/api/" + c.user + "/tasks"
		for i, row := range []struct {
			method, path, body, name, value string
			want                            string // severity, method, route, status
			trace                           string
		}{
			{"POST", tasks, `{"title": "hunter2", "description": "hunter2"}`, "X-Cloud-Trace-Context", trace + "/1;o=1", "INFO POST /api/{user_id}/tasks 201", trace},
			{"GET", tasks, "", "X-Cloud-Trace-Context", trace, "INFO GET /api/{user_id}/tasks 200", trace},
			{"GET", tasks + "?title=hunter2&limit=1", "", "Traceparent", parent, "INFO GET /api/{user_id}/tasks 200", trace},
			{"GET", tasks + "?limit=hunter2", "", "Traceparent", "hunter2", "INFO GET /api/{user_id}/tasks 422", ""},
			{"GET", tasks + "?hunter2=%zz", "", "X-Cloud-Trace-Context", "hunter2/1", "INFO GET /api/{user_id}/tasks 422", ""},
			{"GET", tasks + "/hunter2", "", "X", "", "INFO GET /api/{user_id}/tasks/{id} 404", ""},
			{"DELETE", tasks + "/9223372036854775807", "", "X", "", "INFO DELETE /api/{user_id}/tasks/{id} 404", ""},
			{"PATCH", tasks + "/1/complete", `{"completed": "hunter2"}`, "X", "", "INFO PATCH /api/{user_id}/tasks/{id}/complete 422", ""},
			{"POST", tasks, `{"title": "hunter2`, "X", "", "INFO POST /api/{user_id}/tasks 400", ""},
			{"POST", tasks, `{"title": hunter2}`, "X", "", "INFO POST /api/{user_id}/tasks 400", ""},
			{"POST", tasks, `{"title": "hunter2\ud800"}`, "X", "", "INFO POST /api/{user_id}/tasks 400", ""},
			{"POST", tasks, `"hunter2"`, "X", "", "INFO POST /api/{user_id}/tasks 400", ""},
			{"POST", tasks, `{"title": "hunter2\u0000"}`, "X", "", "INFO POST /api/{user_id}/tasks 422", ""},
			{"POST", tasks, `{"title": "hunter2"}`, "Content-Type", "text/hunter2", "INFO POST /api/{user_id}/tasks 415", ""},
			{"POST", tasks, strings.Repeat("hunter2", 10000), "X", "", "INFO POST /api/{user_id}/tasks 413", ""},
			{"GET", tasks, "", "Authorization", "Bearer hunter2", "INFO GET /api/{user_id}/tasks 401", ""},
			{"GET", tasks, "", "Authorization", c.authorization + "hunter2", "INFO GET /api/{user_id}/tasks 401", ""},
			{"GET", tasks, "", "Authorization", "Bearer h.hunter2.h", "INFO GET /api/{user_id}/tasks 401", ""},
			{"GET", "/api/somebody/tasks", "", "X", "", "INFO GET /api/{user_id}/tasks 403", ""},
			{"GET", "/hunter2?access_token=hunter2", "", "X", "", "INFO GET / 404", ""},
			{"TRACE", "/health/live", "", "X", "", "INFO other /health/live 405", ""},
			{strings.Repeat("M", 8<<10), "/health/live", "", "X", "", "INFO other /health/live 405", ""},
		} {
			id := fmt.Sprintf("row-%d", i)
			a := c.send(row.method, row.path, row.body, "X-Request-Id", id, row.name, row.value)
			if p == quiet {
				continue
			}
			line := p.request(id)
			got := fmt.Sprint(line["severity"], " ", line["method"], " ", line["route"], " ", line["status"])
			duration, _ := line["duration_us"].(float64)
			if got != row.want || line["bytes"] != float64(len(a.body)) || duration <= 0 || duration > 20e6 {
				t.Errorf("%s %s %s is logged as %v, want %s and %d bytes", row.method, row.path, row.body, line, row.want, len(a.body))
			}
			wantTrace := row.trace
			if wantTrace != "" && p == project {
				wantTrace = "projects/some-project/traces/" + row.trace
			}
			if got, _ := line["logging.googleapis.com/trace"].(string); got != wantTrace {
				t.Errorf("%s: %s is logged with trace %q, want %q", row.name, row.value, got, wantTrace)
			}
		}

		p.signal(syscall.SIGTERM)
		if status := p.wait(stopLimit); status != 0 {
			t.Errorf("exit status %d, want 0", status)
		}
		output := p.output.String()
		secrets := []string{"hunter2", testSecret, strings.TrimPrefix(c.authorization, "Bearer ")}
		if u, err := url.Parse(os.Getenv("DATABASE_URL")); err == nil && u.User != nil {
			if password, ok := u.User.Password(); ok {
				secrets = append(secrets, password)
			}
		}
		for _, secret := range secrets {
			if strings.Contains(output, secret) {
				t.Errorf("the log shows %q: %s", secret, output)
			}
		}
		for _, line := range p.output.lines(t) {
			at, _ := line["time"].(string)
			severity, _ := line["severity"].(string)
			message, _ := line["message"].(string)
			if _, err := time.Parse(time.RFC3339, at); err != nil || message == "" || !slices.Contains([]string{"DEBUG", "INFO", "WARNING", "ERROR"}, severity) {
				t.Errorf("log line %v, want time, severity and message", line)
			}
		}
		if p == quiet && output != "" {
			t.Errorf("LOG_LEVEL=error logs %s, want nothing", output)
		}
	}
}

// lacking says what an answer at path lacks of the headers that all have.
func lacking(a answer, path string) string {
	switch h := a.header; {
	case h.Get("X-Request-Id") == "":
		return "X-Request-Id"
	case h.Get("X-Content-Type-Options") != "nosniff":
		return "X-Content-Type-Options: nosniff"
	case strings.HasPrefix(path, "/api/") && h.Get("Cache-Control") != "no-store":
		return "Cache-Control: no-store"
	case a.status != 204 && h.Get("Content-Type") != "application/json":
		return "Content-Type: application/json"
	}
	return ""
}

func TestPathsAndMethods(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	c.authorization = "" // the router's answers come before the token's
	const list, one, complete, health = "GET, HEAD, POST", "DELETE, GET, HEAD, PATCH, PUT", "PATCH", "GET, HEAD"
	for _, row := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/", 404, ""},
		{"GET", "/api", 404, ""},
		{"GET", "/api/", 404, ""},
		{"GET", "/api/u", 404, ""},
		{"GET", "/api/u/tasks/", 404, ""},
		{"POST", "/api/u/tasks/", 404, ""},
		{"OPTIONS", "/api/u/tasks/", 404, ""},
		{"GET", "/api/u/tasks/1/", 404, ""},
		{"DELETE", "/api/u/tasks/1/", 404, ""},
		{"PATCH", "/api/u/tasks/1/complete/", 404, ""},
		{"PATCH", "/api/u/tasks/1/finish", 404, ""},
		{"GET", "/API/u/tasks", 404, ""},
		{"GET", "/api/u/todos", 404, ""},
		{"GET", "/health", 404, ""},
		{"GET", "/health/live/", 404, ""},
		{"BREW", "/coffee", 404, ""},
		{"PUT", "/api/u/tasks", 405, list},
		{"PATCH", "/api/u/tasks", 405, list},
		{"DELETE", "/api/u/tasks", 405, list},
		{"OPTIONS", "/api/u/tasks", 405, list},
		{"TRACE", "/api/u/tasks", 405, list},
		{"BREW", "/api/u/tasks", 405, list},
		{"POST", "/api/u/tasks/1", 405, one},
		{"OPTIONS", "/api/u/tasks/1", 405, one},
		{"POST", "/api/u/tasks/x", 405, one},
		{"GET", "/api/u/tasks/1/complete", 405, complete},
		{"HEAD", "/api/u/tasks/1/complete", 405, complete},
		{"POST", "/api/u/tasks/1/complete", 405, complete},
		{"PUT", "/api/u/tasks/1/complete", 405, complete},
		{"POST", "/health/live", 405, health},
		{"OPTIONS", "/health/ready", 405, health},
		{"GET", "/api/u/tasks", 401, ""},
		{"PATCH", "/api/u/tasks/1/complete", 401, ""},
	} {
		a := c.send(row.method, row.path, "")
		if got := a.header.Get("Allow"); a.status != row.status || got != row.allow || row.method != "HEAD" && detail(t, a) == "" {
			t.Errorf("%s %s = %d, Allow %q, %s, want %d, Allow %q and a detail", row.method, row.path, a.status, got, a.body, row.status, row.allow)
		}
		if missing := lacking(a, row.path); missing != "" {
			t.Errorf("%s %s = %v, without %s", row.method, row.path, a.header, missing)
		}
	}
}

func TestHeadIsGetWithoutBody(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("head")
	c.create("more")
	tasks := "/api/" + c.user + "/tasks"
	for _, path := range []string{tasks, tasks + "?limit=1&total=true", fmt.Sprintf("%s/%d", tasks, task.ID), tasks + "/0",
		tasks + "?limit=0", "/api/u/tasks", "/nothing", "/health/live", "/health/ready"} {
		get, head := c.send("GET", path, ""), c.send("HEAD", path, "")
		for _, a := range []answer{get, head} {
			a.header.Del("Date")
			a.header.Del("X-Request-Id")
		}
		if head.status != get.status || fmt.Sprint(head.header) != fmt.Sprint(get.header) || head.body != "" ||
			head.header.Get("Content-Length") != strconv.Itoa(len(get.body)) {
			t.Errorf("HEAD %s = %d %v %q, want as GET: %d %v and no body", path, head.status, head.header, head.body, get.status, get.header)
		}
	}
}

func TestCommonHeaders(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("headers")
	for _, row := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "", "", 200},
		{"POST", "", `{"title": "x"}`, 201},
		{"GET", "/0", "", 404},
		{"POST", "", `{}`, 422},
		{"POST", "", `[]`, 400},
		{"POST", "", strings.Repeat(" ", maxBody+1), 413},
		{"DELETE", fmt.Sprintf("/%d", task.ID), "", 204},
	} {
		a := c.do(row.method, row.path, row.body)
		if missing := lacking(a, "/api/"); a.status != row.status || missing != "" {
			t.Errorf("%s %q %.20s = %d %v, lacking %q, want %d", row.method, row.path, row.body, a.status, a.header, missing, row.status)
		}
	}
	if a := c.send("GET", "/api/somebody/tasks", ""); a.status != 403 || lacking(a, "/api/") != "" {
		t.Errorf("another user's list = %d %v, lacking %q, want 403", a.status, a.header, lacking(a, "/api/"))
	}
	for _, path := range []string{"/health/live", "/health/ready"} {
		if a := c.send("GET", path, ""); a.status != 200 || lacking(a, path) != "" {
			t.Errorf("GET %s = %d %v, lacking %q, want 200", path, a.status, a.header, lacking(a, path))
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	seen := map[string]bool{}
	for _, row := range []struct {
		id   string
		kept bool
	}{
		{"1", true},
		{"0b9e7a6c-3f53-4a4b-9a5c-0d2f3f6b8e11", true},
		{"Root=1-67891233-abcdef012345678912345678", true},
		{strings.Repeat("x", 128), true},
		{"", false},
		{strings.Repeat("x", 10000), false},
		{"two words", false},
		{`quo"te`, false},
		{"{}", false},
		{"<script>", false},
		{"tab\tbed", false},
		{"zwölf", false},
		{"\xff", false},
	} {
		got := c.send("GET", "/health/live", "", "X-Request-Id", row.id).header.Get("X-Request-Id")
		if (got == row.id) != row.kept || got == "" || len(got) > 128 || seen[got] {
			t.Errorf("X-Request-Id %q is answered with %q, want kept: %t", row.id, got, row.kept)
		}
		seen[got] = true
	}
}

func TestBodySize(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	const limit = 65536
	body := func(size int) string { return fmt.Sprintf("%-*s", size, `{"title": "padded"}`) }
	for _, row := range []struct {
		size   int
		status int
	}{{limit, 201}, {limit + 1, 413}, {10 * limit, 413}} {
		if a := c.do("POST", "", body(row.size)); a.status != row.status {
			t.Errorf("POST of %d bytes = %d %s, want %d", row.size, a.status, a.body, row.status)
		}
		chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", row.size, body(row.size))
		if row.status == 413 { // it is refused although it does not end
			chunked = fmt.Sprintf("%x\r\n%s", 1<<30, body(row.size))
		}
		a := readAnswer(t, raw(t, c.service, c.post(chunked, "Transfer-Encoding: chunked")))
		if a.status != row.status {
			t.Errorf("chunked POST of %d bytes = %d %s, want %d", row.size, a.status, a.body, row.status)
		}
	}
	for _, header := range []string{"Content-Length: 65537", "Content-Length: 1099511627776", "Content-Length: 65537\r\nExpect: 100-continue",
		"Content-Length: 65537\r\nContent-Type: text/plain"} {
		start := time.Now()
		a := readAnswer(t, raw(t, c.service, c.post("", header)))
		if took := time.Since(start); a.status != 413 || detail(t, a) == "" || took > 5*time.Second {
			t.Errorf("%q without a byte of it = %d %s after %v, want 413 at once", header, a.status, a.body, took)
		}
	}
	if got := len(decode[[]wireTask](t, c.do("GET", "", "").body)); got != 2 {
		t.Errorf("%d tasks were created, want the 2 with bodies within the limit", got)
	}
}

func TestContentType(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("typed")
	for _, row := range []struct {
		contentType string
		status      int
	}{
		{"", 201},
		{"application/json", 201},
		{"application/json; charset=utf-8", 201},
		{"Application/JSON;charset=UTF-8", 201},
		{"application/merge-patch+json", 201},
		{"application/vnd.api+json; version=1", 201},
		{"text/plain", 415},
		{"text/plain;charset=UTF-8", 415}, // what fetch says of a string
		{"text/json", 415},
		{"application/x-www-form-urlencoded", 415},
		{"multipart/form-data; boundary=x", 415},
		{"application/octet-stream", 415},
		{"application/jsonp", 415},
		{"application/json-seq", 415},
		{"json", 415},
		{"*/*", 415},
		{";", 415},
	} {
		a := c.do("POST", "", `{"title": "x"}`, "Content-Type", row.contentType)
		if a.status != row.status || row.status == 415 && detail(t, a) == "" {
			t.Errorf("POST with Content-Type %q = %d %s, want %d", row.contentType, a.status, a.body, row.status)
		}
	}
	path := fmt.Sprintf("/%d/complete", task.ID)
	if a := c.do("PATCH", path, "", "Content-Type", "text/plain"); a.status != 200 {
		t.Errorf("PATCH with a Content-Type and no body = %d %s, want 200", a.status, a.body)
	}
	body := c.post(`{"title": "x"}`, "Content-Length: 14", "Connection: close") // no Content-Type at all
	if a := readAnswer(t, raw(t, c.service, body)); a.status != 201 {
		t.Errorf("POST without a Content-Type = %d %s, want 201", a.status, a.body)
	}
}

func TestCutBody(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for name, text := range map[string]string{
		"a short body":            c.post(`{"title": "x"}`, "Content-Length: 15"),
		"no body":                 c.post("", "Content-Length: 15"),
		"a short chunk":           c.post("20\r\n{\"title\": \"x\"}", "Transfer-Encoding: chunked"),
		"no last chunk":           c.post("e\r\n{\"title\": \"x\"}\r\n", "Transfer-Encoding: chunked"),
		"a chunk without length":  c.post("zz\r\n{\"title\": \"x\"}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
		"a chunk longer than due": c.post("2\r\n{\"title\": \"x\"}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
	} {
		conn := raw(t, c.service, text)
		conn.(*net.TCPConn).CloseWrite()
		if a := readAnswer(t, conn); a.status != 400 || detail(t, a) == "" || !closed(conn) {
			t.Errorf("%s = %d %s, want 400 and the connection closed", name, a.status, a.body)
		}
	}
	if a := c.do("GET", "", ""); strings.TrimSpace(a.body) != "[]" {
		t.Errorf("cut bodies created %s, want nothing", a.body)
	}
}

// What the server's own limits do shows only on the process.
func TestLargeHeadersAndSlowClients(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	c := newClientOf(t, p.url, "test-"+rand.Text())
	start := time.Now()
	within := func(limit time.Duration) bool { return time.Since(start) < limit }
	silent := raw(t, p.url, "GET /health/live HTTP/1.1\r\nHost: to")
	stalled := raw(t, p.url, c.post(`{"title":`, "Content-Length: 65536"))
	trickling := raw(t, p.url, c.post(`{"title":`, "Content-Length: 65536"))
	var trickle sync.WaitGroup
	defer trickle.Wait()
	trickle.Go(func() {
		for {
			if _, err := io.WriteString(trickling, " "); err != nil {
				return // cut
			}
			time.Sleep(100 * time.Millisecond) // the pace, no wait for anything
		}
	})

	for _, row := range []struct{ size, status int }{{15 << 10, 200}, {16<<10 + 1, 431}, {1 << 20, 431}} {
		head := "GET /health/live HTTP/1.1\r\nHost: todo\r\nX-Large: "
		const end = "\r\n\r\n"
		conn := raw(t, p.url, "")
		// What is over the limit may be cut before all of it is written.
		go io.WriteString(conn, head+strings.Repeat("x", row.size-len(head)-len(end))+end)
		if a := readAnswer(t, conn); a.status != row.status {
			t.Errorf("headers of %d bytes = %d %s, want %d", row.size, a.status, a.body, row.status)
		}
	}

	if text, err := io.ReadAll(silent); strings.Contains(string(text), " 200 ") || errors.Is(err, os.ErrDeadlineExceeded) || !within(9*time.Second) {
		t.Errorf("unfinished headers: %q, %v after %v, want the connection cut after 4 s", text, err, time.Since(start))
	}
	for name, conn := range map[string]net.Conn{"stalls": stalled, "trickles": trickling} {
		a := readAnswer(t, conn)
		if a.status != 408 && a.status != 400 || detail(t, a) == "" || !closed(conn) || !within(19*time.Second) {
			t.Errorf("a body that %s = %d %s after %v, want 408 or 400 within 20 s and the connection closed", name, a.status, a.body, time.Since(start))
		}
		conn.Close()
	}
	if a := c.do("GET", "", ""); a.status != 200 || strings.TrimSpace(a.body) != "[]" {
		t.Errorf("list afterwards = %d %s, want 200 []", a.status, a.body)
	}
}

func TestPanicAndUnknownError(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	s := newServer(sharedAuth, sharedDB, newLogger(&log, slog.LevelInfo), nil, "")
	var nothing *task
	s.mux.HandleFunc("GET /panic", s.handle(func(context.Context, http.ResponseWriter, *http.Request) error { panic("boom hunter") }))
	s.mux.HandleFunc("GET /nil", s.handle(func(context.Context, http.ResponseWriter, *http.Request) error { return errors.New(nothing.Title) }))
	s.mux.HandleFunc("GET /error", s.handle(func(context.Context, http.ResponseWriter, *http.Request) error {
		return fmt.Errorf("make it: %w", errors.New("boom hunter"))
	}))
	service := httptest.NewServer(s)
	defer service.Close()
	c := newClientOf(t, service.URL, "test-"+rand.Text())
	for _, row := range []struct{ path, cause string }{{"/panic", "boom hunter"}, {"/nil", "nil pointer"}, {"/error", "make it: boom hunter"}} {
		// Not through the client, which holds answers to openapi.json.
		a := readAnswer(t, raw(t, service.URL, "GET "+row.path+" HTTP/1.1\r\nHost: todo\r\nX-Request-Id: failing"+row.path+"\r\n\r\n"))
		if text := detail(t, a); a.status != 500 || text == "" || strings.Contains(text, "boom") || strings.Contains(text, "nil") ||
			strings.Contains(text, ".go") || lacking(a, row.path) != "" {
			t.Errorf("GET %s = %d %v %s, want a bare 500", row.path, a.status, a.header, a.body)
		}
		lines := log.lines(t)
		last := lines[len(lines)-1]
		if cause, _ := last["error"].(string); last["request_id"] != "failing"+row.path || last["severity"] != "ERROR" || !strings.Contains(cause, row.cause) ||
			row.path != "/error" && !strings.Contains(cause, "main_test.go:") {
			t.Errorf("GET %s is logged as %v, want severity ERROR, the cause and where it was", row.path, last)
		}
	}
	if a := c.do("GET", "", ""); a.status != 200 {
		t.Errorf("list after a panic = %d %s, want 200", a.status, a.body)
	}
}
