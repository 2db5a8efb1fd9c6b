package main

import (
	"crypto/rand"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The log: one JSON object per line, one line per request, nothing secret.

func TestLog(t *testing.T) {
	t.Parallel()
	const trace = "105445aa7843bc8bf206b12000100000"
	const parent = "00-" + trace + "-b7ad6b7169203331-01"
	p := startProcess(t, "GOOGLE_CLOUD_PROJECT=some-project", "LOG_LEVEL=debug")
	quiet := startProcess(t, "LOG_LEVEL=error")
	c := p.newClient()
	tasks := c.path("")
	const list, one = "/api/{user_id}/tasks", "/api/{user_id}/tasks/{id}"
	for i, row := range []struct {
		method, path, body string
		header, value      string
		want               string // severity, method, route and status
	}{
		{"POST", tasks, `{"title": "hunter2", "description": "hunter2"}`, "X", "", "INFO POST " + list +
			" 201"},
		{"GET", tasks + "?title=hunter2&limit=1", "", "X", "", "INFO GET " + list + " 200"},
		{"GET", tasks + "?limit=hunter2", "", "Traceparent", "hunter2", "INFO GET " + list + " 422"},
		{"GET", tasks + "?hunter2=%zz", "", "X-Cloud-Trace-Context", "hunter2/1", "INFO GET " + list +
			" 422"},
		{"GET", tasks + "/hunter2", "", "X", "", "INFO GET " + one + " 404"},
		{"DELETE", tasks + noTask, "", "X", "", "INFO DELETE " + one + " 404"},
		{"PATCH", tasks + "/1/complete", `{"completed": "hunter2"}`, "X", "", "INFO PATCH " + one +
			"/complete 422"},
		{"POST", tasks, `{"title": "hunter2`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `{"title": hunter2}`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `{"title": "hunter2\ud800"}`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `"hunter2"`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `{"title": "hunter2\u0000"}`, "X", "", "INFO POST " + list + " 422"},
		{"POST", tasks, `{"title": "hunter2"}`, "Content-Type", "text/hunter2", "INFO POST " + list +
			" 415"},
		{"POST", tasks, strings.Repeat("hunter2", 10000), "X", "", "INFO POST " + list + " 413"},
		{"GET", tasks, "", "Authorization", "Bearer hunter2", "INFO GET " + list + " 401"},
		{"GET", tasks, "", "Authorization", c.authorization + "hunter2", "INFO GET " + list + " 401"},
		{"GET", tasks, "", "Authorization", "Bearer h.hunter2.h", "INFO GET " + list + " 401"},
		{"GET", "/api/u/tasks", "", "X", "", "INFO GET " + list + " 403"},
		{"GET", "/hunter2?access_token=hunter2", "", "X", "", "INFO GET / 404"},
		{"TRACE", "/health/live", "", "X", "", "INFO other /health/live 405"},
		{strings.Repeat("M", 8<<10), "/health/live", "", "X", "", "INFO other /health/live 405"},
	} {
		id := fmt.Sprint("row-", i)
		a := c.send(row.method, row.path, row.body, "X-Request-Id", id, row.header, row.value)
		line := p.output.request(t, id)
		got := fmt.Sprint(line["severity"], " ", line["method"], " ", line["route"], " ", line["status"])
		if got != row.want || line["bytes"] != float64(len(a.body)) {
			t.Errorf("%.20s %s %.40s is logged as %v, want %s and %d bytes",
				row.method, row.path, row.body, line,
				row.want, len(a.body))
		}
		if us, _ := line["duration_us"].(float64); us <= 0 || us > 20e6 {
			t.Errorf("%.20s %s is logged with the duration %v", row.method, row.path, line["duration_us"])
		}
		if line["logging.googleapis.com/trace"] != nil {
			t.Errorf("%.20s %s is logged with the trace %v",
				row.method, row.path, line["logging.googleapis.com/trace"])
		}
	}

	local := startService(t, sharedDB, settings{}) // without a project
	for i, row := range []struct{ header, value string }{
		{"X-Cloud-Trace-Context", trace + "/1;o=1"}, {"X-Cloud-Trace-Context", trace},
		{"Traceparent", parent},
	} {
		id := fmt.Sprint("trace-", i)
		for service, want := range map[string]string{p.url: "projects/some-project/traces/" + trace,
			local.url: trace} {
			newClientOf(t, service, c.user).do("GET", "", "", "X-Request-Id", id, row.header, row.value)
			log := &local.log
			if service == p.url {
				log = &p.output
			}
			if got := log.request(t, id)["logging.googleapis.com/trace"]; got != want {
				t.Errorf("%s: %s is logged with the trace %v, want %s", row.header, row.value, got, want)
			}
		}
	}

	p.signal(syscall.SIGTERM)
	if status := p.wait(shutdownLimit); status != 0 {
		t.Errorf("exit status %d, want 0", status)
	}
	for _, line := range p.output.lines(t) {
		at, _ := line["time"].(string)
		if _, err := time.Parse(time.RFC3339, at); err != nil || line["message"] == "" {
			t.Errorf("log line %v, want a time and a message", line)
		}
		severities := []any{"DEBUG", "INFO", "WARNING", "ERROR"}
		if !slices.Contains(severities, line["severity"]) {
			t.Errorf("log line %v, want a severity of %v", line, severities)
		}
	}
	secrets := []string{"hunter2", testSecret, strings.TrimPrefix(c.authorization, "Bearer ")}
	if u, err := url.Parse(os.Getenv("DATABASE_URL")); err == nil && u.User != nil {
		if password, ok := u.User.Password(); ok {
			secrets = append(secrets, password)
		}
	}
	for _, secret := range secrets {
		if output := p.output.String(); strings.Contains(output, secret) {
			t.Errorf("the log contains %q: %s", secret, output)
		}
	}

	quiet.newClient().create("hunter2")
	quiet.signal(syscall.SIGTERM)
	if status := quiet.wait(shutdownLimit); status != 0 || quiet.output.String() != "" {
		t.Errorf("LOG_LEVEL=error: exit status %d, log %s, want 0 and nothing",
			status, quiet.output.String())
	}
}

func TestStatementLog(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"debug", "info", "warn"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			d := startDB(t, openDB(t, createDatabase(t)))
			sqlExec(t, d.pool, `
				CREATE FUNCTION public.act() RETURNS trigger LANGUAGE plpgsql AS $$
				BEGIN
					IF NEW.completed THEN PERFORM pg_sleep(1.2); END IF;
					IF NEW.description = 'fail' THEN RAISE 'as the test requires'; END IF;
					RETURN NEW;
				END $$;
				CREATE TRIGGER act BEFORE INSERT ON public.tasks FOR EACH ROW EXECUTE FUNCTION public.act()`)
			p := startProcess(t, "DATABASE_URL="+withParam(d.pool.Config().ConnString(), "pool_max_conns=1"),
				"LOG_LEVEL="+level)
			p.waitReady()
			c := newClientOf(t, p.url, newUser())
			other := newClientOf(t, p.url, newUser())
			title, description, key := "title-"+rand.Text(), "description-"+rand.Text(), "key-"+rand.Text()
			body := fmt.Sprintf(`{"title": %q, "description": %q}`, title, description)
			slowBody := fmt.Sprintf(`{"title": %q, "completed": true}`, title)
			a := c.do("POST", "", body, "Idempotency-Key", key)
			path := fmt.Sprint("/", decode[wireTask](t, a.body).ID)
			for _, row := range []struct {
				method, path, body string
				status             int
			}{
				{"POST", "", fmt.Sprintf(`{"title": %q, "description": "fail"}`, title), 500},
				{"POST", "", body, 201},
				{"GET", "", "", 200},
				{"GET", path, "", 200},
				{"PATCH", path, body, 200},
				{"DELETE", path, "", 204},
			} {
				if a := c.do(row.method, row.path, row.body); a.status != row.status {
					t.Errorf("%s %s = %d %s, want %d", row.method, row.path, a.status, a.body, row.status)
				}
			}
			slow := inParallel(1, func() {
				a, err := c.try("POST", "/api/"+c.user+"/tasks", slowBody)
				if err != nil || a.status != 201 {
					t.Errorf("slow create = %d %s %v, want 201", a.status, a.body, err)
				}
			})
			eventually(t, "slow statement", func() bool {
				return sqlValue[bool](t, d.pool, `
					SELECT EXISTS (SELECT FROM pg_stat_activity
					               WHERE datname = current_database() AND wait_event = 'PgSleep')`)
			})
			other.do("GET", "", "", "X-Request-Id", "waits") // for the only connection
			<-slow
			c.send("GET", "/health/live", "")
			p.signal(syscall.SIGTERM)
			p.wait(shutdownLimit)

			output := p.output.String()
			for _, secret := range []string{title, description, key, c.user, other.user, testSecret,
				strings.TrimPrefix(c.authorization, "Bearer "), d.pool.Config().ConnConfig.Password} {
				if strings.Contains(output, secret) {
					t.Errorf("the log contains %q: %s", secret, output)
				}
			}
			checkStatements(t, p, level)
			checkRequests(t, p)
		})
	}
}

