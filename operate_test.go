package main

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Each request has one line in the log, with its fields. No line is long or contains a secret, no
// matter what a client sends.
func TestLog(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "GOOGLE_CLOUD_PROJECT=project", "LOG_LEVEL=debug", "CORS_ORIGINS=http://a")
	c := p.newClient()
	const id, trace = "0aZ._:/+=-", "105445aa7843bc8bf206b12000100000"
	long := func(text string) string { return strings.Repeat(text, 9<<10/len(text)) }
	list := c.path("")
	for i, row := range []struct{ request, header, body, want string }{
		{"POST " + list, "", `{"title": "hunter2", "description": "hunter2"}`, "POST /tasks 201"},
		{"GET " + list + "?title=hunter2", "X-Request-Id: " + id, "", "GET /tasks 200"},
		{"GET " + list + "?hunter2=%zz", "", "", "GET /tasks 422"},
		{"GET " + list + "/hunter2", `X-Request-Id: hunter2"`, "", "GET /tasks/{id} 404"},
		{"POST " + list, "", `{"title": "hunter2`, "POST /tasks 400"},
		{"POST " + list, "", `{"title": "hunter2\u0000"}`, "POST /tasks 422"},
		{"GET " + list, "Authorization: Bearer h.hunter2.h", "", "GET /tasks 401"},
		{"GET " + list, "Authorization: " + c.authorization + "hunter2", "", "GET /tasks 401"},
		{"GET /api/hunter2/tasks", "", "", "GET /tasks 403"},
		{"GET /?access_token=hunter2", "Traceparent: " + long("ab"), "", "GET / 404"},
		{"TRACE /docs", "Traceparent: 00-" + trace + "-b7ad6b7169203331-01", "", "other /docs 405"},
		{"GET /docs", "X-Cloud-Trace-Context: " + trace + "/1;o=1", "", "GET /docs 200"},
		{"GET /docs", "X-Request-Id: " + long("id"), "", "GET /docs 200"},
		{long("METHOD") + " /docs", "", "", "other /docs 405"},
		{"GET /" + long("path"), "Origin: " + long(`"\`), "", "GET / 404"},
	} {
		method, path, _ := strings.Cut(row.request, " ")
		name, value, _ := strings.Cut(row.header, ": ")
		a := c.send(method, path, row.body, cmp.Or(name, "X-Nothing"), value)
		sent := a.header.Get("X-Request-Id")
		if name == "X-Request-Id" && (sent == value) != (value == id) {
			t.Errorf("X-Request-Id: %.40s is answered with %s", value, sent)
		}
		line := p.output.request(t, sent)
		route := strings.TrimPrefix(fmt.Sprint(line["route"]), "/api/{user_id}")
		got := fmt.Sprint(line["method"], " ", route, " ", line["status"])
		if got != row.want || line["bytes"] != float64(len(a.body)) {
			t.Errorf("row %d is logged as %v, want %s and %d bytes", i, line, row.want, len(a.body))
		}
		took, db := line["duration_us"].(float64), line["db_us"].(float64)
		if line["db_wait_us"].(float64) > db || db > took || a.status == 201 && db == 0 {
			t.Errorf("row %d is logged as %v, want db_wait_us <= db_us <= duration_us", i, line)
		}
		traced := line["logging.googleapis.com/trace"] == "projects/project/traces/"+trace
		if (line["error"] != nil) != (a.status >= 400) || traced != strings.Contains(value, trace) {
			t.Errorf("row %d is logged as %v, want its error and the trace in %q", i, line, row.header)
		}
	}
	form := regexp.MustCompile(`^{"time":"2[^"]+","severity":"(DEBUG|INFO|WARNING)","message":.+}\n$`)
	for line := range strings.Lines(p.output.String()) {
		if len(line) > 8<<10 || !form.MatchString(line) {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
	password := cmp.Or(sharedDB.pool.Config().ConnConfig.Password, testSecret)
	for _, secret := range []string{"hunter2", testSecret, password, c.authorization[7:]} {
		if strings.Contains(p.output.String(), secret) {
			t.Errorf("the log contains %q", secret)
		}
	}
}

// Slow statements are logged at WARNING, all of them at DEBUG: with SQL and request id, without
// arguments. A failed one has its SQLSTATE, and its cause is in the log only.
func TestStatementLog(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t)))
	sqlExec(t, d.pool, `
		CREATE FUNCTION public.act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.completed THEN PERFORM pg_sleep(1.1); END IF;
			IF NEW.description = 'fail' THEN RAISE '%', repeat('cause', 5000); END IF;
			RETURN NEW; END $$;
		CREATE TRIGGER act BEFORE INSERT ON public.tasks FOR EACH ROW EXECUTE FUNCTION public.act()`)
	for _, level := range []string{"debug", "info", "warn"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "DATABASE_URL="+d.pool.Config().ConnString(), "LOG_LEVEL="+level)
			p.waitLive()
			c := newClientOf(t, p.url, "argument-"+rand.Text())
			c.do("GET", "", "", "X-Request-Id", "list")
			c.do("POST", "", `{"title": "argument", "completed": true}`, "X-Request-Id", "slow")
			a := c.do("POST", "", `{"title": "argument", "description": "fail"}`, "X-Request-Id", "fail")
			cause, _ := p.output.request(t, "fail")["error"].(string)
			if !strings.HasPrefix(cause, "ERROR: cause") || len(cause) > 8<<10-500 || a.status != 500 {
				t.Errorf("a failed statement is answered %v, and the log has the error %s", a, cause)
			}
			got := map[string]bool{}
			for _, line := range p.output.lines(t) {
				took, _ := line["duration_us"].(float64)
				if strings.Contains(fmt.Sprint(line["sql"]), "public.tasks") && took > 0 {
					got[fmt.Sprintln(line["severity"], line["request_id"], line["rows"], line["sqlstate"])] = true
				}
			}
			want := map[string]bool{"WARNING slow 1 <nil>\n": true}
			if level == "debug" {
				want["DEBUG list 0 <nil>\n"], want["DEBUG fail 0 P0001\n"] = true, true
			}
			if fmt.Sprint(got) != fmt.Sprint(want) || strings.Contains(p.output.String(), "argument") {
				t.Errorf("the log is %s, want %v and no argument", p.output.String(), want)
			}
		})
	}
}

