package main

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"crypto/rand"

	"github.com/jackc/pgx/v5/pgxpool"
)

// The old version serves reads and writes while a new one waits for somebody's transaction and then
// changes the table.
func TestUpgradeUnderLoad(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	u := ownDatabase(t)
	d := openPrepared(t, u)
	old := startProcess(t, "DATABASE_URL="+u)
	old.waitReady()
	l := newLedger(t, old.url, "todo-app")
	l.db, l.reads = d, true
	track := &tracker{RoundTripper: keepingConnections(t).Transport}
	for _, c := range l.users {
		c.http = &http.Client{Transport: track}
	}
	l.run()
	for i := range 24 {
		c := l.users[i%len(l.users)]
		l.clients.Go(func() {
			for !l.stop.Load() {
				if a, err := c.try("GET", "/api/"+c.user+"/tasks", ""); err != nil || a.status != 200 {
					t.Errorf("list during the upgrade = %d %s %v, want 200", a.status, a.body, err)
					return
				}
			}
		})
	}
	// How long a busy machine takes without an upgrade.
	calm := l.made.Load()
	eventually(t, "load before the upgrade", func() bool { return l.made.Load() > calm+500 })
	usual := time.Duration(track.longest.Swap(0))
	reader := begin(t, d)
	sqlValue[int](t, reader, `SELECT count(*) FROM public.tasks`)

	later := startRelease(t, laterRelease, u)
	eventually(t, "second wait for the lock", func() bool { return len(later.messages("WARNING")) >= 2 })
	if live, ready := later.health("live"), later.health("ready"); live != 200 || ready != 503 {
		t.Errorf("while it waits: live = %d, ready = %d, want 200 and 503", live, ready)
	}
	wait := later.messages("WARNING")[0]
	for _, part := range []string{"waiting for a lock", "step 2", "add a column", "todo-app, idle in transaction"} {
		if !strings.Contains(wait, part) {
			t.Errorf("the wait is logged as %q, want it to contain %q", wait, part)
		}
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	later.waitReady()
	if took := time.Since(start); took > 6*time.Second {
		t.Errorf("ready %v after the reader's end, want seconds", took)
	}
	made := l.made.Load()
	eventually(t, "load after the upgrade", func() bool { return l.made.Load() > made+100 })
	l.end()
	l.check()
	longest := time.Duration(track.longest.Load())
	if longest > max(time.Second, 500*time.Millisecond+2*usual) && !underRace() {
		t.Errorf("the longest request took %v, %v before the upgrade; want a second at most", longest, usual)
	}
	t.Logf("longest request %v, %v before the upgrade", longest, usual)
	if n := track.unavailable.Load(); n != 0 {
		t.Errorf("%d requests got a 503, want none", n)
	}
}

// Both versions serve side by side, in either order of starting, and a restart of the old one
// changes nothing.
func TestRollingUpgradeAndRollback(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	first := startProcess(t, "DATABASE_URL="+u)
	first.waitReady()
	c := newClientOf(t, first.url, "test-"+rand.Text())
	c.create("old")
	later := startRelease(t, laterRelease, u)
	later.waitReady()
	d := open(t, u, func(*pgxpool.Config) {})
	before := catalogState(t, d.pool)
	if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM public.releases`); n != 1 {
		t.Errorf("step 3 ran %d times, want once", n)
	}
	for i, p := range []*process{first, later, startProcess(t, "DATABASE_URL="+u), startRelease(t, laterRelease, u)} {
		p.waitReady()
		c.service = p.url
		task := c.create(fmt.Sprint("of ", i))
		if a := c.do("PATCH", fmt.Sprintf("/%d/complete", task.ID), ""); a.status != 200 {
			t.Errorf("instance %d: toggle = %d %s, want 200", i, a.status, a.body)
		}
		if n := len(decode[[]wireTask](t, c.do("GET", "", "").body)); n != i+2 {
			t.Errorf("instance %d lists %d tasks, want %d", i, n, i+2)
		}
		p.signal(syscall.SIGTERM)
		if status := p.wait(stopLimit); status != 0 {
			t.Errorf("instance %d: exit status %d, want 0: %s", i, status, p.output.String())
		}
	}
	if after := catalogState(t, d.pool); after != before {
		t.Errorf("the catalog changed from\n%s\nto\n%s", before, after)
	}

	over, r := openDatabaseOver(t, u) // the old version's start, counted
	sqlExec(t, over.pool, `SELECT 1`)
	trips := r.trips.Load()
	prepare(t, over)
	if n, sessions := r.trips.Load()-trips, r.dials.Load(); n != 1 || sessions != 1 {
		t.Errorf("the old version starts with %d round trips in %d sessions, want 1 in 1", n, sessions)
	}
}

func TestInstancesStartTogetherWithALaterRelease(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
		u := ownDatabase(t)
		alterDatabase(t, u, `SET default_transaction_isolation = '`+isolation+`'`)
		var instances []*process
		for range 8 {
			instances = append(instances, startRelease(t, laterRelease, u))
		}
		for _, p := range instances {
			p.waitReady()
			if errors := p.messages("ERROR"); errors != nil {
				t.Errorf("%s: an instance logged %q", isolation, errors)
			}
		}
		d := open(t, u, func(*pgxpool.Config) {})
		if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM public.releases`); n != 1 {
			t.Errorf("%s: step 3 ran %d times, want once", isolation, n)
		}
		for _, p := range instances {
			p.signal(syscall.SIGKILL)
			p.wait(stopLimit)
		}
	}
}

