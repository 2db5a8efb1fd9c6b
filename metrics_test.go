package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
)

func TestMetrics(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, sharedDatabaseURL()))
	s := startService(t, d, settings{})
	c := s.newClient()
	page := func() string {
		w := httptest.NewRecorder()
		s.serveMetrics(w, httptest.NewRequest("GET", "/metrics", nil))
		return w.Body.String()
	}
	figure := func(page, name string) (value float64) {
		t.Helper()
		_, line, _ := strings.Cut(page, "\n"+name+" ")
		if _, err := fmt.Sscan(line, &value); err != nil {
			t.Errorf("the page has no %s: %v", name, err)
		}
		return value
	}

	d.unprepared.Store(true) // behind an old pooler a prepared statement may be sent twice
	for range 3 {
		c.create("counted")
	}
	c.do("GET", "/0", "")
	c.send("GET", "/no/such/path?x=1", "")
	for i := range 5 {
		c.send(fmt.Sprint("BREW", i), "/health/live", "")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.acquire(ctx); err == nil {
		t.Error("acquire returned a connection although its context was done")
	}
	text := page()
	for name, want := range map[string]float64{
		`todo_http_requests_total{route="/api/{user_id}/tasks",method="POST",status="201"}`:               3,
		`todo_http_requests_total{route="/api/{user_id}/tasks/{id}",method="GET",status="404"}`:           1,
		`todo_http_requests_total{route="/",method="GET",status="404"}`:                                   1,
		`todo_http_requests_total{route="/health/live",method="other",status="405"}`:                      5,
		`todo_http_request_duration_seconds_count{route="/api/{user_id}/tasks",method="POST"}`:            3,
		`todo_http_request_duration_seconds_bucket{route="/api/{user_id}/tasks",method="POST",le="16"}`:   3,
		`todo_http_request_duration_seconds_bucket{route="/api/{user_id}/tasks",method="POST",le="+Inf"}`: 3,
		"todo_db_statements_total":        4, // one of them read the catalog
		"todo_db_connections_acquired":    0,
		"todo_db_connections_idle":        1,
		"todo_db_connections_open":        1,
		"todo_db_connections_max":         15,
		"todo_db_acquires_canceled_total": 1,
	} {
		if got := figure(text, name); got != want {
			t.Errorf("%s = %g, want %g", name, got, want)
		}
	}
	for _, name := range []string{
		`todo_http_request_duration_seconds_sum{route="/api/{user_id}/tasks",method="POST"}`,
		"todo_db_statement_seconds_total", "todo_db_connections_new_total", "todo_db_acquires_total",
		"todo_db_acquire_waits_total", "todo_db_acquire_wait_seconds_total",
		"go_goroutines", "go_memstats_heap_alloc_bytes", "go_memstats_sys_bytes",
	} {
		if got := figure(text, name); got <= 0 {
			t.Errorf("%s = %g, want more than 0", name, got)
		}
	}
	for _, label := range []string{c.user, "/no/such/path", "BREW"} {
		if strings.Contains(text, label) {
			t.Errorf("the page contains %s, a label that a client chose", label)
		}
	}
	const acquires = "todo_db_acquires_total"
	if before, after := figure(text, acquires), figure(page(), acquires); after != before {
		t.Errorf("the page acquired %g connections, want none", after-before)
	}

	// .ci/run installs promtool.
	if promtool, err := exec.LookPath("promtool"); err == nil {
		check := exec.Command(promtool, "check", "metrics")
		check.Stdin = strings.NewReader(text)
		if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics: %v\n%s", err, out)
		}
	}
}

// The page has a separate port. TestPathsAndMethods shows that it is not on the public one.
func TestMetricsPort(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := startProcess(t, "METRICS_PORT="+port)
	p.waitLive()
	for _, row := range []struct {
		method, path      string
		status            int
		contentType, part string
	}{
		{"GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8", "\ngo_goroutines "},
		{"HEAD", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8", ""},
		{"GET", "/", 404, "application/json", `{"detail":"`},
		{"GET", "/nothing", 404, "application/json", `{"detail":"`},
		{"POST", "/metrics", 404, "application/json", `{"detail":"`},
	} {
		r, err := http.NewRequest(row.method, "http://127.0.0.1:"+port+row.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != row.status || !strings.Contains(string(text), row.part) {
			t.Errorf("%s %s = %d %s %v, want %d with %q",
				row.method, row.path, res.StatusCode, text, err, row.status, row.part)
		}
		if got := res.Header.Get("Content-Type"); got != row.contentType {
			t.Errorf("%s %s has Content-Type %q, want %q", row.method, row.path, got, row.contentType)
		}
	}
}
