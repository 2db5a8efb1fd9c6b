package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// The tests run through HTTP on a real database, which others may use at the
// same time: each test has users of its own, and removes what they created.

func TestStory(t *testing.T) {
	t.Parallel()
	c := newClient(t)

	a := c.do("GET", "", "")
	if a.status != 200 || strings.TrimSpace(a.body) != "[]" {
		t.Fatalf("list of a new user = %d %s, want 200 []", a.status, a.body)
	}

	a = c.do("POST", "", `{"title": "  Grüße <&> 🌍 ", "description": "two\nlines"}`)
	if a.status != 201 {
		t.Fatalf("create = %d %s, want 201", a.status, a.body)
	}
	milk := decode[wireTask](t, a.body)
	path := fmt.Sprintf("/%d", milk.ID)
	if got, want := a.header.Get("Location"), "/api/"+c.user+"/tasks"+path; got != want {
		t.Errorf("Location = %q, want %q", got, want)
	}
	if milk.UserID != c.user || milk.Title != "  Grüße <&> 🌍 " || milk.Description == nil || *milk.Description != "two\nlines" || milk.Completed {
		t.Errorf("created %+v, not as sent", milk)
	}
	if !milk.CreatedAt.Equal(milk.UpdatedAt) || time.Since(milk.CreatedAt).Abs() > time.Minute {
		t.Errorf("created at %v, updated at %v, want both now", milk.CreatedAt, milk.UpdatedAt)
	}
	etag := a.header.Get("ETag")

	a = c.do("GET", path, "")
	if got := decode[wireTask](t, a.body); a.status != 200 || !equalTasks(got, milk) || a.header.Get("ETag") != etag {
		t.Errorf("get = %d %s %s, want 200 %s %+v", a.status, a.header.Get("ETag"), a.body, etag, milk)
	}

	// Each change shows, leaves the rest alone and moves the version on.
	last := milk
	for _, step := range []struct {
		method, path, body string
		want               func(*wireTask)
	}{
		{"PUT", "", `{"title": "Milk"}`, func(w *wireTask) { w.Title = "Milk" }},
		{"PATCH", "", `{"description": null}`, func(w *wireTask) { w.Description = nil }},
		{"PATCH", "", `{}`, func(*wireTask) {}},
		{"PUT", "", `{"id": 1, "user_id": "somebody", "created_at": "now", "Title": "not this", "unknown": [1]}`, func(*wireTask) {}},
		{"PATCH", "/complete", ``, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{}`, func(w *wireTask) { w.Completed = false }},
		{"PATCH", "/complete", `{"completed": true, "title": "ignored here"}`, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{"completed": true}`, func(w *wireTask) { w.Completed = true }},
		{"PUT", "", `{"completed": false, "description": ""}`, func(w *wireTask) { w.Completed = false; w.Description = new("") }},
	} {
		a := c.do(step.method, path+step.path, step.body)
		if a.status != 200 {
			t.Fatalf("%s %s %s = %d %s, want 200", step.method, step.path, step.body, a.status, a.body)
		}
		got, want := decode[wireTask](t, a.body), last
		step.want(&want)
		want.UpdatedAt = got.UpdatedAt
		if !equalTasks(got, want) {
			t.Errorf("%s %s %s = %+v, want %+v", step.method, step.path, step.body, got, want)
		}
		if !got.UpdatedAt.After(last.UpdatedAt) || a.header.Get("ETag") == etag {
			t.Errorf("%s %s %s: updated_at %v after %v, ETag %s after %s: want both new", step.method, step.path, step.body,
				got.UpdatedAt, last.UpdatedAt, a.header.Get("ETag"), etag)
		}
		last, etag = got, a.header.Get("ETag")
	}

	eggs := c.create("Eggs")
	if got := decode[[]wireTask](t, c.do("GET", "", "").body); len(got) != 2 || !equalTasks(got[0], eggs) || !equalTasks(got[1], last) {
		t.Errorf("list = %+v, want the newest first: %+v, %+v", got, eggs, last)
	}
	if a := c.do("DELETE", path, ""); a.status != 204 || a.body != "" {
		t.Errorf("delete = %d %q, want 204 and nothing", a.status, a.body)
	}
	for _, method := range []string{"GET", "DELETE"} {
		if a := c.do(method, path, ""); a.status != 404 || detail(t, a) == "" {
			t.Errorf("%s of a deleted task = %d %s, want 404", method, a.status, a.body)
		}
	}
}