func TestMigrateCommand(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	d := open(t, u, func(*pgxpool.Config) {})
	if status, p := runMigrate(t, thisRelease, u); status != 0 {
		t.Fatalf("migrate an empty database: exit status %d, want 0: %s", status, p.output.String())
	}
	before := catalogState(t, d.pool)
	start := time.Now()
	if status, p := runMigrate(t, thisRelease, u); status != 0 || time.Since(start) > 5*time.Second {
		t.Errorf("migrate a current database: exit status %d after %v, want 0 at once: %s", status, time.Since(start), p.output.String())
	}
	if after := catalogState(t, d.pool); after != before {
		t.Errorf("migrate changed a current database from\n%s\nto\n%s", before, after)
	}

	reader := begin(t, d)
	sqlValue[int](t, reader, `SELECT count(*) FROM public.tasks`)
	stopped, waiting := startRelease(t, laterRelease, u, "migrate"), startRelease(t, laterRelease, u, "migrate")
	for _, p := range []*process{stopped, waiting} {
		eventually(t, "wait for the lock", func() bool { return p.messages("WARNING") != nil })
	}
	stopped.signal(syscall.SIGTERM)
	if status := stopped.wait(5 * time.Second); status <= 0 {
		t.Errorf("SIGTERM while migrate waits: exit status %d, want a failure: %s", status, stopped.output.String())
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if status := waiting.wait(10 * time.Second); status != 0 {
		t.Errorf("migrate after its wait: exit status %d, want 0: %s", status, waiting.output.String())
	}
	if status, p := runMigrate(t, thisRelease, u); status != 0 {
		t.Errorf("migrate of the old release on the newer schema: exit status %d, want 0: %s", status, p.output.String())
	}
}

// A step takes longer than the statement timeout. The next one fails, then succeeds, and the first
// is not repeated.
func TestLongStepAndFailedStep(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	alterDatabase(t, u, `SET statement_timeout = '1s'`)
	d := openPrepared(t, u)
	sqlExec(t, d.pool, `INSERT INTO public.tasks (user_id, title) VALUES ('u', 'hunter2')`)
	serving := startRelease(t, slowRelease, u)
	if status := serving.wait(20 * time.Second); status != 1 {
		t.Errorf("a start with a failed step: exit status %d, want 1", status)
	}
	if n := sqlValue[string](t, d.pool, `SELECT obj_description('public.tasks'::regclass)`); n != "todo-app schema step 2" {
		t.Errorf("after the failed step 3 the comment is %q, want step 2: %s", n, serving.output.String())
	}
	status, failed := runMigrate(t, slowRelease, u)
	for _, p := range []*process{serving, failed} {
		errors := p.messages("ERROR")
		if len(errors) != 1 || !strings.Contains(errors[0], "step 3 (read titles as numbers)") || !strings.Contains(errors[0], "22P02") {
			t.Errorf("a failed step is logged as %q, want one line that names it and the SQLSTATE", errors)
		}
		if strings.Contains(p.output.String(), "hunter2") {
			t.Errorf("the log shows a title: %s", p.output.String())
		}
	}
	if status != 1 {
		t.Errorf("migrate with a failed step: exit status %d, want 1", status)
	}
	sqlExec(t, d.pool, `UPDATE public.tasks SET title = '2'`)
	start := time.Now()
	if status, p := runMigrate(t, slowRelease, u); status != 0 || time.Since(start) > 3*time.Second {
		t.Errorf("migrate once the row fits: exit status %d after %v, want 0 before 3 s: %s", status, time.Since(start), p.output.String())
	}
}

func TestForeignTable(t *testing.T) {
	t.Parallel()
	const table = `CREATE TABLE tasks (id serial PRIMARY KEY, user_id text, title text, description text,
		completed boolean, created_at timestamp, updated_at timestamp)`
	const hash = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	u := ownDatabase(t)
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
		d := open(t, u, func(*pgxpool.Config) {})
		sqlExec(t, d.pool, `DROP SCHEMA public CASCADE; CREATE SCHEMA public; `+sql)
		before := catalogState(t, d.pool)
		start := time.Now()
		err := d.start(t.Context())
		if err == nil || time.Since(start) > 5*time.Second {
			t.Errorf("%s: start = %v after %v, want an error at once", sql, err, time.Since(start))
			continue
		}
		for _, part := range []string{"public.tasks", "rename it", "docs/moving.md"} {
			if !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %q, want one line that contains %q", sql, err, part)
			}
		}
		if i < 2 {
			program := startProcess(t, "DATABASE_URL="+u)
			if status := program.wait(20 * time.Second); status != 1 || len(program.messages("ERROR")) != 1 {
				t.Errorf("%s: exit status %d, want 1 with one line of severity ERROR: %s", sql, status, program.output.String())
			}
			if status, p := runMigrate(t, thisRelease, u); status != 1 || len(p.output.lines(t)) != 1 {
				t.Errorf("%s: migrate = %d, want 1 with one line: %s", sql, status, p.output.String())
			}
		}
		if after := catalogState(t, d.pool); after != before {
			t.Errorf("%s: the catalog changed from\n%s\nto\n%s", sql, before, after)
		}
	}
}

