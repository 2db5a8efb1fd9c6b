package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Faults of connections, and what the service does about them. outage_test.go is about a database
// that is unreachable.

// fewConns is the size of the pool in tests whose load must not take all connections of the server.
const fewConns = 6

// createSmallDatabase is createDatabase with a pool of fewConns.
func createSmallDatabase(t testing.TB) string {
	t.Helper()
	return withParam(createDatabase(t), fmt.Sprint("pool_max_conns=", fewConns))
}

// A change whose request or response is dropped is made at most once. With the headers of the
// contract it is safe to repeat. A read succeeds.
func TestDroppedRequestsAndResponses(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, method, path, body string
		header, value            string // with which the request may be repeated, or ""
		status                   int
		// The status of the repetition and the user's tasks, if the request was dropped and if the
		// response was.
		unmade, made  int
		before, after string
	}{
		{"list", "GET", "", "", "", "", 200, 0, 0, "before", "before"},
		{"get", "GET", "ID", "", "", "", 200, 0, 0, "before", "before"},
		{"create", "POST", "", `{"title": "new"}`, "", "", 503, 0, 0, "before", "new, before"},
		{"create with a key", "POST", "", `{"title": "new"}`, "Idempotency-Key", "one-key-for-both", 201,
			201, 201,
			"new, before", "new, before"},
		{"toggle", "PATCH", "ID/complete", "", "", "", 503, 0, 0, "before", "before done"},
		{"patch", "PATCH", "ID", `{"title": "after"}`, "", "", 503, 0, 0, "before", "after"},
		{"patch of a version", "PATCH", "ID", `{"title": "after"}`, "If-Match", "ETAG", 503, 200, 412,
			"before", "after"},
		{"delete", "DELETE", "ID", "", "", "", 503, 0, 0, "before", ""},
	} {
		for _, dropped := range []string{"request", "response"} {
			what := row.name + " whose " + dropped + " is dropped"
			d, r := startOverRelay(t)
			c := startService(t, d, settings{}).newClient()
			before := c.do("POST", "", `{"title": "before"}`)
			runStatements(t, d, c.service, 2)
			path := strings.ReplaceAll(row.path, "ID", decode[wireTask](t, before.body).path())
			var headers []string
			if row.header != "" {
				headers = []string{row.header, strings.ReplaceAll(row.value, "ETAG", before.header.Get("ETag"))}
			}
			c.send("GET", "/health/ready", "") // on a paused machine, the fault would hit a ping
			tasks, again := row.before, row.unmade
			if dropped == "request" {
				r.dropRequests.Store(1)
			} else {
				r.dropResponses.Store(1)
				tasks, again = row.after, row.made
			}
			wantTasks := func(what, want string) {
				t.Helper()
				var got []string
				for _, task := range c.list("") {
					state := map[bool]string{true: " done"}[task.Completed]
					got = append(got, task.Title+state)
				}
				if got := strings.Join(got, ", "); got != want {
					t.Errorf("%s: the tasks are %q, want %q", what, got, want)
				}
			}
			a := c.do(row.method, path, row.body, headers...)
			if a.status != row.status || a.status == 503 && a.detail() != errUnavailable.detail {
				t.Errorf("%s = %v, want %d", what, a, row.status)
			}
			wantTasks(what, tasks)
			if headers == nil {
				continue
			}
			a = c.do(row.method, path, row.body, headers...)
			replayed := a.header.Get("Idempotency-Replayed") == "true"
			if a.status != again || replayed != (again == 201) {
				t.Errorf("%s, repeated = %v, replayed: %t, want %d", what, a, replayed, again)
			}
			wantTasks(what+", repeated", row.after)
		}
	}
}

// An impatient client closes the connection of a request after a timeout, unless that is 0.
type impatient struct {
	http.RoundTripper
	timeout *atomic.Int64 // nanoseconds
}

func (c *impatient) RoundTrip(r *http.Request) (*http.Response, error) {
	if timeout := time.Duration(c.timeout.Load()); timeout > 0 {
		ctx, cancel := context.WithCancel(r.Context())
		time.AfterFunc(timeout, cancel) // not at the end of RoundTrip: the body is read after it
		r = r.WithContext(ctx)
	}
	return c.RoundTripper.RoundTrip(r)
}

