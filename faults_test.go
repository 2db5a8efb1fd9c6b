package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A change whose request or answer is lost is made at most once, and repeating
// it is safe where the contract says so. A read is not touched by it.
func TestLostRequestsAndAnswers(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, method, path, body string
		header, value            string // with which the request may be repeated, or ""
		status                   int
		unmade, made             int    // the status of its repetition: where the request was lost, and where its answer was
		was, is                  string // the user's tasks in the same two cases
	}{
		{"list", "GET", "", "", "", "", 200, 0, 0, "before", "before"},
		{"get", "GET", "/ID", "", "", "", 200, 0, 0, "before", "before"},
		{"create", "POST", "", `{"title": "new"}`, "", "", 503, 0, 0, "before", "new, before"},
		{"create with a key", "POST", "", `{"title": "new"}`, "Idempotency-Key", "one-key-for-both", 201, 201, 201, "new, before", "new, before"},
		{"toggle", "PATCH", "/ID/complete", "", "", "", 503, 0, 0, "before", "before done"},
		{"patch", "PATCH", "/ID", `{"title": "after"}`, "", "", 503, 0, 0, "before", "after"},
		{"patch of a version", "PATCH", "/ID", `{"title": "after"}`, "If-Match", "ETAG", 503, 200, 412, "before", "after"},
		{"delete", "DELETE", "/ID", "", "", "", 503, 0, 0, "before", ""},
	} {
		for _, lost := range []string{"request", "answer"} {
			d, r := openOver(t)
			c := newClientOf(t, newService(t, d), "test-"+rand.Text())
			before := c.do("POST", "", `{"title": "before"}`)
			runStatements(t, d, c.service, 2)
			path := strings.ReplaceAll(row.path, "ID", fmt.Sprint(decode[wireTask](t, before.body).ID))
			var headers []string
			if row.header != "" {
				headers = []string{row.header, strings.ReplaceAll(row.value, "ETAG", before.header.Get("ETag"))}
			}
			c.send("GET", "/health/ready", "") // or a pre-ping would meet the loss where the machine paused for a second
			want, again := row.was, row.unmade
			if lost == "request" {
				r.loseRequests.Store(1)
			} else {
				r.loseAnswers.Store(1)
				want, again = row.is, row.made
			}
			a := c.do(row.method, path, row.body, headers...)
			if a.status != row.status || a.status == 503 && (a.header.Get("Retry-After") == "" || !strings.Contains(a.body, "may or may not have been made")) {
				t.Errorf("%s, %s lost: %d %s, want %d", row.name, lost, a.status, a.body, row.status)
			}
			tasks := func() string {
				var list []string
				for _, task := range decode[[]wireTask](t, c.do("GET", "", "").body) {
					list = append(list, strings.TrimSpace(task.Title+map[bool]string{true: " done"}[task.Completed]))
				}
				return strings.Join(list, ", ")
			}
			if got := tasks(); got != want {
				t.Errorf("%s, %s lost: the tasks are %q, want %q", row.name, lost, got, want)
			}
			if headers == nil {
				continue
			}
			if a := c.do(row.method, path, row.body, headers...); a.status != again || (again == 201) != (a.header.Get("Idempotency-Replayed") == "true") {
				t.Errorf("%s, %s lost, repeated: %d %v, want %d", row.name, lost, a.status, a.header, again)
			}
			if got := tasks(); got != row.is {
				t.Errorf("%s, %s lost, repeated: the tasks are %q, want %q", row.name, lost, got, row.is)
			}
		}
	}
}