// The table was renamed, but its indexes still have the names of those that step 1 creates.
func TestRenamedLeftover(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	d := openPrepared(t, u)
	sqlExec(t, d.pool, `ALTER TABLE public.tasks RENAME TO tasks_before`)
	for _, row := range []struct{ missing, name string }{
		{"index (user_id, completed, id)", "tasks_user_id_completed_id_idx"},
		{"index unique (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL", "tasks_user_id_idempotency_key_idx"},
	} {
		err := open(t, u, func(*pgxpool.Config) {}).start(t.Context())
		if err == nil || !strings.Contains(err.Error(), row.missing) || strings.Contains(err.Error(), "\n") {
			t.Errorf("start = %v, want one line that names %s", err, row.missing)
		}
		sqlExec(t, d.pool, `ALTER INDEX public.`+row.name+` RENAME TO `+row.name+`_before`)
	}
	c := newClientOf(t, newService(t, openPrepared(t, u)), "test-"+rand.Text())
	c.create("after")
}

func TestHashCommentCountsAsStep1(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	d := openPrepared(t, u)
	sqlExec(t, d.pool, `COMMENT ON TABLE public.tasks IS 'todo-app schema `+strings.Repeat("0123456789abcdef", 4)+`'`)
	before := catalogState(t, d.pool)
	openPrepared(t, u)
	if after := catalogState(t, d.pool); after != before {
		t.Errorf("a start changed the catalog from\n%s\nto\n%s", before, after)
	}
	if status, p := runMigrate(t, laterRelease, u); status != 0 {
		t.Errorf("migrate of a later release = %d, want 0: %s", status, p.output.String())
	}
	if got := sqlValue[string](t, d.pool, `SELECT obj_description('public.tasks'::regclass)`); got != "todo-app schema step 3" {
		t.Errorf("then the comment is %q, want step 3", got)
	}
}

