package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// An object is a JSON object of openapi.json.
type object = map[string]any

var openAPIDocument = sync.OnceValue(func() (doc object) {
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		panic(err)
	}
	return doc
})

// resolve follows a $ref, where v is one.
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

// operation returns what the document says of a request, nil if nothing.
func operation(method, path string) object {
	path, _, _ = strings.Cut(path, "?")
	if method == http.MethodHead {
		method = http.MethodGet
	}
	for template, item := range openAPIDocument()["paths"].(object) {
		pattern := regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(template, `[^/]+`)
		if regexp.MustCompile("^" + pattern + "$").MatchString(path) {
			return resolve(item.(object)[strings.ToLower(method)])
		}
	}
	return nil
}

// undeclared returns how an answer differs from what the document declares.
// client.try validates every answer with it.
func undeclared(method, path string, a answer) error {
	op := operation(method, path)
	if op == nil {
		return nil // a path or method of no route, or a test's own
	}
	response := resolve(op["responses"].(object)[fmt.Sprint(a.status)])
	if response == nil {
		return fmt.Errorf("status %d is not declared", a.status)
	}
	headers, _ := response["headers"].(object)
	for name, header := range headers {
		if resolve(header)["required"] == true && a.header.Get(name) == "" {
			return fmt.Errorf("%d without %s", a.status, name)
		}
	}
	for _, name := range []string{"ETag", "Location", "Link", "X-Total-Count", "Idempotency-Replayed",
		"Retry-After", "WWW-Authenticate"} {
		if a.header.Get(name) != "" && headers[name] == nil {
			return fmt.Errorf("%d with %s, which is not declared", a.status, name)
		}
	}
	content, _ := response["content"].(object)
	if content == nil || method == http.MethodHead {
		if a.body != "" {
			return fmt.Errorf("%d with a body", a.status)
		}
		return nil
	}
	media, _, _ := strings.Cut(a.header.Get("Content-Type"), ";")
	declared := resolve(content[media])
	if declared == nil {
		return fmt.Errorf("%d with Content-Type %s", a.status, media)
	}
	if media != "application/json" {
		return nil
	}
	var body any
	if err := json.Unmarshal([]byte(a.body), &body); err != nil {
		return err
	}
	return mismatch("body", resolve(declared["schema"]), body)
}

