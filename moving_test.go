package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The tests in this file run the SQL of docs/moving.md, each on a separate database.

// movingBlocks returns the SQL blocks of docs/moving.md by their names, and the names in order.
func movingBlocks(t testing.TB) (blocks map[string]string, names []string) {
	t.Helper()
	page, err := os.ReadFile("docs/moving.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks = map[string]string{}
	named := regexp.MustCompile("(?s)<!-- sql: ([a-z]+) -->\n```sql\n(.*?)```\n")
	for _, match := range named.FindAllStringSubmatch(string(page), -1) {
		blocks[match[1]] = match[2]
		names = append(names, match[1])
	}
	if n := strings.Count(string(page), "```sql"); n != len(blocks) {
		t.Fatalf("docs/moving.md has %d SQL blocks, %d of them with a unique name", n, len(blocks))
	}
	return blocks, names
}

// A psql runs blocks of docs/moving.md in one session, one statement after the other, as psql does.
type psql struct {
	t    testing.TB
	conn *pgx.Conn
}

// openPSQL opens a session with settings such as "timezone", "UTC".
func openPSQL(t testing.TB, databaseURL string, settings ...string) psql {
	t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(settings); i += 2 {
		config.RuntimeParams[settings[i]] = settings[i+1]
	}
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return psql{t, conn}
}

// run runs a block and returns the rows of its queries, a line each, as psql -At prints them.
func (p psql) run(name string) string {
	p.t.Helper()
	rows, err := p.try(name)
	if err != nil {
		p.t.Fatalf("docs/moving.md, block %s: %v", name, err)
	}
	return rows
}

// try is run for a block that may fail. Like psql, it goes on after an error; it returns the first.
func (p psql) try(name string) (string, error) {
	p.t.Helper()
	blocks, _ := movingBlocks(p.t)
	if blocks[name] == "" {
		p.t.Fatalf("docs/moving.md has no block %s", name)
	}
	var rows strings.Builder
	var first error
	for _, statement := range strings.SplitAfter(blocks[name], ";\n") {
		if strings.TrimSpace(statement) == "" {
			continue
		}
		results, err := p.conn.PgConn().Exec(p.t.Context(), statement).ReadAll()
		if err != nil && first == nil {
			first = fmt.Errorf("%s: %w", statement, err)
		}
		for _, result := range results {
			for _, row := range result.Rows {
				rows.Write(bytes.Join(row, []byte("|")))
				rows.WriteByte('\n')
			}
		}
	}
	return rows.String(), first
}

// status returns the rows of moving.status, a line each, without those that need no attention.
func (p psql) status() string {
	p.t.Helper()
	result := p.conn.PgConn().ExecParams(p.t.Context(), `
		SELECT COALESCE(string_agg(id || ' ' || status, E'\n' ORDER BY id), '')
		FROM moving.status
		WHERE status <> 'same'`, nil, nil, nil, nil).Read()
	if result.Err != nil {
		p.t.Fatal(result.Err)
	}
	return string(result.Rows[0][0])
}

func lines(texts ...string) string { return strings.Join(texts, "\n") }

// at returns a time of day, given like 15:04:05.999999, of a day in UTC.
func at(t testing.TB, text string) time.Time {
	t.Helper()
	when, err := time.Parse("2006-01-02 15:04:05.999999", text)
	if err != nil {
		t.Fatal(err)
	}
	return when
}

// wantTasks compares a client's list with the tasks that it should have, the newest first.
func (c *client) wantTasks(want ...wireTask) {
	c.t.Helper()
	got := decode[[]wireTask](c.t, c.do("GET", "?limit=100", "").body)
	if !slices.EqualFunc(got, want, equalTasks) {
		g, _ := json.MarshalIndent(got, "", " ")
		w, _ := json.MarshalIndent(want, "", " ")
		c.t.Errorf("tasks of %s = %s, want %s", c.user, g, w)
	}
}

const oldTable = `
	CREATE TABLE task (
	    id serial PRIMARY KEY, user_id varchar, title varchar, description varchar,
	    completed boolean, created_at timestamp, updated_at timestamp
	)`

func TestMovingBlocksAreAllTested(t *testing.T) {
	t.Parallel()
	_, names := movingBlocks(t)
	source, err := os.ReadFile("moving_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !regexp.MustCompile(`[(\[]"` + name + `"[)\]]`).Match(source) {
			t.Errorf("no test runs the block %s of docs/moving.md", name)
		}
	}
}

