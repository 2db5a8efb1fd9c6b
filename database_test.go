package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// everyRoute has a new user of a service use every route that needs the database.
func everyRoute(t *testing.T, service string) {
	t.Helper()
	c := newClientOf(t, service, "test-"+rand.Text())
	const title = "Milch für Zoë, 牛奶 🥛"
	start := time.Now()
	task := c.create(title)
	path := fmt.Sprintf("/%d", task.ID)
	if task.Title != title || task.CreatedAt.Sub(start).Abs() > time.Minute {
		t.Errorf("created %+v at %v, want the title as sent and the time of now", task, start)
	}
	for _, row := range []struct {
		method, path, body string
		status             int
		headers            []string
	}{
		{"POST", "", `{"title": "x"}`, 201, []string{"Idempotency-Key", "one-key-for-both"}},
		{"POST", "", `{"title": "x"}`, 201, []string{"Idempotency-Key", "one-key-for-both"}},
		{"GET", "", "", 200, nil},
		{"GET", "?completed=false&total=true", "", 200, nil},
		{"GET", path, "", 200, nil},
		{"PATCH", path + "/complete", "", 200, nil},
		{"PUT", path, `{"title": "x"}`, 412, []string{"If-Match", `"1"`}},
		{"PATCH", path, `{"description": "é"}`, 200, nil},
	} {
		if a := c.do(row.method, row.path, row.body, row.headers...); a.status != row.status {
			t.Errorf("%s %s = %d %s, want %d", row.method, row.path, a.status, a.body, row.status)
		}
	}
	etag := c.do("GET", path, "").header.Get("ETag")
	if a := c.do("DELETE", path, "", "If-Match", etag); a.status != 204 {
		t.Errorf("DELETE %s with its ETag = %d %s, want 204", path, a.status, a.body)
	}
	if a := c.send("GET", "/health/ready", ""); a.status != 200 {
		t.Errorf("ready = %d %s, want 200", a.status, a.body)
	}
}

// pg_dump empties the search path of a session, which then belongs to the next client of a pooler.
func TestSearchPath(t *testing.T) {
	t.Parallel()
	for _, path := range []string{``, `other`, `other, public`} {
		u := ownDatabase(t)
		alterDatabase(t, u, `SET search_path = `+map[bool]string{true: `''`, false: path}[path == ""])
		d, r := openDatabaseOver(t, u)
		sqlExec(t, d.pool, `CREATE SCHEMA other`)
		prepare(t, d)
		service := newService(t, d)
		everyRoute(t, service)
		// The only session of each pool, and of the pooler. Sessions of the service are used in turn.
		sqlExec(t, open(t, u, func(*pgxpool.Config) {}).pool, `SELECT set_config('search_path', $1, false)`, path)
		sqlExec(t, d.pool, `SELECT set_config('search_path', $1, false)`, path)
		everyRoute(t, service)
		d.pool.Reset()
		prepare(t, openPreparedLike(t, d)) // another instance starts
		everyRoute(t, service)
		got := sqlValue[string](t, d.pool, `SELECT string_agg(relnamespace::regnamespace::text, ', ') FROM pg_class WHERE relname = 'tasks'`)
		if got != "public" {
			t.Errorf("search_path %q: tables tasks in %s, want public alone", path, got)
		}
		if r.dials.Load() == 0 {
			t.Error("the relay was not used")
		}
	}
}

