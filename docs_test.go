package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// This file tests openapi.json and the pages: README.md and those in docs.

// An object is a JSON object of openapi.json.
type object = map[string]any

var openAPIDocument = sync.OnceValue(func() (document object) {
	json.Unmarshal(openAPI, &document)
	return document
})

// resolve returns an object of the document, or the one that it references; nil for anything else.
func resolve(v any) object {
	o, _ := v.(object)
	ref, ok := o["$ref"].(string)
	if !ok {
		return o
	}
	at := openAPIDocument()
	for name := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
		at = at[name].(object)
	}
	return at
}

// documentedRoutes finds the route of a request, as the service does.
var documentedRoutes = sync.OnceValue(func() *http.ServeMux {
	mux := http.NewServeMux()
	for pattern := range operations() {
		mux.Handle(pattern, http.NotFoundHandler())
	}
	return mux
})

// operations returns the operations of the document by the pattern of their route.
func operations() map[string]object {
	found := map[string]object{}
	for path, item := range openAPIDocument()["paths"].(object) {
		for method, op := range item.(object) {
			if method != "parameters" {
				found[strings.ToUpper(method)+" "+path] = op.(object)
			}
		}
	}
	return found
}

// undeclared returns how a response differs from what openapi.json declares. client.try checks each
// response with it. What net/http itself answers is not declared.
func undeclared(method, path string, a answer) error {
	_, pattern := documentedRoutes().Handler(&http.Request{Method: method, URL: &url.URL{Path: path}})
	if pattern == "" || a.status/100 == 3 && a.header.Get("Location") != "" { // the router's answer
		return nil
	}
	op := operations()[pattern]
	response := resolve(op["responses"].(object)[fmt.Sprint(a.status)])
	if response == nil {
		return fmt.Errorf("status %d is not declared", a.status)
	}
	headers, _ := response["headers"].(object)
	for _, name := range []string{"X-Request-Id", "ETag", "Location", "Link", "X-Total-Count",
		"Idempotency-Replayed", "Retry-After", "WWW-Authenticate"} {
		header, sent := resolve(headers[name]), a.header.Get(name) != ""
		if sent && header == nil || !sent && header["required"] == true {
			return fmt.Errorf("%d with the %s %q", a.status, name, a.header.Get(name))
		}
	}
	content, _ := response["content"].(object)
	switch {
	case content == nil && a.body != "":
		return fmt.Errorf("%d with a body", a.status)
	case content == nil || method == http.MethodHead:
		return nil
	}
	media, _, _ := strings.Cut(a.header.Get("Content-Type"), ";")
	declared := resolve(content[media])
	switch {
	case declared == nil:
		return fmt.Errorf("%d with Content-Type %s", a.status, media)
	case media != "application/json":
		return nil
	}
	var body any
	if err := json.Unmarshal([]byte(a.body), &body); err != nil {
		return err
	}
	return mismatch("body", resolve(declared["schema"]), body)
}

// mismatch returns how a value differs from a schema. It knows the keywords of the document.
func mismatch(at string, schema object, v any) error {
	kind := map[string]string{"<nil>": "null", "bool": "boolean", "float64": "number",
		"string": "string", "[]interface {}": "array", "map[string]interface {}": "object",
	}[fmt.Sprintf("%T", v)]
	if n, ok := v.(float64); ok && n == math.Trunc(n) {
		kind = "integer"
	}
	if types := fmt.Sprint(schema["type"]); !strings.Contains(types, kind) {
		return fmt.Errorf("%s is %s, declared %s", at, kind, types)
	}
	within := func(n float64, low, high string) error {
		lowest, isLow := schema[low].(float64)
		highest, isHigh := schema[high].(float64)
		if isLow && n < lowest || isHigh && n > highest {
			return fmt.Errorf("%s is %v, outside of its %s or %s", at, v, low, high)
		}
		return nil
	}
	switch v := v.(type) {
	case float64:
		return within(v, "minimum", "maximum")
	case string:
		pattern, _ := schema["pattern"].(string)
		if !regexp.MustCompile(pattern).MatchString(v) {
			return fmt.Errorf("%s is %q, declared %s", at, v, pattern)
		}
		return within(float64(utf8.RuneCountInString(v)), "minLength", "maxLength")
	case []any:
		for i, item := range v {
			if err := mismatch(fmt.Sprintf("%s[%d]", at, i), resolve(schema["items"]), item); err != nil {
				return err
			}
		}
		return within(float64(len(v)), "minItems", "maxItems")
	case object:
		required, _ := schema["required"].([]any)
		for _, name := range required {
			if _, ok := v[name.(string)]; !ok {
				return fmt.Errorf("%s has no %s", at, name)
			}
		}
		properties, _ := schema["properties"].(object)
		if schema["additionalProperties"] == false && len(required) != len(properties) {
			return fmt.Errorf("%s: not every member is required", at)
		}
		for name, member := range v {
			declared := resolve(properties[name])
			if declared == nil && schema["additionalProperties"] != false {
				continue
			}
			if err := mismatch(at+"."+name, declared, member); err != nil {
				return err
			}
		}
	}
	return nil
}

