package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// What one user, a client or a shutdown may cost the others, and what the operator sees of it.

// listUntil has c get its list until done is closed, and at least 30 times. It returns the median of
// the times that the lists took.
func (c *client) listUntil(done <-chan struct{}) time.Duration {
	c.t.Helper()
	var waits []time.Duration
	for {
		start := time.Now()
		if a := c.do("GET", "", ""); a.status != 200 {
			c.t.Errorf("list of another user = %d %s, want 200", a.status, a.body)
		}
		waits = append(waits, time.Since(start))
		select {
		case <-done:
			if len(waits) >= 30 {
				slices.Sort(waits)
				return waits[len(waits)/2]
			}
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// inParallel runs n copies of f. The channel is closed when all have returned.
func inParallel(n int, f func()) <-chan struct{} {
	var all sync.WaitGroup
	for range n {
		all.Go(f)
	}
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	return done
}

// lockWaits returns how many sessions of d's database wait for a lock.
func lockWaits(t testing.TB, d *database) int {
	t.Helper()
	return sqlValue[int](t, d.pool, `
		SELECT count(*)
		FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock'`)
}

// One user with a million tasks does not slow down another one.
func TestFairness(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	d := openPrepared(t, ownDatabase(t))
	metricsPort := freePort(t)
	p := startProcess(t, "DATABASE_URL="+d.pool.Config().ConnString(), "METRICS_PORT="+metricsPort, "LOG_LEVEL=warn")
	p.waitReady()
	greedy, other := newClientOf(t, p.url, "test-"+rand.Text()), newClientOf(t, p.url, "test-"+rand.Text())
	greedy.http, other.http = keepingConnections(t), keepingConnections(t)
	tasks := "/api/" + greedy.user + "/tasks"
	sqlExec(t, d.pool, `SET LOCAL statement_timeout = 0;
		INSERT INTO public.tasks (user_id, title)
		SELECT '`+greedy.user+`', 'x'
		FROM generate_series(1, 1000000);
		ANALYZE public.tasks`)
	other.create("the only one")
	goroutines := func() (n int) {
		page := get(t, "http://127.0.0.1:"+metricsPort+"/metrics", nil).body
		_, line, _ := strings.Cut(page, "\ngo_goroutines ")
		if _, err := fmt.Sscan(line, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := goroutines()
	second, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	alone := other.listUntil(second.Done())
	t.Logf("a list takes %v (median)", alone)
	limit := alone + 100*time.Millisecond // the database may be 60 ms away

	var served, rejected atomic.Int64
	start := time.Now()
	costly := inParallel(100, func() {
		for time.Since(start) < 3*time.Second {
			switch a, err := greedy.try("GET", tasks+"?offset=50000000&total=true", ""); {
			case err == nil && a.status == 200:
				served.Add(1)
			case err == nil && a.status == 429:
				rejected.Add(1)
			default:
				t.Errorf("costly list = %d %s %v, want 200 or 429", a.status, a.body, err)
			}
		}
	})
	median := other.listUntil(costly)
	t.Logf("next to 100 costly requests a list takes %v (median); %d of them were 200, %d were 429",
		median, served.Load(), rejected.Load())
	if median > limit {
		t.Errorf("next to 100 costly requests a list takes %v, want %v at most", median, limit)
	}

	id := sqlValue[int64](t, d.pool, `SELECT max(id) FROM public.tasks WHERE user_id = $1`, greedy.user)
	tx := begin(t, d)
	sqlExec(t, tx, `SELECT FROM public.tasks WHERE user_id = $1 AND id = $2 FOR UPDATE`, greedy.user, id)
	var headers []string // which no waiting request keeps in memory
	for name := range strings.SplitSeq(strings.TrimSuffix(names(2_000), ":\n"), ":\n") {
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
			t.Errorf("toggle of the locked task = %d %v %s %v, want 429 with Retry-After", a.status, a.header, a.body, err)
		case took < turnTimeout || took > requestTimeout:
			t.Errorf("429 after %v, want it after %v", took, turnTimeout)
		}
		if rejected.Add(1) == 295 {
			if n := lockWaits(t, d); n != 5 {
				t.Errorf("%d requests are in progress, want 5", n)
			}
			tx.Rollback(t.Context())
		}
	})
	median = other.listUntil(toggles)
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
	if !made[a.header.Get("ETag")] || len(made) != 5 || !strings.Contains(a.body, `"completed":true`) {
		t.Errorf("the task is %s after toggles to the versions %v, want five, one of them the current one", a.body, made)
	}
	greedy.http.CloseIdleConnections()
	other.http.CloseIdleConnections()
	eventually(t, "end of the goroutines of those requests", func() bool { return goroutines() <= before+5 })
}

// While all turns of a user are taken: what needs no turn, what waits for one, and what gets none.
func TestTurns(t *testing.T) {
	t.Parallel()
	d := open(t, sharedDatabaseURL(), func(config *pgxpool.Config) { config.MaxConns = 7 }) // two turns per user
	prepare(t, d)
	s := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
	s.mux.HandleFunc("GET /panic/{user_id}",
		s.handle(s.forUser(func(context.Context, http.ResponseWriter, *http.Request, taskKey) error { panic("at the disco") })))
	service := httptest.NewServer(s)
	defer service.Close()
	c, other := newClientOf(t, service.URL, "test-"+rand.Text()), newClientOf(t, service.URL, "test-"+rand.Text())
	c.http = keepingConnections(t)
	requests := func() int { // in progress or waiting
		s.turns.mu.Lock()
		defer s.turns.mu.Unlock()
		if u := s.turns.users[c.user]; u != nil {
			return u.requests
		}
		return 0
	}
	tasks, locked := "/api/"+c.user+"/tasks", c.create("locked")
	tx := begin(t, sharedDB)
	sqlExec(t, tx, `SELECT FROM public.tasks WHERE user_id = $1 FOR UPDATE`, c.user)
	blocked := inParallel(2, func() {
		a, err := c.try("PATCH", fmt.Sprint(tasks, "/", locked.ID), `{"title": "changed"}`)
		if err != nil || a.status != 200 {
			t.Errorf("blocked change = %d %s %v, want 200", a.status, a.body, err)
		}
	})
	eventually(t, "two requests in progress", func() bool { return requests() == 2 && d.pool.Stat().AcquiredConns() == 2 })

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
			t.Errorf("%s %s = %d %s after %v, want %d at once", row.method, row.path, a.status, a.body, took, row.status)
		}
	}

	var waiting sync.WaitGroup
	for _, text := range []string{
		c.post("", "Content-Length: 12"), // the body never comes
		c.post(`{"title": "x"}`, "Content-Length: 14"),
		c.post("x", "Content-Length: 100000000"),
		c.post("x", "Content-Length: 1", "Content-Type: text/plain"),
		strings.Replace(c.post("", "X: x"), "POST", "GET", 1),
		strings.Replace(c.post("", "If-Match: undefined"), "POST "+tasks, fmt.Sprint("DELETE ", tasks, "/", locked.ID), 1),
	} {
		waiting.Go(func() {
			start := time.Now()
			a, err := answerTo(service.URL, text)
			took := time.Since(start)
			if err != nil || a.status != 429 || a.header.Get("Retry-After") == "" {
				t.Errorf("%q = %d %v %s %v, want 429 with Retry-After", text, a.status, a.header, a.body, err)
			}
			if took < turnTimeout || took > turnTimeout+4*time.Second {
				t.Errorf("%q is answered after %v, want %v", text, took, turnTimeout)
			}
		})
	}
	waiting.Wait()
	eventually(t, "end of the rejected requests", func() bool { return requests() == 2 })

	got := inParallel(5, func() {
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
	<-got
	for range 3 {
		readAnswer(t, raw(t, service.URL, "GET /panic/"+c.user+" HTTP/1.1\r\nHost: todo\r\nAuthorization: "+c.authorization+"\r\n\r\n"))
	}
	if a := c.do("GET", "", ""); a.status != 200 || strings.Count(a.body, `"title"`) != 1 {
		t.Errorf("list = %d %s, want the one task", a.status, a.body)
	}
	eventually(t, "empty map of turns", func() bool {
		s.turns.mu.Lock()
		defer s.turns.mu.Unlock()
		return len(s.turns.users) == 0
	})
}

// answerTo sends text on a new connection and returns the answer.
func answerTo(service, text string) (a answer, err error) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(service, "http://"))
	if err != nil {
		return a, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil {
		return a, err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return a, err
	}
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(body)}, err
}

// A user whose requests wait for the database is not told to send fewer.
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
			d, r := openOver(t)
			s := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
			service := httptest.NewServer(s)
			defer service.Close()
			c := newClientOf(t, service.URL, "test-"+rand.Text())
			c.http = keepingConnections(t)
			c.create("before")
			row.fault(r)
			defer r.heal()
			all503 := func(limit time.Duration) {
				<-inParallel(20, func() {
					start := time.Now()
					a, err := c.try("GET", "/api/"+c.user+"/tasks", "")
					took := time.Since(start)
					if err != nil || a.status != 503 || took > limit+2*time.Second {
						t.Errorf("list = %d %s %v after %v, want 503 within %v", a.status, a.body, err, took, limit)
					}
				})
			}
			all503(requestTimeout)
			eventually(t, "long outage", func() bool {
				c.do("GET", "", "")
				return d.outage()
			})
			all503(outageWait)
			r.heal()
			if a := c.do("GET", "", ""); a.status != 200 {
				t.Errorf("after the recovery list = %d %s, want 200", a.status, a.body)
			}
			eventually(t, "empty map of turns", func() bool {
				s.turns.mu.Lock()
				defer s.turns.mu.Unlock()
				return len(s.turns.users) == 0
			})
		})
	}
}

