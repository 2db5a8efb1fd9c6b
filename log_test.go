package main

import (
	"fmt"
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
		{"POST", tasks, `{"title": "hunter2", "description": "hunter2"}`, "X", "", "INFO POST " + list + " 201"},
		{"GET", tasks + "?title=hunter2&limit=1", "", "X", "", "INFO GET " + list + " 200"},
		{"GET", tasks + "?limit=hunter2", "", "Traceparent", "hunter2", "INFO GET " + list + " 422"},
		{"GET", tasks + "?hunter2=%zz", "", "X-Cloud-Trace-Context", "hunter2/1", "INFO GET " + list + " 422"},
		{"GET", tasks + "/hunter2", "", "X", "", "INFO GET " + one + " 404"},
		{"DELETE", tasks + noTask, "", "X", "", "INFO DELETE " + one + " 404"},
		{"PATCH", tasks + "/1/complete", `{"completed": "hunter2"}`, "X", "", "INFO PATCH " + one + "/complete 422"},
		{"POST", tasks, `{"title": "hunter2`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `{"title": hunter2}`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `{"title": "hunter2\ud800"}`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `"hunter2"`, "X", "", "INFO POST " + list + " 400"},
		{"POST", tasks, `{"title": "hunter2\u0000"}`, "X", "", "INFO POST " + list + " 422"},
		{"POST", tasks, `{"title": "hunter2"}`, "Content-Type", "text/hunter2", "INFO POST " + list + " 415"},
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
			t.Errorf("%.20s %s %.40s is logged as %v, want %s and %d bytes", row.method, row.path, row.body, line,
				row.want, len(a.body))
		}
		if us, _ := line["duration_us"].(float64); us <= 0 || us > 20e6 {
			t.Errorf("%.20s %s is logged with the duration %v", row.method, row.path, line["duration_us"])
		}
		if line["logging.googleapis.com/trace"] != nil {
			t.Errorf("%.20s %s is logged with the trace %v", row.method, row.path, line["logging.googleapis.com/trace"])
		}
	}

	local := startService(t, sharedDB, settings{}) // without a project
	for i, row := range []struct{ header, value string }{
		{"X-Cloud-Trace-Context", trace + "/1;o=1"}, {"X-Cloud-Trace-Context", trace}, {"Traceparent", parent},
	} {
		id := fmt.Sprint("trace-", i)
		for service, want := range map[string]string{p.url: "projects/some-project/traces/" + trace, local.url: trace} {
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
		t.Errorf("LOG_LEVEL=error: exit status %d, log %s, want 0 and nothing", status, quiet.output.String())
	}
}