func TestSessionFormats(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	for _, set := range []string{`datestyle = 'SQL, DMY'`, `timezone = 'Asia/Kathmandu'`, `client_encoding = 'LATIN1'`,
		`intervalstyle = 'iso_8601'`, `bytea_output = 'escape'`, `standard_conforming_strings = off`, `extra_float_digits = -15`} {
		alterDatabase(t, u, `SET `+set)
	}
	d := openPrepared(t, u)
	everyRoute(t, newService(t, d))

	// Neon's proxy drops parameters that it does not know.
	for _, row := range []struct{ dropped, want string }{
		{"datestyle", "datestyle"},
		{"client_encoding", "client_encoding"},
	} {
		deaf := openPreparedLike(t, d)
		config := deaf.pool.Config()
		before := config.BeforeConnect
		config.BeforeConnect = func(ctx context.Context, conn *pgx.ConnConfig) error {
			err := before(ctx, conn)
			delete(conn.RuntimeParams, row.dropped)
			options := conn.RuntimeParams["options"]
			conn.RuntimeParams["options"] = strings.ReplaceAll(options, "-c "+row.dropped+"=", "-c test.dropped=")
			if options == "" {
				delete(conn.RuntimeParams, "options") // or a pooler rejects it
			}
			return err
		}
		var err error
		if deaf.pool, err = pgxpool.NewWithConfig(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		defer deaf.pool.Close()
		start := time.Now()
		err = deaf.start(t.Context())
		if err == nil || !strings.HasPrefix(err.Error(), "DATABASE_URL: ") || !strings.Contains(err.Error(), row.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("without %s: start = %v, want one line that names it", row.dropped, err)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("without %s: start = %v after %v, want it at once", row.dropped, err, took)
		}
	}
}

func TestDatabaseOfAnotherEncoding(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"LATIN1", "SQL_ASCII"} {
		u := ownDatabase(t, `ENCODING '`+encoding+`' TEMPLATE template0 LOCALE 'C'`)
		p := startProcess(t, "DATABASE_URL="+u)
		status := p.wait(20 * time.Second)
		errors := p.messages("ERROR")
		if status != 1 || len(errors) != 1 || !strings.Contains(errors[0], encoding) {
			t.Errorf("%s: exit status %d, %q, want 1 and one line that names the encoding", encoding, status, errors)
		}
		if status, p := runMigrate(t, thisRelease, u); status != 1 || len(p.output.lines(t)) != 1 {
			t.Errorf("%s: migrate = %d, want 1 with one line: %s", encoding, status, p.output.String())
		}
	}
}

// Errors that guarantee that nothing happened, and others of the same classes: how often a change
// is sent, which a sequence counts even where it is rolled back.
func TestNothingHappened(t *testing.T) {
	t.Parallel()
	d := openPrepared(t, ownDatabase(t))
	sqlExec(t, d.pool, `
		CREATE SEQUENCE public.sent;
		CREATE FUNCTION public.fault(code text, times int) RETURNS int LANGUAGE plpgsql AS $$
		BEGIN
			IF nextval('public.sent') <= times THEN RAISE EXCEPTION USING ERRCODE = code; END IF;
			RETURN 1;
		END $$`)
	for _, row := range []struct {
		code        string
		times       int
		sent        int // 0 for many
		unavailable bool
	}{
		{"25006", 1, 2, false},
		{"25006", 2, 2, true},
		{"40001", 4, 5, false},
		{"40P01", 4, 5, false},
		{"40001", 1 << 30, 0, true},
		{"40000", 1, 1, true},
		{"40003", 1, 1, true}, // it is not known whether it ran
		{"25001", 1, 1, true},
		{"55P03", 1, 1, true},
		{"57014", 1, 1, true},
	} {
		sqlExec(t, d.pool, `ALTER SEQUENCE public.sent RESTART`)
		ctx, cancel := context.WithTimeout(t.Context(), map[bool]time.Duration{true: 3 * time.Second, false: requestTimeout}[row.sent == 0])
		defer cancel()
		_, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT public.fault($1, $2)`, row.code, row.times)
		if errors.Is(err, errUnavailable) != row.unavailable || (err == nil) == row.unavailable {
			t.Errorf("%s, %d times: %v, want unavailable: %t", row.code, row.times, err, row.unavailable)
		}
		sent := sqlValue[int](t, d.pool, `SELECT last_value FROM public.sent`)
		if row.sent > 0 && sent != row.sent || row.sent == 0 && (sent < 4 || sent > 100) {
			t.Errorf("%s, %d times: sent %d times, want %d (0: often)", row.code, row.times, sent, row.sent)
		}
	}
}

// After a failover the pool's sessions are read-only, and new ones are not.
func TestReadOnlySessions(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	d, r := openDatabaseOver(t, u)
	prepare(t, d)
	users := make([]*client, 8)
	service := newService(t, d)
	for i := range users {
		users[i] = newClientOf(t, service, "test-"+rand.Text())
	}
	alterDatabase(t, u, `SET default_transaction_read_only = on`)
	d.pool.Reset()
	renewSessions(t, u)

	start, dials := time.Now(), r.dials.Load()
	for time.Since(start) < 2500*time.Millisecond {
		if a := users[0].do("POST", "", `{"title": "x"}`); a.status != 503 {
			t.Fatalf("create while the database is read-only = %d %s, want 503", a.status, a.body)
		}
		if a := users[0].do("GET", "", ""); a.status != 200 {
			t.Fatalf("list while the database is read-only = %d %s, want 200", a.status, a.body)
		}
	}
	// One request at a time uses one session, so each reset costs one, and the first reset came before.
	if n, most := r.dials.Load()-dials, int64(time.Since(start)/time.Second)+2; n > most {
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
	var creates sync.WaitGroup
	for i := range 40 {
		creates.Go(func() {
			c := users[i%len(users)]
			if a, err := c.try("POST", "/api/"+c.user+"/tasks", `{"title": "x"}`); err != nil || a.status != 201 {
				t.Errorf("create after the failover = %d %s %v, want 201", a.status, a.body, err)
			}
		})
	}
	creates.Wait()
	if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM public.tasks`); n != 40 {
		t.Errorf("%d tasks, want 40", n)
	}
}