func TestRefusedBodiesChangeNothing(t *testing.T) {
	t.Parallel()
	type refusal struct {
		on, body    string
		contentType string // "": application/json
		status      int
		detail      string // a regular expression
	}
	const (
		every  = "POST PUT PATCH COMPLETE"
		fields = "POST PUT PATCH" // /complete looks at completed alone
		fine   = `{"title": "x"}`
		object = `^The request body must be one JSON object in valid UTF-8\.$`
	)
	refusals := []refusal{
		{fields, "", "", 400, object},
		{fields, " \n", "", 400, object},
		{every, fine + strings.Repeat(" ", 64<<10+1-len(fine)), "", 413, `65536 bytes`},
		{"POST", `{}`, "", 422, `^title is required`},
		{"POST", `{"Title": "x", "TITLE": "x", "description": "x"}`, "", 422, `^title is required`},
		{fields, `{"title": "` + strings.Repeat("x", 201) + `"}`, "", 422, `^title .*200 characters`},
		{fields, `{"title": "` + strings.Repeat("🌍", 201) + `"}`, "", 422, `^title .*200 characters`},
		{fields, `{"title": "x", "description": "` + strings.Repeat("🌍", 1001) + `"}`, "", 422, `^description .*1000 characters`},
		{fields, `{"title": ""}`, "", 422, `^title .*blank`},
		{fields, `{"title": "a\u0000b"}`, "", 422, `^title .*U\+0000`},
		{fields, `{"title": "x", "description": "\u0000"}`, "", 422, `^description .*U\+0000`},
		{fields, `{"title": "x", "title": null}`, "", 422, `^title .*string`}, // the last one counts
		{every, `{"title": "x", "completed": true, "\u0063ompleted": 1}`, "", 422, `^completed .*true or false`},
	}
	for _, body := range []string{
		`null`, `[]`, `[{"title": "x"}]`, `"x"`, `7`, `true`, // no object
		`{`, `{"title": "x"`, `{"title": "x`, `{"title"`, `{"title": "x",}`, `{title: "x"}`, `{'title': 'x'}`, `{"title": "x", "n": NaN}`, `{"title": "\x"}`,
		fine + `{}`, fine + `x`, fine + `}`, fine + `//`, fine + "\x00", "\ufeff\ufeff" + fine, "\ufeff",
		"{\"title\": \"\xff\"}", "{\"title\": \"x\", \"\xc3\": 1}", "{\"title\": \"x\", \"unknown\": [\"\xed\xa0\x80\"]}", "{\"title\": \"\xc0\xaf\"}", // no UTF-8
		"{\"title\": \"a\nb\"}", "{\"title\": \"a\x00b\"}", // control characters that are not escaped
		`{"title": "\ud800"}`, `{"title": "\udc00"}`, `{"title": "\uDE00\uD83D"}`, `{"title": "\ud800\ud800\udc00"}`, `{"title": "\ud800\\udc00"}`, // no characters
		`{"title": "\\\ud800"}`, `{"title": "x", "unknown": ["\udfff"]}`, `{"title": "x", "\ud800": 1}`, `{"title": "x", "title\uDBFFu0041": 1}`,
		`{"title": "x", "deep": ` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`,
	} {
		refusals = append(refusals, refusal{every, body, "", 400, object})
	}
	for _, contentType := range []string{"text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "application/jsonp", "json", "+json", "a+json", "*/*", ";"} {
		refusals = append(refusals, refusal{every, fine, contentType, 415, `application/json`})
	}
	for _, space := range "\t\n\v\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000" {
		refusals = append(refusals, refusal{fields, fmt.Sprintf(`{"title": " \u%04x"}`, space), "", 422, `^title .*blank`})
	}
	for _, value := range []string{`1`, `true`, `[]`, `{}`, `["x"]`} {
		refusals = append(refusals,
			refusal{fields, `{"title": ` + value + `}`, "", 422, `^title .*string`},
			refusal{fields, `{"title": "x", "description": ` + value + `}`, "", 422, `^description .*string`})
	}
	for _, value := range []string{`null`, `"true"`, `""`, `0`, `1`, `[]`, `{}`} {
		refusals = append(refusals, refusal{every, `{"title": "x", "completed": ` + value + `}`, "", 422, `^completed .*true or false`})
	}
	refusals = append(refusals, refusal{fields, `{"title": null}`, "", 422, `^title .*string`})

	for _, route := range []struct{ name, method, path string }{
		{"POST", "POST", ""}, {"PUT", "PUT", "/%d"}, {"PATCH", "PATCH", "/%d"}, {"COMPLETE", "PATCH", "/%d/complete"},
	} {
		t.Run(route.name, func(t *testing.T) {
			t.Parallel()
			c := newClient(t)
			id := c.create("as it was").ID
			path := route.path
			if path != "" {
				path = fmt.Sprintf(path, id)
			}
			before, list := c.do("GET", fmt.Sprintf("/%d", id), ""), c.do("GET", "", "")
			for _, r := range refusals {
				if !strings.Contains(r.on, route.name) {
					continue
				}
				var headers []string
				if r.contentType != "" {
					headers = []string{"Content-Type", r.contentType}
				}
				a := c.do(route.method, path, r.body, headers...)
				if a.status != r.status || !regexp.MustCompile(r.detail).MatchString(detail(t, a)) {
					t.Errorf("%.80q %s = %d %s, want %d %s", r.body, r.contentType, a.status, a.body, r.status, r.detail)
				}
				if now := c.do("GET", "", ""); now.body != list.body {
					t.Fatalf("the tasks after %.80q = %s, want them unchanged: %s", r.body, now.body, list.body)
				}
			}
			if after := c.do("GET", fmt.Sprintf("/%d", id), ""); after.body != before.body || after.header.Get("ETag") != before.header.Get("ETag") {
				t.Errorf("the task after refusals = %s %s, want %s %s", after.header.Get("ETag"), after.body, before.header.Get("ETag"), before.body)
			}
		})
	}
}

func TestTakenBodies(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for _, row := range []struct {
		body, contentType, title string
		description              *string
		completed                bool
	}{
		{`{"title": "x"}`, "application/json; charset=utf-8", "x", nil, false},
		{`{"title": "x"}`, "Application/JSON", "x", nil, false},
		{`{"title": "x"}`, "application/merge-patch+json", "x", nil, false},
		{" {\"title\":\n\"x\"}\r\n\t", "", "x", nil, false},
		{`{"title": "x"}` + strings.Repeat(" ", 64<<10-14), "", "x", nil, false},
		{`{"title": "x", "description": null, "completed": false}`, "", "x", nil, false},
		{`{"title": "x", "description": "", "completed": true}`, "", "x", new(""), true},
		{`{"title": "a", "title": "b", "description": "c", "description": null}`, "", "b", nil, false},
		{`{"title": 7, "title": "b", "completed": null, "completed": true}`, "", "b", nil, true},
		{`{"\u0074itle": "b"}`, "", "b", nil, false},
		{`{"title": "a", "Title": "b", "TITLE": 7, "t\u0131tle": "b", "title ": "b", "Completed": 7, "DESCRIPTION": "b"}`, "", "a", nil, false},
		{`{"title": "x", "id": "seven", "user_id": "somebody", "created_at": null, "updated_at": 7, "unknown": {"title": ""}}`, "", "x", nil, false},
		{`{"title": "x", "unknown": "\u0000", "\u0000": 1, "big": 1e999, "deep": ` + strings.Repeat("[", 500) + strings.Repeat("]", 500) + `}`, "", "x", nil, false},
		{`{"title": "\uD83D\ude00"}`, "", "😀", nil, false},
		{`{"title": "\\ud800 \\\\udc00 \\\ud83d\ude00"}`, "", `\ud800 \\udc00 \😀`, nil, false},
		{`{"title": "\u200b"}`, "", "\u200b", nil, false}, // no white space, whatever its name
		{`{"title": "\ufeff"}`, "", "\ufeff", nil, false},
		{"{\"title\": \"\u00a0x\u3000\"}", "", "\u00a0x\u3000", nil, false},
		{`{"title": "` + strings.Repeat("🌍", 200) + `", "description": "` + strings.Repeat("🌍", 1000) + `"}`, "", strings.Repeat("🌍", 200), new(strings.Repeat("🌍", 1000)), false},
	} {
		var headers []string
		if row.contentType != "" {
			headers = []string{"Content-Type", row.contentType}
		}
		for _, method := range []string{"POST", "PUT", "PATCH"} {
			path, status := "", 201
			if method != "POST" {
				path, status = fmt.Sprintf("/%d", c.create("before").ID), 200
			}
			a := c.do(method, path, row.body, headers...)
			if a.status != status {
				t.Errorf("%s %.80q %s = %d %s, want %d", method, row.body, row.contentType, a.status, a.body, status)
				continue
			}
			got := decode[wireTask](t, a.body)
			want := wireTask{got.ID, c.user, row.title, row.description, row.completed, got.CreatedAt, got.UpdatedAt}
			if !equalTasks(got, want) {
				t.Errorf("%s %.80q = %.300s, want %q, %v, %t", method, row.body, a.body, row.title, row.description, row.completed)
			}
		}
	}
}

// A body whose length is not what it seems is told by raw bytes: net/http's client would not send them.
func TestBodyLengths(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	fine := `{"title": "` + strings.Repeat("x", 50) + `"}`
	for _, row := range []struct {
		name, headers, body string
		status              int
	}{
		{"no byte of a body too long", "Content-Length: 65537", "", 413},
		{"chunks beyond the limit", "Transfer-Encoding: chunked", fmt.Sprintf("10001\r\n%-65537s\r\n", fine), 413},
		{"chunks up to the limit", "Transfer-Encoding: chunked", fmt.Sprintf("10000\r\n%-65536s\r\n0\r\n\r\n", fine), 201},
		{"a body cut short", "Content-Length: 100", fine, 400},
		{"chunks cut short", "Transfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s\r\n", len(fine), fine), 400},
		{"malformed chunks", "Transfer-Encoding: chunked", "no number\r\n", 400},
	} {
		t.Run(row.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", strings.TrimPrefix(c.service, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(15 * time.Second))
			fmt.Fprintf(conn, "POST /api/%s/tasks HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n%s\r\n\r\n%s", c.user, c.authorization, row.headers, row.body)
			if row.status == 400 {
				conn.(*net.TCPConn).CloseWrite()
			}
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(res.Body)
			if res.StatusCode != row.status || !strings.HasPrefix(string(text), `{"`) {
				t.Errorf("= %d %s, want %d", res.StatusCode, text, row.status)
			}
			if refused := row.status != 201; res.Close != refused {
				t.Errorf("closes the connection: %t, want %t", res.Close, refused)
			}
		})
	}
	if tasks := decode[[]wireTask](t, c.do("GET", "", "").body); len(tasks) != 1 {
		t.Errorf("there are %d tasks, want the one of the whole body", len(tasks))
	}
}

