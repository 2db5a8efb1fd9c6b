package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// The HTTP edge: routes, methods, headers, the body before its fields, errors. What every response
// must have is checked in answer.check.

func TestPathsAndMethods(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	c.authorization = "" // the router answers before the token is checked
	const (
		list     = "GET, HEAD, POST"
		one      = "DELETE, GET, HEAD, PATCH, PUT"
		complete = "PATCH"
		health   = "GET, HEAD"
	)
	for _, row := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/", 404, ""},
		{"GET", "/api", 404, ""},
		{"GET", "/api/", 404, ""},
		{"GET", "/api/u", 404, ""},
		{"GET", "/api/u/tasks/", 404, ""},
		{"POST", "/api/u/tasks/", 404, ""},
		{"OPTIONS", "/api/u/tasks/", 404, ""},
		{"GET", "/api/u/tasks/1/", 404, ""},
		{"DELETE", "/api/u/tasks/1/", 404, ""},
		{"PATCH", "/api/u/tasks/1/complete/", 404, ""},
		{"PATCH", "/api/u/tasks/1/finish", 404, ""},
		{"GET", "/API/u/tasks", 404, ""},
		{"GET", "/api/u/todos", 404, ""},
		{"GET", "/health", 404, ""},
		{"GET", "/health/live/", 404, ""},
		{"GET", "/metrics", 404, ""},
		{"BREW", "/coffee", 404, ""},
		{"PUT", "/api/u/tasks", 405, list},
		{"PATCH", "/api/u/tasks", 405, list},
		{"DELETE", "/api/u/tasks", 405, list},
		{"OPTIONS", "/api/u/tasks", 405, list},
		{"TRACE", "/api/u/tasks", 405, list},
		{"BREW", "/api/u/tasks", 405, list},
		{"POST", "/api/u/tasks/1", 405, one},
		{"OPTIONS", "/api/u/tasks/1", 405, one},
		{"POST", "/api/u/tasks/x", 405, one},
		{"GET", "/api/u/tasks/1/complete", 405, complete},
		{"HEAD", "/api/u/tasks/1/complete", 405, complete},
		{"POST", "/api/u/tasks/1/complete", 405, complete},
		{"PUT", "/api/u/tasks/1/complete", 405, complete},
		{"POST", "/health/live", 405, health},
		{"OPTIONS", "/health/ready", 405, health},
		{"GET", "/api/u/tasks", 401, ""},
		{"PATCH", "/api/u/tasks/1/complete", 401, ""},
		{"GET", "/health/live", 200, ""},
	} {
		a := c.send(row.method, row.path, "")
		if allow := a.header.Get("Allow"); a.status != row.status || allow != row.allow {
			t.Errorf("%s %s = %v, Allow %q, want %d, Allow %q", row.method, row.path, a, allow,
				row.status, row.allow)
		}
	}
}

func TestHeadIsGetWithoutBody(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("head")
	c.create("more")
	for _, path := range []string{
		c.path(""), c.path("?limit=1&total=true"), c.path("?limit=0"), c.path(task.path()), c.path("/0"),
		"/api/u/tasks", "/nothing", "/health/live", "/health/ready",
	} {
		get, head := c.send("GET", path, ""), c.send("HEAD", path, "")
		for _, a := range []answer{get, head} {
			a.header.Del("Date")
			a.header.Del("X-Request-Id")
		}
		if head.status != get.status || head.body != "" || !reflect.DeepEqual(head.header, get.header) {
			t.Errorf("HEAD %s = %v %v, want as GET: %v %v", path, head, head.header, get, get.header)
		}
		if length := head.header.Get("Content-Length"); length != strconv.Itoa(len(get.body)) {
			t.Errorf("HEAD %s has Content-Length %s, want %d", path, length, len(get.body))
		}
	}
}

