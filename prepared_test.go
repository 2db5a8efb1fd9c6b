package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The service prepares its statements. Where that fails, it repeats the statement unprepared and
// stops preparing. Whether it fails depends on the pooler that the run uses: see poolerPrepares.

// poolerPrepares reports whether prepared statements work on the host: directly, and through a
// pooler that gives each client its own. An older pooler lets its clients share them by accident.
// Nothing else may use the database, so that there is one server session to share.
func poolerPrepares(t *testing.T, databaseURL string) bool {
	t.Helper()
	var err error
	for range 2 {
		conn, connectErr := pgx.Connect(t.Context(), databaseURL)
		if connectErr != nil {
			t.Fatal(connectErr)
		}
		defer conn.Close(t.Context())
		_, err = conn.Prepare(t.Context(), "probe", `SELECT 1`)
	}
	if err != nil && sqlState(err) != "42P05" {
		t.Fatal(err)
	}
	return err == nil
}

// fallbacks returns how often a service has logged that it stops preparing.
func (l *lockedBuffer) fallbacks(t *testing.T) (n int) {
	t.Helper()
	for _, line := range l.lines(t) {
		if line["severity"] == "WARNING" && strings.Contains(fmt.Sprint(line), "prepared statements") {
			n++
		}
	}
	return n
}

// failures returns how many statements have failed because they were prepared. The log has level
// DEBUG.
func (l *lockedBuffer) failures(t *testing.T) (n int) {
	t.Helper()
	for _, line := range l.lines(t) {
		if state, _ := line["sqlstate"].(string); line["message"] == "statement" &&
			preparingFailed(state) {
			n++
		}
	}
	return n
}

// logTo has a database that is not in use yet log to a buffer, at level DEBUG.
func logTo(d *database) *lockedBuffer {
	var log lockedBuffer
	d.log = newLogger(&log, slog.LevelDebug)
	return &log
}

// Each statement is prepared once on a connection. Its text does not depend on its arguments.
func TestStatementsArePreparedOnce(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t))) // one connection, and one session of the server
	c := startService(t, d, settings{}).newClient()
	for i := range 3 {
		key := fmt.Sprint("key-of-the-create-", i)
		c.do("POST", "", fmt.Sprintf(`{"title": "Keyed %d"}`, i), "Idempotency-Key", key)
		task := fmt.Sprintf("/%d", c.create(fmt.Sprint("Milk ", i)).ID)
		tag := c.do("GET", task, "").header.Get("ETag")
		for _, body := range []string{`{}`, `{"title": "Eggs"}`,
			`{"completed": true, "description": null}`} {
			c.do("PATCH", task, body)
		}
		c.do("PATCH", task+"/complete", "")
		c.do("PATCH", task, `{}`, "If-Match", tag)
		c.do("GET", fmt.Sprintf("?limit=%d&total=true", i+1), "")
		c.do("GET", fmt.Sprintf("?completed=%t&total=true&offset=%d", i == 1, i), "")
		c.do("DELETE", task, "", "If-Match", tag)
		c.do("DELETE", task, "")
	}
	type statement struct {
		SQL  string
		Runs int
	}
	rows, _ := d.pool.Query(t.Context(), `
		SELECT regexp_replace(statement, '\s+', ' ', 'g'), generic_plans + custom_plans
		FROM pg_prepared_statements
		WHERE statement ~ 'public.tasks'`)
	statements, err := pgx.CollectRows(rows, pgx.RowToStructByPos[statement])
	if err != nil {
		t.Fatal(err)
	}
	texts, prefix := map[string]bool{}, fmt.Sprintf("/* schema step %d */", len(d.steps))
	for _, s := range statements {
		texts[s.SQL] = true
		if s.Runs < 3 || !strings.HasPrefix(s.SQL, prefix) {
			t.Errorf("%q ran %d times, want 3 at least, and the number of the schema's step", s.SQL, s.Runs)
		}
	}
	// Two lists, two counts, a create with and without a key in one, a read, two updates, two deletes.
	if len(texts) != 10 || len(statements) != len(texts) {
		t.Errorf("%d statements, %d different ones, want 10 of each: %v",
			len(statements), len(texts), statements)
	}
}

// A statement that fails because it is prepared is repeated once and unprepared, a change too. The
// next statements are not prepared. "sent" counts how often the server ran one, also where that was
// rolled back.
func TestUnpreparedAfterAFailure(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	sqlExec(t, startDB(t, openDB(t, u)).pool, `
		CREATE SEQUENCE sent;
		CREATE FUNCTION fail(state text) RETURNS int LANGUAGE plpgsql
		AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = state; END $$`)
	for _, row := range []struct {
		state     string
		fallbacks int
		failing   []int // times that each of two failing statements is sent
	}{
		{"42P05", 1, []int{2, 1}},
		{"26000", 1, []int{2, 1}},
		{"0A000", 1, []int{2, 1}},
		{"42P03", 0, []int{1, 1}}, // a duplicate cursor says nothing about preparing
	} {
		d := openDB(t, u, func(*pgxpool.Config) {})
		log := logTo(d)
		startDB(t, d)
		for i, times := range row.failing {
			sqlExec(t, d.pool, `ALTER SEQUENCE sent RESTART`)
			_, err := query(t.Context(), d, noRetry, pgx.RowTo[int],
				fmt.Sprintf(`SELECT nextval('sent')::int + fail('%s')`, row.state))
			n := sqlValue[int](t, d.pool, `SELECT last_value FROM sent`)
			if sqlState(err) != row.state || n != times {
				t.Errorf("%s, statement %d: %v, sent %d times, want its own error after %d",
					row.state, i, err, n, times)
			}
		}
		if n := log.fallbacks(t); n != row.fallbacks {
			t.Errorf("%s: %d warnings, want %d: %s", row.state, n, row.fallbacks, log)
		}
	}
}