func TestTaskIDs(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	id := c.create("the only one").ID
	for _, spelling := range []string{"0%d", "00000000000000000000000%d"} {
		if a := c.do("GET", fmt.Sprintf("/"+spelling, id), ""); a.status != 200 || decode[wireTask](t, a.body).ID != id {
			t.Errorf("GET /"+spelling+" = %d %s, want the task", id, a.status, a.body)
		}
	}
	bad := []string{"0", "00", "9223372036854775807", "9223372036854775808", "18446744073709551617", "99999999999999999999", "abc", "null", "%20", "."}
	for _, spelling := range []string{"-%d", "+%d", "%%2B%d", "%d.0", "%de0", "%d%%00", "%%00%d", "%d%%20", "%%20%d", "0x%d", "%d,", "%d_0", "%d%%2F", "%d%%0A", "%%D9%%A1%d"} {
		bad = append(bad, fmt.Sprintf(spelling, id))
	}
	bad = append(bad, strings.Map(func(r rune) rune { return r - '0' + '٠' }, fmt.Sprint(id)))
	want := c.do("GET", "/9223372036854775807", "")
	for _, verb := range []struct{ method, path, body string }{
		{"GET", "/%s", ""}, {"PUT", "/%s", `{"title": "x"}`}, {"PATCH", "/%s", `{"title": "x"}`}, {"PATCH", "/%s/complete", ""}, {"DELETE", "/%s", ""},
	} {
		for _, b := range bad {
			if b == "." && verb.path != "/%s" { // net/http redirects what it can clean
				continue
			}
			b = strings.ReplaceAll(b, ".", "%2E")
			a := c.do(verb.method, fmt.Sprintf(verb.path, b), verb.body)
			if a.status != 404 || a.body != want.body || a.header.Get("Content-Type") != "application/json" {
				t.Errorf("%s "+verb.path+" = %d %s %s, want 404 %s", verb.method, b, a.status, a.header.Get("Content-Type"), a.body, want.body)
			}
		}
		if a := c.do(verb.method, "/", verb.body); a.status != 404 || a.header.Get("Content-Type") != "application/json" || detail(t, a) == "" {
			t.Errorf("%s / = %d %s, want 404 in JSON", verb.method, a.status, a.body)
		}
	}
	if a := c.do("GET", "", ""); len(decode[[]wireTask](t, a.body)) != 1 || !strings.Contains(a.body, "the only one") {
		t.Errorf("the tasks afterwards = %s, want the one unchanged", a.body)
	}
}