func TestMovingFromFastAPI(t *testing.T) {
	t.Parallel()
	for _, session := range [][]string{
		{"timezone", "UTC", "datestyle", "ISO, MDY"},
		{"timezone", "America/New_York", "datestyle", "SQL, DMY"},
		{"timezone", "Asia/Kathmandu", "datestyle", "German", "standard_conforming_strings", "off"},
	} {
		t.Run(strings.ReplaceAll(session[1], "/", " "), func(t *testing.T) {
			t.Parallel()
			moveFromFastAPI(t, session)
		})
	}
}

func moveFromFastAPI(t *testing.T, session []string) {
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	service := startService(t, d, settings{}).url
	alice, bob := newClientOf(t, service, "alice@example.com"), newClientOf(t, service,
		strings.Repeat("b", 512))
	sqlExec(t, d.pool, oldTable)
	globes, long := strings.Repeat("🌍", 200), strings.Repeat("é", 1000)
	insert := func(id int, user, title, description, completed, created, updated any) {
		t.Helper()
		sqlExec(t, d.pool, `INSERT INTO task VALUES ($1, $2, $3, $4, $5, $6, $7)`, id, user, title,
			description, completed, created, updated)
	}
	when := func(text string) time.Time { return at(t, text) }
	const day = "2024-05-01 12:00:00"
	// In New York 2:30 on March 10, 2024 does not exist, and 1:30 on November 3 exists twice.
	insert(1, alice.user, "first", nil, true, when("2024-03-10 02:30:00"),
		when("2024-11-03 01:30:00.000001"))
	insert(2, bob.user, globes, long, false, when("1969-12-31 23:59:59.999999"),
		when("2199-12-31 23:59:59.999999"))
	insert(3, alice.user, " Grüße\\n\t'\u200b ", "", false, when(day+".123456"), when(day+".123457"))
	insert(9, alice.user, "created before 3", "two\nlines", false, when("2024-04-30 12:00:00"),
		when(day))
	insert(4, alice.user, "to be changed in both", nil, false, when(day), when(day))
	insert(5, alice.user, "to be deleted in the old table", nil, false, when(day), when(day))
	insert(6, alice.user, "to be deleted here", nil, false, when(day), when(day))
	insert(7, alice.user, "to be deleted there, changed here", nil, false, when(day), when(day))
	insert(8, bob.user, "to change hands", nil, false, when(day), when(day))

	type bad struct{ user, title, description, completed, created, updated any }
	blanks := " \t\n\v\f\r\u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004" +
		"\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
	times := func(b bad) bad { b.created, b.updated = when(day), when(day); return b }
	invalid := []string{}
	for i, row := range []struct {
		bad
		problem string
	}{
		{times(bad{user: nil, title: "x", completed: true}), "no user_id"},
		{times(bad{user: "", title: "x", completed: true}), "no user_id"},
		{times(bad{user: strings.Repeat("é", 256) + "x", title: "x", completed: true}),
			"user_id is over 512 bytes"},
		{times(bad{user: "u", title: nil, completed: true}), "no title"},
		{times(bad{user: "u", title: "", completed: true}), "no title"},
		{times(bad{user: "u", title: blanks, completed: true}), "no title"},
		{times(bad{user: "u", title: globes + "x", completed: true}), "title is over 200 characters"},
		{times(bad{user: "u", title: "x", description: long + "x", completed: true}),
			"description is over 1000 characters"},
		{times(bad{user: "u", title: "x"}), "no completed"},
		{bad{user: "u", title: "x", completed: true, updated: when(day)},
			"no created_at in the years 1 to 9999"},
		{bad{user: "u", title: "x", completed: true, created: when(day)},
			"no updated_at in the years 1 to 9999"},
		{bad{"u", "x", nil, true, "infinity", when(day)}, "no created_at in the years 1 to 9999"},
		{bad{"u", "x", nil, true, when(day), "0001-01-01 BC"}, "no updated_at in the years 1 to 9999"},
		{bad{}, "no user_id, no title, no completed, " +
			"no created_at in the years 1 to 9999, no updated_at in the years 1 to 9999"},
	} {
		insert(100+i, row.user, row.title, row.description, row.completed, row.created, row.updated)
		invalid = append(invalid, fmt.Sprintf("%d invalid: %s", 100+i, row.problem))
	}
	insert(0, "u", "x", nil, true, when(day), when(day))
	if got := strings.TrimSpace(blanks); got != "" {
		t.Fatalf("TrimSpace leaves %q of the white space", got)
	}

	p := openPSQL(t, u, session...)
	p.run("task")
	p.run("prepare")
	if got := p.run("look"); !strings.Contains(got, "new|9|1|9\n") ||
		!strings.Contains(got, "113||invalid: no user_id, no title, ") {
		t.Errorf("look = %s", got)
	}
	if !strings.HasPrefix(p.status(), "0 invalid: id is below 1\n1 new\n") {
		t.Errorf("status before the copy = %s", p.status())
	}
	p.run("copy")
	if got, want := p.status(), lines("0 invalid: id is below 1", lines(invalid...)); got != want {
		t.Errorf("status after the copy = %s\nwant %s", got, want)
	}

	a := func(id int64, title string, text *string, completed bool, created, updated string) wireTask {
		return wireTask{ID: id, UserID: alice.user, Title: title, Description: text,
			Completed: completed, CreatedAt: at(t, created), UpdatedAt: at(t, updated)}
	}
	tasks := []wireTask{
		a(9, "created before 3", new("two\nlines"), false, "2024-04-30 12:00:00", day),
		a(7, "to be deleted there, changed here", nil, false, day, day),
		a(6, "to be deleted here", nil, false, day, day),
		a(5, "to be deleted in the old table", nil, false, day, day),
		a(4, "to be changed in both", nil, false, day, day),
		a(3, " Grüße\\n\t'\u200b ", new(""), false, day+".123456", day+".123457"),
		a(1, "first", nil, true, "2024-03-10 02:30:00", "2024-11-03 01:30:00.000001"),
	}
	alice.wantTasks(tasks...)
	b2 := wireTask{ID: 2, UserID: bob.user, Title: globes, Description: &long,
		CreatedAt: at(t, "1969-12-31 23:59:59.999999"), UpdatedAt: at(t, "2199-12-31 23:59:59.999999")}
	b8 := wireTask{ID: 8, UserID: bob.user, Title: "to change hands", CreatedAt: at(t, day),
		UpdatedAt: at(t, day)}
	bob.wantTasks(b8, b2)

	created := alice.create("created here")
	if created.ID <= 113 {
		t.Errorf("id of a new task = %d, want one larger than all old ones", created.ID)
	}

	// Both versions go on. Some of the old version's changes leave updated_at as it was.
	change := func(id int, body string) wireTask {
		t.Helper()
		res := alice.do("PATCH", fmt.Sprint("/", id), body)
		if res.status != 200 {
			t.Fatalf("PATCH = %d %s", res.status, res.body)
		}
		return decode[wireTask](t, res.body)
	}
	t4, t7 := change(4, `{"title": "changed here"}`), change(7, `{"completed": true}`)
	t9 := change(9, `{"title": "changed here first"}`)
	if res := alice.do("DELETE", "/6", ""); res.status != 204 {
		t.Fatalf("DELETE = %d %s", res.status, res.body)
	}
	for _, sql := range []string{
		`UPDATE task SET title = 'changed there, earlier', updated_at = '2025-01-01' WHERE id = 4`,
		`UPDATE task SET title = 'changed there, later', updated_at = '2100-01-01 00:00:00.5'
			WHERE id = 9`,
		`UPDATE task SET description = 'changed there' WHERE id = 3`,
		`UPDATE task SET title = 'changed there', updated_at = '2025-01-01' WHERE id IN (1, 6)`,
		`UPDATE task SET user_id = 'alice@example.com' WHERE id = 8`,
		`UPDATE task SET title = '' WHERE id = 2`,
		`UPDATE task SET user_id = 'alice@example.com' WHERE id = 100`,
		`DELETE FROM task WHERE id IN (0, 5, 7) OR id > 100`,
		`INSERT INTO task
			VALUES (114, 'alice@example.com', 'new there', NULL, false, '2025-01-01', '2025-01-01')`,
	} {
		sqlExec(t, d.pool, sql)
	}
	if got, want := p.status(), lines("1 changed in the old table", "2 invalid: no title",
		"3 changed in the old table", "4 changed here", "5 deleted in the old table",
		"6 deleted here", "7 deleted in the old table, changed here",
		"8 changed in the old table", "9 changed in the old table", "100 new", "114 new"); got != want {
		t.Errorf("status after changes in both = %s\nwant %s", got, want)
	}
	p.run("copy")
	if got, want := p.status(), lines("2 invalid: no title", "4 changed here",
		"5 deleted in the old table", "6 deleted here",
		"7 deleted in the old table, changed here"); got != want {
		t.Errorf("status after the second copy = %s\nwant %s", got, want)
	}
	t9.Title, t9.UpdatedAt = "changed there, later", at(t, "2100-01-01 00:00:00.5")
	tasks = []wireTask{
		created,
		a(114, "new there", nil, false, "2025-01-01 00:00:00", "2025-01-01 00:00:00"),
		a(100, "x", nil, true, day, day),
		t9,
		a(8, "to change hands", nil, false, day, day+".000001"),
		t7,
		tasks[3],
		t4,
		a(3, " Grüße\\n\t'\u200b ", new("changed there"), false, day+".123456", day+".123458"),
		a(1, "changed there", nil, true, "2024-03-10 02:30:00", "2025-01-01 00:00:00"),
	}
	alice.wantTasks(tasks...)
	bob.wantTasks(b2)

	// A copy without changes changes nothing, and the sequence never moves backwards.
	const everything = `SELECT string_agg(tasks || xmin::text, ',' ORDER BY id) FROM tasks`
	before := sqlValue[string](t, d.pool, everything)
	sqlExec(t, d.pool, `SELECT setval(pg_get_serial_sequence('tasks', 'id'), 50000000)`)
	p.run("copy")
	if after := sqlValue[string](t, d.pool, everything); after != before {
		t.Errorf("a copy without changes: %s, was %s", after, before)
	}

	p.run("deleted")
	if got, want := p.status(), lines("2 invalid: no title", "4 changed here", "5 deleted in both",
		"6 deleted here",
		"7 deleted in the old table, changed here"); got != want {
		t.Errorf("status after the deletions = %s\nwant %s", got, want)
	}
	p.run("copy")
	last := alice.create("the last")
	if last.ID != 50000001 {
		t.Errorf("id after the sequence was set to 50000000 and a copy = %d", last.ID)
	}
	p.run("finish")
	tasks = slices.Concat([]wireTask{last}, tasks[:6], tasks[7:])
	alice.wantTasks(tasks...)
	if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM task`); n == 0 {
		t.Errorf("the old table is empty")
	}
}

func TestMovingForeignTasks(t *testing.T) {
	t.Parallel()
	for _, zone := range []string{"with", "without"} {
		t.Run(zone+" time zone", func(t *testing.T) {
			t.Parallel()
			u := createDatabase(t)
			p := openPSQL(t, u, "timezone", "Australia/Lord_Howe", "datestyle", "SQL, MDY")
			d := startDB(t, openDB(t, u))
			sqlExec(t, d.pool, `DROP TABLE tasks`)
			sqlExec(t, d.pool, `
				CREATE TABLE tasks (
				    id serial PRIMARY KEY, user_id uuid NOT NULL, title char(40), description text,
					completed integer,
				    created_at timestamp `+zone+` time zone, updated_at timestamp `+zone+` time zone
				)`)
			sqlExec(t, d.pool, `CREATE INDEX tasks_user_id_completed_id_idx ON tasks (title)`)
			sqlExec(t, d.pool, `CREATE INDEX tasks_user_id_idempotency_key_idx ON tasks (created_at)`)
			const user = "7d3c1b4e-0a52-4a3e-9f7e-2a3a3c6a1f00"
			for i := range 3 {
				sqlExec(t, d.pool,
					`INSERT INTO tasks (user_id, title, completed, created_at, updated_at) VALUES ($1, $2, $3,
					'2024-05-01 12:00:00.000001Z',
						'2024-05-01 12:00:00.999999Z')`, user, fmt.Sprint("task ", i), i)
			}

			p.run("tasks")
			d = startDB(t, openDB(t, u))
			p.run("prepare")
			p.run("copy")
			c := newClientOf(t, startService(t, d, settings{}).url, user)
			var tasks []wireTask
			for id := int64(3); id > 0; id-- {
				tasks = append(tasks, wireTask{ID: id, UserID: user, Title: fmt.Sprint("task ", id-1),
					Completed: id > 1, CreatedAt: at(t, "2024-05-01 12:00:00.000001"),
					UpdatedAt: at(t, "2024-05-01 12:00:00.999999")})
			}
			c.wantTasks(tasks...)
			made := c.create("made here")
			c.wantTasks(slices.Concat([]wireTask{made}, tasks)...)

			// The table has its indexes under their names, and the other program goes on in its own.
			if names := sqlValue[string](t, d.pool,
				`SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_index
				JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = 'public.tasks'::regclass`); names !=
				"tasks_pkey tasks_user_id_completed_id_idx tasks_user_id_idempotency_key_idx" {
				t.Errorf("indexes of public.tasks: %s", names)
			}
			tx := begin(t, d)
			sqlExec(t, tx, `SET LOCAL search_path = old, public`)
			if id := sqlValue[int](t, tx,
				`INSERT INTO tasks (user_id, title) VALUES ($1, 'theirs') RETURNING id`, user); id != 4 {
				t.Errorf("the other program's next id = %d, want 4", id)
			}
			tx.Rollback(t.Context())
			if got := p.run("look"); got != "same|3|1|3\n" {
				t.Errorf("look after the copy = %s", got)
			}
			p.run("finish")
			if n := sqlValue[int](t, d.pool, `SELECT count(*) FROM old.tasks`); n != 3 {
				t.Errorf("%d rows in the old table, want 3", n)
			}
		})
	}
}

// This service created tasks before the first copy moved the sequence.
func TestMovingTakenIDs(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	service := startService(t, d, settings{}).url
	alice, bob := newClientOf(t, service, "alice"), newClientOf(t, service, "bob")
	own1, own2 := alice.create("own"), bob.create("own")
	sqlExec(t, d.pool, oldTable)
	sqlExec(t, d.pool, `INSERT INTO task (user_id, title, completed, created_at, updated_at)
		SELECT 'alice', 'old ' || i, false, '2024-05-01', '2024-05-01' FROM generate_series(1, 3) AS i`)
	p := openPSQL(t, u)
	p.run("task")
	p.run("prepare")
	p.run("copy")
	if got, want := p.status(), lines("1 invalid: id is taken",
		"2 invalid: id is taken"); got != want {
		t.Errorf("status after the copy = %s\nwant %s", got, want)
	}
	p.run("taken")
	p.run("copy")
	if got := p.status(); got != "" {
		t.Errorf("status after the second copy = %s", got)
	}
	old := func(id int64) wireTask {
		day := at(t, "2024-05-01 00:00:00")
		return wireTask{ID: id, UserID: "alice", Title: fmt.Sprint("old ", id), CreatedAt: day,
			UpdatedAt: day}
	}
	own1.ID = decode[[]wireTask](t, alice.do("GET", "", "").body)[0].ID
	own2.ID = decode[[]wireTask](t, bob.do("GET", "", "").body)[0].ID
	alice.wantTasks(own1, old(3), old(2), old(1))
	bob.wantTasks(own2)
	if own1.ID == own2.ID || min(own1.ID, own2.ID) <= 1_000_000 {
		t.Errorf("new ids %d, %d, want two larger than all", own1.ID, own2.ID)
	}
}

// The service creates and changes tasks while the copy runs, again and again.
func TestMovingUnderTraffic(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	service := startService(t, d, settings{}).url
	sqlExec(t, d.pool, oldTable)
	const more = `INSERT INTO task (id, user_id, title, completed, created_at, updated_at)
		SELECT $1::int + i, 'user ' || i % 4, 'old', false, now() - interval '1 hour',
			now() - interval '1 hour'
		FROM generate_series(1, 300) AS i`
	sqlExec(t, d.pool, more, 0)
	p := openPSQL(t, u)
	p.run("task")
	p.run("prepare")
	p.run("copy")

	done := make(chan struct{})
	var clients sync.WaitGroup
	toggled := make([]int, 4)
	for i := range toggled {
		c := newClientOf(t, service, fmt.Sprint("user ", i))
		clients.Go(func() {
			first := fmt.Sprintf("/api/user%%20%d/tasks/%d", i, cmp.Or(i, 4))
			for {
				select {
				case <-done:
					return
				default:
				}
				if a, err := c.try("POST", "/api/user%20"+fmt.Sprint(i)+"/tasks",
					`{"title": "new"}`); err != nil || a.status != 201 {
					t.Errorf("create = %d %s, %v", a.status, a.body, err)
				}
				if a, err := c.try("PATCH", first+"/complete", ``); err != nil || a.status != 200 {
					t.Errorf("toggle = %d %s, %v", a.status, a.body, err)
				}
				toggled[i]++
			}
		})
	}
	// Each time the old version's ids come near enough for the sequence to move again.
	for round := 1; round <= 8; round++ {
		sqlExec(t, d.pool, more, round*600_000)
		sqlExec(t, d.pool, `UPDATE task
			SET title = 'changed', updated_at = now() - interval '1 minute'
			WHERE id % 7 = 5 AND id > 4`)
		p.run("copy")
	}
	close(done)
	clients.Wait()

	if got, want := p.status(), lines("1 changed here", "2 changed here", "3 changed here",
		"4 changed here"); got != want {
		t.Errorf("status = %s\nwant %s", got, want)
	}
	if n := sqlValue[int](t, d.pool, `SELECT count(*) - count(DISTINCT id) FROM tasks`); n != 0 {
		t.Errorf("%d ids were assigned twice", n)
	}
	for i, n := range toggled {
		id := cmp.Or(i, 4)
		if got := sqlValue[bool](t, d.pool, `SELECT completed FROM tasks WHERE id = $1`,
			id); got != (n%2 == 1) {
			t.Errorf("task %d after %d toggles: completed = %t", id, n, got)
		}
	}
	if last := sqlValue[int64](t, d.pool, `SELECT max(id) FROM tasks`); last < 8*600_000+1_000_000 {
		t.Errorf("the last id is %d: the sequence did not move", last)
	}
}

// A change that commits while the copy waits for its row is newer and stays.
func TestMovingWaitsForAChange(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	sqlExec(t, d.pool, oldTable)
	sqlExec(t, d.pool, `INSERT INTO task VALUES
		(1, 'u', 'old', NULL, false, '2024-05-01', '2024-05-01'),
		(2, 'u', 'old', NULL, false, '2024-05-01', '2024-05-01')`)
	p := openPSQL(t, u)
	p.run("task")
	p.run("prepare")
	p.run("copy")
	sqlExec(t, d.pool, `UPDATE task SET title = 'changed there', updated_at = '2025-01-01'`)

	tx := begin(t, d)
	sqlExec(t, tx, `UPDATE tasks SET title = 'changed here', updated_at = '2026-01-01Z' WHERE id = 1`)
	failed := make(chan error)
	go func() {
		_, err := p.try("copy")
		failed <- err
	}()
	eventually(t, "copy that waits for the row", func() bool {
		return sqlValue[bool](t, d.pool, `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock')`)
	})
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Error(err)
	}
	if got := sqlValue[string](t, d.pool,
		`SELECT string_agg(title, ', ' ORDER BY id) FROM tasks`); got != "changed here, changed there" {
		t.Errorf("titles = %s", got)
	}
}

