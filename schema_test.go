package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Section 10 of the contract: the steps of schema.sql, the start, and a schema that disappears.

// The lines "-- step N: title" of schema.sql count its steps.
func TestStepsAreNumbered(t *testing.T) {
	t.Parallel()
	title := regexp.MustCompile(`(?m)^-- step (.*): \S`)
	for i, match := range title.FindAllStringSubmatch(schema, -1) {
		if match[1] != fmt.Sprint(i+1) {
			t.Errorf("step %d of schema.sql has the number %s", i+1, match[1])
		}
	}
}

// startNext runs the next release, which is this one with more steps, on a database until the test
// ends, in this process. A step is its title and, from the second line on, its SQL.
func startNext(t *testing.T, d *database, steps ...string) *process {
	t.Helper()
	port := freePort()
	p := &process{t: t, url: "http://127.0.0.1:" + port, exited: make(chan struct{})}
	d.steps = append(d.steps, steps...)
	d.log = newLogger(&p.output, slog.LevelInfo)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(p.exited)
		s := newServer(settings{auth: sharedAuth, port: port}, d, d.log)
		if err := s.listenAndServe(ctx); err != nil {
			t.Errorf("the next release: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-p.exited
	})
	p.waitHealth("live")
	return p
}

// schemaState describes the relations of the schema public. It changes with their columns, indexes
// and comments.
func schemaState(t testing.TB, on runner) string {
	t.Helper()
	return sqlValue[string](t, on, `
		SELECT array_agg(concat_ws(' ', oid, relname, xmin, obj_description(oid)) ORDER BY oid)::text
		FROM pg_class
		WHERE relnamespace = 'public'::regnamespace`)
}

// laterStep returns "step N" for the nth step after those of this release.
func laterStep(n int) string {
	return fmt.Sprint("step ", len(schemaSteps(schema))+n)
}

// wantStep compares the table's comment with that of the nth step after those of this release.
func wantStep(t testing.TB, on runner, n int) {
	t.Helper()
	comment := sqlValue[string](t, on, `SELECT obj_description('public.tasks'::regclass, 'pg_class')`)
	if want := "todo-app schema " + laterStep(n); comment != want {
		t.Errorf("the comment is %q, want %q", comment, want)
	}
}

// A database that has all steps, or more, is left alone, whatever else it lacks: the start takes
// one round trip, and not even locks that exclude everything delay it.
func TestCurrentSchemaIsLeftAlone(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	admin := startDB(t, openDB(t, u))
	for _, sql := range []string{
		`SELECT 'as this release created it'`,
		`COMMENT ON TABLE public.tasks IS 'todo-app schema step 99'`, // a newer release's
		`DROP INDEX public.tasks_user_id_completed_id_idx;
		 ALTER TABLE public.tasks DROP COLUMN request_hash`,
	} {
		sqlExec(t, admin.pool, sql)
		before := schemaState(t, admin.pool)
		d, r := openOverRelay(t, u)
		connect(t, d, 1)
		locks := begin(t, admin)
		sqlExec(t, locks, `LOCK TABLE public.tasks IN ACCESS EXCLUSIVE MODE`)
		sqlExec(t, locks, `SELECT pg_advisory_xact_lock($1)`, schemaLock)
		trips := r.trips.Load()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := d.ensureSchema(ctx); err != nil || ctx.Err() != nil {
			t.Fatalf("%s: start = %v, want none, without a wait for a lock", sql, err)
		}
		if n := r.trips.Load() - trips; n != 1 || r.dials.Load() != 1 {
			t.Errorf("%s: %d round trips in %d sessions, want 1 in 1", sql, n, r.dials.Load())
		}
		sqlExec(t, locks, `ROLLBACK`)
		if after := schemaState(t, admin.pool); after != before {
			t.Errorf("%s: the start changed\n%s\nto\n%s", sql, before, after)
		}
	}
}

