package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Sessions and statements: what the service sets and requires, what a request costs, which errors
// it retries, deadlines. Faults of the network are in faults_test.go.

// A host whose name does not tell is recognized as a pooler when it rejects the options parameter.
// Only a direct host gets the statement timeout.
func TestSession(t *testing.T) {
	t.Parallel()
	conn, err := pgx.ParseConfig(sharedDatabaseURL())
	if err != nil {
		t.Fatal(err)
	}
	conn.RuntimeParams["options"] = "-c statement_timeout=12345"
	timeout, pooler := "30s", false
	switch plain, err := pgx.ConnectConfig(t.Context(), conn); {
	case err == nil:
		plain.Close(t.Context())
	case strings.Contains(err.Error(), "unsupported startup parameter"):
		pooler, timeout = true, sqlValue[string](t, sharedDB.pool, `SHOW statement_timeout`) // the role's
	default:
		t.Fatal(err)
	}

	// does not know, unlike openDB
	d, err := openDatabase(sharedDatabaseURL(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer d.pool.Close()
	if n := d.pool.Stat().NewConnsCount(); n != 0 {
		t.Errorf("a new database has opened %d connections, want none before it is needed", n)
	}
	startDB(t, d)
	if got := d.pooler.Load(); got != pooler {
		t.Errorf("the host is a pooler: %t, want %t", got, pooler)
	}
	for setting, want := range map[string]string{"application_name": "todo-app",
		"statement_timeout": timeout} {
		if got := sqlValue[string](t, d.pool, `SHOW `+setting); got != want {
			t.Errorf("SHOW %s = %q, want %q", setting, got, want)
		}
	}
}

func TestOneRoundTripPerRequest(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	c := startService(t, d, settings{}).newClient()
	runStatements(t, d, c.service, 1)
	task := c.path(c.create("Milk").path())
	key := []string{"Idempotency-Key", "one-key-for-both"}
	for _, row := range []struct {
		method, path, body string
		status             int
		trips              int64
		headers            []string
	}{
		{"GET", c.path(""), "", 200, 1, nil},
		{"GET", c.path("?completed=false&limit=1&offset=1"), "", 200, 1, nil},
		{"GET", c.path("?total=true&before=9999999"), "", 200, 2, nil}, // the count is a second statement
		{"GET", c.path("?total=true&completed=true&offset=7"), "", 200, 2, nil},
		{"GET", task, "", 200, 1, nil},
		{"POST", c.path(""), `{"title": "Eggs"}`, 201, 1, nil},
		{"POST", c.path(""), `{"title": "Tea"}`, 201, 1, key},
		{"POST", c.path(""), `{"title": "Tea"}`, 201, 1, key},
		{"PUT", task, `{}`, 412, 2, []string{"If-Match", `"1"`}}, // the second one tells 412 from 404
		{"PUT", task, `{"title": "Oat milk", "description": null}`, 200, 1, nil},
		{"PATCH", task, `{}`, 200, 1, nil},
		{"PATCH", task + "/complete", ``, 200, 1, nil},
		{"PATCH", task + "/complete", `{"completed": false}`, 200, 1, nil},
		{"DELETE", task, "", 204, 1, nil},
		{"GET", task, "", 404, 1, nil},
		{"PATCH", task, `{}`, 404, 1, nil},
		{"DELETE", task, "", 404, 1, nil},

		{"GET", "/health/live", "", 200, 0, nil},
		{"GET", "/api/u/tasks", "", 403, 0, nil},
		{"GET", c.path(""), "", 401, 0, []string{"Authorization", "Bearer e30.e30.e30"}},
		{"GET", "/api/tasks", "", 404, 0, nil},
		{"GET", c.path("/"), "", 404, 0, nil},
		{"GET", c.path("/0"), "", 404, 0, nil},
		{"PATCH", c.path("/x"), `{}`, 404, 0, nil},
		{"POST", task, `{}`, 405, 0, nil},
		{"POST", c.path(""), `[]`, 400, 0, nil},
		{"POST", c.path(""), `{}`, 422, 0, nil},
		{"PUT", task, `{"title": null}`, 422, 0, nil},
		{"POST", c.path(""), `"` + strings.Repeat("a", maxBody) + `"`, 413, 0, nil},
		{"GET", c.path("?limit=0"), "", 422, 0, nil},
	} {
		// on a paused machine, a ping of an idle connection would count
		c.send("GET", "/health/ready", "")
		before := r.trips.Load()
		a := c.send(row.method, row.path, row.body, row.headers...)
		if trips := r.trips.Load() - before; a.status != row.status || trips != row.trips {
			t.Errorf("%s %s = %v after %d round trips, want %d after %d",
				row.method, row.path, a, trips, row.status, row.trips)
		}
	}
	if n := d.pool.Stat().NewConnsCount(); n > 2 { // one more where the host turned out to be a pooler
		t.Errorf("one request after the other opened %d connections", n)
	}
}

func TestDeadlineBeforeStatement(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	d := openDB(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) {
			cancel()
			return true, nil
		}
	})
	close(d.ready)
	if _, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT 1`); !errors.Is(err, errUnavailable) {
		t.Errorf("query that was not sent = %v, want %v", err, errUnavailable)
	}
}

// A statement that a request gives up on does not go on on the server, where it would hold its
// locks.
func TestDeadlineEndsStatement(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("Milk")
	tx := lockTasks(t, c.user)
	for policy, sql := range map[retryPolicy]string{
		noRetry: `UPDATE public.tasks SET title = 'x' WHERE user_id = $1 RETURNING id`,
		retry:   `SELECT id FROM public.tasks WHERE user_id = $1 FOR UPDATE`,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		failed := make(chan error)
		go func() {
			_, err := query(ctx, sharedDB, policy, pgx.RowTo[int64], sql, c.user)
			failed <- err
		}()
		waitBlocked(t, tx, 1)
		if err := <-failed; !errors.Is(err, errUnavailable) || errors.Is(err, errConnection) {
			t.Errorf("query(%q) = %v, want %v, with a connection", sql, err, errUnavailable)
		}
		if ctx.Err() == nil {
			t.Errorf("query(%q) returned before its deadline", sql)
		}
		waitBlocked(t, tx, 0)
	}
	tx.Rollback(t.Context())
	if got := c.list(""); !equalTasks(got[0], task) {
		t.Errorf("after the canceled change: %v, want %v", got, task)
	}
}

// Five clients disconnect while their changes wait for a lock. The changes are made, and their
// connections stay in the pool.
func TestAbandonedRequestsKeepTheirConnections(t *testing.T) {
	t.Parallel()
	const n = defaultMaxConns / 3 // as many as one user may have in progress
	d := startDB(t, openDB(t, sharedDatabaseURL()))
	var gone atomic.Int64
	api := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		context.AfterFunc(r.Context(), func() { gone.Add(1) })
		api.ServeHTTP(w, r)
	}))
	defer service.Close()
	c := newClientOf(t, service.URL, newUser())
	for range n {
		c.create("Milk")
	}
	var opened int64
	for _, completed := range []bool{true, false} {
		tasks := c.list("")
		tx := lockTasks(t, c.user)
		ctx, disconnect := context.WithCancel(t.Context())
		defer disconnect()
		var clients sync.WaitGroup
		for _, task := range tasks {
			r, err := http.NewRequestWithContext(ctx, "PATCH", service.URL+c.path(task.path()),
				strings.NewReader(fmt.Sprintf(`{"completed": %t}`, completed)))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", c.authorization)
			clients.Go(func() {
				if res, err := http.DefaultClient.Do(r); err == nil {
					res.Body.Close()
					t.Errorf("a blocked change = %d, want no response", res.StatusCode)
				}
			})
		}
		eventually(t, "request of each client", func() bool { return d.pool.Stat().AcquiredConns() == n })
		if opened == 0 {
			opened = d.pool.Stat().NewConnsCount()
		}
		before := gone.Load()
		disconnect()
		clients.Wait()
		eventually(t, "notice of the disconnects", func() bool { return gone.Load() >= before+n })
		tx.Rollback(t.Context())
		eventually(t, "end of the abandoned changes",
			func() bool { return d.pool.Stat().AcquiredConns() == 0 })
		for _, task := range c.list("") {
			if task.Completed != completed {
				t.Errorf("%v after its client disconnected, want completed: %t", task, completed)
			}
		}
	}
	if n := d.pool.Stat().NewConnsCount(); n != opened {
		t.Errorf("%d connections replaced those of abandoned requests, want none", n-opened)
	}
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
		sent      = `nextval('public.sent')::int`
		terminate = `pg_terminate_backend(pg_backend_pid())`
		canceled  = sent + `, pg_cancel_backend(pg_backend_pid()), pg_sleep(9)`
		fault     = `public.fault($1, $2)`
		always    = 1 << 30
		many      = 0
	)
	args := func(args ...any) []any { return args }
	for _, row := range []struct {
		name, sql   string
		args        []any
		policy      retryPolicy
		unavailable bool   // the error is errUnavailable
		code        string // SQLSTATE of the error, "" for none
		sent        int
	}{
		{"read whose connection breaks once",
			`CASE ` + sent + ` WHEN 1 THEN ` + terminate + `::int + length(pg_sleep(9)::text) ELSE 1 END`,
			nil, retry, false, "", 2},
		{"read whose connection breaks", sent + `, ` + terminate + `, pg_sleep(9)`, nil, retry, true, "",
			2},
		{"write whose connection breaks", sent + `, ` + terminate + `, pg_sleep(9)`, nil, noRetry, true,
			"", 1},
		{"canceled read", canceled, nil, retry, true, "57014", 1},
		{"canceled write", canceled, nil, noRetry, true, "57014", 1},
		{"fault of a read", sent + ` / 0`, nil, retry, false, "22012", 1},
		{"fault of a write", sent + ` / 0`, nil, noRetry, false, "22012", 1},
		{"value of another type", sent + `::text || 'x'`, nil, retry, false, "scan", 1},

		// Neon's proxy reports its own failures as internal errors.
		{"internal error", fault, args("XX000", always), retry, true, "XX000", 1},
		// These guarantee that nothing happened, so even a write is sent again.
		{"read-only session, once", fault, args("25006", 1), noRetry, false, "", 2},
		{"read-only session", fault, args("25006", 2), noRetry, true, "25006", 2},
		{"serialization failure", fault, args("40001", 4), noRetry, false, "", 5},
		{"deadlock", fault, args("40P01", 4), noRetry, false, "", 5},
		{"serialization failure, always", fault, args("40001", always), noRetry, true, "", many},
		// Others of the same classes.
		{"rollback", fault, args("40000", 1), noRetry, true, "40000", 1},
		{"unknown completion", fault, args("40003", 1), noRetry, true, "40003", 1},
		{"active transaction", fault, args("25001", 1), noRetry, true, "25001", 1},
		{"lock not available", fault, args("55P03", 1), noRetry, true, "55P03", 1},
		{"query canceled", fault, args("57014", 1), noRetry, true, "57014", 1},
	} {
		sqlExec(t, d.pool, `ALTER SEQUENCE public.sent RESTART`)
		ctx, cancel := context.WithTimeout(t.Context(), requestTimeout)
		if row.sent == many {
			ctx, cancel = context.WithTimeout(t.Context(), 2*time.Second)
		}
		defer cancel()
		scan := func(r pgx.CollectableRow) (n int, err error) { // the first column
			return n, r.Scan(append([]any{&n}, make([]any, len(r.FieldDescriptions())-1)...)...)
		}
		rows, err := query(ctx, d, row.policy, scan, `SELECT `+row.sql, row.args...)
		code := sqlState(err)
		if _, ok := errors.AsType[pgx.ScanArgError](err); ok {
			code = "scan"
		}
		if errors.Is(err, errUnavailable) != row.unavailable || row.code != "" && code != row.code {
			t.Errorf("%s: %v (%s), want unavailable: %t, %s", row.name, err, code, row.unavailable, row.code)
		}
		if succeeds := !row.unavailable && row.code == ""; succeeds != (err == nil && len(rows) == 1) {
			t.Errorf("%s: %v, %v, want success: %t", row.name, rows, err, succeeds)
		}
		n := sqlValue[int](t, d.pool, `SELECT last_value FROM public.sent`)
		if row.sent != many && n != row.sent || row.sent == many && (n < 4 || n > 100) {
			t.Errorf("%s: sent %d times, want %d (0: until the deadline, with backoff)",
				row.name, n, row.sent)
		}
	}
}

// While nothing has been sent, even a write may be retried.
func TestErrorsBeforeAStatement(t *testing.T) {
	t.Parallel()
	var failures atomic.Int64
	d := openDB(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		config.MaxConns = 1
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn,
			error) {
			if failures.Add(-1) >= 0 {
				return nil, errors.New("no route to the database")
			}
			return dial(ctx, network, address)
		}
	})
	write := func(timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		_, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT 1`)
		return err
	}
	if err := write(100 * time.Millisecond); !errors.Is(err, errUnavailable) ||
		d.pool.Stat().NewConnsCount() != 0 {
		t.Errorf("before the schema is in place: %v, want %v and no connection", err, errUnavailable)
	}
	close(d.ready)
	const many = 1 << 30
	failures.Store(many)
	if err := write(300 * time.Millisecond); !errors.Is(err, errUnavailable) ||
		failures.Load() > many-2 {
		t.Errorf("no connection: %v after %d tries, want %v after several",
			err, many-failures.Load(), errUnavailable)
	}
	failures.Store(3)
	if err := write(15 * time.Second); err != nil {
		t.Errorf("a connection at the fourth try: %v, want success", err)
	}
	if d.failures != 0 {
		t.Errorf("%d failures are remembered after a success: the next attempt to connect would wait",
			d.failures)
	}
	conn, err := d.acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	if err := write(100 * time.Millisecond); !errors.Is(err, errUnavailable) {
		t.Errorf("all connections are busy: %v, want %v", err, errUnavailable)
	}
}

