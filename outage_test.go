package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// A database that is unreachable, resuming or suspended: at start, for seconds, for long.

func TestUnreachableDatabaseAtStart(t *testing.T) {
	t.Parallel()
	start := time.Now()
	unreachable := "DATABASE_URL=postgres://todo:hunter2@127.0.0.1:" + freePort(t) + "/todo"
	p, signaled := startProcess(t, unreachable), startProcess(t, unreachable)
	c := p.newClient()
	signaled.waitLive()
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("live after %v, want it before the database is reached", took)
	}
	signaled.signal(syscall.SIGTERM)
	if status := signaled.wait(5 * time.Second); status != 0 {
		t.Errorf("SIGTERM before the database is reached: exit status %d, want 0: %s",
			status, signaled.output.String())
	}

	for _, path := range []string{"/health/ready", c.path("")} {
		sent := time.Now()
		a := c.send("GET", path, "", "X-Request-Id", path)
		if took := time.Since(sent); a.status != 503 || took > 20*time.Second {
			t.Errorf("GET %s = %v after %v, want 503 within 20 s", path, a, took)
		}
		if line := p.output.request(t, path); line["severity"] != "WARNING" {
			t.Errorf("GET %s is logged as %v, want severity WARNING", path, line)
		}
	}
	if status := p.health("live"); status != 200 {
		t.Errorf("/health/live = %d, want 200", status)
	}
	// A request still waits when the process exits.
	sent := time.Now()
	if a := c.do("GET", "", ""); a.status != 503 || time.Since(sent) > 14*time.Second {
		t.Errorf("list at the exit = %v after %v, want 503 before its deadline", a, time.Since(sent))
	}

	status := p.wait(15 * time.Second)
	if took := time.Since(start); status != 1 || took < 25*time.Second || took > 45*time.Second {
		t.Errorf("exit status %d after %v, want 1 after 30 s", status, took)
	}
	lines := p.output.lines(t)
	last := lines[len(lines)-1]
	for _, part := range []string{"DATABASE_URL", "refused"} {
		if message := fmt.Sprint(last["message"]); last["severity"] != "ERROR" ||
			!strings.Contains(message, part) {
			t.Errorf("the last line is %v, want an ERROR that contains %q", last, part)
		}
	}
	if output := p.output.String() + signaled.output.String(); strings.Contains(output, "hunter2") {
		t.Errorf("the log contains the password: %s", output)
	}
}

// An instance starts before its database does. Requests wait for it.
func TestDatabaseStartsLater(t *testing.T) {
	t.Parallel()
	unreachable := "127.0.0.1:" + freePort(t)
	var up atomic.Bool
	var failures atomic.Int32
	d := openDB(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn,
			error) {
			if !up.Load() {
				failures.Add(1)
				return new(net.Dialer).DialContext(ctx, "tcp", unreachable)
			}
			return dial(ctx, network, address)
		}
	})
	started := make(chan error, 1)
	go func() { started <- d.ensureSchema(t.Context()) }()
	c := startService(t, d, settings{}).newClient()
	waiting := make(chan answer, 1)
	go func() {
		a, err := c.try("POST", c.path(""), `{"title": "x"}`)
		if err != nil {
			t.Error(err)
		}
		waiting <- a
	}()
	// with full backoff
	eventually(t, "twelfth attempt to connect", func() bool { return failures.Load() >= 12 })
	start := time.Now()
	up.Store(true)
	if c.list(""); time.Since(start) > 6*time.Second {
		t.Errorf("list %v after the database started, want it in about a second", time.Since(start))
	}
	if a := <-waiting; a.status != 201 {
		t.Errorf("a create that waited for the database = %v, want 201", a)
	}
	if err := <-started; err != nil {
		t.Errorf("start = %v, which would end the process", err)
	}
}

// A request waits longer for a database that restarts or resumes than for a busy pool, even if the
// pool still has connections that are closed or silent.
func TestLongRestart(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		conns int
		fault func(*relay)
	}{
		{"down", 0, func(r *relay) { r.down.Store(true) }},
		{"resuming", 0, func(r *relay) { r.stalled.Store(true) }},
		{"resuming, connections cut", 3, func(r *relay) { r.stalled.Store(true); r.cut() }},
		{"resuming, connections silent", 3, func(r *relay) { r.silence(); r.stalled.Store(true) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := startOverRelay(t)
			c := startService(t, d, settings{}).newClient()
			if row.conns == 0 {
				d.pool.Reset() // a change on a connection that is cut may have run: it would get a 503
			} else {
				connect(t, d, row.conns)
				idle := time.Now()
				eventually(t, "idle time", func() bool { return time.Since(idle) > 1100*time.Millisecond })
			}
			row.fault(r)
			time.AfterFunc(acquireTimeout+2*time.Second, r.heal)
			var requests sync.WaitGroup
			for _, request := range []struct {
				method, body string
				status       int
			}{{"GET", "", 200}, {"POST", `{"title": "x"}`, 201}} {
				requests.Go(func() {
					start := time.Now()
					a, err := c.try(request.method, c.path(""), request.body)
					if took := time.Since(start); err != nil || a.status != request.status ||
						took < acquireTimeout {
						t.Errorf("%s = %v %v after %v, want %d after the restart",
							request.method, a, err, took, request.status)
					}
				})
			}
			requests.Wait()
		})
	}
}

