package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Every parameter of pgx, pgxpool and PostgreSQL works, and ours are only defaults.
func TestDatabaseURL(t *testing.T) {
	t.Parallel()
	for params, want := range map[string]string{
		"":                                   "15 cache statement todo-app",
		"?application_name=x":                "15 cache statement x",
		"?pool_max_conns=2&pool_max_conns=3": "3 cache statement todo-app",
		"?default_query_exec_mode=exec":      "15 exec todo-app",
		"?options=-c%20timezone%3DEtc/GMT+3": "15 cache statement todo-app -c timezone=Etc/GMT+3",
	} {
		config, err := poolConfig(" postgres://u:p%40s%2Fw%3F%25&=é@localhost/d" + params + "\n")
		if err != nil {
			t.Errorf("%s: %v", params, err)
			continue
		}
		conn := config.ConnConfig
		got := fmt.Sprint(config.MaxConns, " ", conn.DefaultQueryExecMode, " ",
			conn.RuntimeParams["application_name"], " ", conn.RuntimeParams["options"])
		if strings.TrimSpace(got) != want || conn.Password != "p@s/w?%&=é" {
			t.Errorf("%s: the configuration is %q, password %q, want %q", params, got, conn.Password, want)
		}
	}
}

// hostsOf describes how pgx would connect to each host of a connection string: in plain text,
// accepting any certificate, verifying its chain, or verifying it fully against the system's roots.
func hostsOf(config *pgxpool.Config) string {
	conn, hosts := config.ConnConfig, []string{}
	first := &pgconn.FallbackConfig{Host: conn.Host, TLSConfig: conn.TLSConfig}
	for _, h := range append([]*pgconn.FallbackConfig{first}, conn.Fallbacks...) {
		c, mode := h.TLSConfig, "odd"
		switch {
		case c == nil:
			mode = "plain"
		case c.InsecureSkipVerify && c.VerifyPeerCertificate == nil:
			mode = "any"
		case c.InsecureSkipVerify:
			mode = "chain"
		case c.ServerName == h.Host && c.RootCAs == nil && c.VerifyPeerCertificate == nil:
			mode = "full"
		}
		hosts = append(hosts, h.Host+" "+mode)
	}
	return strings.Join(hosts, ", ")
}

// TLS is required but on the local host, and the certificates of Neon's hosts are verified,
// whatever sslmode says. libpq's environment variables do not weaken that; setting one excludes
// t.Parallel.
func TestDatabaseURLRequiresTLS(t *testing.T) {
	t.Setenv("PGSSLMODE", "disable")
	const neon, other = "ep-a-1-pooler.c-2.eu-central-1.aws.neon.tech", "db.example.com"
	rejected := ""
	for _, row := range []struct{ url, want string }{
		{other + "/d", other + " any"},
		{other + "/d?sslmode=verify-ca", other + " chain"},
		{other + "/d?sslmode=verify-full", other + " full"},
		{neon + ".example.com/d", neon + ".example.com any"},
		{"evilneon.tech/d", "evilneon.tech any"},
		{neon + "/d?sslmode=require&channel_binding=require", neon + " full"},
		{neon + "./d?sslsni=0", neon + ". full"}, // the same host
		{"EP-A-1.AWS.NEON.TECH/d", "EP-A-1.AWS.NEON.TECH full"},
		{other + "," + neon + ":5433/d", other + " any, " + neon + " full"},
		{other + "/d?host=" + neon, neon + " full"},

		{"localhost/d", "localhost any"},
		{"127.0.0.2/d?sslmode=prefer", "127.0.0.2 any, 127.0.0.2 plain"},
		{"[::1]:5433/d?sslmode=disable", "::1 plain"},
		{"%2Ftmp/d", "/tmp plain"},

		{other + "/d?sslmode=disable", rejected},
		{other + "/d?sslmode=prefer", rejected},
		{"localhost," + other + "/d?sslmode=disable", rejected},
		{"localhost/d?sslmode=disable&host=" + other, rejected},
		{"127.0.0.1.example.com/d?sslmode=disable", rejected},
	} {
		config, err := poolConfig("postgres://u:p@" + row.url)
		got := rejected
		if err == nil {
			got = hostsOf(config)
		}
		if got != row.want {
			t.Errorf("poolConfig(%q) = %q, %v, want %q", row.url, got, err, row.want)
		}
	}
}