// runMigrate runs `todo-app migrate` with no setting but DATABASE_URL.
func runMigrate(t testing.TB, databaseURL string) (status int, p *process) {
	t.Helper()
	p = startProgram(t, os.Args[0], []string{"migrate"}, "DATABASE_URL="+databaseURL,
		"BETTER_AUTH_SECRET=", "PORT=")
	return p.wait(), p
}

// migrate needs DATABASE_URL alone.
func TestMigrate(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	for _, database := range []string{"an empty database", "a current one"} {
		if status, p := runMigrate(t, u); status != 0 {
			t.Errorf("migrate %s: exit status %d, want 0: %s", database, status, p.output.String())
		}
		wantStep(t, openDB(t, u).pool, 0)
	}
}

// Several instances of the next release start at the same time. Each step is applied once, also if
// the role's transactions have another isolation level.
func TestInstancesStartTogether(t *testing.T) {
	t.Parallel()
	const more = "-- step 1: another\nINSERT INTO public.applied VALUES (1);\n" +
		"-- step 2: a slow one\nINSERT INTO public.applied VALUES (2); SELECT pg_sleep(0.1)"
	for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			u := createDatabase(t)
			alterDatabase(t, u, `SET default_transaction_isolation = '`+isolation+`'`)
			admin := openDB(t, u)
			sqlExec(t, admin.pool, `CREATE TABLE public.applied (step int)`)
			instances := make([]*database, 8)
			for i := range instances {
				instances[i] = openDB(t, u)
				instances[i].steps = schemaSteps(schema + more)
				connect(t, instances[i], 1)
			}
			atOnce(t, len(instances), func(i int) (answer, error) {
				return answer{}, instances[i].ensureSchema(t.Context())
			})
			wantStep(t, admin.pool, 2)
			if applied := sqlValue[string](t, admin.pool, `SELECT string_agg(step::text, ' ' ORDER BY step)
				FROM public.applied`); applied != "1 2" {
				t.Errorf("applied the steps %s, want each once", applied)
			}
			if n := sqlValue[int](t, admin.pool, `SELECT count(*) FROM pg_locks
				JOIN pg_database d ON d.oid = database
				WHERE datname = current_database() AND locktype = 'advisory'`); n != 0 {
				t.Errorf("%d sessions still have an advisory lock", n)
			}
		})
	}
}

// This release serves reads and writes while the next one waits for another transaction and then
// changes the table.
func TestUpgradeUnderLoad(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	old := startProcess(t, "DATABASE_URL="+u)
	old.waitHealth("ready")
	l := newLedger(t, d, old.url, "todo-app")
	l.run()
	reader := begin(t, d)
	sqlValue[int](t, reader, `SELECT count(*) FROM public.tasks`)

	next := startNext(t, openDB(t, u), `add a column
		CREATE TABLE public.lock_timeout AS SELECT current_setting('lock_timeout') AS of_the_step;
		ALTER TABLE public.tasks ADD COLUMN priority integer`)
	var warnings []string
	eventually(t, "third wait for the lock", func() bool {
		warnings = next.output.messages(t, "WARNING")
		return len(warnings) >= 3
	})
	for _, warning := range warnings {
		if !strings.Contains(warning, laterStep(1)+" (add a column)") {
			t.Errorf("the warning %q does not name the step", warning)
		}
	}
	if live, ready := next.health("live"), next.health("ready"); live != 200 || ready != 503 {
		t.Errorf("during a step: live = %d, ready = %d, want 200 and 503", live, ready)
	}
	sqlExec(t, reader, `ROLLBACK`)
	next.waitHealth("ready")
	made := l.made.Load()
	eventually(t, "load after the upgrade", func() bool { return l.made.Load() > made+100 })
	l.end()
	l.check()
	if n := l.failed.Load(); n != 0 {
		t.Errorf("%d requests got a 503, want none", n)
	}
	wantStep(t, d.pool, 1)
	wait := sqlValue[string](t, d.pool, `SELECT of_the_step FROM public.lock_timeout`)
	if wait != "200ms" {
		t.Errorf("requests wait behind the step for %s, want 200ms", wait)
	}
}

