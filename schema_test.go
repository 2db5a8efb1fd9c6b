package main

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The schema: steps, upgrades under load, a database that is not ours, a schema that disappears.

const laterSteps = `
-- step: add a column
ALTER TABLE public.tasks ADD COLUMN priority integer;

-- step: record the release's name
CREATE TABLE public.releases (name text);
INSERT INTO public.releases VALUES ('it''s step 3');
`

const slowSteps = `
-- step: sleep for three seconds
DO $$ BEGIN ASSERT current_setting('statement_timeout') = '0'; END $$;
SELECT pg_sleep(3);

-- step: read titles as numbers
SELECT sum(title::integer) FROM public.tasks;
`

// Releases that come after this one.
var (
	nextRelease = laterRelease("next", laterSteps)
	slowRelease = laterRelease("slow", slowSteps)
)

// schemaComment returns the comment on the table.
func schemaComment(t testing.TB, d *database) string {
	t.Helper()
	return sqlValue[string](t, d.pool, `SELECT obj_description('public.tasks'::regclass)`)
}

// The old release serves reads and writes while a new one waits for another transaction and then
// changes the table.
func TestUpgradeUnderLoad(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	old := startProcess(t, "DATABASE_URL="+u)
	old.waitReady()
	l := newLedger(t, d, old.url, "todo-app")
	l.reads = true
	track := &tracker{RoundTripper: keepingConnections(t).Transport}
	for _, c := range l.users {
		c.http.Transport = track
	}
	l.run()
	for _, c := range l.users {
		l.clients.Go(func() {
			for !l.stop.Load() {
				if a, err := c.try("GET", c.path(""), ""); err != nil || a.status != 200 {
					t.Errorf("list during the upgrade = %v %v, want 200", a, err)
					return
				}
			}
		})
	}
	// A busy machine is slow without an upgrade, too.
	calm := l.made.Load()
	eventually(t, "load before the upgrade", func() bool { return l.made.Load() > calm+500 })
	usual := time.Duration(track.longest.Swap(0))
	reader := begin(t, d)
	sqlValue[int](t, reader, `SELECT count(*) FROM public.tasks`)

	next := startRelease(t, nextRelease, u)
	eventually(t, "second wait for the lock", func() bool {
		return len(next.output.messages(t,
			"WARNING")) >= 2
	})
	if live, ready := next.health("live"), next.health("ready"); live != 200 || ready != 503 {
		t.Errorf("while it waits: live = %d, ready = %d, want 200 and 503", live, ready)
	}
	eventually(t, "reason of the 503 in the log", func() bool {
		return strings.Contains(next.output.String(), "the schema is not in place yet")
	})
	wait := next.output.messages(t, "WARNING")[0]
	for _, part := range []string{"waiting for a lock", laterStep(1), "add a column",
		"todo-app, idle in transaction"} {
		if !strings.Contains(wait, part) {
			t.Errorf("the wait is logged as %q, want it to contain %q", wait, part)
		}
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	next.waitReady()
	if took := time.Since(start); took > 6*time.Second {
		t.Errorf("ready %v after the end of the reader, want seconds", took)
	}
	made := l.made.Load()
	eventually(t, "load after the upgrade", func() bool { return l.made.Load() > made+100 })
	l.end()
	l.check()
	longest := time.Duration(track.longest.Load())
	t.Logf("longest request %v, %v before the upgrade", longest, usual)
	if longest > max(time.Second, 500*time.Millisecond+2*usual) && !underRace() {
		t.Errorf("the longest request took %v, %v before the upgrade; want a second at most",
			longest, usual)
	}
	if n := track.unavailable.Load(); n != 0 {
		t.Errorf("%d requests got a 503, want none", n)
	}
}

// Both releases serve next to each other, whichever starts first, and a restart of the old one
// changes nothing.
func TestRollingUpgradeAndRollback(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	old := startProcess(t, "DATABASE_URL="+u)
	old.waitReady()
	c := old.newClient()
	c.create("old")
	next := startRelease(t, nextRelease, u)
	next.waitReady()
	d := openDB(t, u)
	before := catalogState(t, d.pool)
	if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM public.releases`); n != 1 {
		t.Errorf("the last step ran %d times, want once", n)
	}
	again, nextAgain := startProcess(t, "DATABASE_URL="+u), startRelease(t, nextRelease, u)
	for i, p := range []*process{old, next, again, nextAgain} {
		p.waitReady()
		c.service = p.url
		task := c.create(fmt.Sprint("of ", i))
		if a := c.do("PATCH", task.path()+"/complete", ""); a.status != 200 {
			t.Errorf("instance %d: toggle = %v, want 200", i, a)
		}
		if n := len(c.list("")); n != i+2 {
			t.Errorf("instance %d lists %d tasks, want %d", i, n, i+2)
		}
		p.signal(syscall.SIGTERM)
	}
	for i, p := range []*process{old, next, again, nextAgain} {
		if status := p.wait(shutdownLimit); status != 0 {
			t.Errorf("instance %d: exit status %d, want 0: %s", i, status, p.output.String())
		}
	}
	wantOneRoundTripStart(t, u)
	if after := catalogState(t, d.pool); after != before {
		t.Errorf("the catalog changed from\n%s\nto\n%s", before, after)
	}
}

// wantOneRoundTripStart wants a start on a current schema to take one round trip in one session.
func wantOneRoundTripStart(t testing.TB, databaseURL string) {
	t.Helper()
	d, r := openOverRelay(t, databaseURL)
	sqlExec(t, d.pool, `SELECT 1`)
	before := r.trips.Load()
	startDB(t, d)
	if trips, sessions := r.trips.Load()-before, r.dials.Load(); trips != 1 || sessions != 1 {
		t.Errorf("a start takes %d round trips in %d sessions, want 1 in 1", trips, sessions)
	}
}

// A database with a current schema is left alone. Not even locks that exclude everything keep an
// instance from starting.
func TestCurrentSchemaTakesOneRoundTrip(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	tx := begin(t, startDB(t, openDB(t, u)))
	sqlExec(t, tx, `LOCK TABLE public.tasks IN ACCESS EXCLUSIVE MODE`)
	sqlExec(t, tx, `SELECT pg_advisory_xact_lock($1)`, schemaLock)
	wantOneRoundTripStart(t, u)
}

// It calls migrate and not start, so that no retry hides a race.
func TestInstancesStartTogether(t *testing.T) {
	t.Parallel()
	for range 4 {
		u := createDatabase(t)
		var instances sync.WaitGroup
		begin := make(chan struct{})
		for range 8 {
			d := openDB(t, u)
			instances.Go(func() {
				<-begin
				err := errLocked
				for errors.Is(err, errLocked) { // by another instance, whose database is far away
					err = d.applySteps(t.Context(), time.Now().Add(startupTimeout))
				}
				if err != nil {
					t.Errorf("one of eight instances: %v", err)
				}
			})
		}
		close(begin)
		instances.Wait()
	}
}

func TestInstancesOfTheNextReleaseStartTogether(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
		u := createDatabase(t)
		alterDatabase(t, u, `SET default_transaction_isolation = '`+isolation+`'`)
		var instances []*process
		for range 8 {
			instances = append(instances, startRelease(t, nextRelease, u))
		}
		for _, p := range instances {
			p.waitReady()
			if errors := p.output.messages(t, "ERROR"); errors != nil {
				t.Errorf("%s: an instance logged %q", isolation, errors)
			}
		}
		if n := sqlValue[int](t, openDB(t, u).pool, `SELECT count(*) FROM public.releases`); n != 1 {
			t.Errorf("%s: the last step ran %d times, want once", isolation, n)
		}
		for _, p := range instances {
			p.signal(syscall.SIGKILL)
			p.wait(shutdownLimit)
		}
	}
}

func TestMigrateCommand(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := openDB(t, u)
	if status, p := runMigrate(t, thisRelease, u); status != 0 {
		t.Fatalf("migrate an empty database: exit status %d, want 0: %s", status, p.output.String())
	}
	before := catalogState(t, d.pool)
	start := time.Now()
	if status, p := runMigrate(t, thisRelease, u); status != 0 || time.Since(start) > 5*time.Second {
		t.Errorf("migrate a current database: exit status %d after %v, want 0 at once: %s", status,
			time.Since(start), p.output.String())
	}
	if after := catalogState(t, d.pool); after != before {
		t.Errorf("migrate changed a current database from\n%s\nto\n%s", before, after)
	}

	reader := begin(t, d)
	sqlValue[int](t, reader, `SELECT count(*) FROM public.tasks`)
	signaled, waiting := startRelease(t, nextRelease, u, "migrate"),
		startRelease(t, nextRelease, u, "migrate")
	for _, p := range []*process{signaled, waiting} {
		eventually(t, "wait for the lock", func() bool { return p.output.messages(t, "WARNING") != nil })
	}
	signaled.signal(syscall.SIGTERM)
	if status := signaled.wait(5 * time.Second); status <= 0 {
		t.Errorf("SIGTERM while migrate waits: exit status %d, want a failure: %s",
			status, signaled.output.String())
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if status := waiting.wait(10 * time.Second); status != 0 {
		t.Errorf("migrate after its wait: exit status %d, want 0: %s", status, waiting.output.String())
	}
	if status, p := runMigrate(t, thisRelease, u); status != 0 {
		t.Errorf("migrate a newer schema: exit status %d, want 0: %s", status, p.output.String())
	}
}

// A step takes longer than the statement timeout. The next one fails, then succeeds, and the first
// one is not repeated.
func TestLongStepAndFailedStep(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	alterDatabase(t, u, `SET statement_timeout = '1s'`)
	d := startDB(t, openDB(t, u))
	sqlExec(t, d.pool, `INSERT INTO public.tasks (user_id, title) VALUES ('u', 'hunter2')`)
	serving := startRelease(t, slowRelease, u)
	if status := serving.wait(20 * time.Second); status != 1 {
		t.Errorf("a start with a failed step: exit status %d, want 1", status)
	}
	if got := schemaComment(t, d); got != "todo-app schema "+laterStep(1) {
		t.Errorf("after the failed step the comment is %q, want %s: %s",
			got, laterStep(1), serving.output.String())
	}
	status, failed := runMigrate(t, slowRelease, u)
	if status != 1 {
		t.Errorf("migrate with a failed step: exit status %d, want 1", status)
	}
	for _, p := range []*process{serving, failed} {
		errors := p.output.messages(t, "ERROR")
		for _, part := range []string{laterStep(2) + " (read titles as numbers)", "22P02"} {
			if len(errors) != 1 || !strings.Contains(errors[0], part) {
				t.Errorf("a failed step is logged as %q, want one line that contains %q", errors, part)
			}
		}
		if strings.Contains(p.output.String(), "hunter2") {
			t.Errorf("the log contains a title: %s", p.output.String())
		}
	}
	sqlExec(t, d.pool, `UPDATE public.tasks SET title = '2'`)
	start := time.Now()
	if status, p := runMigrate(t, slowRelease, u); status != 0 || time.Since(start) > 3*time.Second {
		t.Errorf("migrate once the row fits: exit status %d after %v, want 0 before 3 s: %s", status,
			time.Since(start), p.output.String())
	}
}

func TestForeignTable(t *testing.T) {
	t.Parallel()
	const table = `CREATE TABLE tasks (id serial PRIMARY KEY, user_id text, title text, description text,
		completed boolean, created_at timestamp, updated_at timestamp)`
	const hash = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	u := createDatabase(t)
	for i, sql := range []string{
		table,
		table + `; COMMENT ON TABLE tasks IS 'our tasks'`,
		table + `; COMMENT ON TABLE tasks IS 'todo-app schema step 0'`,
		table + `; COMMENT ON TABLE tasks IS 'todo-app schema step 1 of 2'`,
		table + `; COMMENT ON TABLE tasks IS 'todo-app schema ` + hash + `0'`,
		table + `; COMMENT ON COLUMN tasks.id IS 'todo-app schema step 1'`,
		`CREATE VIEW tasks AS SELECT 1 AS id`,
		`CREATE MATERIALIZED VIEW tasks AS SELECT 1 AS id`,
		`CREATE TABLE tasks (id int, user_id text) PARTITION BY LIST (user_id)`,
		`CREATE SEQUENCE tasks`,
	} {
		d := openDB(t, u)
		sqlExec(t, d.pool, `DROP SCHEMA public CASCADE; CREATE SCHEMA public; `+sql)
		before := catalogState(t, d.pool)
		start := time.Now()
		err := d.ensureSchema(t.Context())
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s: start = %v after %v, want an error at once", sql, err, took)
		}
		for _, part := range []string{"public.tasks", "rename it", "docs/moving.md"} {
			if message := fmt.Sprint(err); !strings.Contains(message, part) ||
				strings.Contains(message, "\n") {
				t.Errorf("%s: %q, want one line that contains %q", sql, message, part)
			}
		}
		if i < 2 {
			wantFailedStart(t, u, "rename it")
		}
		if after := catalogState(t, d.pool); after != before {
			t.Errorf("%s: the catalog changed from\n%s\nto\n%s", sql, before, after)
		}
	}
}

// The table was renamed, but its indexes still have the names of those that step 1 creates.
func TestIndexesOfARenamedTable(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	sqlExec(t, d.pool, `ALTER TABLE public.tasks RENAME TO tasks_before`)
	for _, row := range []struct{ missing, name string }{
		{"index (user_id, completed, id)", "tasks_user_id_completed_id_idx"},
		{"index unique (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL",
			"tasks_user_id_idempotency_key_idx"},
	} {
		err := openDB(t, u).ensureSchema(t.Context())
		if message := fmt.Sprint(err); !strings.Contains(message, row.missing) ||
			strings.Contains(message, "\n") {
			t.Errorf("start = %v, want one line that names %s", err, row.missing)
		}
		sqlExec(t, d.pool, `ALTER INDEX public.`+row.name+` RENAME TO `+row.name+`_before`)
	}
	startService(t, startDB(t, openDB(t, u)), settings{}).newClient().create("after")
}

func TestHashCommentCountsAsStep1(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := openDB(t, u)
	hash := strings.Repeat("0123456789abcdef", 4)
	sqlExec(t, d.pool, d.steps[0].sql+
		`; COMMENT ON TABLE public.tasks IS 'todo-app schema `+hash+`'`)
	before := catalogState(t, d.pool)
	startDB(t, d)
	if after := catalogState(t, d.pool); after != before && len(d.steps) == 1 {
		t.Errorf("a start changed the catalog from\n%s\nto\n%s", before, after)
	}
	if status, p := runMigrate(t, nextRelease, u); status != 0 {
		t.Errorf("migrate to the next release = %d, want 0: %s", status, p.output.String())
	}
	if got := schemaComment(t, d); got != "todo-app schema "+laterStep(2) {
		t.Errorf("then the comment is %q, want %s", got, laterStep(2))
	}
}

// A restore or a branch reset removes a part of the schema while the process runs. It exits, and
// its next start repairs the schema or tells what is wrong.
func TestVanishedSchema(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, sql string
		message   string // of the exit
		next      string // of the next start's exit, "" if it serves
	}{
		{"table", `DROP TABLE public.tasks`, "missing or incomplete", ""},
		{"column", `ALTER TABLE public.tasks DROP COLUMN description`, "no column description",
			"no column description"},
		{"unique index", `DROP INDEX public.tasks_user_id_idempotency_key_idx`, "missing or incomplete",
			""},
		{"schema", `DROP SCHEMA public CASCADE`, "missing or incomplete", `"public" does not exist`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			u := createDatabase(t)
			d := startDB(t, openDB(t, u))
			p := startProcess(t, "DATABASE_URL="+u)
			p.waitReady()
			c := p.newClient()
			var unavailable atomic.Int64
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					for {
						switch a, err := c.try("POST", c.path(""), `{"title": "x"}`); {
						case err != nil:
							return // the process has exited
						case a.status == 503:
							unavailable.Add(1)
						case a.status != 201:
							t.Errorf("create = %v, want 201 or 503", a)
						}
					}
				})
			}
			eventually(t, "create", func() bool {
				return sqlValue[bool](t, d.pool, `SELECT EXISTS (SELECT FROM public.tasks)`)
			})
			eventually(t, "end of "+row.sql, func() bool {
				_, err := d.pool.Exec(t.Context(), row.sql)
				if err != nil && sqlState(err) != "40P01" { // a deadlock with the creates
					t.Fatal(err)
				}
				return err == nil
			})
			status, errors := p.wait(shutdownLimit+5*time.Second), p.output.messages(t, "ERROR")
			clients.Wait()
			if status != 1 || len(errors) != 1 || !strings.Contains(errors[0], row.message) {
				t.Errorf("exit status %d with %q, want 1 with one line that contains %q",
					status, errors, row.message)
			}
			if unavailable.Load() == 0 {
				t.Error("no request got a 503")
			}
			if row.next != "" {
				wantFailedStart(t, u, row.next)
				return
			}
			next := startProcess(t, "DATABASE_URL="+u)
			next.waitReady()
			next.newClient().create("after")
		})
	}
}

// An error that only looks like a missing table must not end the service.
func TestBrokenTriggerDoesNotEndTheService(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t)))
	sqlExec(t, d.pool, `
		CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM FROM audit;
			RETURN NEW;
		END $$;
		CREATE TRIGGER broken BEFORE INSERT ON public.tasks FOR EACH ROW EXECUTE FUNCTION broken()`)
	c := startService(t, d, settings{}).newClient()
	for range 3 {
		if a := c.do("POST", "", `{"title": "x"}`); a.status != 500 {
			t.Errorf("create = %v, want 500", a)
		}
		c.list("")
	}
	wantRunning(t, d)
}

// wantRunning wants that nothing has told the service to exit.
func wantRunning(t testing.TB, d *database) {
	t.Helper()
	select {
	case err := <-d.failed:
		t.Errorf("the service would exit with %v", err)
	default:
	}
}

func TestStartRepairsOrRejects(t *testing.T) {
	t.Parallel()
	const (
		completedIndex = `tasks_user_id_completed_id_idx`
		keyIndex       = `tasks_user_id_idempotency_key_idx`
		createKeyIndex = `CREATE UNIQUE INDEX ` + keyIndex + ` ON public.tasks (user_id, idempotency_key`
		present        = ` WHERE idempotency_key IS NOT NULL`
	)
	for _, row := range []struct {
		name  string
		sql   []string
		error string // "" if the start repairs it
	}{
		{"restore without indexes", []string{`DROP INDEX ` + completedIndex + `, ` + keyIndex}, ""},
		{"restore of a newer schema", []string{`DROP INDEX ` + completedIndex,
			`COMMENT ON TABLE public.tasks IS 'todo-app schema step 7'`}, ""},
		{"index with an expression", []string{`DROP INDEX ` + keyIndex,
			createKeyIndex + `, (title || ''))` + present}, "idempotency_key"},
		{"primary key", []string{`ALTER TABLE public.tasks DROP CONSTRAINT tasks_pkey`},
			"unique (user_id, id)"},
		{"column", []string{`ALTER TABLE public.tasks DROP COLUMN request_hash`},
			"no column request_hash"},
		{"index of another predicate", []string{`DROP INDEX ` + keyIndex, createKeyIndex + `)`},
			"idempotency_key"},
		{"invalid index", []string{`DROP INDEX ` + keyIndex,
			`INSERT INTO public.tasks (user_id, title, idempotency_key) VALUES ('u', 'x', 'k'), ('u', 'x', 'k')`,
			"error: " + strings.Replace(createKeyIndex, "INDEX", "INDEX CONCURRENTLY", 1) + `)` + present,
		}, "idempotency_key"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			u := createDatabase(t)
			d := startDB(t, openDB(t, u))
			for _, sql := range row.sql {
				sql, fails := strings.CutPrefix(sql, "error: ")
				if _, err := d.pool.Exec(t.Context(), sql); (err != nil) != fails {
					t.Fatalf("%s: %v, want an error: %t", sql, err, fails)
				}
			}
			before := schemaComment(t, d)
			err := openDB(t, u).ensureSchema(t.Context())
			if after := schemaComment(t, d); after != before {
				t.Errorf("a start changed the comment from %q to %q", before, after)
			}
			if row.error == "" {
				if _, verifyErr := d.verify(t.Context()); err != nil || verifyErr != nil {
					t.Errorf("start = %v, then %v, want the schema repaired", err, verifyErr)
				}
				return
			}
			if message := fmt.Sprint(err); !strings.Contains(message, row.error) ||
				strings.Contains(message, "\n") {
				t.Errorf("start = %v, want one line that contains %q", err, row.error)
			}
		})
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d, r := openOverRelay(t, u)
	c := startService(t, startDB(t, d), settings{}).newClient()
	c.http = keepingConnections(t)
	admin := openDB(t, u)
	ready := func() int { return c.send("GET", "/health/ready", "").status }
	if got := ready(); got != 200 {
		t.Fatalf("ready = %d, want 200", got)
	}

	start, before := time.Now(), r.trips.Load()
	for _, a := range atOnce(t, 200, func(int) (answer,
		error) {
		return c.try("GET", "/health/ready", "")
	}) {
		if a.status != 200 {
			t.Errorf("ready = %v, want 200", a)
		}
	}
	// A check comes with a ping if the connection was idle for a second.
	n, most := r.trips.Load()-before, 2*(1+int64(time.Since(start)/time.Second))
	if n > most {
		t.Errorf("200 callers caused %d round trips in %v, want %d at most", n, time.Since(start), most)
	}

	alter := begin(t, admin)
	sqlExec(t, alter, `ALTER TABLE public.tasks ADD COLUMN priority integer`) // holds ACCESS EXCLUSIVE
	trips := r.trips.Load()
	eventually(t, "check during the lock", func() bool {
		if got := ready(); got != 200 {
			t.Fatalf("during ALTER TABLE ready = %d, want 200", got)
		}
		return r.trips.Load() > trips
	})
	if err := alter.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}

	run := func(sql string) func() { return func() { sqlExec(t, admin.pool, sql) } }
	set := func(sql string) func() {
		return func() {
			alterDatabase(t, u, sql)
			renewSessions(t, u)
		}
	}
	for _, row := range []struct {
		name          string
		fault, remedy func()
	}{
		{"without the table", run(`ALTER TABLE public.tasks RENAME TO gone`),
			run(`ALTER TABLE public.gone RENAME TO tasks`)},
		{"without a column", run(`ALTER TABLE public.tasks RENAME COLUMN title TO gone`),
			run(`ALTER TABLE public.tasks RENAME COLUMN gone TO title`)},
		{"without an index", run(`DROP INDEX public.tasks_user_id_completed_id_idx`),
			run(`CREATE INDEX tasks_user_id_completed_id_idx ON public.tasks (user_id, completed, id)`)},
		{"read-only", func() {
			set(`SET default_transaction_read_only = on`)()
			d.pool.Reset()
		}, set(`RESET default_transaction_read_only`)},
	} {
		row.fault()
		eventually(t, "503 "+row.name, func() bool { return ready() == 503 })
		row.remedy()
		eventually(t, "200 after "+row.name, func() bool { return ready() == 200 })
	}
	wantRunning(t, d)
}