// The answer does not wait for a body that nobody reads, and neither does the end of the connection.
func TestRejectedWithoutItsBody(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	c := newClientOf(t, p.url, "test-"+rand.Text())
	const length, chunked = "Content-Length: 1000", "Transfer-Encoding: chunked"
	tasks := "/api/" + c.user + "/tasks"
	for _, row := range []struct {
		request, authorization string
		headers                []string
		status                 int
	}{
		{"POST " + tasks, "", []string{length}, 401},
		{"POST " + tasks, "", []string{chunked}, 401},
		{"POST " + tasks, "Bearer x.y.z", []string{length}, 401},
		{"POST /api/somebody/tasks", c.authorization, []string{length}, 403},
		{"PUT " + tasks + "/abc", c.authorization, []string{length}, 404},
		{"PUT " + tasks + "/abc", c.authorization, []string{chunked}, 404},
		{"POST /nothing", "", []string{length}, 404},
		{"PUT " + tasks, "", []string{length}, 405},
		{"GET /health/live", "", []string{length}, 200},
		{"POST " + tasks, c.authorization, []string{"Content-Length: 65537"}, 413},
		{"POST " + tasks, c.authorization, []string{length, "Content-Type: text/plain"}, 415},
		{"POST " + tasks, c.authorization, []string{length, "Content-Encoding: gzip"}, 415},
	} {
		start := time.Now()
		conn := raw(t, p.url, fmt.Sprintf("%s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n%s\r\n\r\n",
			row.request, row.authorization, strings.Join(row.headers, "\r\n")))
		a := readAnswer(t, conn)
		took := time.Since(start)
		if a.status != row.status || took > time.Second {
			t.Errorf("%s with %q = %d %s after %v, want %d at once", row.request, row.headers, a.status, a.body, took, row.status)
		}
		if !closed(conn) || time.Since(start) > took+2*time.Second {
			t.Errorf("%s with %q: the connection is closed after %v, want it soon", row.request, row.headers, time.Since(start))
		}
		conn.Close()
	}

	// A body that does arrive does not cost the connection.
	body := strings.Repeat("x", 60_000)
	conn := raw(t, p.url, "POST "+tasks+" HTTP/1.1\r\nHost: todo\r\nContent-Length: 60000\r\n\r\n"+body)
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
		eventually(t, "end of the time for the body", func() bool { return time.Since(answered) > 2*discardTimeout })
		io.WriteString(conn, "GET /health/live HTTP/1.1\r\nHost: todo\r\n\r\n")
	}
}