// openapi.json declares the routes of the service, and no others.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	declared := slices.Sorted(maps.Keys(operations()))
	registered := slices.Sorted(maps.Keys((&server{}).routes()))
	if !slices.Equal(declared, registered) {
		t.Errorf("declared   %q\nregistered %q", declared, registered)
	}
}

// The examples of errors are the service's own texts, and all of them, each under its status. Every
// example matches its schema. A status that handlers share is declared for each of them.
func TestOpenAPIExamplesAreTrue(t *testing.T) {
	t.Parallel()
	blank := httptest.NewRequest("POST", "/", strings.NewReader(`{"title": " "}`))
	_, errBlank := readChange(blank)
	_, errLimit := readPage(url.Values{"limit": {"0"}})
	missing := map[string]string{} // all texts but those for a request without a route
	for _, err := range []error{errBadJSON, errCutBody, errNoToken, errBadToken, errOtherUser,
		errNotFound, errSlowBody, errChanged, errLargeBody, errNotJSON, errEncoded, errKeyReused,
		errBlank, errLimit, errTooMany, errManyHeaders, errInternal, errNotSent, errMayHaveRun} {
		missing[err.Error()] = fmt.Sprint(err.(apiError).status)
	}
	texts := maps.Clone(missing)
	for route, op := range operations() {
		responses := op["responses"].(object)
		for status, response := range responses {
			content, _ := resolve(response)["content"].(object)
			media := resolve(content["application/json"])
			examples := object{"example": object{"value": media["example"]}}
			if media["example"] == nil {
				examples = resolve(media["examples"])
			}
			if status >= "400" && len(examples) == 0 {
				t.Errorf("%s: %s has no example", route, status)
			}
			for _, example := range examples {
				value := example.(object)["value"]
				if err := mismatch("example", resolve(media["schema"]), value); err != nil {
					t.Errorf("%s: %s: %v", route, status, err)
				}
				text, _ := resolve(value)["detail"].(string)
				if status >= "400" && texts[text] != status {
					t.Errorf("%s: %q is declared as %s, sent as %q", route, text, status, texts[text])
				}
				delete(missing, text)
			}
		}
		shared := []string{"431", "500"}
		if strings.Contains(route, "/api/") {
			shared = append(shared, "401", "403", "422", "429", "503")
		}
		if op["requestBody"] != nil {
			shared = append(shared, "400", "408", "413", "415")
		}
		for _, status := range shared {
			if responses[status] == nil {
				t.Errorf("%s does not declare %s", route, status)
			}
		}
	}
	if len(missing) > 0 {
		t.Errorf("no response has the examples %q", missing)
	}
}