func TestMovingRestore(t *testing.T) {
	t.Parallel()
	from := startDB(t, openDB(t, createDatabase(t)))
	alice := newClientOf(t, startService(t, from, settings{}).url, "alice")
	want := []wireTask{}
	for i := range 5 {
		want = slices.Insert(want, 0, alice.create(fmt.Sprint("task ", i, "\t\\")))
	}
	const all = "(" + columns + ", idempotency_key, request_hash)"
	u := createDatabase(t)
	to := startDB(t, openDB(t, u))
	copyOut, err := from.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer copyOut.Release()
	copyIn, err := to.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer copyIn.Release()
	var backup bytes.Buffer
	if _, err := copyOut.Conn().PgConn().CopyTo(t.Context(), &backup,
		`COPY public.tasks `+all+` TO STDOUT`); err != nil {
		t.Fatal(err)
	}
	if _, err := copyIn.Conn().PgConn().CopyFrom(t.Context(), &backup,
		`COPY public.tasks `+all+` FROM STDIN`); err != nil {
		t.Fatal(err)
	}
	p := openPSQL(t, u)
	p.run("sequence")
	if got := p.run("sequence"); got != "" {
		t.Errorf("the sequence, moved again: %s, want no row", got)
	}
	alice = newClientOf(t, startService(t, to, settings{}).url, "alice")
	alice.wantTasks(want...)
	want = slices.Insert(want, 0, alice.create("after the restore"))
	alice.wantTasks(want...)
	if want[0].ID <= want[1].ID {
		t.Errorf("id after the restore = %d, want one larger than %d", want[0].ID, want[1].ID)
	}
	if got := p.run("sequence"); got != "" {
		t.Errorf("the sequence, moved after a create: %s, want no row", got)
	}

	// A restore without comments, one index and the primary key.
	sqlExec(t, to.pool, `ALTER TABLE tasks DROP CONSTRAINT tasks_pkey`)
	sqlExec(t, to.pool, `DROP INDEX tasks_user_id_completed_id_idx`)
	sqlExec(t, to.pool, `COMMENT ON TABLE tasks IS NULL`)
	p.run("key")
	p.run("comment")
	startDB(t, openDB(t, u))
	if n := sqlValue[int](t, to.pool,
		`SELECT count(*) FROM pg_index
			WHERE indrelid = 'public.tasks'::regclass AND indisvalid`); n != 3 {
		t.Errorf("%d indexes after the repair, want 3", n)
	}
	key := sqlValue[string](t, to.pool, `SELECT conname || ' ' || pg_get_constraintdef(oid)
		FROM pg_constraint WHERE conrelid = 'public.tasks'::regclass AND contype = 'p'`)
	if key != "tasks_pkey PRIMARY KEY (user_id, id)" {
		t.Errorf("primary key after the repair: %s", key)
	}
	alice.wantTasks(want...)
}