// What a restore or a branch reset takes away while the process runs: it exits, and its next start
// repairs the schema or tells what is wrong.
func TestVanishedSchema(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, sql string
		message   string // of the exit
		next      string // of the next start's exit, "" where it serves
	}{
		{"table", `DROP TABLE public.tasks`, "missing or incomplete", ""},
		{"column", `ALTER TABLE public.tasks DROP COLUMN description`, "no column description", "no column description"},
		{"unique index", `DROP INDEX public.tasks_user_id_idempotency_key_idx`, "missing or incomplete", ""},
		{"schema", `DROP SCHEMA public CASCADE`, "missing or incomplete", `"public" does not exist`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			u := ownDatabase(t)
			d := openPrepared(t, u)
			p := startProcess(t, "DATABASE_URL="+u)
			p.waitReady()
			c := newClientOf(t, p.url, "test-"+rand.Text())
			c.create("before")
			var unavailable atomic.Int64
			var clients sync.WaitGroup
			for range 8 {
				clients.Go(func() {
					for {
						switch a, err := c.try("POST", "/api/"+c.user+"/tasks", `{"title": "x"}`); {
						case err != nil:
							return // it has ended
						case a.status == 503:
							unavailable.Add(1)
						case a.status != 201:
							t.Errorf("create = %d %s, want 201 or 503", a.status, a.body)
						}
					}
				})
			}
			sqlExec(t, d.pool, row.sql)
			status := p.wait(stopLimit + 5*time.Second)
			clients.Wait()
			if errors := p.messages("ERROR"); status != 1 || len(errors) != 1 || !strings.Contains(errors[0], row.message) {
				t.Errorf("exit status %d with %q, want 1 with one line that contains %q", status, errors, row.message)
			}
			if unavailable.Load() == 0 {
				t.Error("no request got a 503")
			}
			next := startProcess(t, "DATABASE_URL="+u)
			if row.next == "" {
				next.waitReady()
				c.service = next.url
				c.create("after")
				return
			}
			status = next.wait(20 * time.Second)
			if errors := next.messages("ERROR"); status != 1 || len(errors) != 1 || !strings.Contains(errors[0], row.next) {
				t.Errorf("the next start: exit status %d with %q, want 1 with one line that contains %q", status, errors, row.next)
			}
		})
	}
}

func TestBrokenTriggerDoesNotEndTheService(t *testing.T) {
	t.Parallel()
	d := openPrepared(t, ownDatabase(t))
	sqlExec(t, d.pool, `
		CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM FROM audit; RETURN NEW; END $$;
		CREATE TRIGGER broken BEFORE INSERT ON public.tasks FOR EACH ROW EXECUTE FUNCTION broken()`)
	c := newClientOf(t, newService(t, d), "test-"+rand.Text())
	for range 3 {
		if a := c.do("POST", "", `{"title": "x"}`); a.status != 500 {
			t.Errorf("create = %d %s, want 500", a.status, a.body)
		}
		if a := c.do("GET", "", ""); a.status != 200 {
			t.Errorf("list = %d %s, want 200", a.status, a.body)
		}
	}
	select {
	case err := <-d.failed:
		t.Errorf("the service would end with %v", err)
	default:
	}
}