// mismatch returns how a value differs from a schema, of which it knows what the document uses.
func mismatch(at string, schema object, v any) error {
	kind := map[reflect.Kind]string{reflect.String: "string", reflect.Bool: "boolean",
		reflect.Float64: "number",
		reflect.Slice:   "array", reflect.Map: "object", reflect.Invalid: "null"}[reflect.ValueOf(v).Kind()]
	types, ok := schema["type"].([]any)
	if !ok {
		types = []any{schema["type"]}
	}
	if n, isNumber := v.(float64); isNumber && n == float64(int64(n)) &&
		slices.Contains(types, "integer") {
		kind = "integer"
	}
	if !slices.Contains(types, any(kind)) {
		return fmt.Errorf("%s is %s, declared %v", at, kind, types)
	}
	if enum, ok := schema["enum"].([]any); ok && !slices.Contains(enum, v) {
		return fmt.Errorf("%s is %v, declared one of %v", at, v, enum)
	}
	number := func(name string, otherwise float64) float64 {
		if n, ok := schema[name].(float64); ok {
			return n
		}
		return otherwise
	}
	switch v := v.(type) {
	case float64:
		if v < number("minimum", v) || v > number("maximum", v) {
			return fmt.Errorf("%s is %v, out of bounds", at, v)
		}
	case string:
		if n := float64(utf8.RuneCountInString(v)); n < number("minLength", 0) ||
			n > number("maxLength", n) {
			return fmt.Errorf("%s has %v characters", at, n)
		}
		if pattern, ok := schema["pattern"].(string); ok && !matches(pattern, v) {
			return fmt.Errorf("%s is %q, declared %s", at, v, pattern)
		}
		if _, err := time.Parse(time.RFC3339, v); schema["format"] == "date-time" &&
			(err != nil || !strings.HasSuffix(v, "Z")) {
			return fmt.Errorf("%s is no time in UTC: %q", at, v)
		}
	case []any:
		for i, item := range v {
			if err := mismatch(fmt.Sprintf("%s[%d]", at, i), resolve(schema["items"]), item); err != nil {
				return err
			}
		}
	case object:
		properties, _ := schema["properties"].(object)
		required, _ := schema["required"].([]any)
		for _, name := range required {
			if _, ok := v[name.(string)]; !ok {
				return fmt.Errorf("%s lacks %s", at, name)
			}
		}
		for name, member := range v {
			declared := resolve(properties[name])
			if declared == nil && schema["additionalProperties"] == false {
				return fmt.Errorf("%s has %s, which is not declared", at, name)
			}
			if declared != nil {
				if err := mismatch(at+"."+name, declared, member); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// matches is a pattern of the document, which is ECMAScript's, on text.
func matches(pattern, text string) bool {
	return regexp.MustCompile(regexp.MustCompile(`\\u(....)`).ReplaceAllString(pattern,
		`\x{$1}`)).MatchString(text)
}

func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	if version, _ := openAPIDocument()["openapi"].(string); !strings.HasPrefix(version, "3.1.") {
		t.Errorf("openapi = %q, want 3.1", version)
	}
	var declared []string
	for path, item := range openAPIDocument()["paths"].(object) {
		for method := range item.(object) {
			if method != "parameters" {
				declared = append(declared, strings.ToUpper(method)+" "+path)
			}
		}
	}
	registered := slices.Sorted(maps.Keys((&server{}).routes()))
	slices.Sort(declared)
	if !slices.Equal(declared, registered) {
		t.Errorf("declared   %q\nregistered %q", declared, registered)
	}
}

// The document's examples of refusals are the service's own words, and all of them, under their
// statuses; a status is declared wherever forUser, readObject or a handler can give it.
func TestOpenAPIExamplesAreTrue(t *testing.T) {
	t.Parallel()
	missing := map[string]string{}
	for _, e := range []apiError{errBadJSON, errCutBody, errNoToken, errBadToken, errOtherUser,
		errNotFound, errSlowBody, errChanged, errLargeBody, errNotJSON, errEncoded, errKeyReused,
		errTooMany, errInternal, errUnavailable} {
		missing[e.detail] = fmt.Sprint(e.status)
	}
	_, blank := readChange(t.Context(), httptest.NewRecorder(),
		httptest.NewRequest("POST", "/", strings.NewReader(`{"title": " "}`)))
	_, limit := readPage(url.Values{"limit": {"0"}})
	missing[blank.Error()], missing[limit.Error()] = "422", "422"
	texts := maps.Clone(missing)
	for path, item := range openAPIDocument()["paths"].(object) {
		for method, op := range item.(object) {
			if method == "parameters" {
				continue
			}
			for status, response := range op.(object)["responses"].(object) {
				content, _ := resolve(response)["content"].(object)
				media := resolve(content["application/json"])
				examples := []any{}
				if one, ok := media["example"]; ok {
					examples = append(examples, one)
				}
				for _, one := range resolve(media["examples"]) {
					examples = append(examples, one.(object)["value"])
				}
				if status >= "400" && media != nil && len(examples) == 0 {
					t.Errorf("%s %s: %s has no example", method, path, status)
				}
				for _, example := range examples {
					if err := mismatch("example", resolve(media["schema"]), example); err != nil {
						t.Errorf("%s %s %s: %v", method, path, status, err)
					}
					text, _ := resolve(example)["detail"].(string)
					if status >= "400" && texts[text] != status {
						t.Errorf("%s %s: the example %q is answered with %q, want %s",
							method, path, text, texts[text], status)
					}
					delete(missing, text)
				}
			}
		}
	}
	if len(missing) > 0 {
		t.Errorf("the document lacks %q", missing)
	}
	for name, schema := range openAPIDocument()["components"].(object)["schemas"].(object) {
		examples, _ := schema.(object)["examples"].([]any)
		for _, example := range examples {
			if err := mismatch(name, schema.(object), example); err != nil {
				t.Errorf("example: %v", err)
			}
		}
	}
	for path, item := range openAPIDocument()["paths"].(object) {
		for method := range item.(object) {
			if method == "parameters" || !strings.HasPrefix(path, "/api/{user_id}/") {
				continue
			}
			want := []string{"401", "403", "422", "429", "500", "503"}
			if strings.Contains(path, "{id}") {
				want = append(want, "404")
			}
			if method != "get" && strings.Contains(path, "{id}") {
				want = append(want, "412")
			}
			if method == "post" || method == "put" || method == "patch" {
				want = append(want, "400", "408", "413", "415")
			}
			for _, status := range want {
				if item.(object)[method].(object)["responses"].(object)[status] == nil {
					t.Errorf("%s %s does not declare %s", method, path, status)
				}
			}
		}
	}
}

// Swagger UI sends the examples and defaults of parameters that nobody filled in: an If-Match that
// never matches, a key that is used up, an offset beside a before.
func TestOpenAPIFillsInNothing(t *testing.T) {
	t.Parallel()
	for name, p := range openAPIDocument()["components"].(object)["parameters"].(object) {
		parameter := p.(object)
		filled := parameter["example"] != nil || parameter["examples"] != nil
		for _, member := range []string{"default", "example", "examples"} {
			filled = filled || parameter["schema"].(object)[member] != nil
		}
		// its default is the service's own
		if filled && parameter["required"] != true && name != "Limit" {
			t.Errorf("%s is sent with a value that nobody chose", name)
		}
	}
	for name, schema := range openAPIDocument()["components"].(object)["schemas"].(object) {
		for member, property := range schema.(object)["properties"].(object) {
			if property.(object)["default"] != nil { // generated types take it for required
				t.Errorf("%s.%s has a default", name, member)
			}
		}
	}
}

// The generated code of hey-api (zod, valibot) does not parse with \\u in a pattern.
func TestOpenAPIPatternsHaveNoEscapedCodePoint(t *testing.T) {
	t.Parallel()
	if at := regexp.MustCompile(`"pattern": ".*\\\\u.*"`).Find(openAPI); at != nil {
		t.Errorf("%s", at)
	}
}

func TestOpenAPIChecksAnswers(t *testing.T) {
	t.Parallel()
	h := http.Header{"Content-Type": {"application/json"}, "Etag": {`"1"`}, "X-Request-Id": {"x"}}
	const good = `{"id":1,"user_id":"u","title":"t","description":null,"completed":false,"created_at":"2026-01-02T03:04:05.000000Z","updated_at":"2026-01-02T03:04:05.000001Z"}`
	if err := undeclared("GET", "/api/u/tasks/1", answer{200, h, good}); err != nil {
		t.Errorf("a good answer: %v", err)
	}
	for _, bad := range []answer{
		{201, h, good},
		{200, http.Header{"Content-Type": {"application/json"}, "X-Request-Id": {"x"}}, good},
		{200, http.Header{"Content-Type": {"text/plain"}, "Etag": {`"1"`}, "X-Request-Id": {"x"}}, good},
		{200, h, strings.Replace(good, `"id":1`, `"id":"1"`, 1)},
		{200, h, strings.Replace(good, `"id":1`, `"id":0`, 1)},
		{200, h, strings.Replace(good, `"id":1`, `"id":1.5`, 1)},
		{200, h, strings.Replace(good, `"completed":false,`, ``, 1)},
		{200, h, strings.Replace(good, `{`, `{"version":1,`, 1)},
		{200, h, strings.Replace(good, `"t"`, `""`, 1)},
		{200, h, strings.Replace(good, `"t"`, `"  "`, 1)},
		{200, h, strings.Replace(good, `05.000000Z`, `05Z`, 1)},
		{404, h, `{"detail":["x"]}`},
	} {
		if undeclared("GET", "/api/u/tasks/1", bad) == nil {
			t.Errorf("%d %v %s passes", bad.status, bad.header, bad.body)
		}
	}
}

func TestDocuments(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	c.authorization = ""
	for path, want := range map[string]struct {
		contentType string
		content     []byte
	}{"/openapi.json": {"application/json", openAPI},
		"/docs": {"text/html; charset=utf-8", docsPage}} {
		a := c.send("GET", path, "")
		if a.status != 200 || a.body != string(want.content) ||
			a.header.Get("Content-Type") != want.contentType {
			t.Errorf("GET %s = %d %v", path, a.status, a.header)
		}
		if a := c.send("HEAD", path, ""); a.status != 200 ||
			a.header.Get("Content-Length") != fmt.Sprint(len(want.content)) {
			t.Errorf("HEAD %s = %d %v", path, a.status, a.header)
		}
	}

	policy := c.send("GET", "/docs", "").header.Get("Content-Security-Policy")
	script := regexp.MustCompile(`(?s)<script>(.*?)</script>`).FindSubmatch(docsPage)
	hash := sha256.Sum256(script[1])
	want := "'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "'"
	if !strings.Contains(policy, want) {
		t.Errorf("the policy %s lacks the page's script, %s", policy, want)
	}
	loads := regexp.MustCompile(`(?:src|href)="(https:[^"]*/)[^"/]*"\s+`+
		`integrity="sha384-[A-Za-z0-9+/]{64}"\s+crossorigin="anonymous"`).FindAllSubmatch(docsPage, -1)
	if len(loads) != 2 || len(regexp.MustCompile(`(?:src|href)="http`).FindAll(docsPage, -1)) != 2 {
		t.Fatalf("the page loads %q, want a script and a style sheet of pinned content", loads)
	}
	for _, load := range loads {
		if !strings.Contains(policy, "script-src "+string(load[1])+" ") ||
			!strings.Contains(policy, "style-src "+string(load[1])+";") {
			t.Errorf("the policy %s does not allow just %s", policy, load[1])
		}
	}
	if !strings.HasPrefix(policy, "default-src 'none';") ||
		!strings.Contains(policy, "frame-ancestors 'none'") ||
		!strings.Contains(string(docsPage), `href="openapi.json"`) {
		t.Errorf("the policy %s allows more, or the page does not say where the document is", policy)
	}
}