// The error for a malformed value is one fixed sentence. A password that is not percent-encoded
// does not become a part of the host, user or database, which later messages contain.
func TestInvalidDatabaseURL(t *testing.T) {
	t.Parallel()
	_, malformed := poolConfig("malformed")
	const other = "postgres://u:hunter2@db.example.com/d?"
	for _, text := range []string{
		"hunter2",
		`"postgres://u:hunter2@db.example.com/d"`,
		"host=db.example.com password=hunter2",
		other + "sslmode=hunter",
		"postgres://u:hunter2%zz@db.example.com/d",
		"postgres://u:hunter2@local host/d",
		"postgres://u:hunter2@db.example.com:port/d",
		"postgres://u:12/hunter2@db.example.com/d",
		"postgres://u:12?hunter2@db.example.com/d",
		"postgres://u:x@hunter2@db.example.com/d",
		other + "sslrootcert=/no/such/file",
		"postgres://u@db.example.com/d?password=hunter2%zz",
	} {
		if _, err := poolConfig(text); err == nil || err.Error() != malformed.Error() {
			t.Errorf("poolConfig(%q) = %v, want %v", text, err, malformed)
		}
	}
	for text, want := range map[string]string{
		" \n":                     "DATABASE_URL is not set",
		other + "sslmode=disable": "sslmode",
		other + "default_query_exec_mode=describe_exec": "describe_exec",
	} {
		_, err := poolConfig(text)
		if shown := fmt.Sprint(err); err == nil || !strings.Contains(shown, want) ||
			strings.Contains(shown, "hunter2") {
			t.Errorf("poolConfig(%q) = %v, want an error that contains %q", text, err, want)
		}
	}
}

// A message about a failed connection names the cause, which may be a parameter that nobody knows,
// and never the password.
func TestConnectionErrors(t *testing.T) {
	t.Parallel()
	testDB(t)
	for want, change := range map[string]func(*url.URL){ // by a part of the message
		"127.0.0.1":      func(u *url.URL) { u.Host = "127.0.0.1:" + freePort() },
		"nosuchdatabase": func(u *url.URL) { u.Path = "/nosuchdatabase" },
		"nosuchuser":     func(u *url.URL) { u.User = url.UserPassword("nosuchuser", "hunter2") },
		"pool_timeout":   func(u *url.URL) { u.RawQuery = "pool_timeout=9&" + u.RawQuery },
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			databaseURL := changeURL(t, change)
			u, _ := url.Parse(databaseURL)
			password, _ := u.User.Password()
			var log lockedBuffer
			d, err := openDatabase(databaseURL, newLogger(&log, slog.LevelDebug))
			if err != nil {
				t.Fatal(err)
			}
			defer d.pool.Close()
			ctx, cancel := context.WithCancel(t.Context())
			ended := inParallel(1, func(int) { err = d.ensureSchema(ctx) })
			eventually(t, "WARNING", func() bool { return len(log.messages(t, "WARNING")) > 0 })
			cancel()
			<-ended
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("start = %v, want an error that contains %q", err, want)
			}
			if shown := fmt.Sprint(err, log.String()); strings.Contains(shown, cmp.Or(password, "hunter2")) {
				t.Errorf("%q contains the password", shown)
			}
		})
	}
}