// What happens to prepared statements under load costs no request, and no change is lost or
// doubled.
func TestPreparedStatementsUnderLoad(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name      string
		fallbacks int  // where the host supports prepared statements
		cut       bool // connections, so a change may get a 503
		fault     func(t *testing.T, r *relay, db *database, tick int)
	}{
		{"a column changes its type", 1, false, func(t *testing.T, _ *relay, db *database, tick int) {
			sqlExec(t, db.pool, fmt.Sprintf(
				`ALTER TABLE public.tasks ALTER COLUMN description TYPE varchar(%d)`, 2000+tick))
		}},
		{"other clients discard theirs", 0, false, func(t *testing.T, _ *relay, db *database, _ int) {
			var clients sync.WaitGroup
			for range 5 {
				clients.Go(func() {
					for range 20 {
						for _, sql := range []string{`DISCARD ALL`, `DEALLOCATE ALL`} {
							if _, err := db.pool.Exec(t.Context(), sql); err != nil {
								t.Errorf("%s: %v", sql, err)
							}
						}
					}
				})
			}
			clients.Wait()
		}},
		{"the server ends its sessions", 0, true, func(t *testing.T, _ *relay, db *database, _ int) {
			endSessions(t, db.pool.Config().ConnString())
		}},
		{"the pooler restarts", 0, true, func(t *testing.T, r *relay, db *database, _ int) {
			r.down.Store(true)
			r.cut()
			endSessions(t, db.pool.Config().ConnString())
			r.down.Store(false)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			takeTurns(t)
			u := createDatabase(t)
			want := row.fallbacks
			if !poolerPrepares(t, u) {
				want = 1
			}
			d, r := openOverRelay(t, u)
			log := logTo(d)
			startDB(t, d)
			db := openDB(t, u)
			service := startService(t, d, settings{})
			l := newLedger(t, db, service.url, r.name)
			track := &tracker{RoundTripper: keepingConnections(t).Transport}
			for _, c := range l.users {
				c.http = &http.Client{Transport: track}
			}
			l.reads = !row.cut
			more := func(n int64) {
				t.Helper()
				before := l.made.Load()
				eventually(t, "changes", func() bool { return l.made.Load() >= before+n })
			}
			l.run()
			for tick := range 4 {
				row.fault(t, r, db, tick)
				more(200)
			}
			settled := log.failures(t)
			row.fault(t, r, db, 4)
			more(200)
			l.end()
			l.check()
			if n := log.fallbacks(t); n != want {
				t.Errorf("%d warnings about prepared statements, want %d", n, want)
			}
			if n := log.failures(t); n != settled || want == 0 && n != 0 {
				t.Errorf("%d statements failed, of which %d in the end, want none in the end", n, n-settled)
			}
			if n := track.unavailable.Load(); n != 0 && !row.cut {
				t.Errorf("%d requests got a 503, want none", n)
			}
		})
	}
}

// retypingRelease changes the type of a column.
var retypingRelease = laterRelease("retyping", `
-- step: limit the description
ALTER TABLE public.tasks ALTER COLUMN description TYPE varchar(2000);
`)

// Releases whose schemas differ share no plans, not even in a pooler, which knows a statement by
// its text: the later one works from the start. The earlier one, whose plans the step outdates,
// works on unprepared.
func TestReleasesShareNoPlans(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	u := createDatabase(t)
	wantLater := 0
	if !poolerPrepares(t, u) {
		wantLater = 1
	}
	first := startProcess(t, "DATABASE_URL="+u)
	first.waitReady()
	db := startDB(t, openDB(t, u))
	var ledgers []*ledger
	load := func(p *process) {
		l := newLedger(t, db, p.url, "todo-app")
		l.reads = true
		ledgers = append(ledgers, l)
		l.run()
	}
	load(first)
	later := startRelease(t, retypingRelease, u)
	later.waitReady()
	load(later)
	for _, l := range slices.Concat(ledgers, ledgers) {
		before := l.made.Load()
		eventually(t, "changes", func() bool { return l.made.Load() >= before+200 })
	}
	for _, l := range ledgers {
		l.end()
		l.check()
	}
	if n := first.output.fallbacks(t); n != 1 {
		t.Errorf("the first release warns %d times that it stops preparing, want once", n)
	}
	if n := later.output.fallbacks(t); n != wantLater {
		t.Errorf("the later release warns %d times that it stops preparing, want %d", n, wantLater)
	}
}