// Under load, a series of faults neither loses nor repeats a change. Afterwards the service
// recovers at once, and at no time does it open connections in a storm.
func TestNoChangeIsLost(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name       string
		reads      bool // succeed during the faults
		disconnect bool // clients do, about half the time
		// Each slot tries to connect two to four times a second, and a broken connection resets all.
		leastDials, mostDials int64
		fault                 func(r *relay, tick int, terminate func())
	}{
		{"connections are cut", false, false, 2 * fewConns, 160, func(r *relay, tick int, _ func()) {
			if tick%6 == 0 { // time for TLS and SCRAM on a busy machine
				r.cut()
			}
		}},
		{"sessions are terminated", false, false, 2 * fewConns, 160,
			func(_ *relay, tick int, terminate func()) {
				if tick%6 == 0 {
					terminate()
				}
			}},
		{"requests are dropped", false, false, 2 * fewConns, 600, func(r *relay, _ int, _ func()) {
			r.dropRequests.Store(2)
		}},
		{"responses are dropped", false, false, 2 * fewConns, 600, func(r *relay, _ int, _ func()) {
			r.dropResponses.Store(2)
		}},
		{"database restarts", true, false, 2 * fewConns, 160, func(r *relay, tick int, _ func()) {
			switch tick { // so that no request meets both restarts
			case 0, 30:
				r.down.Store(true)
				r.cut()
			case 10:
				r.down.Store(false)
			}
		}},
		{"pooler restarts", true, false, 2 * fewConns, 200, func(r *relay, tick int, _ func()) {
			switch tick % 20 {
			case 0:
				r.down.Store(true)
				r.cut()
			case 3:
				r.down.Store(false)
			}
		}},
		{"network stalls", true, false, 1, 3 * fewConns, func(r *relay, tick int, _ func()) {
			r.stalled.Store(tick%40 < 20)
		}},
		{"clients disconnect", false, true, 1, fewConns, func(r *relay, _ int, _ func()) {
			r.delay.Store(int64(20 * time.Millisecond))
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			u := createSmallDatabase(t)
			d, r := openOverRelay(t, u)
			s := startService(t, startDB(t, d), settings{})
			c := s.newClient()
			list := func() time.Duration {
				start := time.Now()
				c.list("")
				return time.Since(start)
			}
			list()
			usual := list()
			l := newLedger(t, d, s.url, r.name)
			l.reads = row.reads
			var timeout atomic.Int64
			for _, c := range l.users {
				c.http.Transport = &impatient{c.http.Transport, &timeout}
			}
			// At this distance most clients wait for the database whenever a fault occurs.
			r.delay.Store(int64(5 * time.Millisecond))
			l.run()
			if row.disconnect {
				timeout.Store(int64(usual + 30*time.Millisecond))
			}
			for tick := range 40 {
				row.fault(r, tick, func() { endSessions(t, u) })
				time.Sleep(50 * time.Millisecond)
			}
			r.heal()
			if took := list(); took > 2*time.Second+10*usual && !underRace() {
				t.Errorf("after the faults a list takes %v, want 2 s at most", took)
			}
			l.end()
			l.check()
			if n := r.dials.Load(); n < row.leastDials || n > row.mostDials {
				t.Errorf("%d connections were opened, want %d to %d", n, row.leastDials, row.mostDials)
			}
		})
	}
}