// useEveryRoute has a new user of a service use every route that needs the database.
func useEveryRoute(t *testing.T, s *service) {
	t.Helper()
	c := s.newClient()
	const title = "Milch für Zoë, 牛奶 🥛"
	start := time.Now()
	task := c.create(title)
	if task.Title != title || task.CreatedAt.Sub(start).Abs() > time.Minute {
		t.Errorf("created %v at %v, want the title as sent and the current time", task, start)
	}
	key := []string{"Idempotency-Key", "one-key-for-both"}
	for _, row := range []struct {
		method, path, body string
		status             int
		headers            []string
	}{
		{"POST", "", `{"title": "x"}`, 201, key},
		{"POST", "", `{"title": "x"}`, 201, key},
		{"GET", "", "", 200, nil},
		{"GET", "?completed=false&total=true", "", 200, nil},
		{"GET", task.path(), "", 200, nil},
		{"PATCH", task.path() + "/complete", "", 200, nil},
		{"PUT", task.path(), `{"title": "x"}`, 412, []string{"If-Match", `"1"`}},
		{"PATCH", task.path(), `{"description": "é"}`, 200, nil},
	} {
		if a := c.do(row.method, row.path, row.body, row.headers...); a.status != row.status {
			t.Errorf("%s %s = %v, want %d", row.method, row.path, a, row.status)
		}
	}
	etag := c.do("GET", task.path(), "").header.Get("ETag")
	if a := c.do("DELETE", task.path(), "", "If-Match", etag); a.status != 204 {
		t.Errorf("DELETE with the ETag = %v, want 204", a)
	}
	if a := c.send("GET", "/health/ready", ""); a.status != 200 {
		t.Errorf("ready = %v, want 200", a)
	}
}