// A fleet is clients that keep their connections and create tasks, with short breaks.
type fleet struct {
	t       *testing.T
	users   [8]*client
	created atomic.Int64
	cut     atomic.Int64 // requests whose connection ended without an answer

	mu        sync.Mutex
	closing   time.Time // when the first response with Connection: close was read
	accepted  time.Time // when a request on the newest connection that was answered was sent
	keptAlive int       // responses without Connection: close to requests sent after closing
}

// sail creates tasks until nothing listens.
func (f *fleet) sail(c *client) {
	const body = `{"title": "x"}`
	text := c.post(body, fmt.Sprint("Content-Length: ", len(body)))
	for {
		conn, err := net.Dial("tcp", strings.TrimPrefix(c.service, "http://"))
		if err != nil {
			if !errors.Is(err, syscall.ECONNREFUSED) {
				f.t.Errorf("connect: %v", err)
			}
			return
		}
		f.use(conn, text)
		conn.Close()
	}
}

// use sends requests on a connection until the service ends it.
func (f *fleet) use(conn net.Conn, text string) {
	conn.SetDeadline(time.Now().Add(time.Minute))
	in := bufio.NewReader(conn)
	for n := 1; ; n++ {
		time.Sleep(mathrand.N(4 * time.Millisecond)) // the pace
		sent := time.Now()
		_, err := io.WriteString(conn, text)
		var res *http.Response
		if err == nil {
			res, err = http.ReadResponse(in, nil)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
		if err != nil {
			f.cut.Add(1)
			f.t.Logf("request %d of a connection was cut: %v", n, err)
			return
		}
		if res.StatusCode != 201 {
			f.t.Errorf("create = %v, want 201", res)
		}
		f.created.Add(1)
		f.mu.Lock()
		switch {
		case res.Close && f.closing.IsZero():
			f.closing = time.Now()
		case !res.Close && !f.closing.IsZero() && sent.After(f.closing):
			f.keptAlive++
		}
		f.accepted = sent
		f.mu.Unlock()
		if res.Close {
			return
		}
	}
}

func TestShutdownLosesNothing(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	for range 8 {
		p := startProcess(t, "LOG_LEVEL=warn")
		p.waitReady()
		f := &fleet{t: t}
		var names []string
		for i := range f.users {
			f.users[i] = newClientOf(t, p.url, "test-"+rand.Text())
			names = append(names, f.users[i].user)
		}
		next := make(chan *client, 16)
		for i := range cap(next) {
			next <- f.users[i%len(f.users)]
		}
		done := inParallel(cap(next), func() { f.sail(<-next) })
		eventually(t, "load", func() bool { return f.created.Load() > 200 })
		start := time.Now()
		p.signal(syscall.SIGTERM)
		if status := p.wait(stopLimit); status != 0 {
			t.Errorf("exit status %d, want 0: %s", status, p.output.String())
		}
		ended := time.Since(start)
		<-done
		t.Logf("exit after %v; the last request was sent after %v; %d of %d requests were cut", ended, f.accepted.Sub(start),
			f.cut.Load(), f.created.Load()+f.cut.Load())
		if f.cut.Load() > 0 || f.keptAlive > 0 {
			t.Errorf("%d requests were cut, %d responses kept the connection alive, want none", f.cut.Load(), f.keptAlive)
		}
		if last := f.accepted.Sub(start); last < graceTime-100*time.Millisecond {
			t.Errorf("the last request that was accepted was sent %v after the signal, want %v", last, graceTime)
		}
		if n := sqlValue[int64](t, sharedDB.pool, `SELECT count(*) FROM tasks WHERE user_id = ANY ($1)`, names); n != f.created.Load() {
			t.Errorf("%d tasks, want the %d that were acknowledged", n, f.created.Load())
		}
	}
}

// The second signal does not wait for the second in which requests are still accepted.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	p.signal(syscall.SIGTERM)
	eventually(t, "line about the shutdown", func() bool { return strings.Contains(p.output.String(), `"shutting down"`) })
	start := time.Now()
	p.signal(syscall.SIGTERM)
	if status := p.wait(stopLimit); status != -1 || time.Since(start) > graceTime/2 {
		t.Errorf("exit status %d after %v, want the signal's at once", status, time.Since(start))
	}
}

