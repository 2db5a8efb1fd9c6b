package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// The limits of what one user, one client or a shutdown costs everyone else, and what the operator
// sees in the log.

// noTurns reports whether s has forgotten all users: no request is in progress or waiting.
func noTurns(s *server) bool {
	s.turns.mu.Lock()
	defer s.turns.mu.Unlock()
	return len(s.turns.users) == 0
}

// One user with a million tasks does not slow down another one.
func TestFairness(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t)))
	metricsPort := freePort(t)
	p := startProcess(t, "DATABASE_URL="+d.pool.Config().ConnString(),
		"METRICS_PORT="+metricsPort, "LOG_LEVEL=warn")
	p.waitReady()
	greedy := newClientOf(t, p.url, newUser())
	other := newClientOf(t, p.url, newUser())
	greedy.http, other.http = keepingConnections(t), keepingConnections(t)
	tasks := "/api/" + greedy.user + "/tasks"
	sqlExec(t, d.pool, `SET LOCAL statement_timeout = 0;
		INSERT INTO public.tasks (user_id, title)
		SELECT '`+greedy.user+`', 'x'
		FROM generate_series(1, 1000000);
		ANALYZE public.tasks`)
	other.create("the only one")
	goroutines := func() (n int) {
		page, err := http.Get("http://127.0.0.1:" + metricsPort + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer page.Body.Close()
		text, _ := io.ReadAll(page.Body)
		_, line, _ := strings.Cut(string(text), "\ngo_goroutines ")
		if _, err := fmt.Sscan(line, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := goroutines()
	second, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	alone, _ := other.listUntil(second.Done())
	t.Logf("a list takes %v (median)", alone)
	limit := alone + 100*time.Millisecond // the database may be 60 ms away

	var served, rejected atomic.Int64
	start := time.Now()
	costly := inParallel(100, func() {
		for time.Since(start) < 3*time.Second {
			a, err := greedy.try("GET", tasks+"?offset=50000000&total=true", "")
			switch {
			case err == nil && a.status == 200:
				served.Add(1)
			case err == nil && a.status == 429:
				rejected.Add(1)
			default:
				t.Errorf("costly list = %d %s %v, want 200 or 429", a.status, a.body, err)
			}
		}
	})
	median, _ := other.listUntil(costly)
	t.Logf("next to 100 costly requests a list takes %v (median); of those %d were 200, %d were 429",
		median, served.Load(), rejected.Load())
	if median > limit {
		t.Errorf("next to 100 costly requests a list takes %v, want %v at most", median, limit)
	}

	id := sqlValue[int64](t, d.pool, `SELECT max(id) FROM public.tasks WHERE title = 'x'`)
	tx := begin(t, d)
	sqlExec(t, tx, `SELECT FROM public.tasks WHERE id = $1 AND title = 'x' FOR UPDATE`, id)
	inProgress := func() int {
		return sqlValue[int](t, d.pool, `
			SELECT count(*)
			FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`)
	}
	var headers []string // which waiting requests do not keep in memory
	for name := range strings.SplitSeq(strings.TrimSuffix(headerNames(2_000), ":\n"), ":\n") {
		headers = append(headers, name, "")
	}
	rejected.Store(0)
	versions := make(chan string, 300) // that the toggles made
	toggles := inParallel(300, func() {
		start := time.Now()
		a, err := greedy.try("PATCH", fmt.Sprint(tasks, "/", id, "/complete"), "", headers...)
		took := time.Since(start)
		switch {
		case err == nil && a.status == 200:
			versions <- a.header.Get("ETag")
			return
		case err != nil || a.status != 429 || a.header.Get("Retry-After") == "":
			t.Errorf("toggle of the locked task = %d %v %s %v, want 429 with Retry-After",
				a.status, a.header, a.body, err)
		case took < turnTimeout || took > turnTimeout+8*time.Second:
			t.Errorf("429 after %v, want it after %v", took, turnTimeout)
		}
		if rejected.Add(1) == 295 {
			if n := inProgress(); n != 5 {
				t.Errorf("%d requests are in progress, want 5", n)
			}
			tx.Rollback(t.Context())
		}
	})
	median, _ = other.listUntil(toggles)
	t.Logf("next to 300 requests for a locked row a list takes %v (median)", median)
	if median > limit {
		t.Errorf("next to 300 requests for a locked row a list takes %v, want %v at most", median, limit)
	}
	if peak := p.memory("VmHWM"); peak > 128<<20 {
		t.Errorf("%d bytes of memory, want 128 MiB at most", peak)
	}
	close(versions)
	made := map[string]bool{}
	for version := range versions {
		made[version] = true
	}
	a := greedy.do("GET", fmt.Sprint("/", id), "")
	if len(made) != 5 || !made[a.header.Get("ETag")] || !strings.Contains(a.body, `"completed":true`) {
		t.Errorf("the toggles made the versions %v of %s, want five with the current one", made, a.body)
	}
	greedy.http.CloseIdleConnections()
	other.http.CloseIdleConnections()
	eventually(t, "end of the goroutines of those requests", func() bool {
		return goroutines() <= before+5
	})
}

// While a user's turns are taken: requests that need no turn, that wait for one, and that get none.
func TestTurns(t *testing.T) {
	t.Parallel()
	d := openDB(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		config.MaxConns = 7 // two turns for each user
	})
	startDB(t, d)
	s := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
	s.mux.HandleFunc("GET /panic/{user_id}", s.handle(s.forUser(
		func(context.Context, http.ResponseWriter, *http.Request, taskKey) error { panic("a test") })))
	service := httptest.NewServer(s)
	defer service.Close()
	c := newClientOf(t, service.URL, newUser())
	other := newClientOf(t, service.URL, newUser())
	c.http = keepingConnections(t)
	requests := func() int { // of c, in progress or waiting
		s.turns.mu.Lock()
		defer s.turns.mu.Unlock()
		if u := s.turns.users[c.user]; u != nil {
			return u.requests
		}
		return 0
	}
	tasks := "/api/" + c.user + "/tasks"
	locked := fmt.Sprint(tasks, "/", c.create("locked").ID)
	tx := begin(t, sharedDB)
	sqlExec(t, tx, `SELECT FROM public.tasks WHERE user_id = $1 FOR UPDATE`, c.user)
	blocked := inParallel(2, func() {
		if a, err := c.try("PATCH", locked, `{"title": "changed"}`); err != nil || a.status != 200 {
			t.Errorf("blocked change = %d %s %v, want 200", a.status, a.body, err)
		}
	})
	eventually(t, "two requests in progress", func() bool {
		return requests() == 2 && d.pool.Stat().AcquiredConns() == 2
	})

	nobody := *c
	nobody.authorization = ""
	for _, row := range []struct {
		as           *client
		method, path string
		status       int
	}{
		{&nobody, "GET", tasks, 401},
		{c, "GET", "/api/" + other.user + "/tasks", 403},
		{c, "PUT", tasks + "/abc", 404},
		{c, "GET", "/health/live", 200},
		{other, "GET", "/api/" + other.user + "/tasks", 200},
	} {
		start := time.Now()
		a := row.as.send(row.method, row.path, "")
		if took := time.Since(start); a.status != row.status || took > turnTimeout/2 {
			t.Errorf("%s %s = %d %s after %v, want %d at once",
				row.method, row.path, a.status, a.body, took, row.status)
		}
	}

	waiting := map[string]net.Conn{}
	start := time.Now()
	for _, text := range []string{
		c.rawCreate("", "Content-Length: 12"), // the body never comes
		c.rawCreate(`{"title": "x"}`, "Content-Length: 14"),
		c.rawCreate("x", "Content-Length: 100000000"),
		c.rawCreate("x", "Content-Length: 1", "Content-Type: text/plain"),
		strings.Replace(c.rawCreate("", "X: x"), "POST "+tasks, "GET "+tasks+"?limit=0", 1),
		strings.Replace(c.rawCreate("", "If-Match: undefined"), "POST "+tasks, "DELETE "+locked, 1),
	} {
		waiting[text] = dialRaw(t, service.URL, text)
	}
	for text, conn := range waiting {
		a := readAnswer(t, conn)
		took := time.Since(start)
		if a.status != 429 || a.header.Get("Retry-After") == "" || a.detail() == "" {
			t.Errorf("%q = %d %v %s, want 429 with Retry-After", text, a.status, a.header, a.body)
		}
		if took < turnTimeout || took > turnTimeout+8*time.Second {
			t.Errorf("%q is answered after %v, want %v", text, took, turnTimeout)
		}
	}
	eventually(t, "end of the rejected requests", func() bool { return requests() == 2 })

	lists := inParallel(5, func() {
		if a, err := c.try("GET", tasks, ""); err != nil || a.status != 200 {
			t.Errorf("list that waited for its turn = %d %s %v, want 200", a.status, a.body, err)
		}
	})
	eventually(t, "five waiting requests", func() bool { return requests() == 7 })
	if n := d.pool.Stat().AcquiredConns(); n != 2 {
		t.Errorf("%d connections are in use, want 2", n)
	}
	tx.Rollback(t.Context())
	<-blocked
	<-lists
	for range 3 { // not through the client, which knows only the routes of openapi.json
		text := strings.Replace(c.rawCreate("", "X: x"), "POST "+tasks, "GET /panic/"+c.user, 1)
		if a := readAnswer(t, dialRaw(t, service.URL, text)); a.status != 500 {
			t.Errorf("panic = %d %s, want 500", a.status, a.body)
		}
	}
	if a := c.do("GET", "", ""); a.status != 200 || strings.Count(a.body, `"title"`) != 1 {
		t.Errorf("list = %d %s, want the one task", a.status, a.body)
	}
	eventually(t, "end of all turns", func() bool { return noTurns(s) })
}

// In an outage, a user's requests end in a 503 like everyone's: a 429 would blame the user.
func TestTurnsInAnOutage(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		fault func(*relay)
	}{
		{"hang-ups", func(r *relay) { r.down.Store(true); r.cut() }},
		{"silence", func(r *relay) { r.stalled.Store(true); r.cut() }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := startOverRelay(t)
			s := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
			service := httptest.NewServer(s)
			defer service.Close()
			c := newClientOf(t, service.URL, newUser())
			c.http = keepingConnections(t)
			c.create("before")
			row.fault(r)
			defer r.heal()
			lists := func(limit time.Duration) {
				<-inParallel(20, func() {
					start := time.Now()
					a, err := c.try("GET", "/api/"+c.user+"/tasks", "")
					took := time.Since(start)
					if err != nil || a.status != 503 || took > limit+8*time.Second {
						t.Errorf("list = %d %s %v after %v, want 503 within %v", a.status, a.body, err, took, limit)
					}
				})
			}
			lists(requestTimeout)
			eventually(t, "long outage", func() bool {
				c.do("GET", "", "")
				return d.outage()
			})
			lists(outageWait)
			dials := r.dials.Load()
			r.heal()
			retryAfterPause(t, func() error { return c.listWithin(outageWait) })
			eventually(t, "end of all attempts to connect", func() bool {
				return d.pool.Stat().ConstructingConns() == 0
			})
			if n := r.dials.Load() - dials; n > 3 { // not also for the requests that have ended
				t.Errorf("%d attempts to connect for one list, want one or two", n)
			}
			eventually(t, "end of all turns", func() bool { return noTurns(s) })
		})
	}
}