// pg_dump empties the search path of a session. Behind a pooler, another client gets that session.
func TestSearchPath(t *testing.T) {
	t.Parallel()
	for _, path := range []string{``, `other`, `other, public`} {
		u := createDatabase(t)
		literal := path
		if path == "" {
			literal = `''`
		}
		alterDatabase(t, u, `SET search_path = `+literal)
		d := openDB(t, u)
		sqlExec(t, d.pool, `CREATE SCHEMA other`)
		s := startService(t, startDB(t, d), settings{})
		useEveryRoute(t, s)
		// The only session of the pool, which is also the only one of a pooler.
		sqlExec(t, d.pool, `SELECT set_config('search_path', $1, false)`, path)
		useEveryRoute(t, s)
		startDB(t, openDB(t, u)) // another instance starts
		useEveryRoute(t, s)
		got := sqlValue[string](t, d.pool, `SELECT string_agg(relnamespace::regnamespace::text, ', ')
			FROM pg_class WHERE relname = 'tasks'`)
		if got != "public" {
			t.Errorf("search_path %q: there are tables tasks in %s, want public alone", path, got)
		}
	}
}

func TestSessionFormats(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	for _, set := range []string{`datestyle = 'SQL, DMY'`, `timezone = 'Asia/Kathmandu'`,
		`client_encoding = 'LATIN1'`,
		`intervalstyle = 'iso_8601'`, `bytea_output = 'escape'`, `standard_conforming_strings = off`,
		`extra_float_digits = -15`} {
		alterDatabase(t, u, `SET `+set)
	}
	useEveryRoute(t, startService(t, startDB(t, openDB(t, u)), settings{}))

	// Neon's proxy drops parameters that it does not know.
	for _, dropped := range []string{"datestyle", "client_encoding"} {
		d := openDB(t, u)
		config := d.pool.Config()
		before := config.BeforeConnect
		config.BeforeConnect = func(ctx context.Context, conn *pgx.ConnConfig) error {
			err := before(ctx, conn)
			delete(conn.RuntimeParams, dropped)
			// a pooler would reject an empty one
			if options := conn.RuntimeParams["options"]; options != "" {
				conn.RuntimeParams["options"] = strings.ReplaceAll(options, "-c "+dropped+"=",
					"-c test.dropped=")
			}
			return err
		}
		var err error
		if d.pool, err = pgxpool.NewWithConfig(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		defer d.pool.Close()
		start := time.Now()
		err = d.ensureSchema(t.Context())
		if message := fmt.Sprint(err); !strings.HasPrefix(message, "DATABASE_URL: ") ||
			!strings.Contains(message, dropped) {
			t.Errorf("without %s: start = %v, want an error that names it", dropped, err)
		} else if strings.Contains(message, "\n") || time.Since(start) > 10*time.Second {
			t.Errorf("without %s: start = %v after %v, want one line at once",
				dropped, err, time.Since(start))
		}
	}
}

func TestDatabaseOfAnotherEncoding(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"LATIN1", "SQL_ASCII"} {
		u := createDatabase(t, `ENCODING '`+encoding+`' TEMPLATE template0 LOCALE 'C'`)
		wantFailedStart(t, u, encoding)
	}
}

