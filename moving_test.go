package main

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
)

// runBlock runs a block as psql does, statement by statement, in a session with unusual settings.
// It returns the sorted rows, their columns separated by |.
func runBlock(t testing.TB, databaseURL, block string) (rows []string) {
	t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	config.RuntimeParams["timezone"] = "America/New_York"
	config.RuntimeParams["datestyle"] = "SQL, DMY"
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for statement := range strings.SplitAfterSeq(strings.TrimSpace(block), ";\n") {
		results, err := conn.PgConn().Exec(t.Context(), statement).ReadAll()
		if err != nil {
			t.Fatalf("docs/moving.md: %s: %v", statement, err)
		}
		for _, row := range results[0].Rows {
			rows = append(rows, string(bytes.Join(row, []byte("|"))))
		}
	}
	slices.Sort(rows)
	return rows
}

// All blocks of the page on one database: another application's table public.tasks is imported,
// then the FastAPI application's, a restore without some parts is repaired, and an index is created
// before its step.
func TestMovingPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/moving.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := map[string]string{}
	block := regexp.MustCompile("(?s)<!-- sql: ([a-z]+) -->\n```sql\n(.*?)```\n")
	for _, match := range block.FindAllStringSubmatch(string(page), -1) {
		blocks[match[1]] = match[2]
	}
	if n := strings.Count(string(page), "```sql"); n != len(blocks) || n != 6 {
		t.Errorf("%d SQL blocks, %d with a name, want the 6 of this test", n, len(blocks))
	}
	u := createDatabase(t)
	d := openDB(t, u)
	const user = "7d3c1b4e-0a52-4a3e-9f7e-2a3a3c6a1f00"
	sqlExec(t, d.pool, `
		CREATE TABLE public.tasks (id serial PRIMARY KEY, user_id uuid, title char(40),
			description text, completed int, created_at timestamptz, updated_at timestamptz);
		CREATE INDEX tasks_user_id_completed_id_idx ON public.tasks (title);
		INSERT INTO public.tasks
		VALUES (7, '`+user+`', 'theirs', NULL, 1, '2024-05-01 12:00:00Z', '2024-05-01 12:00:00.5Z')`)
	runBlock(t, u, blocks["aside"])
	startDB(t, d)
	parts := runBlock(t, u, blocks["restored"])
	source := regexp.MustCompile(`public\.task\b`)
	if rows := runBlock(t, u, source.ReplaceAllString(blocks["check"], "old.tasks")); rows != nil {
		t.Errorf("check lists %q, want no rows", rows)
	}
	runBlock(t, u, source.ReplaceAllString(blocks["import"], "old.tasks"))
	service := startService(t, d, settings{}).url
	day := time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)
	wantImported := func(want wireTask) {
		t.Helper()
		c := newClientOf(t, service, want.UserID)
		if got := c.list(""); len(got) != 1 || !equalTasks(got[0], want) {
			t.Errorf("imported %v, want %v", got, want)
		}
		if next := c.create("next"); next.ID <= want.ID {
			t.Errorf("the next task has the id %d, want one above %d", next.ID, want.ID)
		}
	}
	wantImported(wireTask{ID: 7, UserID: user, Title: "theirs", Completed: true, CreatedAt: day,
		UpdatedAt: day.Add(time.Second / 2)})

	// The longest texts, and a time that New York's clocks skip. The rows after it are invalid.
	long, blank := strings.Repeat("é", 1000), ""
	for r := range rune(0x3001) {
		if unicode.IsSpace(r) {
			blank += string(r)
		}
	}
	title, longest := long[:2*200], long[:2*256]
	sqlExec(t, d.pool, `CREATE TABLE public.task (id bigint, user_id varchar, title varchar,
		description varchar, completed boolean, created_at timestamp, updated_at timestamp)`)
	for _, row := range []string{
		`20, '` + longest + `', '` + title + `', '` + long + `', false, '2024-03-10 02:30', '9999-12-31'`,
		`0, 'u', 'x', '', true, now(), now()`,
		`1, '', 'x', '', true, now(), now()`,
		`2, '` + longest + `x', 'x', '', true, now(), now()`,
		`3, 'u', '` + blank + `', '', true, now(), now()`,
		`4, 'u', '` + title + `x', '', true, now(), now()`,
		`5, 'u', 'x', '` + long + `x', true, now(), now()`,
		`6, 'u', 'x', '', NULL, now(), now()`,
		`7, 'u', 'x', '', true, NULL, now()`,
		`8, 'u', 'x', '', true, now(), 'infinity'`,
		`9007199254740992, 'u', 'x', '', true, now(), now()`,
	} {
		sqlExec(t, d.pool, `INSERT INTO public.task VALUES (`+row+`)`)
	}
	ids := ""
	for _, row := range runBlock(t, u, blocks["check"]) {
		id, _, _ := strings.Cut(row, "|")
		ids += id + " "
	}
	if ids != "0 1 2 3 4 5 6 7 8 9007199254740992 " {
		t.Errorf("check lists the ids %s", ids)
	}
	sqlExec(t, d.pool, `DELETE FROM public.task WHERE id <> 20`)
	runBlock(t, u, blocks["import"])
	wantImported(wireTask{ID: 20, UserID: longest, Title: title, Description: &long,
		CreatedAt: time.Date(2024, 3, 10, 2, 30, 0, 0, time.UTC),
		UpdatedAt: time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)})

	sqlExec(t, d.pool, `ALTER TABLE public.tasks DROP CONSTRAINT tasks_pkey;
		COMMENT ON TABLE public.tasks IS NULL;
		SELECT setval('public.tasks_id_seq', 1)`)
	runBlock(t, u, blocks["remedies"])
	if got := runBlock(t, u, blocks["restored"]); !slices.Equal(got, parts) {
		t.Errorf("the repaired table has the parts\n%s\nwant\n%s", got, parts)
	}
	_, setval, _ := strings.Cut(blocks["import"], "public.task;\n")
	runBlock(t, u, strings.TrimSuffix(setval, "COMMIT;\n"))
	if task := newClientOf(t, service, user).create("after the restore"); task.ID <= 21 {
		t.Errorf("a task has the id %d after the restore, want one above 21", task.ID)
	}
	runBlock(t, u, blocks["index"])
	next := openDB(t, u)
	next.steps = append(next.steps, "index\nCREATE INDEX IF NOT EXISTS tasks_user_id_updated_at_idx "+
		"ON public.tasks (user_id, updated_at)")
	startDB(t, next)
}