func TestTogglesUnderSerializable(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	u := ownDatabase(t)
	alterDatabase(t, u, `SET default_transaction_isolation = serializable`)
	d := openPrepared(t, u)
	service := newService(t, d)
	each := 25
	if underRace() {
		each = 9
	}
	var users sync.WaitGroup
	for range 8 {
		c := newClientOf(t, service, "test-"+rand.Text())
		path := fmt.Sprintf("/%d", c.create("x").ID)
		users.Go(func() {
			var toggles sync.WaitGroup
			var mu sync.Mutex
			versions := map[string]bool{}
			for range each {
				toggles.Go(func() {
					a, err := c.try("PATCH", "/api/"+c.user+"/tasks"+path+"/complete", "")
					if err != nil || a.status != 200 {
						t.Errorf("toggle = %d %s %v, want 200", a.status, a.body, err)
					}
					mu.Lock()
					defer mu.Unlock()
					versions[a.header.Get("ETag")] = true
				})
			}
			toggles.Wait()
			a, err := c.try("GET", "/api/"+c.user+"/tasks"+path, "")
			if err != nil || len(versions) != each || decode[wireTask](t, a.body).Completed != (each%2 == 1) {
				t.Errorf("%d toggles made %d versions, the last %s %v", each, len(versions), a.body, err)
			}
		})
	}
	users.Wait()
}