// In a long outage requests get their 503 soon, attempts to connect are rare, and the recovery is
// noticed.
func TestLongOutage(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		fault   func(*relay)
		atStart bool // the instance has never reached the database
	}{
		{"connections closed", func(r *relay) { r.down.Store(true); r.cut() }, false},
		{"silence", func(r *relay) { r.stalled.Store(true); r.cut() }, false},
		{"connections closed at start", func(r *relay) { r.down.Store(true) }, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			// A silent attempt takes longer than a request may, and less than the usual 10 s.
			d, r := openOverRelay(t, withParam(sharedDatabaseURL(), "connect_timeout=4"))
			addresses, err := net.LookupHost(d.pool.Config().ConnConfig.Host)
			if err != nil {
				t.Fatal(err)
			}
			if row.atStart {
				row.fault(r)
			}
			ctx, cancel := context.WithCancel(t.Context())
			started := make(chan error, 1)
			go func() { started <- d.ensureSchema(ctx) }()
			defer func() { cancel(); <-started }()
			s := startService(t, d, settings{})
			clients := make([]*client, 10)
			for i := range clients {
				clients[i] = s.newClient()
			}
			if !row.atStart {
				clients[0].create("before")
				row.fault(r)
			}

			var load sync.WaitGroup
			defer load.Wait()
			var healed atomic.Bool
			for _, c := range clients[1:] {
				load.Go(func() {
					for !healed.Load() {
						outage, start := d.outage(), time.Now()
						a, err := c.try("GET", c.path(""), "")
						took := time.Since(start)
						if healed.Load() {
							return
						}
						if err != nil || a.status != 503 {
							t.Errorf("list = %v %v, want 503", a, err)
						}
						// 8 s for a machine that pauses. Without outageWait it is requestTimeout.
						if outage && took > outageWait+8*time.Second {
							t.Errorf("list in the outage took %v, want %v", took, outageWait)
						}
					}
				})
			}
			eventually(t, "failure", func() bool {
				d.mu.Lock()
				defer d.mu.Unlock()
				return d.failures > 0
			})
			eventually(t, "long outage", d.outage)
			start, dials := time.Now(), r.dials.Load()
			eventually(t, "four seconds of the outage",
				func() bool { return time.Since(start) > 4*time.Second })
			most := int64(len(addresses)) * (2 + int64(time.Since(start)/time.Second))
			if n := r.dials.Load() - dials; n < 2 || n > most {
				t.Errorf("%d attempts to connect in %v of the outage, want some, and %d at most",
					n, time.Since(start), most)
			}
			healed.Store(true)
			r.heal()
			// The promise is 2 s.
			retryAfterPause(t, func() error { return clients[0].listWithin(3 * time.Second) })
			if d.outage() {
				t.Error("it is still a long outage")
			}
		})
	}
}

// A time without requests is no outage, even if an attempt to connect failed before it.
func TestIdleTimeIsNoOutage(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	c := startService(t, d, settings{}).newClient()
	c.create("before")
	d.mu.Lock()
	d.failures, d.firstFailure = 7, time.Now().Add(-2*outageForget)
	d.lastFailure = d.firstFailure
	d.mu.Unlock()
	r.down.Store(true)
	r.cut()
	start := time.Now()
	a := c.do("GET", "", "")
	if took := time.Since(start); a.status != 503 || took < requestTimeout-3*time.Second {
		t.Errorf("first list after the idle time = %v after %v, want 503 after %v",
			a, took, requestTimeout)
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for i, longest := range []time.Duration{25, 50, 100, 200, 400, 500, 500, 500} {
			longest *= time.Millisecond
			least, most := longest, time.Duration(0)
			for range 1000 {
				start := time.Now()
				if !backoff(t.Context(), i+1) {
					t.Fatal("the context is done")
				}
				took := time.Since(start)
				least, most = min(least, took), max(most, took)
			}
			if least < longest/2 || least > longest*6/10 {
				t.Errorf("the shortest of 1000 delays after try %d is %v, want about %v", i+1, least, longest/2)
			}
			if most < longest*9/10 || most > longest {
				t.Errorf("the longest of 1000 delays after try %d is %v, want about %v", i+1, most, longest)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if backoff(ctx, 1) {
			t.Error("a delay does not end with its context")
		}
	})
}

// Every session and every statement would postpone the suspension of Neon's compute by five
// minutes. A suspended compute has closed the sessions. The first request, a read or a change,
// resumes it.
func TestIdle(t *testing.T) {
	t.Parallel()
	for method, body := range map[string]string{"GET": "", "POST": `{"title": "after"}`} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			u := createDatabase(t)
			d := startDB(t, openDB(t, u, func(config *pgxpool.Config) {
				config.HealthCheckPeriod = 20 * time.Millisecond
				if method == "GET" { // the connections expire, and no other must replace them
					config.MaxConnLifetime, config.MaxConnLifetimeJitter = time.Second, 0
					config.MaxConnIdleTime = time.Second
				}
			}))
			c := startService(t, d, settings{}).newClient()
			c.create("before")

			// Sessions of clients and the time of their statements; those of autovacuum do not count.
			counters := func() string {
				return sqlValue[string](t, sharedDB.pool, `
					SELECT sessions || ' sessions, ' || active_time || ' ms'
					FROM pg_stat_database
					WHERE datname = $1`, databaseName(t, u))
			}
			before, since := counters(), time.Now()
			eventually(t, "end of the counting", func() bool { // the server counts up to a second later
				if now := counters(); now != before {
					before, since = now, time.Now()
				}
				return time.Since(since) > 1500*time.Millisecond
			})
			const interval = 20 * time.Millisecond
			for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(interval) {
				if a := c.send("GET", "/health/live", ""); a.status != 200 {
					t.Fatalf("/health/live = %v", a)
				}
			}
			if after := counters(); after != before {
				t.Errorf("without requests the database counts %s after %s, want no difference", after, before)
			}

			endSessions(t, u)
			if a := c.do(method, "", body); a.status/100 != 2 {
				t.Errorf("%s after the suspension = %v, want success", method, a)
			}
			eventually(t, "more counted sessions", func() bool { return counters() != before })
		})
	}
}