func TestStartRepairsOrRefuses(t *testing.T) {
	t.Parallel()
	const unique = `CREATE UNIQUE INDEX CONCURRENTLY tasks_user_id_idempotency_key_idx
		ON public.tasks (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL`
	for _, row := range []struct {
		name    string
		sql     []string
		refusal string // "" where the start repairs it
	}{
		{"restore without indexes", []string{`DROP INDEX tasks_user_id_completed_id_idx, tasks_user_id_idempotency_key_idx`}, ""},
		{"restore of a newer schema", []string{`DROP INDEX tasks_user_id_completed_id_idx`,
			`COMMENT ON TABLE public.tasks IS 'todo-app schema step 7'`}, ""},
		{"index with an expression", []string{`DROP INDEX tasks_user_id_idempotency_key_idx`,
			`CREATE UNIQUE INDEX tasks_user_id_idempotency_key_idx ON public.tasks (user_id, idempotency_key, (title || ''))
				WHERE idempotency_key IS NOT NULL`}, "idempotency_key"},
		{"primary key", []string{`ALTER TABLE public.tasks DROP CONSTRAINT tasks_pkey`}, "unique (user_id, id)"},
		{"column", []string{`ALTER TABLE public.tasks DROP COLUMN request_hash`}, "no column request_hash"},
		{"index of another predicate", []string{`DROP INDEX tasks_user_id_idempotency_key_idx`,
			`CREATE UNIQUE INDEX tasks_user_id_idempotency_key_idx ON public.tasks (user_id, idempotency_key)`}, "idempotency_key"},
		{"invalid index", []string{`DROP INDEX tasks_user_id_idempotency_key_idx`,
			`INSERT INTO public.tasks (user_id, title, idempotency_key) VALUES ('u', 'x', 'k'), ('u', 'x', 'k')`,
			"error: " + unique}, "idempotency_key"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			u := ownDatabase(t)
			d := openPrepared(t, u)
			for _, sql := range row.sql {
				if sql, fails := strings.CutPrefix(sql, "error: "); fails {
					if _, err := d.pool.Exec(t.Context(), sql); err == nil {
						t.Fatalf("%s succeeded", sql)
					}
					continue
				}
				sqlExec(t, d.pool, sql)
			}
			comment := func() string {
				return sqlValue[string](t, d.pool, `SELECT obj_description('public.tasks'::regclass)`)
			}
			before := comment()
			err := open(t, u, func(*pgxpool.Config) {}).start(t.Context())
			if after := comment(); after != before {
				t.Errorf("a start changed the comment from %q to %q", before, after)
			}
			if row.refusal == "" {
				if err != nil {
					t.Errorf("start = %v, want a repair", err)
				}
				if _, err := d.verify(t.Context()); err != nil {
					t.Errorf("after the start: %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), row.refusal) || strings.Contains(err.Error(), "\n") {
				t.Errorf("start = %v, want one line that contains %q", err, row.refusal)
			}
		})
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	d, r := openDatabaseOver(t, u)
	prepare(t, d)
	admin := open(t, u, func(config *pgxpool.Config) { config.ConnConfig.RuntimeParams["application_name"] = "admin" })
	c := newClientOf(t, newService(t, d), "test-"+rand.Text())
	c.http = keepingConnections(t)
	ready := func() int { return c.send("GET", "/health/ready", "").status }
	if got := ready(); got != 200 {
		t.Fatalf("ready = %d, want 200", got)
	}

	start, before := time.Now(), r.trips.Load()
	var callers sync.WaitGroup
	for range 200 {
		callers.Go(func() {
			if a, err := c.try("GET", "/health/ready", ""); err != nil || a.status != 200 {
				t.Errorf("ready = %d %s %v, want 200", a.status, a.body, err)
			}
		})
	}
	callers.Wait()
	// A pre-ping comes with a check of a connection that was idle for a second.
	if n, most := r.trips.Load()-before, 2*(1+int64(time.Since(start)/time.Second)); n > most {
		t.Errorf("200 callers caused %d round trips in %v, want %d at most", n, time.Since(start), most)
	}

	alter := begin(t, admin)
	sqlExec(t, alter, `ALTER TABLE public.tasks ADD COLUMN priority integer`) // keeps ACCESS EXCLUSIVE
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

	setting := func(sql string) func() {
		return func() {
			alterDatabase(t, u, sql)
			renewSessions(t, u)
		}
	}
	statement := func(sql string) func() { return func() { sqlExec(t, admin.pool, sql) } }
	for _, row := range []struct {
		name          string
		fault, remedy func()
	}{
		{"without the table", statement(`ALTER TABLE public.tasks RENAME TO gone`), statement(`ALTER TABLE public.gone RENAME TO tasks`)},
		{"without a column", statement(`ALTER TABLE public.tasks RENAME COLUMN title TO gone`), statement(`ALTER TABLE public.tasks RENAME COLUMN gone TO title`)},
		{"without an index", statement(`DROP INDEX public.tasks_user_id_completed_id_idx`),
			statement(`CREATE INDEX tasks_user_id_completed_id_idx ON public.tasks (user_id, completed, id)`)},
		{"read-only", func() {
			setting(`SET default_transaction_read_only = on`)()
			d.pool.Reset()
		}, setting(`RESET default_transaction_read_only`)},
	} {
		row.fault()
		eventually(t, "503 "+row.name, func() bool { return ready() == 503 })
		row.remedy()
		eventually(t, "200 after "+row.name, func() bool { return ready() == 200 })
	}
	select {
	case err := <-d.failed:
		t.Errorf("a check would end the service: %v", err)
	default:
	}
}