// wantFailedStart wants the service and `todo-app migrate` to exit with status 1 and one ERROR that
// contains a text.
func wantFailedStart(t testing.TB, databaseURL, text string) {
	t.Helper()
	p := startProcess(t, "DATABASE_URL="+databaseURL)
	status := p.wait(20 * time.Second)
	migrateStatus, migrate := runMigrate(t, thisRelease, databaseURL)
	if status != 1 || migrateStatus != 1 {
		t.Errorf("exit status %d, of migrate %d, want 1", status, migrateStatus)
	}
	for _, p := range []*process{p, migrate} {
		errors := p.output.messages(t, "ERROR")
		if len(errors) != 1 || !strings.Contains(errors[0], text) {
			t.Errorf("the ERRORs are %q, want one that contains %q", errors, text)
		}
	}
}

// Serialization failures are retried until every toggle has succeeded.
func TestTogglesUnderSerializable(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	u := createDatabase(t)
	alterDatabase(t, u, `SET default_transaction_isolation = serializable`)
	s := startService(t, startDB(t, openDB(t, u)), settings{})
	each := 25
	if underRace() {
		each = 9
	}
	clients, tasks := make([]*client, 8), make([]wireTask, 8)
	for i := range clients {
		clients[i] = s.newClient()
		tasks[i] = clients[i].create("x")
	}
	versions := map[string]bool{}
	for _, a := range atOnce(t, len(clients)*each, func(i int) (answer, error) {
		c, task := clients[i%len(clients)], tasks[i%len(clients)]
		return c.try("PATCH", c.path(task.path()+"/complete"), "")
	}) {
		if a.status != 200 {
			t.Errorf("toggle = %v, want 200", a)
		}
		versions[a.body] = true
	}
	if len(versions) != len(clients)*each {
		t.Errorf("%d toggles made %d versions", len(clients)*each, len(versions))
	}
	for _, c := range clients {
		if got := c.list(""); got[0].Completed != (each%2 == 1) {
			t.Errorf("after %d toggles: %v", each, got)
		}
	}
}