// Alone, for the sake of terminate and of the time to recover.
func TestNothingIsLost(t *testing.T) {
	for _, row := range []struct {
		name  string
		reads bool // succeed nevertheless
		leave bool // clients do, about half the time
		// Each of the 15 places tries to connect two to four times a second, more often at first; and each loss renews all.
		leastDials, mostDials int64
		fault                 func(t *testing.T, r *relay, tick int)
	}{
		{"connections cut again and again", false, false, 2 * defaultMaxConns, 400, func(_ *testing.T, r *relay, tick int) {
			if tick%6 == 0 { // or a busy machine never gets through a TLS and SCRAM handshake
				r.cut()
			}
		}},
		{"connections terminated again and again", false, false, 2 * defaultMaxConns, 400, func(t *testing.T, r *relay, tick int) {
			if tick%6 == 0 {
				r.terminate(t)
			}
		}},
		{"requests lost", false, false, 2 * defaultMaxConns, 1500, func(_ *testing.T, r *relay, _ int) { r.loseRequests.Store(2) }},
		{"answers lost", false, false, 2 * defaultMaxConns, 1500, func(_ *testing.T, r *relay, _ int) { r.loseAnswers.Store(2) }},
		{"database restarts", true, false, 2 * defaultMaxConns, 400, func(_ *testing.T, r *relay, tick int) {
			switch tick { // far apart, or a slow machine has one request meet two restarts
			case 0, 50:
				r.down.Store(true)
				r.cut()
			case 10:
				r.down.Store(false)
			}
		}},
		{"pooler restarts", true, false, 2 * defaultMaxConns, 500, func(_ *testing.T, r *relay, tick int) {
			switch tick % 30 {
			case 0:
				r.down.Store(true)
				r.cut()
			case 3:
				r.down.Store(false)
			}
		}},
		{"network stalls", true, false, 1, 3 * defaultMaxConns, func(_ *testing.T, r *relay, tick int) {
			switch tick % 40 {
			case 0:
				r.stalled.Store(true)
			case 20:
				r.stalled.Store(false)
			}
		}},
		{"clients leave", false, true, 1, defaultMaxConns, func(_ *testing.T, r *relay, _ int) { r.delay.Store(int64(20 * time.Millisecond)) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			d, r := openOver(t)
			service := newService(t, d)
			c, l := newClientOf(t, service, "test-"+rand.Text()), newLedger(t, service, r.name)
			c.create("before")
			list := func() time.Duration {
				start := time.Now()
				if a := c.do("GET", "", ""); a.status != 200 {
					t.Errorf("list = %d %s, want 200", a.status, a.body)
				}
				return time.Since(start)
			}
			far := list()
			for _, c := range l.users {
				if row.leave {
					c.http.Timeout = far + 30*time.Millisecond
				}
			}
			l.reads = row.reads
			l.run()
			for tick := range 60 {
				row.fault(t, r, tick)
				time.Sleep(50 * time.Millisecond)
			}
			r.heal()
			if took := list(); took > 2*time.Second+10*far && !underRace() {
				t.Errorf("after the faults a list takes %v, want two seconds at most", took)
			}
			l.end()
			l.check()
			if n := r.dials.Load(); n < row.leastDials || n > row.mostDials {
				t.Errorf("%d connections begun, want %d to %d", n, row.leastDials, row.mostDials)
			}
		})
	}
}

func TestNothingIsLostByAStop(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		signal         os.Signal
		status         int
		unacknowledged int
	}{
		{os.Kill, -1, 16},
		{syscall.SIGTERM, 0, 4}, // net/http may close a connection whose request it has just read
	} {
		t.Run(row.signal.String(), func(t *testing.T) {
			t.Parallel()
			takeTurns(t)
			p := startProcess(t)
			p.waitLive()
			l := newLedger(t, p.url, "todo-app")
			l.run()
			p.signal(row.signal)
			if status := p.wait(stopLimit); status != row.status {
				t.Errorf("exit status %d, want %d: %s", status, row.status, p.output.String())
			}
			l.end()
			if n := l.check(); n > row.unacknowledged {
				t.Errorf("%d changes were made and not answered, want %d at most", n, row.unacknowledged)
			}
		})
	}
}

// All connections go silent while they are in use. Who waits for an answer is
// told at the deadline, and then others are there.
func TestSilentPeer(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	d, r := openOver(t)
	l := newLedger(t, newService(t, d), r.name)
	l.run()
	r.silence()
	eventually(t, "sight of the loss", func() bool { return r.dials.Load() > 2*defaultMaxConns })
	l.end()
	start := time.Now()
	if a := l.users[0].do("GET", "", ""); a.status != 200 || time.Since(start) > 5*time.Second {
		t.Errorf("afterwards a list is %d %s after %v, want 200 at once", a.status, a.body, time.Since(start))
	}
	l.check()
}