// Each request breaks two rules: the answer tells which is looked at first.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	nobody, forger := *c, *c
	nobody.authorization, forger.authorization = "", "Bearer x.y.z"
	own, other := "/api/"+c.user+"/tasks", "/api/"+newClient(t).user+"/tasks"
	const none = "/9223372036854775807"
	large := strings.Repeat(" ", 64<<10+1)
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
		if a.status != row.status || detail(t, a) == "" {
			t.Errorf("%s %s %s %.40q = %d %s, want %d", row.method, row.path, row.contentType, row.body, a.status, a.body, row.status)
		}
	}
}

func TestTextComesBackAsSent(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for _, text := range []string{
		"  around \t\r\n", "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳", "e\u0301 \u00e9 \u212b \u00c5 ﬁ ＡＢ İıſK", "שלום \u202eabc\u202c \u0627\u0644\u0639", "\ufffd", "a\u2028b\u2029c",
		`"quoted" 'and' \back\ /slash/ \n \u0041 \ud800`, "<script>alert(1)</script> &amp; &", "\u200b\u200d\ufeff", "\u0001\u0008\u001f\u007f\u0080\u009f",
		"\ufffe\uffff \U0010ffff \ue000", "'; DROP TABLE tasks; -- @user $1 %s {} NULL null", "\\", "%00 %41 +", strings.Repeat("z\u0300\u0301\u0302", 50),
	} {
		plain, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		var escaped strings.Builder
		for _, unit := range utf16.Encode([]rune(text)) {
			fmt.Fprintf(&escaped, `\u%04x`, unit)
		}
		for _, literal := range []string{string(plain), `"` + escaped.String() + `"`} {
			body := `{"title": ` + literal + `, "description": ` + literal + `}`
			made := c.do("POST", "", body)
			if made.status != 201 {
				t.Errorf("create %s = %d %s, want 201", body, made.status, made.body)
				continue
			}
			path := fmt.Sprintf("/%d", decode[wireTask](t, made.body).ID)
			for name, got := range map[string]wireTask{
				"create": decode[wireTask](t, made.body),
				"get":    decode[wireTask](t, c.do("GET", path, "").body),
				"list":   decode[[]wireTask](t, c.do("GET", "?limit=1", "").body)[0],
				"update": decode[wireTask](t, c.do("PUT", path, body).body),
			} {
				if got.Title != text || got.Description == nil || *got.Description != text {
					t.Errorf("%s of %s = %q, %q, want %q twice", name, literal, got.Title, *got.Description, text)
				}
			}
		}
	}
}