// An instance has 15 connections unless pool_max_conns says otherwise. Without a free one, a
// request ends at its deadline.
func TestPoolSize(t *testing.T) {
	t.Parallel()
	testDB(t)
	u := os.Getenv("DATABASE_URL")
	for databaseURL, size := range map[string]int{u: 15, withParam(u, "pool_max_conns=2"): 2} {
		d, r := openOverRelay(t, databaseURL)
		startDB(t, d)
		release := occupy(t, d, size)
		if _, err := runWithin(d, 200*time.Millisecond, retry, `SELECT 1`); !errors.Is(err, errNotSent) {
			t.Errorf("while %d connections are busy: %v, want %v", size, err, errNotSent)
		}
		release()
		if n := r.dials.Load(); n != int64(size) {
			t.Errorf("%d connections were opened, want %d", n, size)
		}
	}
}

// runWithin runs a statement that returns numbers.
func runWithin(
	d *database, timeout time.Duration, policy retryPolicy, sql string, args ...any,
) ([]int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return query(ctx, d, policy, pgx.RowTo[int], sql, args...)
}

// Which text a 503 has: nothing was changed if no statement was sent.
func TestWhetherAStatementWasSent(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		fault func(d *database, r *relay)
		want  error
	}{
		{"no schema", func(d *database, _ *relay) { d.ready = make(chan struct{}) }, errNotSent},
		{"no connection", func(d *database, r *relay) { d.pool.Reset(); r.down.Store(true) }, errNotSent},
		{"a broken connection, then none", func(_ *database, r *relay) {
			r.dropResponses.Store(1)
			r.down.Store(true)
		}, errMayHaveRun},
		{"no response", func(_ *database, r *relay) { r.stalled.Store(true) }, errMayHaveRun},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := startOverRelay(t, withoutPings)
			row.fault(d, r)
			if _, err := runWithin(d, 5*time.Second, retry, `SELECT 1`); !errors.Is(err, row.want) {
				t.Errorf("%v, want %v", err, row.want)
			}
		})
	}
}

// withoutPings makes the next statement the one that a fault affects, on a slow machine too.
func withoutPings(config *pgxpool.Config) {
	config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
}

// Each error of a statement, and how often the statement is sent. A sequence counts that even if
// the transaction is rolled back.
func TestErrorsOfAStatement(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t)))
	sqlExec(t, d.pool, `
		CREATE SEQUENCE public.sent;
		CREATE FUNCTION public.fault(code text, times int) RETURNS int LANGUAGE plpgsql AS $$
		BEGIN
			IF nextval('public.sent') <= times THEN RAISE EXCEPTION USING ERRCODE = code; END IF;
			RETURN 1;
		END $$`)
	const (
		always = 1 << 30
		many   = -1 // until the deadline
		// breaks n times
		breaking = `SELECT CASE WHEN nextval('public.sent') <= $1
			THEN pg_terminate_backend(pg_backend_pid())::int + length(pg_sleep(9)::text) ELSE 1 END`
	)
	for _, row := range []struct {
		code   string // "" if the connection breaks
		times  int    // it fails
		policy retryPolicy
		sent   int
		want   string // "" for success, or the kind of error
	}{
		{code: "", times: 1, policy: retry, sent: 2},
		{code: "", times: 2, policy: retry, sent: 2, want: "unavailable"},
		{code: "", times: 1, policy: noRetry, sent: 1, want: "unavailable"},
		// Nothing happened, so even a change is sent again.
		{code: "40001", times: 4, policy: noRetry, sent: 5},
		{code: "40P01", times: 4, policy: noRetry, sent: 5},
		{code: "40001", times: always, policy: noRetry, sent: many, want: "unavailable"},
		{code: "25006", times: 1, policy: noRetry, sent: 2},
		{code: "25006", times: 2, policy: noRetry, sent: 2, want: "unavailable"},
		{code: "26000", times: 2, policy: noRetry, sent: 2, want: "fault"},
		// Nothing else is repeated. Neon's proxy reports its own failures as internal errors.
		{code: "XX000", times: 1, policy: retry, sent: 1, want: "unavailable"},
		{code: "55P03", times: 1, policy: retry, sent: 1, want: "unavailable"},
		{code: "57014", times: 1, policy: retry, sent: 1, want: "unavailable"},
		{code: "22012", times: 1, policy: retry, sent: 1, want: "fault"},
	} {
		sqlExec(t, d.pool, `ALTER SEQUENCE public.sent RESTART`)
		timeout := requestTimeout
		if row.sent == many {
			timeout = 2 * time.Second
		}
		sql, args := `SELECT public.fault($1, $2)`, []any{row.code, row.times}
		if row.code == "" {
			sql, args = breaking, []any{row.times}
		}
		_, err := runWithin(d, timeout, row.policy, sql, args...)
		got := "fault"
		switch {
		case err == nil:
			got = ""
		case errors.Is(err, errMayHaveRun):
			got = "unavailable"
		}
		n := sqlValue[int](t, d.pool, `SELECT last_value FROM public.sent`)
		if got != row.want || n != row.sent && row.sent != many {
			t.Errorf("%+v: %v, sent %d times", row, err, n)
		}
		if row.sent == many && (n < 3 || n > 50) { // 2 s, and a backoff of 50 to 100 ms
			t.Errorf("%+v: sent %d times in 2 s", row, n)
		}
	}
}