// All connections break at once, as when Neon suspends the compute, or a platform the machine. A
// write does not fail, because the connections were idle or because a read noticed it first.
func TestBrokenConnectionsAreNoticed(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		silent bool
		idle   time.Duration
		first  []retryPolicy // statements before many concurrent writes
	}{
		{"cut, used at once", false, 0, []retryPolicy{retry}},
		{"cut after idle time", false, 1100 * time.Millisecond, nil},
		{"silent after idle time, used by one", true, 1100 * time.Millisecond, []retryPolicy{noRetry}},
		{"silent after idle time, used by all", true, 1100 * time.Millisecond, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := startOverRelay(t)
			connect(t, d, fewConns)
			start := time.Now()
			if row.silent {
				r.silence()
			} else {
				r.cut()
			}
			eventually(t, "idle time", func() bool { return time.Since(start) > row.idle })
			start = time.Now()
			use := func(policy retryPolicy) {
				if _, err := query(t.Context(), d, policy, pgx.RowTo[int], `SELECT 1`); err != nil {
					t.Errorf("retry %t: %v, want success", policy, err)
				}
			}
			for _, policy := range row.first {
				use(policy)
			}
			var writes sync.WaitGroup
			for range fewConns {
				writes.Go(func() { use(noRetry) })
			}
			writes.Wait()
			// A ping takes a second. Without Reset it would be a second for each connection.
			if took := time.Since(start); took > 4*time.Second {
				t.Errorf("changes on %d broken connections took %v, want %v", fewConns, took, pingTimeout)
			}
		})
	}
}

// All connections become silent while they are in use. Their requests end at the deadline, and then
// the pool has others.
func TestSilentPeer(t *testing.T) {
	t.Parallel()
	d, r := openOverRelay(t, createSmallDatabase(t))
	s := startService(t, startDB(t, d), settings{})
	l := newLedger(t, d, s.url, r.name)
	r.delay.Store(int64(5 * time.Millisecond))
	l.run()
	r.silence()
	eventually(t, "new connections", func() bool {
		n := 0
		r.each(func(l *link) {
			if !l.silent.Load() {
				n++
			}
		})
		return n >= fewConns
	})
	l.end()
	start := time.Now()
	l.users[0].list("")
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("afterwards a list takes %v, want it at once", took)
	}
	l.check()
}