func TestTasksOfOthersDoNotExist(t *testing.T) {
	t.Parallel()
	a, b := newClient(t), newClient(t)
	old := b.create("B's older")
	secret := a.create("A's secret")
	recent := b.create("B's newer")
	path := fmt.Sprintf("/%d", secret.ID)
	before := a.do("GET", path, "")
	for _, r := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"HEAD", "", ""}, {"PUT", "", `{"title": "taken"}`}, {"PUT", "", `{}`}, {"PATCH", "", `{"title": "taken"}`},
		{"PATCH", "/complete", ""}, {"PATCH", "/complete", `{"completed": true}`}, {"DELETE", "", ""},
	} {
		got, none := b.do(r.method, path+r.path, r.body), b.do(r.method, "/9223372036854775807"+r.path, r.body)
		if got.status != 404 || got.body != none.body || got.header.Get("ETag") != "" {
			t.Errorf("%s of somebody else's task = %d %s, want it to be no task: %d %s", r.method+r.path, got.status, got.body, none.status, none.body)
		}
	}
	if after := a.do("GET", path, ""); after.body != before.body || after.header.Get("ETag") != before.header.Get("ETag") {
		t.Errorf("A's task afterwards = %s, want %s", after.body, before.body)
	}
	for _, list := range []struct {
		of    *client
		query string
		want  []wireTask
		total string
	}{
		{a, "?total=true", []wireTask{secret}, "1"},
		{a, "?total=true&completed=false", []wireTask{secret}, "1"},
		{b, "?total=true", []wireTask{recent, old}, "2"},
		{b, "?total=true&completed=true", nil, "0"},
		{b, fmt.Sprintf("?total=true&before=%d", secret.ID), []wireTask{old}, "2"}, // somebody else's id is a number, no more
		{b, fmt.Sprintf("?total=true&completed=false&before=%d", secret.ID+1), []wireTask{old}, "2"},
		{b, "?total=true&offset=2", nil, "2"},
	} {
		got := list.of.do("GET", list.query, "")
		if tasks := decode[[]wireTask](t, got.body); !slices.EqualFunc(tasks, list.want, equalTasks) || got.header.Get("X-Total-Count") != list.total {
			t.Errorf("list %s = %s of %q, want %+v of %s", list.query, got.body, got.header.Get("X-Total-Count"), list.want, list.total)
		}
	}
}