func TestStatementLog(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"debug", "info", "warn"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			d := openPrepared(t, ownDatabase(t))
			sqlExec(t, d.pool, `
				CREATE FUNCTION public.act() RETURNS trigger LANGUAGE plpgsql AS $$
				BEGIN
					IF NEW.completed THEN PERFORM pg_sleep(1.2); END IF;
					IF NEW.description = 'fail' THEN RAISE 'as the test asks'; END IF;
					RETURN NEW;
				END $$;
				CREATE TRIGGER act BEFORE INSERT ON public.tasks FOR EACH ROW EXECUTE FUNCTION public.act()`)
			p := startProcess(t, "DATABASE_URL="+d.pool.Config().ConnString()+"&pool_max_conns=1", "LOG_LEVEL="+level)
			p.waitReady()
			c, other := newClientOf(t, p.url, "test-"+rand.Text()), newClientOf(t, p.url, "test-"+rand.Text())
			title, description, key := "title-"+rand.Text(), "description-"+rand.Text(), "key-"+rand.Text()
			body := fmt.Sprintf(`{"title": %q, "description": %q}`, title, description)
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
				if a, err := c.try("POST", "/api/"+c.user+"/tasks", strings.Replace(body, "{", `{"completed": true, `, 1)); err != nil || a.status != 201 {
					t.Errorf("slow create = %d %s %v, want 201", a.status, a.body, err)
				}
			})
			eventually(t, "slow statement", func() bool {
				return sqlValue[int](t, d.pool, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'`) == 1
			})
			other.do("GET", "", "", "X-Request-Id", "waits") // for the only connection
			<-slow
			c.send("GET", "/health/live", "")
			p.signal(syscall.SIGTERM)
			p.wait(stopLimit)

			output := p.output.String()
			for _, secret := range []string{title, description, key, c.user, other.user, testSecret,
				strings.TrimPrefix(c.authorization, "Bearer "), d.pool.Config().ConnConfig.Password} {
				if strings.Contains(output, secret) {
					t.Errorf("the log contains %q: %s", secret, output)
				}
			}
			statements := map[string]int{}
			for _, line := range p.output.lines(t) {
				text, _ := line["sql"].(string)
				message, _ := line["message"].(string)
				us := func(name string) float64 { n, _ := line[name].(float64); return n }
				switch message {
				case "statement", "slow statement":
					verb := regexp.MustCompile(`(INSERT INTO|SELECT id|UPDATE|DELETE FROM)\b.*public\.tasks`).FindStringSubmatch(text)
					if verb == nil || line["sqlstate"] != nil && line["sqlstate"] != "P0001" {
						break // about the schema, or sent again
					}
					statements[fmt.Sprint(line["severity"], " ", message, ": ", verb[1], " ", line["rows"], " ", line["sqlstate"])]++
					if us("duration_us") <= 0 || (message == "slow statement") != (us("duration_us") > 1e6) {
						t.Errorf("line %v, want the duration, and a slow statement if it is over a second", line)
					}
				case "request":
					if us("db_wait_us") < 0 || us("db_us") < us("db_wait_us") || us("duration_us") < us("db_us") {
						t.Errorf("request line %v, want db_wait_us <= db_us <= duration_us", line)
					}
					if route, _ := line["route"].(string); strings.HasPrefix(route, "/api/") != (us("db_us") > 0) && route != "/health/ready" {
						t.Errorf("request line %v, want db_us > 0 if the database was used", line)
					}
					if line["request_id"] == "waits" && us("db_wait_us") < 100e3 {
						t.Errorf("request line %v, want the wait for the connection", line)
					}
				}
			}
			want := map[string]int{"WARNING slow statement: INSERT INTO 1 <nil>": 1}
			if level == "debug" {
				maps.Copy(want, map[string]int{
					"DEBUG statement: INSERT INTO 1 <nil>": 2,
					"DEBUG statement: INSERT INTO 0 P0001": 1,
					"DEBUG statement: SELECT id 2 <nil>":   1,
					"DEBUG statement: SELECT id 1 <nil>":   1,
					"DEBUG statement: SELECT id 0 <nil>":   1,
					"DEBUG statement: UPDATE 1 <nil>":      1,
					"DEBUG statement: DELETE FROM 1 <nil>": 1,
				})
			}
			if !maps.Equal(statements, want) {
				t.Errorf("the log has the statements %v, want %v", statements, want)
			}
		})
	}
}