// A change whose request or response is dropped is made at most once. With the headers of the
// contract it is safe to repeat. A read succeeds.
func TestDroppedRequestsAndResponses(t *testing.T) {
	t.Parallel()
	const key, ifMatch = "Idempotency-Key", "If-Match"
	for _, row := range []struct {
		name, method, path, body string
		header                   string // with which the request may be repeated
		status                   int    // of the request
		dropped, made            string // the tasks if the request was dropped, or the response
		again, againMade         int    // the status of the repetition in these cases
	}{
		{name: "list", method: "GET", status: 200, dropped: "before", made: "before"},
		{name: "create", method: "POST", body: `{"title": "new"}`,
			status: 503, dropped: "before", made: "new before"},
		{name: "create with a key", method: "POST", body: `{"title": "new"}`, header: key,
			status: 201, dropped: "new before", made: "new before", again: 201, againMade: 201},
		{name: "toggle", method: "PATCH", path: "ID/complete",
			status: 503, dropped: "before", made: "before done"},
		{name: "patch", method: "PATCH", path: "ID", body: `{"title": "after"}`,
			status: 503, dropped: "before", made: "after"},
		{name: "patch of a version", method: "PATCH", path: "ID", body: `{"title": "after"}`,
			header: ifMatch, status: 503, dropped: "before", made: "after", again: 200, againMade: 412},
		{name: "delete", method: "DELETE", path: "ID", status: 503, dropped: "before", made: ""},
	} {
		for _, drop := range []string{"request", "response"} {
			t.Run(row.name+" "+drop, func(t *testing.T) {
				t.Parallel()
				d, r := startOverRelay(t, withoutPings)
				c := startService(t, d, settings{}).newClient()
				c.useEveryRoute() // until it is prepared, a statement takes two requests
				created := c.do("POST", "", `{"title": "before"}`)
				path := strings.ReplaceAll(row.path, "ID", decode[wireTask](t, created.body).path())
				var headers []string
				if row.header != "" {
					value := map[string]string{key: "one-key-for-both", ifMatch: created.header.Get("ETag")}
					headers = []string{row.header, value[row.header]}
				}
				want, again := row.dropped, row.again
				if drop == "request" {
					r.dropRequests.Store(1)
				} else {
					r.dropResponses.Store(1)
					want, again = row.made, row.againMade
				}
				a := c.do(row.method, path, row.body, headers...)
				if a.status != row.status || a.status == 503 && a.detail() != errMayHaveRun.detail {
					t.Errorf("the request = %v, want %d", a, row.status)
				}
				c.wantTasks(want)
				if headers == nil {
					return
				}
				a = c.do(row.method, path, row.body, headers...)
				replayed := a.header.Get("Idempotency-Replayed") == "true"
				if a.status != again || replayed != (row.header == key) {
					t.Errorf("the repetition = %v, replayed: %t, want %d", a, replayed, again)
				}
				c.wantTasks(row.made)
			})
		}
	}
}