// The database is unreachable for long: requests are answered soon, attempts are rare, and the
// recovery is noticed.
func TestLongOutage(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		fault   func(*relay)
		atStart bool // the instance has never reached the database
	}{
		{"hang-ups", func(r *relay) { r.down.Store(true); r.cut() }, false},
		{"silence", func(r *relay) { r.stalled.Store(true); r.cut() }, false},
		{"hang-ups at start", func(r *relay) { r.down.Store(true) }, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d, r := openDatabaseOver(t, sharedDatabaseURL())
			started := make(chan error, 1)
			if row.atStart {
				row.fault(r)
			}
			ctx, stop := context.WithCancel(t.Context())
			go func() { started <- d.start(ctx) }()
			defer func() { stop(); <-started }()
			service := newService(t, d)
			clients := make([]*client, 10)
			for i := range clients {
				clients[i] = newClientOf(t, service, "test-"+rand.Text())
			}
			if !row.atStart {
				clients[0].create("before")
				row.fault(r)
			}
			addresses, err := net.LookupHost(d.pool.Config().ConnConfig.Host)
			if err != nil {
				t.Fatal(err)
			}

			var load sync.WaitGroup
			defer load.Wait()
			var healed atomic.Bool
			for _, c := range clients[1:] {
				load.Go(func() {
					for !healed.Load() {
						outage, start := d.outage(), time.Now()
						a, err := c.try("GET", "/api/"+c.user+"/tasks", "")
						took := time.Since(start)
						if healed.Load() {
							return
						}
						if err != nil || a.status != 503 || a.header.Get("Retry-After") == "" {
							t.Errorf("list = %d %s %v, want 503", a.status, a.body, err)
						}
						if outage && took > outageWait+2*time.Second {
							t.Errorf("list in the outage took %v, want %v at most", took, outageWait)
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
			eventually(t, "five seconds of the outage", func() bool { return time.Since(start) > 5*time.Second })
			most := int64(len(addresses)) * (2 + int64(time.Since(start)/time.Second))
			if n := r.dials.Load() - dials; n < 3 || n > most {
				t.Errorf("%d attempts in %v of the outage, want some, and %d at most", n, time.Since(start), most)
			}
			healed.Store(true)
			r.heal()
			start = time.Now()
			if a := clients[0].do("GET", "", ""); a.status != 200 || time.Since(start) > 3*time.Second {
				t.Errorf("after the recovery list = %d %s after %v, want 200 within 2 s", a.status, a.body, time.Since(start))
			}
			if d.outage() {
				t.Error("it is still a long outage")
			}
		})
	}
}

// A time without requests is no outage, even if an attempt failed before it.
func TestIdleTimeIsNoOutage(t *testing.T) {
	t.Parallel()
	d, r := openOver(t)
	c := newClientOf(t, newService(t, d), "test-"+rand.Text())
	c.create("before")
	d.mu.Lock()
	d.failures, d.firstFailure, d.lastFailure = 7, time.Now().Add(-2*outageForget), time.Now().Add(-2*outageForget)
	d.mu.Unlock()
	r.down.Store(true)
	r.cut()
	start := time.Now()
	a := c.do("GET", "", "")
	if took := time.Since(start); a.status != 503 || took < requestTimeout-3*time.Second {
		t.Errorf("first list after the idle time = %d %s after %v, want 503 after %v", a.status, a.body, took, requestTimeout)
	}
}

// The same connection string serves programs in other languages next to this one.
func TestSharedConnectionString(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "DATABASE_URL= "+sharedDatabaseURL()+"&uselibpqcompat=true&pgbouncer=true&connection_limit=5"+
		"&schema=hunter2&pool_timeout=9&application_name=hunter2&hunter2=hunter2&%68unter2&pool_max_conns=7\n")
	p.waitReady()
	warnings := p.messages("WARNING")
	if len(warnings) != 1 {
		t.Fatalf("the WARNINGs are %q, want one", warnings)
	}
	for _, part := range []string{"DATABASE_URL", "uselibpqcompat", "pgbouncer", "connection_limit", "schema", "pool_timeout", "application_name", "2 unknown"} {
		if !strings.Contains(warnings[0], part) {
			t.Errorf("the WARNING is %q, want it to contain %q", warnings[0], part)
		}
	}
	if strings.Contains(p.output.String(), "hunter2") || strings.Contains(warnings[0], "pool_max_conns") {
		t.Errorf("the log shows a part of the string, or a parameter that is used: %s", p.output.String())
	}
}

func TestParametersOfTheConnectionString(t *testing.T) {
	t.Parallel()
	const base = "postgres://u:p@localhost/d"
	for _, row := range []struct {
		url, want string // the error's part, or the size of the pool and the options
	}{
		{base, "15 "},
		{base + "?", "15 "},
		{base + "?&&sslmode=disable&", "15 "},
		{base + "?pool_max_conns=1", "1 "},
		{base + "?pool_max_conns=100", "100 "},
		{base + "?pool_max_conns=2&pool_max_conns=3", "3 "},
		{base + "?pool_max_conns=0", "pool_max_conns must be a number from 1 to 100"},
		{base + "?pool_max_conns=101", "pool_max_conns must be a number from 1 to 100"},
		{base + "?pool_max_conns=x", "pool_max_conns must be a number from 1 to 100"},
		{base + "?pool_max_conns=-1", "pool_max_conns must be a number from 1 to 100"},
		{base + "?pool_max_conns=", "pool_max_conns must be a number from 1 to 100"},
		{base + "?options=endpoint%3Dep-a-1", "15 endpoint=ep-a-1"},
		{base + "?options=-c%20jit%3Doff", "15 -c jit=off"},
		{base + "?options=-c%20jit%3Doff&options=-c%20jit%3Don", "15 -c jit=on"},
		{base + "?option%73=-c%20jit%3Doff", "15 -c jit=off"},
		{base + "?options=-c%20timezone%3DEtc/GMT+3", "15 -c timezone=Etc/GMT+3"}, // libpq takes + as it is
		{base + "?sslmode=no-such-mode", "DATABASE_URL must be like"},
		{base + "?connect_timeout=x", "DATABASE_URL must be like"},
		{`"` + base + `"`, "remove the quotes"},
		{`'` + base + `'`, "remove the quotes"},
		{"\n`" + base + "`\n", "remove the quotes"},
		{base + `"`, "remove the quotes"},
		{"\"", "remove the quotes"},
		{" \n", "DATABASE_URL is not set"},
	} {
		config, _, err := poolConfig(row.url)
		got := fmt.Sprint(err)
		if err == nil {
			got = fmt.Sprint(config.MaxConns, " ", config.ConnConfig.RuntimeParams["options"])
		}
		if err == nil && got != row.want || err != nil && !strings.Contains(got, row.want) {
			t.Errorf("poolConfig(%q) = %q, want %q", row.url, got, row.want)
		}
	}
}

// Whatever is wrong with a string, no error and no WARNING shows a part of it.
func TestMalformedStringsShowNothing(t *testing.T) {
	t.Parallel()
	const marker = "hunter"
	seed := mathrand.Uint64()
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	pieces := []string{marker, "postgres://", "postgresql://", ":", "@", "/", "?", "&", "=", "%", "%20", "%zz", "#", " ", "\n", "\t",
		"[", "]", ",", ";", "+", "\\", "'", `"`, "`", "\x00", "é", "\xff", "sslmode", "host", "password", "options", "port",
		"pool_max_conns", "schema", "connect_timeout", "5432", "localhost", "require"}
	for range 10_000 {
		text := "postgres://" + marker + ":" + marker + "@" + marker + "/" + marker + "?" + marker + "=" + marker
		for range 1 + random.IntN(4) {
			at := random.IntN(len(text) + 1)
			text = text[:at] + pieces[random.IntN(len(pieces))] + text[min(len(text), at+random.IntN(3)):]
		}
		_, ignored, err := poolConfig(text)
		// Parts of the marker count, as pieces are inserted into it.
		if shown := fmt.Sprint(ignored, err); strings.Contains(shown, "hunt") || strings.Contains(shown, "nter") {
			t.Fatalf("seed %d: poolConfig(%q): %q, %v shows a part of it", seed, text, ignored, err)
		}
	}
}

// What the network or the server says about a failed attempt names users, databases and hosts.
func TestConnectionErrorsShowNothing(t *testing.T) {
	t.Parallel()
	u, err := url.Parse(sharedDatabaseURL())
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*url.URL)) string {
		changed := *u
		change(&changed)
		return changed.String()
	}
	for name, databaseURL := range map[string]string{
		"user":      with(func(u *url.URL) { u.User = url.UserPassword("hunteruser", "hunterpass") }),
		"odd user":  with(func(u *url.URL) { u.User = url.UserPassword(`$1 "hunter" user.*`, "$2hunter") }),
		"database":  with(func(u *url.URL) { u.Path = "/hunterdb" }),
		"host":      with(func(u *url.URL) { u.Host = "hunterhost.invalid:" + u.Port() }),
		"two hosts": with(func(u *url.URL) { u.Host = "hunter1.invalid,hunter2.invalid" }),
		"socket":    "postgres://hunteruser:hunterpass@%2Ftmp%2Fhunterdir/hunterdb",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log lockedBuffer
			d, err := openDatabase(databaseURL, newLogger(&log, slog.LevelDebug))
			if err != nil {
				t.Fatal(err)
			}
			defer d.pool.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			err = d.start(ctx)
			if err == nil || !strings.Contains(err.Error(), "DATABASE_URL") {
				t.Fatalf("start = %v, want an error that names DATABASE_URL", err)
			}
			if text := err.Error() + log.String(); strings.Contains(text, "hunter") || strings.Contains(text, "\n") {
				t.Errorf("%q shows a part of the connection string", text)
			}
			t.Log(err)
		})
	}
}
