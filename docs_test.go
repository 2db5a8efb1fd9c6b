package main

import (
	"cmp"
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
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// This file tests openapi.json and the pages: README.md and those in docs. moving_test.go runs the
// SQL of docs/moving.md.

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

// undeclared finds each way in which a response can differ from the document.
func TestOpenAPIChecksAnswers(t *testing.T) {
	t.Parallel()
	const task = `{"id":1,"user_id":"u","title":"t","description":null,"completed":false,` +
		`"created_at":"2026-01-02T03:04:05.000000Z","updated_at":"2026-01-02T03:04:05.000001Z"}`
	header := http.Header{"Content-Type": {"application/json"}, "Etag": {`"1"`}, "X-Request-Id": {"x"}}
	withHeader := func(name, value string) answer {
		h := header.Clone()
		h.Set(name, value)
		return answer{200, h, task}
	}
	withBody := func(before, after string) answer {
		return answer{200, header, strings.Replace(task, before, after, 1)}
	}
	for fault, a := range map[string]answer{
		"none":              {200, header, task},
		"none: redirect":    {307, http.Header{"Location": {"/docs"}}, "<a>"},
		"status":            {201, header, task},
		"body of a 304":     {304, header, task},
		"required header":   withHeader("ETag", ""),
		"undeclared header": withHeader("Retry-After", "1"),
		"media type":        withHeader("Content-Type", "text/plain"),
		"type":              withBody(`"id":1`, `"id":"1"`),
		"minimum":           withBody(`"id":1`, `"id":0`),
		"pattern":           withBody(`05.000000Z`, `05Z`),
		"missing member":    withBody(`"completed":false,`, ``),
		"unknown member":    withBody(`{`, `{"version":1,`),
	} {
		err := undeclared("GET", "/api/u/tasks/1", a)
		if (err == nil) != strings.HasPrefix(fault, "none") {
			t.Errorf("fault %q: %v", fault, err)
		}
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
	p.waitReady()
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