// No line of the log is long, no matter what a client sends.
func TestLogLinesAreBounded(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "LOG_LEVEL=debug", "CORS_ORIGINS=https://app.example.com")
	p.waitReady()
	c := newClientOf(t, p.url, newUser())
	tasks := "/api/" + c.user + "/tasks"
	long := func(text string) string { return strings.Repeat(text, 10<<10/len(text)) }
	title := func(text string) string {
		return `{"title": "` + strings.Repeat(text, 60<<10/len(text)) + `"}`
	}
	for i, row := range []struct {
		method, target, header, body string
		status                       int
	}{
		{long("METHOD"), "/health/live", "X: x", "", 405},
		{strings.Repeat("M", 60<<10), "/health/live", "X: x", "", 431}, // by net/http
		{"GET", "/" + long("path"), "X: x", "", 404},
		{"GET", tasks + "?limit=" + long("9"), "X: x", "", 422},
		{"GET", tasks + "?" + long("%zz"), "X: x", "", 422},
		{"GET", tasks + "/" + long("9"), "X: x", "", 404},
		{"GET", tasks, "Origin: " + long(`"\`), "", 200},
		{"GET", tasks, "Origin: " + long("\u2028\xff"), "", 200},
		{"GET", tasks, "Traceparent: " + long("ab"), "", 200},
		{"GET", tasks, "X-Cloud-Trace-Context: " + long(strings.Repeat("0", 32)+" "), "", 200},
		{"GET", tasks, "X-Request-Id: " + long("id"), "", 200},
		{"PATCH", tasks + "/1", "If-Match: " + long(`"x", `), "{}", 422},
		{"POST", tasks, "Idempotency-Key: " + long("key"), `{"title": "x"}`, 422},
		{"POST", tasks, "Content-Type: " + long("text/"), `{"title": "x"}`, 415},
		{"POST", tasks, "X: x", title("\x01"), 400},
		{"POST", tasks, "X: x", title(`\"`), 422},
		{"POST", tasks, "X: x", title(`\u2028`), 422},
		{"POST", "/api/" + long("user") + "/tasks", "X: x", "", 403},
		{"GET", tasks, "Authorization: " + long("Bearer"), "", 401},
	} {
		conn := dialRaw(t, p.url, "")
		text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n"+
			"Content-Length: %d\r\n%s\r\n\r\n%s",
			row.method, row.target, c.authorization, len(row.body), row.header, row.body)
		go io.WriteString(conn, text) // the service may close the connection before the end
		if a := readAnswer(t, conn); a.status != row.status {
			t.Errorf("row %d = %d %s, want %d", i, a.status, a.body, row.status)
		}
	}
	c.send("GET", "/health/live", "", "X-Request-Id", "last")
	p.output.request(t, "last")
	for line := range strings.Lines(p.output.String()) {
		if len(line) > 8<<10 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
}

// checkStatements validates the lines about statements in the log of TestStatementLog's requests.
func checkStatements(t *testing.T, p *process, level string) {
	t.Helper()
	got := map[string]int{}
	for _, line := range p.output.lines(t) {
		text, _ := line["sql"].(string)
		verb := taskStatement.FindStringSubmatch(text)
		state := line["sqlstate"]
		if verb == nil || state != nil && state != "P0001" { // of the start, or sent again
			continue
		}
		got[fmt.Sprintf("%v %v: %s %v %v",
			line["severity"], line["message"], verb[1], line["rows"], state)]++
		took, _ := line["duration_us"].(float64)
		if slow := line["message"] == "slow statement"; took <= 0 || slow != (took > 1e6) {
			t.Errorf("line %v, want a duration, and a slow statement if it exceeds a second", line)
		}
	}
	want := map[string]int{"WARNING slow statement: INSERT INTO 1 <nil>": 1}
	if level == "debug" {
		maps.Copy(want, map[string]int{
			"DEBUG statement: INSERT INTO 1 <nil>": 2,
			"DEBUG statement: INSERT INTO 0 P0001": 1,
			"DEBUG statement: SELECT 2 <nil>":      1,
			"DEBUG statement: SELECT 1 <nil>":      1,
			"DEBUG statement: SELECT 0 <nil>":      1,
			"DEBUG statement: UPDATE 1 <nil>":      1,
			"DEBUG statement: DELETE FROM 1 <nil>": 1,
		})
	}
	if !maps.Equal(got, want) {
		t.Errorf("the log has the statements %v, want %v", got, want)
	}
}

// checkRequests validates the times in the log's lines about requests.
func checkRequests(t *testing.T, p *process) {
	t.Helper()
	for _, line := range p.output.lines(t) {
		if line["message"] != "request" {
			continue
		}
		us := func(name string) float64 {
			n, ok := line[name].(float64)
			if !ok {
				t.Errorf("line %v, want %s", line, name)
			}
			return n
		}
		took, db, wait := us("duration_us"), us("db_us"), us("db_wait_us")
		if wait < 0 || db < wait || took < db {
			t.Errorf("line %v, want db_wait_us <= db_us <= duration_us", line)
		}
		switch route, _ := line["route"].(string); {
		case strings.HasPrefix(route, "/api/") && db == 0:
			t.Errorf("line %v, want the time on the database", line)
		case route == "/health/live" && db != 0:
			t.Errorf("line %v, want no time on the database", line)
		case line["request_id"] == "waits" && wait < 100e3:
			t.Errorf("line %v, want the wait for the connection", line)
		}
	}
}