// useEveryRoute uses every route that needs the database, so that a connection that is used alone
// prepares every statement of the service. It leaves no task.
func (c *client) useEveryRoute() {
	c.t.Helper()
	task := c.create("Milch für Zoë, 牛奶 🥛").path()
	key, stale := []string{"Idempotency-Key", rand.Text()}, []string{"If-Match", `"1"`}
	for _, row := range []struct {
		method, path, body string
		status             int
		headers            []string
	}{
		{"POST", "", `{"title": "x"}`, 201, key},
		{"POST", "", `{"title": "x"}`, 201, key},
		{"GET", "", "", 200, nil},
		{"GET", "?completed=false&total=true", "", 200, nil},
		{"GET", task, "", 200, nil},
		{"PATCH", task + "/complete", "", 200, nil},
		{"PATCH", task, `{"description": "é"}`, 200, nil},
		{"PUT", task, `{"title": "x"}`, 412, stale},
		{"DELETE", task, "", 412, stale},
		{"DELETE", task, "", 204, nil},
	} {
		if a := c.do(row.method, row.path, row.body, row.headers...); a.status != row.status {
			c.t.Errorf("%s %s = %v, want %d", row.method, row.path, a, row.status)
		}
	}
	c.do("DELETE", c.list("")[0].path(), "")
	c.wantTasks("")
}

// wantTasks compares the user's tasks with a list such as "new before done".
func (c *client) wantTasks(want string) {
	c.t.Helper()
	var got []string
	for _, task := range c.list("") {
		got = append(got, task.Title)
		if task.Completed {
			got = append(got, "done")
		}
	}
	if text := strings.Join(got, " "); text != want {
		c.t.Errorf("the tasks are %q, want %q", text, want)
	}
}

// Under load, a series of faults neither loses nor repeats a change.
func TestNoChangeIsLost(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		fault func(r *relay, tick int)
	}{
		{"connections are cut", func(r *relay, tick int) {
			if tick%6 == 0 { // time for TLS and SCRAM on a busy machine
				r.cut()
			}
		}},
		{"responses are dropped", func(r *relay, _ int) { r.dropResponses.Store(2) }},
		{"the database restarts", func(r *relay, tick int) {
			switch tick {
			case 0:
				r.down.Store(true)
				r.cut()
			case 10:
				r.down.Store(false)
			}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := openOverRelay(t, withParam(createDatabase(t), "pool_max_conns=6"))
			l := newLedger(t, d, startService(t, startDB(t, d), settings{}).url, r.name)
			// At this distance most clients wait for the database whenever a fault occurs.
			r.delay.Store(int64(5 * time.Millisecond))
			l.run()
			for tick := range 40 {
				row.fault(r, tick)
				time.Sleep(50 * time.Millisecond)
			}
			r.heal()
			l.end()
			l.check()
		})
	}
}

// All connections break at once, as when Neon suspends the compute, or a platform the machine. No
// request fails, because the connections were idle or because a read noticed it first. A ping of a
// silent one takes a second; neither one request nor the pool spends its time on them.
func TestBrokenConnectionsAreNoticed(t *testing.T) {
	t.Parallel()
	const idle = 1100 * time.Millisecond // from a second on, a connection is pinged
	for _, row := range []struct {
		name  string
		conns int32 // the size of the pool, all of it broken
		fault func(*relay)
		idle  time.Duration
		first []retryPolicy // of the statements before concurrent changes on each connection
	}{
		{"cut, used at once", 6, (*relay).cut, 0, []retryPolicy{retry}},
		{"cut after idle time", 6, (*relay).cut, idle, nil},
		{"silent, used by one", 15, (*relay).silence, idle, []retryPolicy{noRetry}},
		{"silent, used by all", 6, (*relay).silence, idle, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := startOverRelay(t, func(config *pgxpool.Config) { config.MaxConns = row.conns })
			connect(t, d, int(row.conns))
			start := time.Now()
			row.fault(r)
			eventually(t, "idle time", func() bool { return time.Since(start) > row.idle })
			use := func(policy retryPolicy) {
				if _, err := runWithin(d, requestTimeout, policy, `SELECT 1`); err != nil {
					t.Errorf("retry %t: %v, want success", policy, err)
				}
			}
			for _, policy := range row.first {
				use(policy)
			}
			<-inParallel(int(row.conns), func(int) { use(noRetry) })
		})
	}
}