// pages returns the Markdown files.
func pages() []string {
	found, _ := filepath.Glob("docs/*.md")
	return append(found, "README.md")
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section returns the text between a heading of a page and the next one of its level.
func section(t *testing.T, page, heading string) string {
	t.Helper()
	found := matches(`(?s)\n## `+heading+`\n(.*?)(?:\n## |$)`, readFile(t, page))
	if found == nil {
		t.Fatalf("%s has no section %q", page, heading)
	}
	return found[0]
}

// matches returns what the first group of a pattern matches in a text, sorted, each once.
func matches(pattern, text string) (found []string) {
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, match[1])
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// The transcript of "Try it" prints what README.md shows, except for times and line breaks. It runs
// on an empty database, in which the first id is 1.
func TestReadmeTranscript(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "DATABASE_URL="+createDatabase(t))
	p.waitHealth("ready")
	var script, transcript string
	for line := range strings.Lines(section(t, "README.md", "Try it")) {
		line, isCode := strings.CutPrefix(line, "    ")
		line = strings.ReplaceAll(line, "http://localhost:8080", p.url)
		if isCode {
			transcript += line
		}
		if command, ok := strings.CutPrefix(line, "$ "); ok {
			script += "cat <<'END'\n" + line + "END\n" + command
		}
	}
	bash := exec.Command("bash", "-c", script)
	bash.Env = append(os.Environ(), "BETTER_AUTH_SECRET="+testSecret)
	out, err := bash.Output()
	general := func(text string) string {
		text = strings.Join(strings.Fields(text), "")
		return regexp.MustCompile(`"2[0-9-]{9}T[0-9:.]{15}Z"`).ReplaceAllString(text, "TIME")
	}
	got, want := general(string(out)), general(transcript)
	if err != nil || got != want || strings.Count(want, "$") < 8 {
		t.Errorf("%v\ngot  %s\nwant %s", err, got, want)
	}
}

// The tables of README.md have every setting that the service reads, and every route.
func TestReadmeHasEverySettingAndRoute(t *testing.T) {
	t.Parallel()
	source := readFile(t, "main.go") + readFile(t, "auth.go") + readFile(t, "db.go")
	got := matches("(?m)^\\| `([A-Z_]+)`", section(t, "README.md", "Settings"))
	if want := matches(`etenv\("([A-Z_]+)"\)`, source); !slices.Equal(got, want) {
		t.Errorf("README has the settings %q, want %q", got, want)
	}
	patterns := strings.Join(slices.Collect(maps.Keys((&server{}).routes())), "\n")
	got = matches("(?m)^\\| [^|/]*(/[^|`]*)`", section(t, "README.md", "Routes"))
	if want := matches(`(?m) (.*)$`, patterns); !slices.Equal(got, want) {
		t.Errorf("README has the routes %q, want %q", got, want)
	}
}

// The pages, and the comments of the product, name tests that exist.
func TestNamedTestsExist(t *testing.T) {
	t.Parallel()
	files, _ := filepath.Glob("*.go")
	var tests, others string
	for _, file := range append(files, pages()...) {
		if strings.HasSuffix(file, "_test.go") {
			tests += readFile(t, file)
		} else {
			others += readFile(t, file)
		}
	}
	existing := matches(`(?m)^func (Test\w+)\(`, tests)
	for _, name := range matches(`\b(Test[A-Z]\w+)`, others) {
		if !slices.Contains(existing, name) {
			t.Errorf("there is no test %s", name)
		}
	}
}

// Links between files, and to headings, have a target.
func TestLinks(t *testing.T) {
	t.Parallel()
	for _, page := range pages() {
		for _, link := range matches(`\]\(([^)\s]+)\)`, readFile(t, page)) {
			if strings.Contains(link, "://") {
				continue
			}
			file, anchor, hasAnchor := strings.Cut(link, "#")
			target := filepath.Join(filepath.Dir(page), cmp.Or(file, filepath.Base(page)))
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %s: %v", page, link, err)
			} else if hasAnchor && !hasHeading(readFile(t, target), anchor) {
				t.Errorf("%s: %s: there is no such heading", page, link)
			}
		}
	}
}

// hasHeading reports whether GitHub gives one of the headings of a page that id.
func hasHeading(text, id string) bool {
	text = regexp.MustCompile(`[^\p{L}\p{N}_ \n#-]`).ReplaceAllString(strings.ToLower(text), "")
	text = strings.ReplaceAll(text, " ", "-")
	return regexp.MustCompile(`(?m)^#+-` + regexp.QuoteMeta(id) + `$`).MatchString(text)
}