// Each request breaks two rules. The response tells which one is checked first.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	nobody, forger := *c, *c
	nobody.authorization, forger.authorization = "", "Bearer x.y.z"
	own, other := c.path(""), newClient(t).path("")
	const none = "/9223372036854775807"
	large := strings.Repeat(" ", maxBody+1)
	for _, row := range []struct {
		as                              *client
		method, path, contentType, body string
		status                          int
	}{
		{&nobody, "GET", own + "/7/none", "", "", 404},
		{&nobody, "GET", own + "/", "", "", 404},
		{&nobody, "DELETE", own, "", "", 405},
		{&forger, "POST", own + "/abc", "", "[]", 405},
		{c, "POST", other + "/abc", "", "[]", 405},
		{&nobody, "POST", other, "text/plain", large, 401},
		{&nobody, "GET", own + "?limit=0", "", "", 401},
		{&forger, "PUT", own + "/abc", "", "[]", 401},
		{&forger, "DELETE", own + none, "", "", 401},
		{c, "GET", other + "?limit=0", "", "", 403},
		{c, "GET", other + "/abc", "", "", 403},
		{c, "DELETE", other + none, "", "", 403},
		{c, "POST", other, "text/plain", large, 403},
		{c, "PUT", own + "/abc", "", large, 404},
		{c, "PATCH", own + "/0", "text/plain", "[]", 404},
		{c, "PATCH", own + "/abc/complete", "", `{"completed": null}`, 404},
		{c, "PUT", own + none, "", large, 413},
		{c, "PUT", own + none, "text/plain", "{}", 415},
		{c, "PATCH", own + none, "", "{", 400},
		{c, "PATCH", own + none, "", `{"title": ""}`, 422},
		{c, "PATCH", own + none + "/complete", "", "[]", 400},
		{c, "PATCH", own + none + "/complete", "", `{"completed": null}`, 422},
		{c, "POST", own, "text/plain", large, 413},
		{c, "POST", own, "text/plain", "[]", 415},
		{c, "POST", own, "", `{"title": "", "unknown": "\ud800"}`, 400},
		{c, "POST", own, "", "{\"completed\": null, \"unknown\": \"\xff\"}", 400},
	} {
		var headers []string
		if row.contentType != "" {
			headers = []string{"Content-Type", row.contentType}
		}
		a := row.as.send(row.method, row.path, row.body, headers...)
		if a.status != row.status {
			t.Errorf("%s %s %s %.40q = %v, want %d",
				row.method, row.path, row.contentType, row.body, a, row.status)
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	seen := map[string]bool{}
	for _, row := range []struct {
		id   string
		kept bool
	}{
		{"1", true},
		{"0b9e7a6c-3f53-4a4b-9a5c-0d2f3f6b8e11", true},
		{"Root=1-67891233-abcdef012345678912345678", true},
		{strings.Repeat("x", 128), true},
		{"", false},
		{strings.Repeat("x", 10000), false},
		{"two words", false},
		{`quo"te`, false},
		{"{}", false},
		{"<script>", false},
		{"tab\tbed", false},
		{"zwölf", false},
		{"\xff", false},
	} {
		got := c.send("GET", "/health/live", "", "X-Request-Id", row.id).header.Get("X-Request-Id")
		if (got == row.id) != row.kept || seen[got] {
			t.Errorf("X-Request-Id %q is answered with %q, want it kept: %t", row.id, got, row.kept)
		}
		seen[got] = true
	}
}

// net/http's client would not send most of these bodies.
func TestBodyLength(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	const object = `{"title": "x"}` // 14 bytes
	const chunked = "Transfer-Encoding: chunked"
	for _, row := range []struct {
		name, header, body string
		status             int
	}{
		{"at the limit", "Content-Length: 65536", fmt.Sprintf("%-65536s", object), 201},
		{"chunks at the limit", chunked, fmt.Sprintf("10000\r\n%-65536s\r\n0\r\n\r\n", object), 201},

		// Rejected before a byte of the body is read.
		{"over the limit", "Content-Length: 65537", "", 413},
		{"far over the limit", "Content-Length: 1099511627776", "", 413},
		{"expecting 100", "Content-Length: 65537\r\nExpect: 100-continue", "", 413},
		{"of another type", "Content-Length: 65537\r\nContent-Type: text/plain", "", 413},
		// Rejected although it does not end.
		{"chunks over the limit", chunked, fmt.Sprintf("40000000\r\n%-65537s", object), 413},

		{"too short", "Content-Length: 15", object, 400},
		{"absent", "Content-Length: 15", "", 400},
		{"a chunk too short", chunked, "20\r\n" + object, 400},
		{"no last chunk", chunked, "e\r\n" + object + "\r\n", 400},
		{"a chunk without a length", chunked, "zz\r\n" + object + "\r\n0\r\n\r\n", 400},
		{"a chunk too long", chunked, "2\r\n" + object + "\r\n0\r\n\r\n", 400},
	} {
		start := time.Now()
		conn := dialRaw(t, c.service, c.rawCreate(row.body, row.header))
		if row.status == 400 {
			conn.(*net.TCPConn).CloseWrite()
		}
		a := readAnswer(t, conn)
		if err := a.check("POST", c.path("")); err != nil || a.status != row.status {
			t.Errorf("a body %s = %v (%v), want %d", row.name, a, err, row.status)
		}
		if row.status != 201 && !isClosed(conn) {
			t.Errorf("a body %s: the connection stays open", row.name)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("a body %s is answered after %v, want at once", row.name, took)
		}
	}
	if n := len(c.list("")); n != 2 {
		t.Errorf("%d tasks were created, want the 2 of complete bodies", n)
	}
}

func TestContentType(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("typed")
	for _, row := range []struct {
		contentType string
		accepted    bool
	}{
		{"", true},
		{"application/json", true},
		{"application/json; charset=utf-8", true},
		{"Application/JSON;charset=UTF-8", true},
		{"application/merge-patch+json", true},
		{"application/vnd.api+json; version=1", true},
		{"text/plain", false},
		{"text/plain;charset=UTF-8", false}, // what fetch sends with a string
		{"text/json", false},
		{"application/x-www-form-urlencoded", false},
		{"multipart/form-data; boundary=x", false},
		{"application/octet-stream", false},
		{"application/jsonp", false},
		{"application/json-seq", false},
		{"json", false},
		{"+json", false},
		{"a+json", false},
		{"*/*", false},
		{";", false},
	} {
		for _, request := range []struct {
			method, path string
			accepted     int
		}{
			{"POST", "", 201}, {"PUT", task.path(), 200}, {"PATCH", task.path(), 200},
			{"PATCH", task.path() + "/complete", 200},
		} {
			want := 415
			if row.accepted {
				want = request.accepted
			}
			a := c.do(request.method, request.path, `{"title": "x"}`, "Content-Type", row.contentType)
			if a.status != want {
				t.Errorf("%s %s with %q = %v, want %d", request.method, request.path, row.contentType, a, want)
			}
		}
	}
	if a := c.do("PATCH", task.path()+"/complete", "", "Content-Type", "text/plain"); a.status != 200 {
		t.Errorf("PATCH with a Content-Type and no body = %v, want 200", a)
	}
	without := dialRaw(t, c.service, c.rawCreate(`{"title": "x"}`, "Content-Length: 14"))
	if a := readAnswer(t, without); a.status != 201 {
		t.Errorf("POST without a Content-Type = %v, want 201", a)
	}
}

// What is not one JSON object in valid UTF-8 is a 400 on every route and changes nothing.
func TestMalformedBodies(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("unchanged")
	const object = `{"title": "x"}`
	bodies := []string{
		`null`, `[]`, `[{"title": "x"}]`, `"x"`, `7`, `true`, // no object
		`{`, `{"title": "x"`, `{"title": "x`, `{"title"`, `{"title": "x",}`, // incomplete
		`{title: "x"}`, `{'title': 'x'}`, `{"title": "x", "n": NaN}`, `{"title": "\x"}`,
		object + `{}`, object + `x`, object + `}`, object + `//`, object + "\x00",
		"\ufeff\ufeff" + object, "\ufeff", // at most one byte order mark, before an object
		"{\"title\": \"\xff\"}", "{\"title\": \"x\", \"\xc3\": 1}", "{\"title\": \"\xc0\xaf\"}",
		"{\"title\": \"x\", \"unknown\": [\"\xed\xa0\x80\"]}",
		"{\"title\": \"a\nb\"}", "{\"title\": \"a\x00b\"}", // control characters must be escaped
		`{"title": "\ud800"}`, `{"title": "\udc00"}`, `{"title": "\uDE00\uD83D"}`, // unpaired surrogates
		`{"title": "\ud800\ud800\udc00"}`, `{"title": "\ud800\\udc00"}`, `{"title": "\\\ud800"}`,
		`{"title": "x", "unknown": ["\udfff"]}`, `{"title": "x", "\ud800": 1}`,
		`{"title": "x", "title\uDBFFu0041": 1}`,
		`{"title": "x", "deep": ` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`,
	}
	for _, request := range []struct{ method, path string }{
		{"POST", ""}, {"PUT", task.path()}, {"PATCH", task.path()}, {"PATCH", task.path() + "/complete"},
	} {
		for _, body := range append(bodies, "", " \n") {
			if body == "" && strings.HasSuffix(request.path, "/complete") {
				continue // toggles
			}
			a := c.do(request.method, request.path, body)
			if a.status != 400 || a.detail() != errBadJSON.detail {
				t.Errorf("%s %s %.80q = %v, want 400 %s",
					request.method, request.path, body, a, errBadJSON.detail)
			}
		}
	}
	if got := c.list(""); len(got) != 1 || !equalTasks(got[0], task) {
		t.Errorf("afterwards the tasks are %v, want %v", got, task)
	}
}

// Which members and which spelling of them count.
func TestBodyMembers(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for _, row := range []struct {
		body      string
		title     string
		completed bool
	}{
		{" {\"title\":\n\"x\"}\r\n\t", "x", false},
		{"\ufeff" + `{"title": "x"}`, "x", false},
		{`{"title": "a", "title": "b"}`, "b", false}, // the last one counts
		{`{"title": 7, "title": "b", "completed": null, "completed": true}`, "b", true},
		{`{"\u0074itle": "b"}`, "b", false},
		{`{"title": "a", "Title": "b", "TITLE": 7, "t\u0131tle": "b", "title ": "b", "Completed": 7}`,
			"a", false},
		{`{"title": "x", "unknown": "\u0000", "\u0000": 1, "big": 1e999, "deep": ` +
			strings.Repeat("[", 500) + strings.Repeat("]", 500) + `}`, "x", false},
		{`{"title": "\uD83D\ude00"}`, "😀", false},
		{`{"title": "\\ud800 \\\\udc00 \\\ud83d\ude00"}`, `\ud800 \\udc00 \😀`, false},
	} {
		for _, method := range []string{"POST", "PUT", "PATCH"} {
			path := ""
			if method != "POST" {
				path = c.create("before").path()
			}
			a := c.do(method, path, row.body)
			if a.status/100 != 2 {
				t.Errorf("%s %.80q = %v, want it accepted", method, row.body, a)
				continue
			}
			if got := decode[wireTask](t, a.body); got.Title != row.title || got.Completed != row.completed {
				t.Errorf("%s %.80q = %v, want %q, %t", method, row.body, got, row.title, row.completed)
			}
		}
	}
}

// The limits of net/http's server exist only in the process.
func TestLargeHeadersAndSlowClients(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	c := p.newClient()
	start := time.Now()
	silent := dialRaw(t, p.url, "GET /health/live HTTP/1.1\r\nHost: to")
	stalled := dialRaw(t, p.url, c.rawCreate(`{"title":`, "Content-Length: 65536"))
	trickling := dialRaw(t, p.url, c.rawCreate(`{"title":`, "Content-Length: 65536"))
	trickled := make(chan struct{})
	go func() {
		defer close(trickled)
		for _, err := io.WriteString(trickling, " "); err == nil; time.Sleep(100 * time.Millisecond) {
			_, err = io.WriteString(trickling, " ")
		}
	}()

	for _, row := range []struct{ size, status int }{{15 << 10, 200}, {16<<10 + 1, 431},
		{1 << 20, 431}} {
		const head, end = "GET /health/live HTTP/1.1\r\nHost: todo\r\nX-Large: ", "\r\n\r\n"
		conn := dialRaw(t, p.url, "")
		// The connection may be closed before all of a large header is written.
		go io.WriteString(conn, head+strings.Repeat("x", row.size-len(head)-len(end))+end)
		if a := readAnswer(t, conn); a.status != row.status {
			t.Errorf("a header of %d bytes = %v, want %d", row.size, a, row.status)
		}
	}

	if text, _ := io.ReadAll(silent); strings.Contains(string(text), " 200 ") {
		t.Errorf("an unfinished header is answered %q", text)
	}
	if took := time.Since(start); took > 9*time.Second {
		t.Errorf("an unfinished header: closed after %v, want 4 s", took)
	}
	for name, conn := range map[string]net.Conn{"stalls": stalled, "trickles": trickling} {
		a := readAnswer(t, conn)
		if a.status != 408 && a.status != 400 || !isClosed(conn) {
			t.Errorf("a body that %s = %v, want 408 or 400 and the connection closed", name, a)
		}
		if took := time.Since(start); took > 19*time.Second {
			t.Errorf("a body that %s is answered after %v, want within 20 s", name, took)
		}
		conn.Close()
	}
	<-trickled
	if n := len(c.list("")); n != 0 {
		t.Errorf("incomplete bodies created %d tasks", n)
	}
}

func TestRequestsHaveADeadline(t *testing.T) {
	t.Parallel()
	s := newServer(sharedAuth, sharedDB, newLogger(io.Discard, 0), nil, "")
	s.handle(func(ctx context.Context, _ http.ResponseWriter, _ *http.Request) error {
		deadline, ok := ctx.Deadline()
		if left := time.Until(deadline); !ok || left > 15*time.Second || left < 10*time.Second {
			t.Errorf("a request ends in %v, want 15 s", left)
		}
		return nil
	})(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
}

func TestPanicAndUnknownError(t *testing.T) {
	t.Parallel()
	s := startService(t, sharedDB, settings{origins: []string{"https://app.example.com"}})
	for path, e := range map[string]endpoint{
		"/panic": func(context.Context, http.ResponseWriter,
			*http.Request) error {
			panic("boom hunter2")
		},
		"/nil": func(context.Context, http.ResponseWriter, *http.Request) error {
			var none *task
			return errors.New(none.Title)
		},
		"/error": func(context.Context, http.ResponseWriter, *http.Request) error {
			return fmt.Errorf("make it: %w", errors.New("boom hunter2"))
		},
	} {
		s.mux.HandleFunc("GET "+path, s.handle(e))
	}
	c := s.newClient()
	for _, row := range []struct {
		path   string
		causes []string // in the log
	}{
		{"/panic", []string{"boom hunter2", "http_test.go:"}},
		{"/nil", []string{"nil pointer", "http_test.go:"}},
		{"/error", []string{"make it: boom hunter2"}},
	} {
		a := c.send("GET", row.path, "", "X-Request-Id", "id"+row.path, "Origin",
			"https://app.example.com")
		if a.status != 500 || a.detail() != errInternal.detail {
			t.Errorf("GET %s = %v, want 500 %s", row.path, a, errInternal.detail)
		}
		if origin := a.header.Get("Access-Control-Allow-Origin"); origin != "https://app.example.com" {
			t.Errorf("GET %s allows the origin %q, want that of the request", row.path, origin)
		}
		line := s.log.request(t, "id"+row.path)
		for _, cause := range row.causes {
			if text, _ := line["error"].(string); line["severity"] != "ERROR" ||
				!strings.Contains(text, cause) {
				t.Errorf("GET %s is logged as %v, want an ERROR that contains %q", row.path, line, cause)
			}
		}
	}
	c.list("") // still served
}

// replacesText decodes valid JSON with encoding/json, which replaces half of a surrogate pair with
// U+FFFD. It reports whether a string has more of them than its literal spells out.
func replacesText(t *testing.T, body []byte) bool {
	t.Helper()
	escape := regexp.MustCompile(`\\(?:u....|.)`)
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber() // 1e999 is JSON and no float64
	for {
		start := d.InputOffset()
		token, err := d.Token()
		if err == io.EOF {
			return false
		}
		if err != nil {
			t.Fatalf("decode valid JSON %q: %v", body, err)
		}
		text, ok := token.(string)
		if !ok {
			continue
		}
		literal := string(body[start:d.InputOffset()])
		spelled := strings.Count(literal, "\ufffd")
		for _, e := range escape.FindAllString(literal, -1) {
			if strings.EqualFold(e, `\ufffd`) {
				spelled++
			}
		}
		if strings.Count(text, "\ufffd") > spelled {
			return true
		}
	}
}

func FuzzParseObject(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, ` {"a": 1} `, `null`, `[]`, `{}{}`, "\ufeff{}", "{\"\xff\": 1}",
		`{"a": 1e999, "b": -0.0}`,
		`{"a": "\ud83d\ude00"}`, `{"a": "\ud800"}`, `{"a": "\udc00\ud800"}`, `{"\ud800": 1}`,
		`{"a": "\ud800\u0041"}`, `{"a": "\\ud800"}`, `{"a": "\\\ud800"}`, `{"a": "\\\\ud800"}`,
		`{"a": "\ufffd\uFFFD"}`, "{\"a\": \"\ufffd\"}", `{"a": ["\ud83d", "\ude00"]}`,
		`{"a": 1, "a": {"b": "\ud800\ud800\udc00"}}`, `{"a": "\ud83d\u005cude00"}`,
		`{"a": "\n\"\ud83d\ude00\/"}`, `{"a": "\uD800\\uDC00"}`,
	} {
		f.Add([]byte(seed))
	}
	whole := func(t *testing.T, text []byte) (v any) {
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			t.Fatalf("decode %q: %v", text, err)
		}
		return v
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		members, err := parseObject(body)
		object := json.Valid(body) && bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{"))
		want := object && utf8.Valid(body) && !replacesText(t, body)
		if (err == nil) != want {
			t.Fatalf("parseObject(%q) = %v, want it accepted: %t", body, err, want)
		}
		if err != nil {
			return
		}
		again, err := json.Marshal(members)
		if err != nil {
			t.Fatalf("encode the members of %q: %v", body, err)
		}
		if _, err := parseObject(again); err != nil ||
			!reflect.DeepEqual(whole(t, again), whole(t, body)) {
			t.Errorf("the members of %q are %q, want the same (%v)", body, again, err)
		}
	})
}

func TestDocsReferrerPolicy(t *testing.T) {
	t.Parallel()
	a := newClient(t).send("GET", "/docs", "")
	if got := a.header.Get("Referrer-Policy"); got != "no-referrer" {
		t.Errorf("Referrer-Policy of /docs = %q, want no-referrer", got)
	}
}