// Nobody answers, on new connections neither: what gave up waiting does not
// keep its place in the pool for long.
func TestSilentPeerFreesItsPlaces(t *testing.T) {
	t.Parallel()
	d, r := openOver(t)
	connect(t, d, 3)
	r.stalled.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var statements sync.WaitGroup
	for range 3 {
		statements.Go(func() {
			if _, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT 1`); !errors.Is(err, errUnavailable) {
				t.Errorf("a statement without an answer = %v, want %v", err, errUnavailable)
			}
		})
	}
	statements.Wait()
	start := time.Now()
	eventually(t, "empty pool", func() bool { return d.pool.Stat().TotalConns() == 0 })
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("the places are free after %v, want 2 s", took)
	}
	r.heal()
}

// The database takes no more connections, as when other instances have them
// all: those there are serve all, and the others are not tried for in a storm.
func TestNoRoomForMoreConnections(t *testing.T) {
	t.Parallel()
	d, r := openOver(t)
	c := newClientOf(t, newService(t, d), "test-"+rand.Text())
	c.http = keepingConnections(t)
	connect(t, d, 2)
	r.room.Store(2)
	before, end := r.dials.Load(), time.Now().Add(3*time.Second)
	var clients sync.WaitGroup
	for range 40 {
		clients.Go(func() {
			for time.Now().Before(end) {
				if a, err := c.try("GET", "/api/"+c.user+"/tasks", ""); err != nil || a.status != 200 {
					t.Errorf("list = %d %s %v, want 200", a.status, a.body, err)
				}
			}
		})
	}
	clients.Wait()
	if n := r.dials.Load() - before; n < 1 || n > 300 {
		t.Errorf("%d connections begun in 3 s, want some, and 300 at most", n)
	}
}

// A request waits for a database that is away, or lets it wait at the door
// while it wakes, for longer than it would for a free connection. It does so
// too where the pool has connections of before, which are dead or silent.
func TestLongRestart(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		conns int
		away  func(*relay)
	}{
		{"down", 0, func(r *relay) { r.down.Store(true) }},
		{"waking", 0, func(r *relay) { r.stalled.Store(true) }},
		{"waking, its connections cut", 3, func(r *relay) { r.stalled.Store(true); r.cut() }},
		{"waking, its connections silent", 3, func(r *relay) { r.silence(); r.stalled.Store(true) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := openOver(t)
			c := newClientOf(t, newService(t, d), "test-"+rand.Text())
			if row.conns == 0 {
				d.pool.Reset() // what is sent on a connection that is cut may have run
			} else {
				connect(t, d, row.conns)
				idle := time.Now()
				eventually(t, "idle time", func() bool { return time.Since(idle) > 1100*time.Millisecond })
			}
			row.away(r)
			time.AfterFunc(acquireTimeout+2*time.Second, r.heal)
			var requests sync.WaitGroup
			for method, status := range map[string]int{"GET": 200, "POST": 201} {
				requests.Go(func() {
					start := time.Now()
					a, err := c.try(method, "/api/"+c.user+"/tasks", map[string]string{"POST": `{"title": "patient"}`}[method])
					if took := time.Since(start); err != nil || a.status != status || took < acquireTimeout {
						t.Errorf("%s = %d %s %v after %v, want %d after the restart", method, a.status, a.body, err, took, status)
					}
				})
			}
			requests.Wait()
		})
	}
}

// Who lost the same database comes back later each time, and not as one.
func TestPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for try, longest := range []time.Duration{25, 50, 100, 200, 400, 500, 500, 500} {
			longest *= time.Millisecond
			least, most := longest, time.Duration(0)
			for range 1000 {
				start := time.Now()
				if !backoff(t.Context(), try+1) {
					t.Fatal("the context ended")
				}
				least, most = min(least, time.Since(start)), max(most, time.Since(start))
			}
			if least < longest/2 || least > longest*6/10 || most < longest*9/10 || most > longest {
				t.Errorf("a thousand pauses before try %d took %v to %v, want %v to %v", try+1, least, most, longest/2, longest)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if backoff(ctx, 1) {
			t.Error("a pause does not end with its context")
		}
	})
}

// All connections are blocked by somebody's lock: who comes then is told soon.
func TestExhaustedPool(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	d, r := openOver(t)
	service := newService(t, d)
	c := newClientOf(t, service, "test-"+rand.Text())
	path := fmt.Sprintf("/api/%s/tasks/%d", c.user, c.create("free").ID)
	tx := begin(t, sharedDB)
	var blocked sync.WaitGroup
	for range 3 { // users, each with a third of the pool
		c := newClientOf(t, service, "test-"+rand.Text())
		path := fmt.Sprintf("/api/%s/tasks/%d", c.user, c.create("locked").ID)
		sqlExec(t, tx, `SELECT FROM tasks WHERE user_id = $1 FOR UPDATE`, c.user)
		for range defaultMaxConns / 3 {
			blocked.Go(func() {
				if a, err := c.try("PATCH", path, `{}`); err != nil || a.status != 200 && a.status != 503 { // 503 where the rest took long
					t.Errorf("blocked = %d %s %v, want 200", a.status, a.body, err)
				}
			})
		}
	}
	eventually(t, "fifteen statements under way", func() bool { return d.pool.Stat().AcquiredConns() == defaultMaxConns })
	var late sync.WaitGroup
	for range defaultMaxConns / 3 {
		late.Go(func() {
			start := time.Now()
			a, err := c.try("GET", path, "")
			took := time.Since(start)
			if err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" || took > acquireTimeout+3*time.Second {
				t.Errorf("beside fifteen blocked = %d %s %v after %v, want 503 after %v", a.status, a.body, err, took, acquireTimeout)
			}
		})
	}
	start := time.Now()
	if a := c.send("GET", "/health/live", ""); a.status != 200 || time.Since(start) > time.Second {
		t.Errorf("/health/live = %d after %v, want 200 at once", a.status, time.Since(start))
	}
	late.Wait()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	blocked.Wait()
	if a := c.send("GET", path, ""); a.status != 200 {
		t.Errorf("afterwards = %d %s, want 200", a.status, a.body)
	}
	if dials := r.dials.Load(); dials > defaultMaxConns {
		t.Errorf("%d connections, want no more than %d", dials, defaultMaxConns)
	}
}

// Each session and each statement would keep Neon awake for five minutes more.
// Asleep, it has ended the sessions; the first request, a read or a change,
// finds it awake.
func TestSleep(t *testing.T) {
	t.Parallel()
	for _, first := range []string{"GET", "POST"} {
		t.Run(first, func(t *testing.T) {
			t.Parallel()
			u := ownDatabase(t)
			d := open(t, u, func(config *pgxpool.Config) {
				config.HealthCheckPeriod = 20 * time.Millisecond
				if first == "GET" { // the connections end, and no other must take their place
					config.MaxConnLifetime, config.MaxConnLifetimeJitter, config.MaxConnIdleTime = time.Second, 0, time.Second
				}
			})
			prepare(t, d)
			service := newService(t, d)
			c := newClientOf(t, service, "test-"+rand.Text())
			c.create("before")

			// Clients' sessions and the time of their statements, as the server counts them; autovacuum does not count.
			counters := func() string {
				return sqlValue[string](t, sharedDB.pool, `SELECT sessions || ' sessions, ' || active_time || ' ms'
					FROM pg_stat_database WHERE datname = $1`, d.pool.Config().ConnConfig.Database)
			}
			before, since := counters(), time.Now()
			eventually(t, "end of the counting", func() bool { // a session tells its statements a second late
				if now := counters(); now != before {
					before, since = now, time.Now()
				}
				return time.Since(since) > 2*time.Second
			})
			for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				if a := c.send("GET", "/health/live", ""); a.status != 200 {
					t.Fatalf("/health/live = %d %s", a.status, a.body)
				}
			}
			if after := counters(); after != before {
				t.Errorf("the database counts %s, after a time without requests %s, want it asleep", before, after)
			}

			sqlExec(t, sharedDB.pool, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, d.pool.Config().ConnConfig.Database)
			a := c.do(first, "", map[string]string{"POST": `{"title": "after"}`}[first])
			if a.status/100 != 2 {
				t.Errorf("%s after a sleep = %d %s, want it to succeed", first, a.status, a.body)
			}
			eventually(t, "sign that sessions are counted", func() bool { return counters() != before })
		})
	}
}