// The service goes on when the reader of its log ends.
func TestLogReaderEnds(t *testing.T) {
	t.Parallel()
	testDB(t)
	p := startProgram(t, "bash", []string{"-c", `exec "$0" > >(read)`, os.Args[0]})
	c := p.newClient()
	c.list("")
}

// METRICS_PORT serves the metrics, the public port does not. A page costs no query.
func TestMetrics(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := startProcess(t, "METRICS_PORT="+port, "DATABASE_URL="+withParam(os.Getenv("DATABASE_URL"),
		"default_query_exec_mode=exec&pool_max_conns=7")) // exec: no statement is sent twice
	c := p.newClient()
	for i := range 3 {
		c.create("counted")
		c.do("GET", "/0", "")
		c.send(fmt.Sprint("BREW", i), "/docs", "")
	}
	get := func(port, request string) answer {
		return readAnswer(t, dialRaw(t, "http://127.0.0.1:"+port, request+" HTTP/1.0\r\n\r\n"))
	}
	if a, b := get(port, "POST /metrics"), get(port, "GET /docs"); a.status+b.status != 405+404 {
		t.Errorf("POST /metrics = %v, GET /docs = %v, want 405 and 404", a, b)
	}
	if a := c.send("GET", "/metrics", ""); a.status != 404 {
		t.Errorf("GET /metrics on the public port = %v, want 404", a)
	}
	page := get(port, "GET /metrics").body
	for name, want := range map[string]float64{ // -1: any number above 0
		`todo_http_requests_total{route="/api/{user_id}/tasks",method="POST",status="201"}`:     3,
		`todo_http_requests_total{route="/api/{user_id}/tasks/{id}",method="GET",status="404"}`: 3,
		`todo_http_requests_total{route="/docs",method="other",status="405"}`:                   3,
		"todo_db_statements_total": 3, "todo_db_statement_seconds_total": -1,
		"todo_db_connections_acquired": 0, "todo_db_connections_idle": 1,
		"todo_db_connections_open": 1, "todo_db_connections_max": 7,
		"todo_db_acquires_total": -1, "todo_db_acquire_waits_total": -1,
		"todo_db_acquire_wait_seconds_total": -1, "todo_db_acquires_canceled_total": 0,
		"go_goroutines": -1, "go_memstats_heap_alloc_bytes": -1, "go_memstats_sys_bytes": -1,
	} {
		var value float64
		_, line, _ := strings.Cut(page, "\n"+name+" ")
		_, err := fmt.Sscan(line, &value)
		if err != nil || value != want && (want >= 0 || value <= 0) {
			t.Errorf("%s = %g %v, want %g", name, value, err, want)
		}
	}
	figures := regexp.MustCompile(`(?m)^todo_db.*`)
	again := get(port, "GET /metrics").body
	if fmt.Sprint(figures.FindAllString(page, -1)) != fmt.Sprint(figures.FindAllString(again, -1)) {
		t.Errorf("the page of the metrics uses the database: %s, then %s", page, again)
	}
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(page)
	if out, err := check.CombinedOutput(); len(out) > 0 { // nothing also if it is not installed
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// The health routes never use the database. /health/ready waits for the start only.
func TestHealth(t *testing.T) {
	t.Parallel()
	testDB(t)
	d, r := openOverRelay(t, os.Getenv("DATABASE_URL"))
	c := startService(t, d, settings{}).newClient()
	check := func(when string, ready int) {
		t.Helper()
		dials, trips := r.dials.Load(), r.trips.Load()
		live, a := c.send("GET", "/health/live", ""), c.send("GET", "/health/ready", "")
		if live.status != 200 || a.status != ready {
			t.Errorf("%s: live %v, ready %v, want 200 and %d", when, live, a, ready)
		}
		if r.dials.Load() != dials || r.trips.Load() != trips {
			t.Errorf("%s: the health routes use the database", when)
		}
	}
	check("before the start", 503)
	startDB(t, d)
	check("after the start", 200)
	r.down.Store(true)
	r.cut()
	check("in an outage", 200)
}

// A hundred costly requests of one user occupy a third of the pool. Those of others are served.
func TestFairness(t *testing.T) {
	t.Parallel()
	d, _ := startOverRelay(t)
	s := startService(t, d, settings{})
	greedy, other := s.newClient(), s.newClient()
	greedy.http = keepingConnections(t)
	ids := greedy.fill(100)
	tx := lockTasks(t, greedy.user)
	var next, rejected atomic.Int64
	done := inParallel(100, func() {
		start, path := time.Now(), greedy.path(fmt.Sprint("/", ids[next.Add(1)-1]))
		a, err := greedy.try("PATCH", path, `{"title": "changed"}`)
		late := time.Since(start) >= 5*time.Second
		if late && a.status == 429 && a.header.Get("Retry-After") != "" {
			rejected.Add(1)
			a, err = greedy.try("GET", greedy.path(""), "") // gets a slot once one is released
		}
		if a.status != 200 {
			t.Errorf("request of the greedy user = %v %v, want 200, or 429 after 5 s", a, err)
		}
	})
	waitBlocked(t, tx, 5)
	for range 50 { // without slots, the first one would wait for the lock's end
		other.list("")
	}
	eventually(t, "95 rejected requests", func() bool { return rejected.Load() == 95 })
	tx.Rollback(t.Context())
	<-done
}

// A request that has sent no statement ends when its client disconnects: it is logged and counted
// as 499, and frees its slot. The 429 comes also while the database is unreachable.
func TestDisconnectedBeforeTheStatement(t *testing.T) {
	t.Parallel()
	testDB(t)
	d := openDB(t, os.Getenv("DATABASE_URL"), func(c *pgxpool.Config) { c.MaxConns = 7 })
	s := startService(t, d, settings{}) // two slots; requests wait for the schema
	c := s.newClient()
	check := func(conn net.Conn, id string) {
		conn.Close()
		if line := s.log.request(t, id); line["status"] != 499.0 {
			t.Errorf("a request that waited for %s is logged as %v, want 499", id, line)
		}
	}
	var slots [2]net.Conn
	for i := range slots {
		slots[i] = dialRaw(t, s.url, c.rawCreate("", "Expect: 100-continue", "Content-Length: 14",
			fmt.Sprint("X-Request-Id: schema-", i)))
		// The interim response tells that the service reads the body, with a slot.
		if line, err := bufio.NewReader(slots[i]).ReadString('\n'); !strings.Contains(line, " 100 ") {
			t.Fatalf("interim response %q, %v, want 100", line, err)
		}
		io.WriteString(slots[i], `{"title": "x"}`)
	}
	check(dialRaw(t, s.url, c.rawCreate("", "X-Request-Id: slot")), "slot")
	check(slots[0], "schema-0")
	check(slots[1], "schema-1")
	page := httptest.NewRecorder()
	if s.serveMetrics(page, nil); !strings.Contains(page.Body.String(), `"POST",status="499"} 3`) {
		t.Errorf("the metrics are %s, want three POST with 499", page.Body)
	}
	statuses := make(chan int, 3) // two get the slots
	inParallel(3, func() {
		a, _ := c.try("GET", c.path(""), "")
		statuses <- a.status
	})
	first := <-statuses
	startDB(t, d)
	if second, third := <-statuses, <-statuses; first != 429 || second != 200 || third != 200 {
		t.Errorf("three requests = %d, %d and %d, want 429, 200, 200", first, second, third)
	}
}

// A request whose statement was sent is finished when its client disconnects. One that waits for
// the connection ends.
func TestDisconnectedAfterTheStatement(t *testing.T) {
	t.Parallel()
	testDB(t)
	d := openDB(t, os.Getenv("DATABASE_URL"), func(c *pgxpool.Config) { c.MaxConns = 1 })
	s := startService(t, startDB(t, d), settings{})
	c, other := s.newClient(), s.newClient()
	path := c.create("locked").path()
	tx := lockTasks(t, c.user)
	send := func(c *client, request, id string) net.Conn {
		text := c.rawCreate("", "X-Request-Id: "+id)
		return dialRaw(t, s.url, strings.Replace(text, "POST "+c.path(""), request, 1))
	}
	sent := send(c, "PATCH "+c.path(path+"/complete"), "sent")
	waitBlocked(t, tx, 1)
	sent.Close()
	send(other, "GET "+other.path(""), "waits").Close()
	if line := s.log.request(t, "waits"); line["status"] != 499.0 || line["db_wait_us"] == 0.0 {
		t.Errorf("a request that waited for a connection is logged as %v, want 499", line)
	}
	waitBlocked(t, tx, 1)
	tx.Rollback(t.Context())
	if line := s.log.request(t, "sent"); line["status"] != 200.0 {
		t.Errorf("a request whose statement was sent is logged as %v, want 200", line)
	}
	if a := c.do("GET", path, ""); !decode[wireTask](t, a.body).Completed {
		t.Errorf("the task is %v, want it completed", a)
	}
}

// The service occupies under 15 MiB, and under 128 MiB next to 400 connections that are slow or
// send thousands of short headers. Others are served.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	testDB(t)
	program, err := laterRelease("operate", "")() // without the tests' code
	if err != nil {
		t.Fatal(err)
	}
	p := startProgram(t, program, nil, "LOG_LEVEL=error")
	c, other := p.newClient(), p.newClient()
	memory := func(figure string) (kib int) { // 0 if the system does not tell
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
		_, value, _ := strings.Cut(string(status), figure+":")
		fmt.Sscan(value, &kib)
		t.Logf("%s %d KiB", figure, kib)
		return kib
	}
	if rss := memory("VmRSS"); rss >= 15<<10 {
		t.Errorf("%d KiB of memory when idle, want under 15 MiB", rss)
	}
	head := "POST " + c.path("") + " HTTP/1.1\r\nHost: todo\r\n"
	names := "" // just under 16 KiB
	for i := range 3000 {
		names += fmt.Sprintf("%x:\n", 256+i)
	}
	for range 10 {
		dialRaw(t, p.url, head+"X-Slow: ")
		dialRaw(t, p.url, c.rawCreate(`{"title":`, "Content-Length: 65536"))
	}
	done := inParallel(380, func() {
		for range 4 {
			conn := dialRaw(t, p.url, head+"Content-Length: 1000000\r\n"+names+"\r\n")
			io.Copy(io.Discard, conn)
		}
	})
	for range 30 {
		other.list("")
	}
	<-done
	if peak := memory("VmHWM"); peak >= 128<<10 {
		t.Errorf("%d KiB of memory next to hostile clients, want under 128 MiB", peak)
	}
}

const exitLimit = 9 * time.Second // of a shutdown; Cloud Run kills the process after 10 s

// Without requests the service exits within 2 s of a signal, and closes its connections until then.
// A second signal ends it at once.
func TestSignals(t *testing.T) {
	t.Parallel()
	p, impatient := startProcess(t), startProcess(t)
	p.waitReady()
	impatient.waitReady()
	p.signal(syscall.SIGINT)
	if status := p.wait(2 * time.Second); status != 0 {
		t.Errorf("exit status %d, want 0: %s", status, p.output.String())
	}
	impatient.signal(syscall.SIGTERM)
	eventually(t, "response with Connection: close", func() bool {
		res, err := http.Get(impatient.url + "/health/live")
		return err == nil && res.Body.Close() == nil && res.Close
	})
	impatient.signal(syscall.SIGTERM)
	if status := impatient.wait(exitLimit); status != -1 {
		t.Errorf("exit status %d after a second signal, want -1: that of the signal", status)
	}
}

// A statement that still runs 7 s after the signal is canceled on the server and answered 503.
func TestShutdownCancelsStatements(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	c := p.newClient()
	path := c.path(c.create("locked").path())
	tx := lockTasks(t, c.user)
	var a answer
	var took time.Duration
	answered := inParallel(1, func() {
		start := time.Now()
		a, _ = c.try("PATCH", path, `{"title": "changed"}`)
		took = time.Since(start)
	})
	waitBlocked(t, tx, 1)
	p.signal(syscall.SIGTERM)
	if status := p.wait(exitLimit); status != 0 {
		t.Errorf("exit status %d, want 0: %s", status, p.output.String())
	}
	if <-answered; a.status != 503 || took < 7*time.Second {
		t.Errorf("blocked change = %v after %v, want 503 7 s after the signal", a, took)
	}
	waitBlocked(t, tx, 0)
}

// No request is lost while a router goes on sending for 5 s after the signal. A client that never
// stops does not delay the exit.
func TestShutdownLosesNoRequest(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "LOG_LEVEL=warn")
	c, endless := p.newClient(), p.newClient()
	c.http = keepingConnections(t)
	var created atomic.Int64
	var end atomic.Pointer[time.Time]
	router := inParallel(8, func() {
		for e := end.Load(); e == nil || time.Now().Before(*e); e = end.Load() {
			a, err := c.try("POST", c.path(""), `{"title": "x"}`)
			if err != nil || a.status != 201 {
				t.Errorf("create = %v %v, want 201", a, err)
				return
			}
			created.Add(1)
		}
	})
	rest := inParallel(1, func() {
		for err := error(nil); err == nil; {
			_, err = endless.try("GET", "/health/live", "")
		}
	})
	eventually(t, "load", func() bool { return created.Load() > 100 })
	end.Store(new(time.Now().Add(5 * time.Second)))
	p.signal(syscall.SIGTERM)
	if status := p.wait(exitLimit); status != 0 {
		t.Errorf("exit status %d, want 0: %s", status, p.output.String())
	}
	<-router
	<-rest
	stored := sqlValue[int64](t, sharedDB.pool,
		`SELECT count(*) FROM public.tasks WHERE user_id = $1`, c.user)
	if n := created.Load(); stored != n {
		t.Errorf("%d tasks of %d creates that were acknowledged", stored, n)
	}
}