// Requests wait for an unreachable database until their deadline. About one attempt a second is
// made to connect, so that one succeeds within 2 s of a recovery.
func TestOutage(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	s := startService(t, d, settings{})
	r.down.Store(true)
	d.pool.Reset()
	wait := func(int) {
		c, start := s.newClient(), time.Now()
		a, err := c.try("POST", c.path(""), `{"title": "x"}`)
		took := time.Since(start)
		if err != nil || a.status != 503 || a.detail() != errNotSent.detail {
			t.Errorf("create = %v %v, want 503: %s", a, err, errNotSent.detail)
		}
		if took < 15*time.Second || took > 20*time.Second {
			t.Errorf("create took %v, want 15 s", took)
		}
	}
	start, dials := time.Now(), r.dials.Load()
	first := inParallel(1, wait)
	eventually(t, "second attempt to connect", func() bool { return r.dials.Load() >= dials+2 })
	others := inParallel(20, wait)
	if a := s.newClient().send("GET", "/health/ready", ""); a.status != 200 {
		t.Errorf("/health/ready in an outage = %v, want 200, because the start is done", a)
	}
	<-first
	n, took := r.dials.Load()-dials, time.Since(start)
	if n < 8 || float64(n) > took.Seconds()+2 { // 8: with 2 s between them there would be 7
		t.Errorf("%d attempts to connect in %v, want about one a second", n, took)
	}
	<-others
	r.heal()
	s.newClient().list("")
}

// The server rejects a connection, because other instances have them all. A request uses a
// connection that becomes idle.
func TestRejectedConnectionHarmsNobody(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	s := startService(t, d, settings{})
	busy := s.newClient()
	ids := busy.fill(5)
	tx := lockTasks(t, busy.user)
	changed := inParallel(5, func(i int) {
		path := busy.path(fmt.Sprint("/", ids[i]))
		if a, err := busy.try("PATCH", path, `{}`); err != nil || a.status != 200 {
			t.Errorf("change after the lock was released = %v %v, want 200", a, err)
		}
	})
	waitBlocked(t, tx, 5)
	r.room.Store(5)
	dials := r.dials.Load()
	listed := inParallel(10, func(int) {
		c := s.newClient()
		if a, err := c.try("GET", c.path(""), ""); err != nil || a.status != 200 {
			t.Errorf("list after the lock was released = %v %v, want 200", a, err)
		}
	})
	eventually(t, "rejected connection", func() bool { return r.dials.Load() > dials })
	tx.Rollback(t.Context())
	<-changed
	<-listed
}