// What a client sends does not make the log's lines long.
func TestLogLinesAreBounded(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "LOG_LEVEL=debug", "CORS_ORIGINS=https://app.example.com")
	p.waitReady()
	c := newClientOf(t, p.url, "test-"+rand.Text())
	tasks := "/api/" + c.user + "/tasks"
	long := func(text string) string { return strings.Repeat(text, 10<<10/len(text)) }
	for i, row := range []struct {
		method, target, header, body string
		status                       int
	}{
		{long("METHOD"), "/health/live", "X: x", "", 405},
		{strings.Repeat("M", 60<<10), "/health/live", "X: x", "", 431},
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
		{"POST", tasks, "X: x", `{"title": "` + strings.Repeat("\x01", 60<<10) + `"}`, 400},
		{"POST", tasks, "X: x", `{"title": "` + strings.Repeat(`\"`, 30<<10) + `"}`, 422},
		{"POST", tasks, "X: x", `{"` + strings.Repeat(`\\`, 30<<10) + `": 1, "title": 1}`, 422},
		{"POST", "/api/" + long("user") + "/tasks", "X: x", "", 403},
	} {
		conn := raw(t, p.url, "")
		text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\nContent-Length: %d\r\n%s\r\n\r\n%s",
			row.method, row.target, c.authorization, len(row.body), row.header, row.body)
		go io.WriteString(conn, text) // the service may close the connection before all of it is written
		if a := readAnswer(t, conn); a.status != row.status {
			t.Errorf("row %d = %d %s, want %d", i, a.status, a.body, row.status)
		}
	}
	readAnswer(t, raw(t, p.url, "GET "+tasks+" HTTP/1.1\r\nHost: todo\r\nAuthorization: Bearer "+long("a.")+"\r\n\r\n"))
	c.send("GET", "/health/live", "", "X-Request-Id", "the last one")
	c.send("GET", "/health/live", "", "X-Request-Id", "last")
	p.request("last")
	for line := range strings.Lines(p.output.String()) {
		if len(line) > 8<<10 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
}