func TestNoToggleIsLost(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	milk := c.create("Milk")
	for _, n := range []int{20, 41} { // an even number and an odd one
		answers := c.atOnce(n, func(int) (string, string, string) { return "PATCH", fmt.Sprintf("/%d/complete", milk.ID), "" })
		states, etags := []wireTask{}, map[string]bool{}
		for _, a := range answers {
			if a.status != 200 {
				t.Fatalf("toggle = %d %s, want 200", a.status, a.body)
			}
			states = append(states, decode[wireTask](t, a.body))
			etags[a.header.Get("ETag")] = true
		}
		if len(etags) != n {
			t.Errorf("%d toggles have %d ETags, want each its own", n, len(etags))
		}
		// In the order of their versions each turns over what the one before left.
		slices.SortFunc(states, func(a, b wireTask) int { return a.UpdatedAt.Compare(b.UpdatedAt) })
		for _, s := range states {
			if !s.UpdatedAt.After(milk.UpdatedAt) || s.Completed == milk.Completed {
				t.Errorf("completed %t at %v follows %t at %v", s.Completed, s.UpdatedAt, milk.Completed, milk.UpdatedAt)
			}
			milk = s
		}
	}
	if got := decode[wireTask](t, c.do("GET", fmt.Sprintf("/%d", milk.ID), "").body); !got.Completed {
		t.Errorf("after 61 toggles = %+v, want it completed", got)
	}
}

func TestChangesOfDifferentFieldsAreAllKept(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("Milk").ID)
	for round := range 10 {
		title, description := fmt.Sprint("title ", round), fmt.Sprint("description ", round)
		bodies := []string{
			fmt.Sprintf(`{"title": %q}`, title), fmt.Sprintf(`{"description": %q}`, description), fmt.Sprintf(`{"completed": %t}`, round%2 == 0), `{}`,
		}
		etags := map[string]bool{}
		for i, a := range c.atOnce(len(bodies), func(i int) (string, string, string) { return []string{"PATCH", "PUT"}[round/2%2], path, bodies[i] }) {
			if a.status != 200 {
				t.Fatalf("%s = %d %s, want 200", bodies[i], a.status, a.body)
			}
			etags[a.header.Get("ETag")] = true
		}
		got := decode[wireTask](t, c.do("GET", path, "").body)
		if got.Title != title || got.Description == nil || *got.Description != description || got.Completed != (round%2 == 0) || len(etags) != len(bodies) {
			t.Fatalf("after %q at once = %+v with %d ETags, want all of them and %d", bodies, got, len(etags), len(bodies))
		}
	}
}

func TestDeletesAtOnce(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("Milk").ID)
	statuses := map[int]int{}
	for _, a := range c.atOnce(20, func(int) (string, string, string) { return "DELETE", path, "" }) {
		statuses[a.status]++
	}
	if statuses[204] != 1 || statuses[404] != 19 {
		t.Errorf("20 deletes of one task = %v, want 204 once and 404 else", statuses)
	}
}