// A statement that times out is canceled on the server, where it would hold its locks. Its slot is
// free at once, even if the connection is silent, and the other connections stay open.
func TestTimedOutStatement(t *testing.T) {
	t.Parallel()
	testDB(t)
	d, r := openOverRelay(t, withParam(os.Getenv("DATABASE_URL"), "pool_max_conns=2"))
	c := startService(t, startDB(t, d), settings{}).newClient()
	task := c.create("Milk")
	connect(t, d, 2)
	tx := lockTasks(t, c.user)
	release, dials := occupy(t, d, 1), r.dials.Load()
	timedOut := inParallel(1, func(int) {
		_, err := runWithin(d, 5*time.Second, retry, // even if it could be repeated
			`UPDATE public.tasks SET title = 'x' WHERE user_id = $1 RETURNING 1`, c.user)
		if !errors.Is(err, errMayHaveRun) {
			t.Errorf("a blocked statement = %v, want %v", err, errMayHaveRun)
		}
	})
	waitBlocked(t, tx, 1)
	r.each(func(l *link) { l.silent.Store(l.pending.Load()) })
	<-timedOut
	waitBlocked(t, tx, 0)
	if _, err := runWithin(d, 10*time.Second, noRetry, `SELECT 1`); err != nil {
		t.Errorf("a statement that needs the slot = %v, want success", err)
	}
	tx.Rollback(t.Context())
	release()
	if got := c.list(""); got[0].String() != task.String() {
		t.Errorf("after the canceled change: %v, want %v", got, task)
	}
	connect(t, d, 2)
	if n := r.dials.Load() - dials; n != 2 {
		t.Errorf("%d connections were opened, want one to cancel and one for the slot", n)
	}
}

// A table, a column or a schema that a trigger's function uses does not exist. That is a 500. The
// process ends only if our own statement uses it.
func TestErrorInATrigger(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	p := startProcess(t, "DATABASE_URL="+u)
	p.waitHealth("ready")
	c, db := p.newClient(), openDB(t, u)
	for code, sql := range map[string]string{
		"42P01": `PERFORM FROM missing;`,
		"42703": `PERFORM missing;`,
		"3F000": `CREATE TABLE missing.t ();`,
	} {
		sqlExec(t, db.pool, `
			CREATE OR REPLACE FUNCTION public.audit() RETURNS trigger LANGUAGE plpgsql
			AS $$ BEGIN `+sql+` RETURN NEW; END $$;
			CREATE OR REPLACE TRIGGER audit BEFORE INSERT ON public.tasks
			FOR EACH ROW EXECUTE FUNCTION public.audit()`)
		if a := c.do("POST", "", `{"title": "x"}`, "X-Request-Id", code); a.status != 500 {
			t.Errorf("%s in a trigger = %v, want 500", code, a)
		}
		if line := p.output.request(t, code); !strings.Contains(fmt.Sprint(line["error"]), code) {
			t.Errorf("%s in a trigger is logged as %v", code, line)
		}
		c.list("")
	}
}

// Each statement is prepared once on a connection, because its text does not depend on its
// arguments.
func TestStatementsArePreparedOnce(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t))) // one connection, and one session of the server
	var prepared [2]int
	for i := range prepared {
		startService(t, d, settings{}).newClient().useEveryRoute()
		prepared[i] = sqlValue[int](t, d.pool, `SELECT count(*) FROM pg_prepared_statements
			WHERE statement ~ 'public[.]tasks'`)
	}
	if prepared[0] == 0 || prepared[1] != prepared[0] {
		t.Errorf("%d statements are prepared for one user, %d for two, want as many",
			prepared[0], prepared[1])
	}
}

// A statement that fails because it is prepared is repeated unprepared, a change too. A later
// release may change the type of a column (0A000), and a pooler may lose or mix up statements.
func TestPreparedStatementFails(t *testing.T) {
	t.Parallel()
	for code, fault := range map[string]func(t *testing.T, d *database){
		"0A000": func(t *testing.T, d *database) {
			sqlExec(t, d.pool, `ALTER TABLE public.tasks ALTER COLUMN description TYPE varchar(2000)`)
		},
		"26000": func(t *testing.T, d *database) { sqlExec(t, d.pool, `DEALLOCATE ALL`) },
		"42P05": func(t *testing.T, d *database) { // as with two clients of an old pooler
			name := sqlValue[string](t, d.pool, `SELECT name FROM pg_prepared_statements
				WHERE statement ~ 'INSERT INTO public.tasks'`)
			d.pool.Reset()
			sqlExec(t, d.pool, `PREPARE `+pgx.Identifier{name}.Sanitize()+` AS SELECT 1`)
		},
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			if pooled && code != "0A000" {
				t.Skip("needs a direct connection")
			}
			d := openDB(t, withParam(createDatabase(t), "pool_max_conns=1"))
			var log lockedBuffer
			d.log = newLogger(&log, slog.LevelDebug)
			c := startService(t, startDB(t, d), settings{}).newClient()
			c.create("before")
			fault(t, d)
			c.create("after")
			if n := strings.Count(log.String(), `"sqlstate":"`+code); n != 1 {
				t.Errorf("%d statements failed with %s, want one", n, code)
			}
			c.wantTasks("after before")
		})
	}
}