func TestDocsHeaders(t *testing.T) {
	t.Parallel()
	a := newClient(t).send("GET", "/docs", "")
	if got := a.header.Get("Referrer-Policy"); got != "no-referrer" {
		t.Errorf("Referrer-Policy of /docs = %q, want no-referrer", got)
	}
}

// A secret that was probably not meant as it is works, with one WARNING.
func TestSecretWarnings(t *testing.T) {
	t.Parallel()
	const good = "secret;of;the;tests;0123456789;abcdef"
	for _, row := range []struct{ secret, secrets, want string }{
		{good, "", ""},
		{good[:20] + " \"' \ufeff" + good[20:], "", ""},
		{"", "2:" + good + "2, 1: " + good + " ", ""}, // they are trimmed
		{good + "\n", "", "BETTER_AUTH_SECRET begins or ends with white space"},
		{"\u00a0" + good, "", "BETTER_AUTH_SECRET begins or ends with white space"},
		{`"` + good + `"`, "", "BETTER_AUTH_SECRET begins or ends with a quotation mark"},
		{good + "'", "", "BETTER_AUTH_SECRET begins or ends with a quotation mark"},
		{"\u201c" + good, "", "BETTER_AUTH_SECRET begins or ends with a quotation mark"},
		{"\ufeff" + good, "", "BETTER_AUTH_SECRET begins or ends with a byte order mark"},
		{strings.Repeat("#", 40), "", "BETTER_AUTH_SECRET is one repeated character"},
		{strings.Repeat("é", 16), "", "BETTER_AUTH_SECRET is one repeated character"},
		{"", "2:" + good + ",1:`" + good, "BETTER_AUTH_SECRETS entry 2 begins or ends with a quotation mark"},
		{"", "2:" + strings.Repeat("#", 32), "BETTER_AUTH_SECRETS entry 1 is one repeated character"},
	} {
		var out lockedBuffer
		// The start ends at the port.
		env := environment{"BETTER_AUTH_SECRET": row.secret, "BETTER_AUTH_SECRETS": row.secrets,
			"DATABASE_URL": "postgres://localhost/none", "PORT": "none"}
		if err := run(t.Context(), nil, env.get, &out); err == nil || !strings.Contains(err.Error(), "PORT") {
			t.Fatalf("run = %v, want an error that names PORT", err)
		}
		var warnings []string
		for _, line := range out.lines(t) {
			warnings = append(warnings, fmt.Sprint(line["severity"], " ", line["message"]))
		}
		if row.want == "" && warnings == nil {
			continue
		}
		if len(warnings) != 1 || row.want == "" || !strings.HasPrefix(warnings[0], "WARNING "+row.want) {
			t.Errorf("%q, %q: the log has %q, want one WARNING: %s", row.secret, row.secrets, warnings, row.want)
		}
		for part := range strings.FieldsFuncSeq(row.secret+row.secrets, func(c rune) bool { return strings.ContainsRune(":,;\"'` ", c) }) {
			if len(part) > 3 && strings.Contains(out.String(), part) {
				t.Errorf("the log contains a part of the secret, %q: %s", part, out.String())
			}
		}
	}
}

// A list of a hundred tags is long enough for anyone; TestMalformedConditions has a longer one.
func TestHundredTags(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	a := c.do("POST", "", `{"title": "x"}`)
	path := fmt.Sprint("/", decode[wireTask](t, a.body).ID)
	tags := strings.Repeat(`"x", `, 99) + a.header.Get("ETag")
	if a := c.do("PATCH", path, "{}", "If-Match", tags); a.status != 200 {
		t.Errorf("If-Match with 100 tags = %d %s, want 200", a.status, a.body)
	}
}