// Requests wait until the database is reached and the steps are applied. A step may take longer
// than the statement_timeout of the role.
func TestRequestsWaitForTheStart(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	alterDatabase(t, u, `SET statement_timeout = '1s'`)
	admin := openDB(t, u)
	sqlExec(t, admin.pool, `CREATE TABLE public.gate ()`)
	d, r := openOverRelay(t, u)
	r.down.Store(true)
	next := startNext(t, d, `wait for the gate
		DO $$ BEGIN
			WHILE NOT EXISTS (SELECT FROM public.gate) LOOP PERFORM pg_sleep(0.01); END LOOP;
		END $$`)
	c := next.newClient()
	created := make(chan answer, 1)
	go func() {
		a, err := c.try("POST", c.path(""), `{"title": "x"}`)
		if err != nil {
			t.Error(err)
		}
		created <- a
	}()
	eventually(t, "second attempt to connect", func() bool { return r.dials.Load() >= 2 })
	r.heal()
	eventually(t, "step that outlasts statement_timeout", func() bool {
		return sqlValue[bool](t, sharedDB.pool, `SELECT EXISTS (
			SELECT FROM pg_stat_activity
			WHERE application_name = $1 AND state = 'active'
			  AND clock_timestamp() - query_start > '1 s')`, r.name)
	})
	if len(created) != 0 {
		t.Error("the create got a response before the step has ended")
	}
	sqlExec(t, admin.pool, `INSERT INTO public.gate DEFAULT VALUES`)
	if a := <-created; a.status != 201 {
		t.Errorf("create = %v, want 201 after the step", a)
	}
	next.waitHealth("ready")
	timeout := sqlValue[string](t, d.pool, `SHOW statement_timeout`)
	if timeout != "1s" {
		t.Errorf("the service's statement_timeout is %s, want that of the role", timeout)
	}
}

// A step fails because of a row: the error names the step and not the row, and the next start
// continues with that step.
func TestFailedStep(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	sqlExec(t, d.pool, `INSERT INTO public.tasks (user_id, title) VALUES ('u', 'hunter2')`)
	next := openDB(t, u)
	next.steps = append(next.steps, "count the tries\nCREATE SEQUENCE public.tries", // not rolled back
		"read titles as numbers\nSELECT nextval('public.tries'), title::integer FROM public.tasks")
	message := fmt.Sprint(next.ensureSchema(t.Context()))
	if !strings.Contains(message, laterStep(2)+" (read titles as numbers)") ||
		!strings.Contains(message, "22P02") || strings.Contains(message, "hunter2") {
		t.Errorf("start = %s, want an error that names the step and the SQLSTATE alone", message)
	}
	wantStep(t, d.pool, 1)
	sqlExec(t, d.pool, `UPDATE public.tasks SET title = '2'`)
	startDB(t, next) // a second CREATE SEQUENCE would fail
	wantStep(t, d.pool, 2)
	if n := sqlValue[int](t, d.pool, `SELECT last_value FROM public.tries`); n != 2 {
		t.Errorf("two starts tried the step %d times, want one each", n)
	}
}