// New connections are silent too. A statement that was abandoned does not occupy its slot for long.
func TestSilentPeerFreesItsSlots(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	connect(t, d, 3)
	r.stalled.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var statements sync.WaitGroup
	for range 3 {
		statements.Go(func() {
			_, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT 1`)
			if !errors.Is(err, errUnavailable) {
				t.Errorf("a statement without a response = %v, want %v", err, errUnavailable)
			}
		})
	}
	statements.Wait()
	start := time.Now()
	eventually(t, "empty pool", func() bool { return d.pool.Stat().TotalConns() == 0 })
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("the slots are free after %v, want 2 s", took)
	}
	r.heal()
}

// pgx also dials to cancel a statement. If no host responds, that must not occupy the slot.
func TestUnansweredDialEndsSoon(t *testing.T) {
	t.Parallel()
	listener := listenLocally(t)
	socket, err := listener.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// The kernel accepts one or two connections and drops the next ones.
	socket.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) })
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		var conn net.Conn
		conn, err = net.DialTimeout("tcp", listener.Addr().String(), 100*time.Millisecond)
		if err == nil {
			defer conn.Close()
		}
	}
	config, _, err := poolConfig("postgres://u:p@localhost/d")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	conn, err := config.ConnConfig.DialFunc(t.Context(), "tcp", listener.Addr().String())
	if took := time.Since(start); err == nil || took < time.Second || took > 8*time.Second {
		t.Errorf("dial = %v, %v after %v, want an error after 2 s", conn, err, took)
	}
}

// The server accepts no more connections, as when other instances have them all. The existing ones
// serve everyone, and the attempts to open others are not a storm.
func TestNoRoomForMoreConnections(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	c := startService(t, d, settings{}).newClient()
	c.http = keepingConnections(t)
	connect(t, d, 2)
	r.room.Store(2)
	r.delay.Store(int64(5 * time.Millisecond))
	before, end := r.dials.Load(), time.Now().Add(2*time.Second)
	var clients sync.WaitGroup
	for range 40 {
		clients.Go(func() {
			for time.Now().Before(end) {
				if a, err := c.try("GET", c.path(""), ""); err != nil || a.status != 200 {
					t.Errorf("list = %v %v, want 200", a, err)
				}
			}
		})
	}
	clients.Wait()
	if n := r.dials.Load() - before; n < 1 || n > 200 {
		t.Errorf("%d attempts to connect in 2 s, want some, and 200 at most", n)
	}
}

// All connections wait for another session's lock. Later requests get a 503 after acquireTimeout.
func TestExhaustedPool(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	d, r := startOverRelay(t)
	s := startService(t, d, settings{})
	c := s.newClient()
	path := c.path(c.create("free").path())
	const share = defaultMaxConns / 3 // of a user
	tx := begin(t, sharedDB)
	var blocked sync.WaitGroup
	var changed atomic.Int64
	for range 3 {
		c := s.newClient()
		path := c.path(c.create("locked").path())
		sqlExec(t, tx, `SELECT FROM public.tasks WHERE user_id = $1 FOR UPDATE`, c.user)
		for range share {
			blocked.Go(func() {
				a, err := c.try("PATCH", path, `{}`)
				switch {
				case err == nil && a.status == 200:
					changed.Add(1)
				case err != nil || a.status != 503: // 503: the rest of this test took long
					t.Errorf("blocked change = %v %v, want 200", a, err)
				}
			})
		}
	}
	eventually(t, "busy connections", func() bool {
		return d.pool.Stat().AcquiredConns() == defaultMaxConns
	})
	var late sync.WaitGroup
	for range share {
		late.Go(func() {
			start := time.Now()
			a, err := c.try("GET", path, "")
			if took := time.Since(start); err != nil || a.status != 503 ||
				took < acquireTimeout || took > acquireTimeout+4*time.Second {
				t.Errorf("next to the blocked changes = %v %v after %v, want 503 after %v",
					a, err, took, acquireTimeout)
			}
		})
	}
	start := time.Now()
	if a := c.send("GET", "/health/live", ""); a.status != 200 || time.Since(start) > 5*time.Second {
		t.Errorf("/health/live = %v after %v, want 200 at once", a, time.Since(start))
	}
	late.Wait()
	cause := fmt.Sprint("all connections were busy for ", acquireTimeout)
	if !strings.Contains(s.log.String(), cause) {
		t.Errorf("the log does not contain %q: %s", cause, s.log.String())
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	blocked.Wait()
	if changed.Load() == 0 {
		t.Error("no blocked change succeeded after the lock was released")
	}
	if a := c.send("GET", path, ""); a.status != 200 {
		t.Errorf("afterwards = %v, want 200", a)
	}
	if dials := r.dials.Load(); dials > defaultMaxConns {
		t.Errorf("%d connections were opened, want %d at most", dials, defaultMaxConns)
	}
}

// After a failover the sessions of the pool are read-only, and new ones are not.
func TestReadOnlySessions(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d, r := openOverRelay(t, u)
	s := startService(t, startDB(t, d), settings{})
	users := make([]*client, 8)
	for i := range users {
		users[i] = s.newClient()
	}
	alterDatabase(t, u, `SET default_transaction_read_only = on`)
	d.pool.Reset()
	renewSessions(t, u)

	start, dials := time.Now(), r.dials.Load()
	for time.Since(start) < 2500*time.Millisecond {
		if a := users[0].do("POST", "", `{"title": "x"}`); a.status != 503 {
			t.Fatalf("create while the database is read-only = %v, want 503", a)
		}
		users[0].list("")
		time.Sleep(10 * time.Millisecond)
	}
	// One request at a time uses one session, so each reset costs one. The first reset came before.
	n, most := r.dials.Load()-dials, int64(time.Since(start)/time.Second)+2
	if n > most {
		t.Errorf("%d sessions in %v, want %d at most: a reset a second", n, time.Since(start), most)
	}

	connect(t, d, 5)
	alterDatabase(t, u, `RESET default_transaction_read_only`)
	renewSessions(t, u)
	eventually(t, "end of the second after the last reset", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return time.Since(d.lastReset) > time.Second
	})
	for _, a := range atOnce(t, 40, func(i int) (answer, error) {
		c := users[i%len(users)]
		return c.try("POST", c.path(""), `{"title": "x"}`)
	}) {
		if a.status != 201 {
			t.Errorf("create after the failover = %v, want 201", a)
		}
	}
	if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM public.tasks`); n != 40 {
		t.Errorf("%d tasks, want 40", n)
	}
}