// Every statement names public.tasks, because pg_dump empties the search path of a session, which a
// pooler then gives to another client. With default_query_exec_mode=exec no statement is prepared,
// for poolers without support.
func TestSessionsOfPoolers(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	alterDatabase(t, u, `SET search_path = other`)
	for _, databaseURL := range []string{withParam(u, "default_query_exec_mode=exec"), u} {
		d := openDB(t, databaseURL)
		sqlExec(t, d.pool, `CREATE SCHEMA IF NOT EXISTS other;
			CREATE TABLE IF NOT EXISTS other.tasks ()`)
		startService(t, startDB(t, d), settings{}).newClient().useEveryRoute()
		prepared := sqlValue[int](t, d.pool, `SELECT count(*) FROM pg_prepared_statements
			WHERE statement ~ 'public[.]tasks'`)
		if prepared > 0 && databaseURL != u {
			t.Errorf("with exec, %d statements are prepared, want none", prepared)
		}
	}
}

// endSessions makes the server end every session of a database.
func endSessions(t testing.TB, databaseURL string) {
	t.Helper()
	sqlExec(t, sharedDB.pool, `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
		WHERE datname = $1 AND usename = current_user`, databaseName(t, databaseURL)) // not autovacuum's
}

// After a failover the pool's sessions are read-only, and new ones are not. The pool is reset once
// a second at most.
func TestReadOnlySessions(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d, r := openOverRelay(t, u)
	c := startService(t, startDB(t, d), settings{}).newClient()
	alterDatabase(t, u, `SET default_transaction_read_only = on`)
	d.pool.Reset()
	if pooled {
		endSessions(t, u)
	}
	start, dials := time.Now(), r.dials.Load()
	eventually(t, "three resets", func() bool {
		// One request at a time uses one session, so each reset costs one.
		if a := c.do("POST", "", `{"title": "x"}`); a.status != 503 {
			t.Fatalf("create while the database is read-only = %v, want 503", a)
		}
		c.list("")
		return r.dials.Load() >= dials+4 // the first one replaces the session before
	})
	if took := time.Since(start); took < 2*time.Second {
		t.Errorf("the third reset came after %v, want one a second at most", took)
	}
	alterDatabase(t, u, `RESET default_transaction_read_only`)
	if pooled {
		endSessions(t, u)
	}
	eventually(t, "create after the failover", func() bool {
		return c.do("POST", "", `{"title": "x"}`).status == 201
	})
	c.wantTasks("x")
}

// Every session and every statement would postpone the suspension of Neon's compute by five
// minutes. The health routes need none, also when the connections have expired.
func TestIdle(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u, func(config *pgxpool.Config) {
		config.HealthCheckPeriod, config.MaxConnIdleTime = 20*time.Millisecond, time.Second
		config.MaxConnLifetime, config.MaxConnLifetimeJitter = time.Second, 0
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
	endSessions(t, u) // which the server then counts
	before := counters()
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		live, ready := c.send("GET", "/health/live", ""), c.send("GET", "/health/ready", "")
		if live.status != 200 || ready.status != 200 {
			t.Fatalf("/health/live = %v, /health/ready = %v, want 200", live, ready)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if after := counters(); after != before {
		t.Errorf("without requests the database counts %s after %s, want no difference", after, before)
	}
	c.create("after")
	eventually(t, "more counted sessions", func() bool { return counters() != before })
}