func TestMovingIndex(t *testing.T) {
	t.Parallel()
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	p := openPSQL(t, u)

	// While a transaction writes to the table, the index cannot be completed.
	tx := begin(t, d)
	sqlExec(t, tx, `INSERT INTO tasks (user_id, title) VALUES ('u', 'x')`)
	failed := make(chan error)
	creator := openPSQL(t, u)
	go func() {
		_, err := creator.try("index")
		failed <- err
	}()
	eventually(t, "invalid index",
		func() bool { return p.run("invalid") == "tasks_user_id_updated_at_idx\n" })
	sqlExec(t, d.pool, `SELECT pg_cancel_backend(pid) FROM pg_stat_activity
		WHERE datname = current_database() AND query LIKE 'CREATE INDEX CONCURRENTLY%'`)
	if err := <-failed; sqlState(err) != "57014" {
		t.Errorf("create = %v, want it canceled", err)
	}
	tx.Rollback(t.Context())
	if got := p.run("invalid"); got != "tasks_user_id_updated_at_idx\n" {
		t.Fatalf("invalid indexes = %q", got)
	}
	p.run("index")
	if got := p.run("invalid"); got == "" {
		t.Errorf("IF NOT EXISTS repaired an invalid index: the page says it does not")
	}
	p.run("drop")
	p.run("index")
	if got := p.run("invalid"); got != "" {
		t.Errorf("invalid indexes = %q", got)
	}
	made := sqlValue[uint32](t, d.pool, `SELECT 'tasks_user_id_updated_at_idx'::regclass::oid`)
	sqlExec(t, d.pool, `CREATE INDEX IF NOT EXISTS tasks_user_id_updated_at_idx
		ON public.tasks (user_id, updated_at)`)
	if oid := sqlValue[uint32](t, d.pool,
		`SELECT 'tasks_user_id_updated_at_idx'::regclass::oid`); oid != made {
		t.Errorf("the step made another index")
	}
}

// The service applies the example's steps, and a release that does not know them goes on.
func TestMovingSteps(t *testing.T) {
	t.Parallel()
	blocks, _ := movingBlocks(t)
	steps, err := parseSteps("-- step 1: stands for those of schema.sql\n" + blocks["steps"])
	if err != nil || len(steps) != 5 {
		t.Fatalf("steps = %v, %v, want five", steps, err)
	}
	u := createDatabase(t)
	d := startDB(t, openDB(t, u))
	c := newClientOf(t, startService(t, d, settings{}).url, "u")
	before := c.create("before")
	next := openDB(t, u)
	next.steps = slices.Concat(next.steps, steps[1:])
	startDB(t, next)
	after := c.create("after")
	c.wantTasks(after, before)
	_, err = d.pool.Exec(t.Context(), `UPDATE tasks SET priority = NULL`)
	if sqlState(err) != "23502" {
		t.Errorf("priority = NULL: %v, want a violation of NOT NULL", err)
	}
}