// A start that fails leaves the database as it was: if another relation has the name of our table,
// and if step 1 is rejected after it has created the table, because the name of an index is taken.
func TestFailedStartChangesNothing(t *testing.T) {
	t.Parallel()
	const (
		table    = `CREATE TABLE public.tasks (id int); `
		foreign  = "public.tasks exists but was not created by this service, which leaves it untouched"
		rejected = "schema.sql, step 1 (create the table and its indexes): "
	)
	u := createDatabase(t)
	d := openDB(t, u)
	for _, row := range []struct{ sql, message string }{
		{table, foreign},
		{table + `COMMENT ON TABLE public.tasks IS 'our tasks'`, foreign},
		{table + `COMMENT ON TABLE public.tasks IS 'todo-app schema step 0'`, foreign},
		{table + `COMMENT ON TABLE public.tasks IS 'todo-app schema step 1 of 2'`, foreign},
		{table + `COMMENT ON COLUMN public.tasks.id IS 'todo-app schema step 1'`, foreign},
		{`CREATE TABLE public.tasks_user_id_completed_id_idx (id int)`, rejected},
	} {
		sqlExec(t, d.pool, `DROP SCHEMA public CASCADE; CREATE SCHEMA public; `+row.sql)
		before := schemaState(t, d.pool)
		message := fmt.Sprint(d.ensureSchema(t.Context()))
		if !strings.HasPrefix(message, row.message) || strings.Contains(message, "\n") {
			t.Errorf("%s: start = %s, want one line with %s", row.sql, message, row.message)
		}
		if after := schemaState(t, d.pool); after != before {
			t.Errorf("%s: the start changed\n%s\nto\n%s", row.sql, before, after)
		}
	}
	serve := startProcess(t, "DATABASE_URL="+u)
	serve.wait()
	_, migrate := runMigrate(t, u)
	for _, p := range []*process{serve, migrate} {
		status, failures := p.cmd.ProcessState.ExitCode(), p.output.messages(t, "ERROR")
		if status != 1 || len(failures) != 1 || !strings.HasPrefix(failures[0], rejected) {
			t.Errorf("exit status %d with %q, want 1 with %q", status, failures, rejected)
		}
	}
}

// A restore removes the table or a column while the process runs. The process exits.
func TestVanishedSchema(t *testing.T) {
	t.Parallel()
	for code, sql := range map[string]string{
		"42P01": `DROP TABLE public.tasks`,
		"42703": `ALTER TABLE public.tasks DROP COLUMN description`,
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			u := createDatabase(t)
			p := startProcess(t, "DATABASE_URL="+u)
			p.waitHealth("ready")
			c := p.newClient()
			c.create("before")
			sqlExec(t, openDB(t, u).pool, sql)
			if a := c.do("POST", "", `{"title": "x"}`); a.status != 503 {
				t.Errorf("create = %v, want 503", a)
			}
			status, failures := p.wait(), p.output.messages(t, "ERROR")
			if status != 1 || len(failures) != 1 || !strings.Contains(failures[0], code) {
				t.Errorf("exit status %d with %q, want 1 with one line that contains %s", status,
					failures, code)
			}
		})
	}
}

// The start tries to reach the database for 30 s. It logs the reason of the first failure, and its
// error is the last one. pgx gets the host's name as its only address, so net.Dialer tries the
// addresses side by side. The time is that of a synctest bubble.
func TestUnreachableDatabaseAtStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		failure := error(syscall.EHOSTUNREACH)
		config, err := poolConfig("postgres://todo:hunter2@db.test/todo")
		if err != nil {
			t.Fatal(err)
		}
		config.ConnConfig.DialFunc = func(_ context.Context, network, address string) (net.Conn, error) {
			defer func() { failure = syscall.ECONNREFUSED }()
			if network+" "+address != "tcp db.test:5432" {
				t.Errorf("pgx dials %s %s, want the name db.test", network, address)
			}
			return nil, failure
		}
		var log lockedBuffer
		d, err := newDatabase(config, newLogger(&log, slog.LevelInfo))
		if err != nil {
			t.Fatal(err)
		}
		defer d.pool.Close()
		start := time.Now()
		err = d.ensureSchema(t.Context())
		took := time.Since(start)
		if !errors.Is(err, syscall.ECONNREFUSED) || took != 30*time.Second {
			t.Errorf("start = %v after %v, want a refused connection after 30 s", err, took)
		}
		warnings := log.messages(t, "WARNING")
		if len(warnings) != 1 || !strings.Contains(warnings[0], syscall.EHOSTUNREACH.Error()) {
			t.Errorf("the warnings are %q, want one: no route to host", warnings)
		}
	})
}

// A running step may take longer than the 30 s in which the database must be reached.
func TestLongStep(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	next := startNext(t, openDB(t, u), "a long one\nSELECT pg_sleep(31)")
	select {
	case <-next.exited:
	case <-time.After(31 * time.Second):
	}
	next.waitHealth("ready")
	wantStep(t, openDB(t, u).pool, 1)
}