func TestCreatesAtOnce(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	ids := map[int64]bool{}
	for i, a := range c.atOnce(50, func(i int) (string, string, string) { return "POST", "", fmt.Sprintf(`{"title": "%d"}`, i) }) {
		if a.status != 201 || decode[wireTask](t, a.body).Title != fmt.Sprint(i) {
			t.Errorf("create %d = %d %s, want 201 and that title", i, a.status, a.body)
			continue
		}
		ids[decode[wireTask](t, a.body).ID] = true
	}
	if total := c.do("GET", "?total=true", "").header.Get("X-Total-Count"); len(ids) != 50 || total != "50" {
		t.Errorf("50 creates gave %d ids and a list of %s, want 50 of each", len(ids), total)
	}
	// The newest id is not given again once its task is gone.
	highest := slices.Max(slices.Collect(maps.Keys(ids)))
	c.do("DELETE", fmt.Sprintf("/%d", highest), "")
	if next := c.create("next").ID; next <= highest {
		t.Errorf("the id after %d = %d, want a higher one", highest, next)
	}
}

func TestUpdatedAtGrowsEvenFromTheFuture(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	milk := c.create("Milk")
	if _, err := sharedDB.pool.Exec(t.Context(), `UPDATE tasks SET updated_at = now() + interval '1 hour' WHERE user_id = $1`, c.user); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/%d", milk.ID)
	last := decode[wireTask](t, c.do("GET", path, "").body)
	for range 3 {
		a := c.do("PATCH", path, `{}`)
		got := decode[wireTask](t, a.body)
		if !got.UpdatedAt.After(last.UpdatedAt) || !got.CreatedAt.Equal(milk.CreatedAt) {
			t.Errorf("updated at %v, created at %v, want after %v and at %v", got.UpdatedAt, got.CreatedAt, last.UpdatedAt, milk.CreatedAt)
		}
		// RFC 3339 in UTC, in microseconds at most.
		if times := regexp.MustCompile(`"(created|updated)_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z"`).FindAllString(a.body, -1); len(times) != 2 {
			t.Errorf("the times in %s are not in the promised format", a.body)
		}
		last = got
	}
}

// Neither the server's time zone nor the process's is the client's business.
func TestTimesAreUTC(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "TZ=Asia/Kolkata")
	p.waitLive()
	c := newClientOf(t, p.url, "test-"+rand.Text())
	a := c.do("POST", "", `{"title": "Chai"}`)
	created := decode[wireTask](t, a.body).CreatedAt
	if len(regexp.MustCompile(`_at":"[^"]*Z"`).FindAllString(a.body, -1)) != 2 || time.Since(created).Abs() > 10*time.Minute {
		t.Errorf("created = %s, want times in UTC", a.body)
	}
}

// losesText decodes valid JSON with encoding/json, which puts U+FFFD in the place of half a surrogate pair, and
// reports whether a string has more of them than its literal spells out.
func losesText(t *testing.T, body []byte) bool {
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
		``, `{}`, ` {"a": 1} `, `null`, `[]`, `{}{}`, `{"a": "\ud83d\ude00"}`, `{"a": "\ud800"}`, `{"a": "\udc00\ud800"}`, `{"\ud800": 1}`, `{"a": "\ud800\u0041"}`,
		`{"a": "\\ud800"}`, `{"a": "\\\ud800"}`, `{"a": "\\\\ud800"}`, `{"a": "\ufffd\uFFFD"}`, "{\"a\": \"\ufffd\"}", "{\"\xff\": 1}", `{"a": ["\ud83d", "\ude00"]}`,
		`{"a": 1, "a": {"b": "\ud800\ud800\udc00"}}`, `{"a": "\ud83d\u005cude00"}`, `{"a": "\n\"\ud83d\ude00\/"}`, "\ufeff{}", `{"a": 1e999, "b": -0.0}`, `{"a": "\uD800\\uDC00"}`,
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
		want := json.Valid(body) && utf8.Valid(body) && bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) && !losesText(t, body)
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
		if _, err := parseObject(again); err != nil || !reflect.DeepEqual(whole(t, again), whole(t, body)) {
			t.Errorf("the members of %q are %q, want the same (%v)", body, again, err)
		}
	})
}
