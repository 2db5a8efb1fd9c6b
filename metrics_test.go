package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
)

func TestMetrics(t *testing.T) {
	t.Parallel()
	db := openPrepared(t, sharedDatabaseURL())
	s := newServer(sharedAuth, db, slog.New(slog.DiscardHandler), nil, "")
	public := httptest.NewServer(s)
	t.Cleanup(public.Close)
	c := newClient(t)
	c.service = public.URL
	page := func() string {
		t.Helper()
		rec := httptest.NewRecorder()
		s.serveMetrics(rec, httptest.NewRequest("GET", "/metrics", nil))
		if got := rec.Header().Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
			t.Errorf("Content-Type = %q", got)
		}
		return rec.Body.String()
	}

	for range 3 {
		c.create("counted")
	}
	c.do("GET", "/0", "")
	c.send("GET", "/no/such/path?x=1", "")
	for i := range 5 {
		c.send(fmt.Sprint("BREW", i), "/health/live", "")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := db.acquire(ctx); err == nil {
		t.Error("a connection was given to nobody")
	}
	text := page()
	for _, want := range []string{
		`todo_http_requests_total{route="/api/{user_id}/tasks",method="POST",status="201"} 3`,
		`todo_http_requests_total{route="/api/{user_id}/tasks/{id}",method="GET",status="404"} 1`,
		`todo_http_requests_total{route="/",method="GET",status="404"} 1`,
		`todo_http_requests_total{route="/health/live",method="other",status="405"} 5`,
		`todo_http_request_duration_seconds_sum{route="/api/{user_id}/tasks",method="POST"} 0.`,
		`todo_http_request_duration_seconds_count{route="/api/{user_id}/tasks",method="POST"} 3`,
		`todo_http_request_duration_seconds_bucket{route="/api/{user_id}/tasks",method="POST",le="16"} 3`,
		`todo_http_request_duration_seconds_bucket{route="/api/{user_id}/tasks",method="POST",le="+Inf"} 3`,
		"todo_db_statements_total 4",
		"todo_db_statement_seconds_total 0.",
		"go_goroutines ",
		"go_memstats_heap_alloc_bytes ",
		"go_memstats_sys_bytes ",
		"todo_db_connections_acquired 0",
		"todo_db_connections_idle 1",
		"todo_db_connections_open 1",
		"todo_db_connections_max 15",
		"todo_db_acquires_canceled_total 1",
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("the page lacks %s", want)
		}
	}
	for _, family := range []string{"todo_db_connections_new_total", "todo_db_acquires_total", "todo_db_acquire_waits_total", "todo_db_acquire_wait_seconds_total", "go_goroutines", "go_memstats_heap_alloc_bytes", "go_memstats_sys_bytes"} {
		var value float64
		_, line, _ := strings.Cut(text, "\n"+family+" ")
		if _, err := fmt.Sscan(line, &value); err != nil || value <= 0 {
			t.Errorf("%s = %g, %v, want more than nothing", family, value, err)
		}
	}
	if strings.Contains(text, c.user) || strings.Contains(text, "/no/such/path") || strings.Contains(text, "BREW") {
		t.Error("the page has labels that clients choose")
	}
	if again := page(); !strings.Contains(again, "\n"+acquires(text)+"\n") {
		t.Error("the page ran a query")
	}
	if a := c.send("GET", "/metrics", ""); a.status != http.StatusNotFound {
		t.Errorf("/metrics on the public port = %d, want 404", a.status)
	}

	// CI has promtool; where it is, the page must be as it likes it.
	if promtool, err := exec.LookPath("promtool"); err == nil {
		check := exec.Command(promtool, "check", "metrics")
		check.Stdin = strings.NewReader(text)
		if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics: %v\n%s", err, out)
		}
	}
}

func TestMetricsPort(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := startProcess(t, "METRICS_PORT="+port)
	p.waitLive()
	c := newClientOf(t, "http://127.0.0.1:"+port, "test-"+rand.Text())
	for _, row := range []struct {
		method, path string
		status       int
	}{{"GET", "/metrics", 200}, {"HEAD", "/metrics", 200}, {"GET", "/", 404}, {"GET", "/nothing", 404}, {"POST", "/metrics", 404}} {
		a := c.send(row.method, row.path, "")
		if a.status != row.status || a.status == 404 && detail(t, a) == "" || row.method == "GET" && a.status == 200 && !strings.Contains(a.body, "\ngo_goroutines ") {
			t.Errorf("%s %s on the metrics port = %d %s, want %d", row.method, row.path, a.status, a.body, row.status)
		}
	}
}

// acquires returns the line that counts statements.
func acquires(page string) string {
	_, rest, _ := strings.Cut(page, "\ntodo_db_acquires_total ")
	value, _, _ := strings.Cut(rest, "\n")
	return "todo_db_acquires_total " + value
}