// The SQL of docs/operations.md runs. Its query shows who holds the lock that a step waits for: a
// session that uses the table, or another instance that applies a step.
func TestOperationsSQL(t *testing.T) {
	t.Parallel()
	testDB(t)
	for _, sql := range matches("(?s)\n```sql\n(.*?)```", readFile(t, "docs/operations.md")) {
		sqlExec(t, begin(t, sharedDB), sql) // and rolls it back
	}
	user, step := lockTasks(t, newUser()), begin(t, sharedDB)
	sqlExec(t, step, `SELECT pg_advisory_xact_lock($1)`, schemaLock)
	query := matches("(?s)\n```sql\n(.*?)```", section(t, "docs/operations.md", "Upgrades"))[0]
	rows, _ := sharedDB.pool.Query(t.Context(), query)
	holders, err := pgx.CollectRows(rows, pgx.RowToMap)
	if err != nil {
		t.Fatal(err)
	}
	for _, tx := range []runner{user, step} {
		pid := sqlValue[int32](t, tx, `SELECT pg_backend_pid()`)
		isShown := func(row map[string]any) bool { return row["pid"] == pid }
		if !slices.ContainsFunc(holders, isShown) {
			t.Errorf("the query shows %v, want process %d among them", holders, pid)
		}
	}
}

// The alerts of docs/operations.md are valid and use metrics that the service has, and the page
// names every metric.
func TestOperationsAlerts(t *testing.T) {
	t.Parallel()
	s := startService(t, testDB(t), settings{})
	metrics := httptest.NewRecorder()
	s.serveMetrics(metrics, nil)
	want := matches(`# TYPE (\S+) `, metrics.Body.String())
	text := section(t, "docs/operations.md", "Alerts")
	if got := matches(`\b((?:todo|go)_\w+)`, text); !slices.Equal(got, want) {
		t.Errorf("the page has the metrics %q, want %q", got, want)
	}

	expressions := matches("(?m)^\\| [^|`]+ \\| `([^`]+)` \\|", text)
	if len(expressions) < 5 {
		t.Fatalf("the alerts are %q, want at least 5", expressions)
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("needs promtool, of Prometheus")
	}
	rules := "groups:\n- name: operations\n  rules:\n"
	for i, expression := range expressions {
		rules += fmt.Sprintf("  - alert: a%d\n    expr: '%s'\n", i, expression)
	}
	check := exec.Command(promtool, "check", "rules", "/dev/stdin")
	check.Stdin = strings.NewReader(rules)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

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

// All blocks of docs/moving.md on one database: the tasks of another application and those of the
// FastAPI one are imported, an incomplete restore is repaired, an index precedes its step.
func TestMovingPage(t *testing.T) {
	t.Parallel()
	page := readFile(t, "docs/moving.md")
	blocks := map[string]string{}
	block := regexp.MustCompile("(?s)<!-- sql: ([a-z]+) -->\n```sql\n(.*?)```\n")
	for _, match := range block.FindAllStringSubmatch(page, -1) {
		blocks[match[1]] = match[2]
	}
	if n := strings.Count(page, "```sql"); n != len(blocks) || n != 6 {
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
		if got := c.list(""); len(got) != 1 || got[0].String() != want.String() {
			t.Errorf("imported %v, want %v", got, want)
		}
		if next := c.create("next"); next.ID <= want.ID {
			t.Errorf("the next task has the id %d, want one above %d", next.ID, want.ID)
		}
	}
	wantImported(wireTask{ID: 7, UserID: user, Title: "theirs", Completed: true, CreatedAt: day,
		UpdatedAt: day.Add(time.Second / 2)})

	// The longest texts, and a time that New York's clocks skip. The rows after it are invalid.
	long := strings.Repeat("é", 1000)
	title, longest := long[:2*200], long[:2*256]
	sqlExec(t, d.pool, `CREATE TABLE public.task (id bigint, user_id varchar, title varchar,
		description varchar, completed boolean, created_at timestamp, updated_at timestamp)`)
	for _, row := range []string{
		`20, '` + longest + `', '` + title + `', '` + long + `', false, '2024-03-10 02:30', '9999-12-31'`,
		`0, 'u', 'x', '', true, now(), now()`,
		`1, '', 'x', '', true, now(), now()`,
		`2, '` + longest + `x', 'x', '', true, now(), now()`,
		`3, 'u', '` + decode[string](t, blank) + `', '', true, now(), now()`,
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