// A rejected request does not wait for its body, and its connection is closed soon.
func TestRejectedWithoutItsBody(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	c := newClientOf(t, p.url, newUser())
	const length, chunked = "Content-Length: 1000", "Transfer-Encoding: chunked"
	tasks := "/api/" + c.user + "/tasks"
	for _, row := range []struct {
		request, authorization, headers string
		status                          int
	}{
		{"POST " + tasks, "", length, 401},
		{"POST " + tasks, "", chunked, 401},
		{"POST " + tasks, "Bearer x.y.z", length, 401},
		{"POST /api/another/tasks", c.authorization, length, 403},
		{"PUT " + tasks + "/abc", c.authorization, length, 404},
		{"PUT " + tasks + "/abc", c.authorization, chunked, 404},
		{"POST /nothing", "", length, 404},
		{"PUT " + tasks, "", length, 405},
		{"GET /health/live", "", length, 200},
		{"POST " + tasks, c.authorization, "Content-Length: 65537", 413},
		{"POST " + tasks, c.authorization, length + "\r\nContent-Type: text/plain", 415},
		{"POST " + tasks, c.authorization, length + "\r\nContent-Encoding: gzip", 415},
	} {
		start := time.Now()
		conn := dialRaw(t, p.url, fmt.Sprintf("%s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n%s\r\n\r\n",
			row.request, row.authorization, row.headers))
		a := readAnswer(t, conn)
		took := time.Since(start)
		if a.status != row.status || took > 5*time.Second {
			t.Errorf("%s with %q = %d %s after %v, want %d at once",
				row.request, row.headers, a.status, a.body, took, row.status)
		}
		if !isClosed(conn) || time.Since(start) > took+5*time.Second {
			t.Errorf("%s with %q: the connection is open %v after the answer, want it closed soon",
				row.request, row.headers, time.Since(start)-took)
		}
		conn.Close()
	}

	// After a body that does arrive, the connection serves the next request.
	conn := dialRaw(t, p.url, "POST "+tasks+" HTTP/1.1\r\nHost: todo\r\nContent-Length: 60000\r\n\r\n"+
		strings.Repeat("x", 60_000))
	in := bufio.NewReader(conn)
	for _, want := range []int{401, 200} {
		res, err := http.ReadResponse(in, nil)
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
		if err != nil || res.StatusCode != want {
			t.Fatalf("answer %v, %v, want %d", res, err, want)
		}
		answered := time.Now()
		eventually(t, "end of the time for the body", func() bool {
			return time.Since(answered) > 2*discardTimeout
		})
		io.WriteString(conn, "GET /health/live HTTP/1.1\r\nHost: todo\r\n\r\n")
	}
}

// taskStatement matches the SQL of a request.
var taskStatement = regexp.MustCompile(`\b(INSERT INTO|SELECT|UPDATE|DELETE FROM) .*public\.tasks`)
