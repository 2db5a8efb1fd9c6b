package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// noTask is the path of a task that does not exist.
const noTask = "/9223372036854775807"

// The API, as one user sees it.
func TestStory(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	if a := c.do("GET", "", ""); a.status != 200 || strings.TrimSpace(a.body) != "[]" {
		t.Fatalf("list of a new user = %v, want 200 []", a)
	}

	a := c.do("POST", "", `{"title": " Grüße <&> 🌍 ", "description": "two\nlines", "id": -1,
		"user_id": "u", "created_at": "now", "updated_at": 7, "other": [1]}`)
	if a.status != 201 {
		t.Fatalf("create = %v, want 201", a)
	}
	milk := decode[wireTask](t, a.body)
	want := wireTask{ID: milk.ID, UserID: c.user, Title: " Grüße <&> 🌍 ",
		Description: new("two\nlines"), CreatedAt: milk.CreatedAt, UpdatedAt: milk.CreatedAt}
	if !equalTasks(milk, want) || milk.ID <= 0 {
		t.Errorf("created %v, want %v", milk, want)
	}
	if got, want := a.header.Get("Location"), c.path(milk.path()); got != want {
		t.Errorf("Location = %q, want %q", got, want)
	}
	etag := a.header.Get("ETag")
	a = c.do("GET", milk.path(), "")
	if got := decode[wireTask](t, a.body); !equalTasks(got, milk) || a.header.Get("ETag") != etag {
		t.Errorf("get = %v %s, want %v %s", a, a.header.Get("ETag"), milk, etag)
	}

	// Each change is visible, keeps the other fields and makes a new version.
	last := milk
	for _, step := range []struct {
		method, path, body string
		change             func(*wireTask)
	}{
		{"PUT", "", `{"title": "Milk"}`, func(w *wireTask) { w.Title = "Milk" }},
		{"PATCH", "", `{"description": null}`, func(w *wireTask) { w.Description = nil }},
		{"PATCH", "", `{}`, func(*wireTask) {}},
		{"PUT", "", `{"id": 1, "user_id": "u", "created_at": "now", "updated_at": 7, "Title": "no"}`,
			func(*wireTask) {}},
		{"PATCH", "/complete", ``, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{}`, func(w *wireTask) { w.Completed = false }},
		{"PATCH", "/complete", `{"completed": true, "title": 7}`,
			func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{"completed": true}`, func(*wireTask) {}},
		{"PUT", "", `{"description": ""}`, func(w *wireTask) { w.Description = new("") }},
		{"PATCH", "", `{"title": "Oat milk"}`, func(w *wireTask) { w.Title = "Oat milk" }},
		{"PUT", "", `{"completed": false}`, func(w *wireTask) { w.Completed = false }},
	} {
		a := c.do(step.method, milk.path()+step.path, step.body)
		if a.status != 200 {
			t.Fatalf("%s %s %s = %v, want 200", step.method, step.path, step.body, a)
		}
		got, want := decode[wireTask](t, a.body), last
		step.change(&want)
		want.UpdatedAt = got.UpdatedAt
		if !equalTasks(got, want) || a.header.Get("ETag") == etag {
			t.Errorf("%s %s %s = %v, ETag %s, want %v and a new ETag",
				step.method, step.path, step.body, got, a.header.Get("ETag"), want)
		}
		if names := slices.Sorted(maps.Keys(decode[map[string]any](t, a.body))); len(names) != 7 {
			t.Errorf("%s %s %s has the members %q, want all seven", step.method, step.path, step.body, names)
		}
		last, etag = got, a.header.Get("ETag")
	}

	eggs := c.create("Eggs")
	if got := c.list(""); !slices.EqualFunc(got, []wireTask{eggs, last}, equalTasks) {
		t.Errorf("list = %v, want the newest first: %v, %v", got, eggs, last)
	}
	if a := c.do("DELETE", eggs.path(), ""); a.status != 204 || a.body != "" {
		t.Errorf("delete = %v, want 204 without a body", a)
	}
	for _, method := range []string{"GET", "DELETE"} {
		if a := c.do(method, eggs.path(), ""); a.status != 404 {
			t.Errorf("%s of a deleted task = %v, want 404", method, a)
		}
	}
	if next := c.create("Bread"); next.ID <= eggs.ID {
		t.Errorf("the id after %d, which was deleted, is %d, want a larger one", eggs.ID, next.ID)
	}
}

// The fields that clients may set. All values are JSON.
var settableFields = []struct {
	name     string
	accepted []string
	absent   string // the value of a create without the field; "" if it is required
	rejected []string
	detail   string // of the 422, as a regular expression
}{
	{
		name: "title",
		accepted: []string{`"x"`, `"\u200b"`, `"\ufeff"`, `"\u00a0x\u3000"`,
			`"` + strings.Repeat("🌍", 200) + `"`},
		rejected: slices.Concat(blankTitles(), []string{`""`, `"a\u0000b"`,
			`"` + strings.Repeat("x", 201) + `"`, `"` + strings.Repeat("🌍", 201) + `"`,
			`1`, `true`, `null`, `[]`, `{}`, `["x"]`}),
		detail: `^title must (not be blank|not contain U\+0000|not exceed 200 characters|be a string)$`,
	},
	{
		name:     "description",
		accepted: []string{`"x"`, `""`, `null`, `"` + strings.Repeat("🌍", 1000) + `"`},
		absent:   `null`,
		rejected: []string{`"\u0000"`, `"` + strings.Repeat("🌍", 1001) + `"`, `1`, `true`, `[]`, `{}`,
			`["x"]`},
		detail: `^description must (not contain U\+0000|not exceed 1000 characters|be a string)$`,
	},
	{
		name:     "completed",
		accepted: []string{`true`, `false`},
		absent:   `false`,
		rejected: []string{`"true"`, `""`, `0`, `1`, `null`, `[]`, `{}`},
		detail:   `^completed must be true or false$`,
	},
}

// blankTitles returns titles of a space and each white space character of Unicode.
func blankTitles() (titles []string) {
	for _, space := range "\t\n\v\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005" +
		"\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000" {
		titles = append(titles, fmt.Sprintf(`" \u%04x"`, space))
	}
	return titles
}

// A create, a PUT and a PATCH store each field, and keep it if it is absent. An invalid value is a
// 422 that names the field and its rule, and changes nothing.
func TestFields(t *testing.T) {
	t.Parallel()
	for _, f := range settableFields {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			c := newClient(t)
			// with sets the field, and the title that a create requires. The last of two titles counts.
			with := func(value string) string {
				return fmt.Sprintf(`{"title": "t", %q: %s}`, f.name, value)
			}
			// send returns the path of the task, after a check that it has the value and is stored.
			send := func(method, path, body, value string) string {
				t.Helper()
				a := c.do(method, path, body)
				if a.status/100 != 2 {
					t.Fatalf("%s %.80s = %v, want success", method, body, a)
				}
				path = decode[wireTask](t, a.body).path()
				stored := c.do("GET", path, "")
				got := decode[map[string]any](t, a.body)[f.name]
				if stored.body != a.body || !reflect.DeepEqual(got, decode[any](t, value)) {
					t.Errorf("%s %.80s = %v, then get = %v, want %.80s", method, body, a, stored, value)
				}
				return path
			}
			var path string
			for i, value := range f.accepted {
				path = send("POST", "", with(value), value)
				other := f.accepted[(i+1)%len(f.accepted)]
				for _, method := range []string{"PUT", "PATCH"} {
					send(method, path, with(other), other)
					send(method, path, `{}`, other)
					send(method, path, fmt.Sprintf(`{%q: %s}`, f.name, value), value)
				}
			}
			if f.absent != "" {
				send("POST", "", `{"title": "t"}`, f.absent)
			} else if a := c.do("POST", "", `{"description": "x", "Title": "x"}`); a.status != 422 ||
				a.detail() != f.name+" is required" {
				t.Errorf("create without %s = %v, want 422", f.name, a)
			}

			before := c.do("GET", "", "")
			requests := [][2]string{{"POST", ""}, {"PUT", path}, {"PATCH", path}}
			if f.name == "completed" {
				requests = append(requests, [2]string{"PATCH", path + "/complete"})
			}
			for _, r := range requests {
				for _, value := range f.rejected {
					a := c.do(r[0], r[1], with(value))
					if a.status != 422 || !regexp.MustCompile(f.detail).MatchString(a.detail()) {
						t.Errorf("%s %s with %.80s = %v, want 422 %s", r[0], r[1], value, a, f.detail)
					}
				}
			}
			if after := c.do("GET", "", ""); after.body != before.body {
				t.Errorf("the tasks after rejected changes = %s, want %s", after.body, before.body)
			}
		})
	}
}

func TestTextComesBackAsSent(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	texts := []string{"  around \t\r\n", "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳", "e\u0301 \u00e9 \u212b \u00c5 ﬁ ＡＢ İıſK",
		"שלום \u202eabc\u202c \u0627\u0644\u0639", "\ufffd", "a\u2028b\u2029c",
		`"quoted" 'and' \back\ /slash/ \n \u0041 \ud800`, "<script>alert(1)</script> &amp; &",
		"\u200b\u200d\ufeff", "\u0001\u0008\u001f\u007f\u0080\u009f", "\ufffe\uffff \U0010ffff \ue000",
		"'; DROP TABLE tasks; -- @user $1 %s {} NULL null", `\`, "%00 %41 +",
		strings.Repeat("z\u0300\u0301\u0302", 50)}
	for _, text := range texts {
		plain, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		var escaped strings.Builder
		for _, unit := range utf16.Encode([]rune(text)) {
			fmt.Fprintf(&escaped, `\u%04x`, unit)
		}
		for _, literal := range []string{string(plain), `"` + escaped.String() + `"`} {
			body := fmt.Sprintf(`{"title": %[1]s, "description": %[1]s}`, literal)
			if a := c.do("POST", "", body); a.status != 201 {
				t.Fatalf("create %s = %v, want 201", body, a)
			}
		}
	}
	for i, task := range c.list("?limit=100") { // two for each text, the last one first
		want := texts[len(texts)-1-i/2]
		if task.Title != want || *task.Description != want {
			t.Errorf("created %q, the list has %v", want, task)
		}
	}
}

var sixDigits = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`)

// Times have six fractional digits and are in UTC, whatever the time zone of the process. Every
// successful change increases updated_at, also after the clock was set back, and the ETag is
// updated_at in quotes, so that each task of a list has its version.
func TestTimes(t *testing.T) {
	t.Parallel()
	c := startProcess(t, "TZ=Asia/Kolkata").newClient()
	times := func(body string) (created, updated string) {
		t.Helper()
		task := decode[map[string]any](t, body)
		return task["created_at"].(string), task["updated_at"].(string)
	}
	a := c.do("POST", "", `{"title": "Chai"}`)
	path := decode[wireTask](t, a.body).path()
	created, updated := times(a.body)
	if at, err := time.Parse(time.RFC3339, created); err != nil || time.Since(at).Abs() > time.Hour {
		t.Errorf("created_at = %s (%v), want now", created, err)
	}
	if updated != created || a.header.Get("ETag") != `"`+updated+`"` {
		t.Errorf("create = %v, ETag %s, want one time", a, a.header.Get("ETag"))
	}

	// Later the clock is set back by an hour: the last change was at a full second, an hour from now.
	sqlExec(t, sharedDB.pool, `
		UPDATE public.tasks
		SET updated_at = date_trunc('second', now()) + interval '1 hour'
		WHERE user_id = $1`, c.user)
	_, updated = times(c.do("GET", path, "").body)
	if !sixDigits.MatchString(created) || !strings.HasSuffix(updated, ".000000Z") {
		t.Errorf("created_at = %s, updated_at = %s, want six digits and Z", created, updated)
	}
	for _, change := range []struct{ method, path, body string }{
		{"PUT", path, `{}`}, {"PATCH", path, `{"title": "Tea"}`},
		{"PATCH", path + "/complete", `{"completed": true}`},
		{"PATCH", path + "/complete", `{"completed": true}`},
	} {
		a := c.do(change.method, change.path, change.body)
		first, next := times(a.body)
		if first != created || next <= updated || !sixDigits.MatchString(next) {
			t.Errorf("%s after %s, %s = %v, want a later updated_at alone",
				change.method, created, updated, a)
		}
		if list := c.do("GET", "", ""); a.header.Get("ETag") != `"`+next+`"` ||
			!strings.Contains(list.body, `"`+next+`"`) {
			t.Errorf("ETag = %s, list %v, want both with %s", a.header.Get("ETag"), list, next)
		}
		updated = next
	}
}

// An id that is no positive 64-bit integer in digits is a 404, like one that does not exist.
func TestTaskIDs(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("the only one")
	for _, spelling := range []string{"/0%d", "/00000000000000000000000%d"} {
		a := c.do("GET", fmt.Sprintf(spelling, task.ID), "")
		if a.status != 200 || decode[wireTask](t, a.body).ID != task.ID {
			t.Errorf("GET "+spelling+" = %v, want the task", task.ID, a)
		}
	}
	arabic := func(r rune) rune { return r - '0' + '٠' }
	bad := []string{"0", "00", "9223372036854775807", "9223372036854775808", "18446744073709551617",
		"99999999999999999999", "abc", "null", "%20", strings.Map(arabic, fmt.Sprint(task.ID)),
		fmt.Sprint(1<<32 + task.ID)}
	for _, spelling := range []string{"-%d", "+%d", "%%2B%d", "%d%%2E0", "%de0", "%d%%00", "%%00%d",
		"%d%%20", "%%20%d", "0x%d", "%d,", "%d_0", "%d%%2F", "%d%%0A", "%%D9%%A1%d"} {
		bad = append(bad, fmt.Sprintf(spelling, task.ID))
	}
	for _, request := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"PUT", "", `{"title": "x"}`}, {"PATCH", "", `{"title": "x"}`},
		{"PATCH", "/complete", ""}, {"DELETE", "", ""},
	} {
		for _, id := range bad {
			a := c.do(request.method, "/"+id+request.path, request.body)
			if a.status != 404 || !strings.Contains(a.detail(), "this id does not exist") {
				t.Errorf("%s /%s%s = %v, want 404", request.method, id, request.path, a)
			}
		}
	}
	if got := c.list(""); !slices.EqualFunc(got, []wireTask{task}, equalTasks) {
		t.Errorf("the tasks afterwards = %v, want %v", got, task)
	}
}

// A user id is opaque. It is compared byte for byte, after the path was decoded.
func TestUserIDs(t *testing.T) {
	t.Parallel()
	testDB(t)
	suffix := newUser()
	for _, row := range []struct {
		user              string // without the suffix
		allowed, rejected []string
	}{
		{"0123456789abcdefABCDEF0123456789", []string{"0123456789abcdefABCDEF0123456789"},
			[]string{"0123456789ABCDEFABCDEF0123456789"}},
		{"0b5c0f6e-3f53-4a4b-9a5c-0d2f3f6b8e11", []string{"0b5c0f6e-3f53-4a4b-9a5c-0d2f3f6b8e11"},
			[]string{"0B5C0F6E-3F53-4A4B-9A5C-0D2F3F6B8E11", "0b5c0f6e3f534a4b9a5c0d2f3f6b8e11"}},
		{"1", []string{"1", "%31"}, []string{"01", "+1", "%221%22"}},
		{"ä@example.com", []string{"%C3%A4@example.com", "%c3%a4%40example.com", "ä@example.com"},
			[]string{"a%CC%88@example.com", "%E4@example.com", "%C3%84@example.com"}}, // composed
		{"a\u0308@example.com", []string{"a%CC%88@example.com"}, []string{"%C3%A4@example.com"}},
		{"a/b", []string{"a%2Fb", "a%2fb", "%61%2F%62"}, []string{"a%252Fb", "a%5Cb", "A%2Fb"}},
		{"../x/", []string{"%2E%2E%2Fx%2F"}, []string{"x"}},
		{`"1"`, []string{"%221%22"}, []string{"1", "%271%27"}},
		{"a b", []string{"a%20b"}, []string{"a+b", "a%2520b", "ab", "a%C2%A0b"}},
		{"a+b", []string{"a+b", "a%2Bb"}, []string{"a%20b"}},
		{"%41", []string{"%2541", "%25%34%31"}, []string{"%41", "A"}},
		{"a?b#c;d&e", []string{"a%3Fb%23c;d&e"}, []string{"a", "a%253Fb%2523c;d&e"}},
		{"\u200b\u202e\ufeff", []string{"%E2%80%8B%E2%80%AE%EF%BB%BF"}, []string{"%E2%80%8B", ""}},
		{"{user_id}", []string{"%7Buser_id%7D"}, []string{"user_id", "a%00"}},
		{strings.Repeat("x", 512-len(suffix)), []string{strings.Repeat("x", 512-len(suffix))},
			[]string{strings.Repeat("x", 511-len(suffix))}},
	} {
		c := newClientOf(t, sharedURL, row.user+suffix)
		for _, spelling := range row.allowed {
			path := "/api/" + spelling + suffix + "/tasks"
			a := c.send("POST", path, `{"title": "x"}`)
			if a.status != 201 || decode[wireTask](t, a.body).UserID != c.user {
				t.Errorf("POST %s by %q = %v, want 201", path, c.user, a)
				continue
			}
			location := a.header.Get("Location")
			if got := c.send("GET", location, ""); got.status != 200 || got.body != a.body {
				t.Errorf("GET %s by %q = %v, want %v", location, c.user, got, a)
			}
		}
		if got := c.list(""); len(got) != len(row.allowed) {
			t.Errorf("list of %q = %v, want %d tasks, one for each spelling", c.user, got, len(row.allowed))
		}
		for _, spelling := range row.rejected {
			path := "/api/" + spelling + suffix + "/tasks"
			if a := c.send("GET", path, ""); a.status != 403 || strings.Contains(a.body, suffix) {
				t.Errorf("GET %s by %q = %v, want 403 that does not name the user", path, c.user, a)
			}
		}
	}
	// Others may use these ids in the tests' database, so their tasks are only read.
	for user, segment := range map[string]string{"..": "%2E%2E", ".": "%2E", " ": "%20"} {
		c := newClientOf(t, sharedURL, user)
		if a := c.send("GET", "/api/"+segment+"/tasks", ""); a.status != 200 {
			t.Errorf("GET of %s by %q = %v, want 200", segment, user, a)
		}
	}
}

// No route reads or changes another user's task, or shows that it exists.
func TestTasksOfOthersDoNotExist(t *testing.T) {
	t.Parallel()
	a, b := newClient(t), newClient(t)
	old := b.create("B's older")
	secret := a.create("A's secret")
	recent := b.create("B's newer")
	before := a.do("GET", secret.path(), "")
	for _, r := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"HEAD", "", ""}, {"PUT", "", `{"title": "taken"}`}, {"PUT", "", `{}`},
		{"PATCH", "", `{"title": "taken"}`}, {"PATCH", "/complete", ""},
		{"PATCH", "/complete", `{"completed": true}`}, {"DELETE", "", ""},
	} {
		for _, headers := range [][]string{nil,
			{"If-Match", before.header.Get("ETag"), "If-None-Match", "*"}, {"If-Match", `"1"`}} {
			got := b.do(r.method, secret.path()+r.path, r.body, headers...)
			none := b.do(r.method, noTask+r.path, r.body, headers...)
			if got.status != 404 || got.body != none.body || got.header.Get("ETag") != "" {
				t.Errorf("%s%s %q of another user's task = %v, want it like no task: %v",
					r.method, r.path, headers, got, none)
			}
		}
	}
	after := a.do("GET", secret.path(), "")
	if after.body != before.body || after.header.Get("ETag") != before.header.Get("ETag") {
		t.Errorf("A's task afterwards = %v, want %v", after, before)
	}
	for _, row := range []struct {
		of    *client
		query string
		want  []wireTask
		total string
	}{
		{a, "?total=true", []wireTask{secret}, "1"},
		{a, "?total=true&completed=false", []wireTask{secret}, "1"},
		{b, "?total=true", []wireTask{recent, old}, "2"},
		{b, "?total=true&completed=true", nil, "0"},
		{b, fmt.Sprintf("?total=true&before=%d", secret.ID), []wireTask{old}, "2"}, // only a number
		{b, fmt.Sprintf("?total=true&completed=false&before=%d", secret.ID+1), []wireTask{old}, "2"},
		{b, "?total=true&offset=2", nil, "2"},
	} {
		got := row.of.do("GET", row.query, "")
		tasks := decode[[]wireTask](t, got.body)
		if total := got.header.Get("X-Total-Count"); total != row.total ||
			!slices.EqualFunc(tasks, row.want, equalTasks) {
			t.Errorf("list %s = %v, %s in all, want %v, %s", row.query, tasks, total, row.want, row.total)
		}
	}
}

// Concurrent changes are all made, one after the other: each applies to what the one before has
// stored, in a later version.
func TestConcurrentChanges(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	last := c.create("Milk")
	path := c.path(last.path())
	requests := []func(text string) (answer, error){
		func(string) (answer, error) { return c.try("PATCH", path+"/complete", "") },
		func(text string) (answer, error) { return c.try("PUT", path, `{"title": `+text+`}`) },
		func(text string) (answer, error) { return c.try("PATCH", path, `{"description": `+text+`}`) },
	}
	made := map[time.Time]int{} // which request made a version
	var versions []wireTask
	for i, a := range atOnce(t, 30, func(i int) (answer, error) {
		return requests[i%3](fmt.Sprintf(`"%d"`, i))
	}) {
		if a.status != 200 {
			t.Fatalf("change %d = %v, want 200", i, a)
		}
		task := decode[wireTask](t, a.body)
		versions, made[task.UpdatedAt] = append(versions, task), i
	}
	slices.SortFunc(versions, func(a, b wireTask) int { return a.UpdatedAt.Compare(b.UpdatedAt) })
	for _, got := range versions {
		want, i := last, made[got.UpdatedAt]
		want.UpdatedAt = got.UpdatedAt
		switch i % 3 {
		case 0:
			want.Completed = !last.Completed
		case 1:
			want.Title = fmt.Sprint(i)
		case 2:
			want.Description = new(fmt.Sprint(i))
		}
		if !got.UpdatedAt.After(last.UpdatedAt) || !equalTasks(got, want) {
			t.Errorf("change %d of %v made %v", i, last, got)
		}
		last = got
	}
}

var nextLink = regexp.MustCompile(`^<(/api/[!-;=?-~]*)>; rel="next"$`) // ASCII without < and >

// nextPage returns the URL of the next page, "" on the last one.
func nextPage(t testing.TB, a answer) string {
	t.Helper()
	link := a.header.Get("Link")
	if link == "" {
		return ""
	}
	match := nextLink.FindStringSubmatch(link)
	if match == nil {
		t.Fatalf("Link = %q, want one URL with rel=\"next\"", link)
	}
	return match[1]
}

// idsOf returns the ids of the tasks in a list.
func idsOf(t testing.TB, a answer) []int64 {
	t.Helper()
	ids := []int64{}
	for _, task := range decode[[]wireTask](t, a.body) {
		ids = append(ids, task.ID)
	}
	return ids
}

// The pages of a list, of which each links to the next one, contain each task once, in order.
func TestPagesShowEachTaskOnce(t *testing.T) {
	t.Parallel()
	testDB(t)
	c := newClientOf(t, sharedURL, `a b/ü>"<?#%41;,`+newUser())
	all := c.fill(150)
	completed, open, none := []int64{}, []int64{}, []int64{}
	for i, id := range all { // the newest is the 150th
		if (150-i)%3 == 0 {
			completed = append(completed, id)
		} else {
			open = append(open, id)
		}
	}
	for _, row := range []struct {
		query string
		want  []int64
		pages []int
		total string
	}{
		{"", all, []int{50, 50, 50}, ""}, // the last page is full
		{"?limit=100", all, []int{100, 50}, ""},
		{"?limit=99&total=true", all, []int{99, 51}, "150"},
		{"?completed=true&limit=25&total=true", completed, []int{25, 25}, "50"},
		{"?completed=false&limit=70&total=true", open, []int{70, 30}, "100"},
		{"?completed=false&total=false", open, []int{50, 50}, ""},
		{"?limit=100&offset=49&total=true", all[49:], []int{100, 1}, "150"},
		{"?limit=20&offset=7&completed=true&total=true", completed[7:], []int{20, 20, 3}, "50"},
		{fmt.Sprintf("?limit=100&before=%d", all[9]), all[10:], []int{100, 40}, ""},
		{fmt.Sprintf("?completed=true&limit=30&total=true&before=%d", completed[9]), completed[10:],
			[]int{30, 10}, "50"},
		{fmt.Sprintf("?before=%d&total=true", all[149]), none, []int{0}, "150"},
		{"?before=9223372036854775807&limit=0100", all, []int{100, 50}, ""},
		{"?offset=150&total=true", none, []int{0}, "150"},
		{"?offset=9223372036854775807&limit=100&total=true&completed=false", none, []int{0}, "100"},
	} {
		got, pages := []int64{}, []int{}
		for next := c.path(row.query); next != "" && len(got) <= len(row.want); {
			a := c.send("GET", next, "")
			if total := a.header.Get("X-Total-Count"); a.status != 200 || total != row.total {
				t.Fatalf("%s = %v, %q in all, want 200, %q", next, a, total, row.total)
			}
			page := idsOf(t, a)
			got, pages = append(got, page...), append(pages, len(page))
			next = nextPage(t, a)
		}
		if !slices.Equal(got, row.want) || !slices.Equal(pages, row.pages) {
			t.Errorf("list %s = pages of %v, ids %v, want pages of %v, ids %v",
				row.query, pages, got, row.pages, row.want)
		}
	}
}

// Tasks that are created or deleted while a client reads do not shift the tasks of later pages.
func TestPagesAreStableWhileTasksChange(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	ids := c.fill(4)
	a := c.do("GET", "?limit=2", "")
	c.create("newer than the page")
	for _, id := range ids[:2] { // also the task of the cursor
		c.do("DELETE", fmt.Sprintf("/%d", id), "")
	}
	a = c.send("GET", nextPage(t, a), "")
	if got := idsOf(t, a); !slices.Equal(got, ids[2:]) || nextPage(t, a) != "" {
		t.Errorf("page 2 = %v, Link %q, want %v and none", got, a.header.Get("Link"), ids[2:])
	}
}

// The link to the next page has before, no offset, and every other parameter of the request.
func TestLinkKeepsParameters(t *testing.T) {
	t.Parallel()
	testDB(t)
	c := newClientOf(t, sharedURL, `ü/<`+newUser())
	ids := c.fill(7)
	const kept = "x=1&limit=2&x=2&Limit=0&%3E%22%3C=%26%3D+%3B%0A&empty&%C3%BC=%FF&Before=7" +
		"&page=%3E%3B+rel%3D%22next&total=false"
	want, err := url.ParseQuery(kept)
	if err != nil {
		t.Fatal(err)
	}
	for query, last := range map[string]int64{
		kept: ids[1], kept + "&offset=2": ids[3], kept + fmt.Sprint("&before=", ids[1]): ids[3],
	} {
		a := c.do("GET", "?"+query, "")
		link, err := url.Parse(nextPage(t, a))
		if err != nil {
			t.Fatalf("Link of %s = %q: %v", query, a.header.Get("Link"), err)
		}
		want.Set("before", fmt.Sprint(last))
		if got := link.Query(); !reflect.DeepEqual(got, want) || link.EscapedPath() != c.path("") {
			t.Errorf("Link of %s = %q, want the path of the list with %v", query, link, want)
		}
	}
}

// An invalid or repeated parameter is a 422 that names it and its rule. Unknown ones are ignored.
func TestQueryParameters(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	rejected := map[string]string{ // the details, as regular expressions
		"before=7&offset=0":            `before.*offset`,
		"offset=0&before=7&total=true": `before.*offset`,
		"limit=101":                    `^limit .* 1 to 100$`,
		"limit=0":                      `^limit .* 1 to 100$`,
		"before=0":                     `^before .* from 1 to`,
	}
	for _, query := range []string{"%zz", "limit=%", "x=%4", "a;b", "limit=5;total=true"} {
		rejected[query] = `query string is malformed`
	}
	for _, name := range []string{"limit", "offset", "before"} {
		for _, value := range []string{"-1", "+5", "%2B5", "1.5", "1.0", "abc", "", "1e1", "0x10", "1_0",
			"%D9%A1", "%EF%BC%95", "5%20", "%205", "5%00", "1,000", "9223372036854775808",
			"18446744073709551617", "99999999999999999999", "5&" + name + "=5", "5&" + name + "="} {
			rejected[name+"="+value] = "^" + name + " must be a single whole number"
		}
	}
	for _, name := range []string{"completed", "total"} {
		for _, value := range []string{"True", "TRUE", "1", "0", "yes", "null", "", "true%20",
			"%22true%22", "true&" + name + "=true", "true&" + name + "="} {
			rejected[name+"="+value] = "^" + name + " must be true or false$"
		}
	}
	for query, detail := range rejected {
		a := c.do("GET", "?"+query, "")
		if a.status != 422 || !regexp.MustCompile(detail).MatchString(a.detail()) {
			t.Errorf("list ?%s = %v, want 422 %s", query, a, detail)
		}
	}
	for _, query := range []string{"?", "?&&", "?Limit=0&TOTAL=7&x&x", "?limit=007", "?limit=%33",
		"?limit=100&offset=0&completed=false&total=true"} {
		if a := c.do("GET", query, ""); a.status != 200 {
			t.Errorf("list %s = %v, want 200", query, a)
		}
	}
}

// A list reads one index from the cursor on, whatever the planner's statistics say, and also when
// a prepared statement has a generic plan. Nearly all tasks are completed. Exceptions are half of
// the tasks of the user "many" and, of the tasks of the user "few", all but the ten oldest.
func TestListsReadOneIndex(t *testing.T) {
	t.Parallel()
	const noAutovacuum = `ALTER TABLE public.tasks SET (autovacuum_enabled = off);`
	for _, row := range []struct{ statistics, before, after string }{
		{"current", "", `VACUUM ANALYZE public.tasks`},
		{"none", noAutovacuum, ""},
		{"of an empty table", noAutovacuum + `ANALYZE public.tasks`, ""},
	} {
		t.Run(row.statistics, func(t *testing.T) {
			t.Parallel()
			var statement lastList
			d := startDB(t, openDB(t, createDatabase(t), func(config *pgxpool.Config) {
				config.ConnConfig.Tracer = &statement
			}))
			sqlExec(t, d.pool, row.before)
			sqlExec(t, d.pool, `
				INSERT INTO public.tasks (user_id, title, completed)
				SELECT CASE WHEN i % 60 = 0 THEN 'few'
				            WHEN i % 20 = 1 THEN 'many'
				            ELSE 'user ' || i % 1009 END,
				       'task ' || i,
				       CASE WHEN i % 60 = 0 THEN i <= 600
				            WHEN i % 20 = 1 THEN i % 40 = 1
				            ELSE true END
				FROM generate_series(1, 60000) AS i`) // the ids are 1 to 60000 too
			sqlExec(t, d.pool, row.after)
			service := startService(t, d, settings{})
			for _, list := range []struct {
				user, query string
				most        int64 // entries of the index that the list may read
			}{
				{"many", "limit=50", 51},
				{"many", "limit=1&offset=30", 32},
				{"many", "limit=5", 6},
				{"many", "limit=5&before=30000", 6},
				{"many", "limit=5&before=3000", 6},
				{"few", "limit=20", 21},
				{"few", "limit=20&before=30000", 21},
			} {
				for filter, index := range map[string]string{
					"":                 "tasks_pkey",
					"&completed=true":  "tasks_user_id_completed_id_idx",
					"&completed=false": "tasks_user_id_completed_id_idx",
				} {
					newClientOf(t, service.url, list.user).list("?" + list.query + filter)
					for _, mode := range []string{"force_generic_plan", "force_custom_plan"} {
						got := readsOf(t, d, mode, index, statement.Load())
						// A block for each row, and a few of the index.
						tooMuch := got.entries > list.most || got.blocks > list.most+10
						if got.scans != 1 || got.otherScans != 0 || tooMuch {
							t.Errorf("%s, list ?%s%s of %s reads %+v, want one scan of %d entries of %s",
								mode, list.query, filter, list.user, got, list.most, index)
						}
					}
				}
			}
		})
	}
}

// A lastList is a tracer that remembers the last statement of a list.
type lastList struct {
	atomic.Pointer[pgx.TraceQueryStartData]
}

func (l *lastList) TraceQueryStart(
	ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData,
) context.Context {
	if strings.Contains(data.SQL, "LIMIT") {
		l.Store(&data)
	}
	return ctx
}

func (*lastList) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// A reads is what a statement has read, by PostgreSQL's counters.
type reads struct {
	scans, otherScans int64 // of the index; of other indexes and of the table
	entries, blocks   int64
}

// readsOf runs a statement again, with a plan_cache_mode.
func readsOf(
	t testing.TB, d *database, mode, index string, asked *pgx.TraceQueryStartData,
) reads {
	t.Helper()
	tx := begin(t, d)
	defer tx.Rollback(t.Context()) // frees the connection for the next one
	count := func() []int64 {      // in this session, since it reported its counts to the server
		return sqlValue[[]int64](t, tx, `
			SELECT ARRAY[sum(pg_stat_get_xact_numscans(oid)) FILTER (WHERE relname = $1),
			             sum(pg_stat_get_xact_numscans(oid)) FILTER (WHERE relname <> $1),
			             sum(pg_stat_get_xact_tuples_returned(oid)),
			             sum(pg_stat_get_xact_blocks_fetched(oid))]::bigint[]
			FROM pg_class
			WHERE relnamespace = 'public'::regnamespace AND relname LIKE 'tasks%'`, index)
	}
	sqlExec(t, tx, `SET LOCAL plan_cache_mode = `+mode)
	before := count()
	sqlExec(t, tx, asked.SQL, asked.Args...)
	after := count()
	for i := range after {
		after[i] -= before[i]
	}
	return reads{after[0], after[1], after[2], after[3]}
}

// A change is made only if If-Match contains the version of the task, in any spelling of a
// compressing proxy. A read with If-None-Match that contains it is a 304.
func TestIfMatchAndIfNoneMatch(t *testing.T) {
	t.Parallel()
	const same, other, malformed = 200, 412, 422 // the status of a change
	for _, row := range []struct {
		value string // V stands for the version, without quotes; \n separates two header lines
		want  int
	}{
		{`"V"`, same},
		{`*`, same},
		{` * `, same},
		{`"1", "V" , "2"`, same},
		{`W/"5",, "V"`, same},
		{"\"1\"\n\"V\"", same}, // RFC 9110, section 5.3
		{strings.Repeat(`"x", `, 99) + `"V"`, same},
		{`W/"V"`, same}, // nginx, HAProxy and Varnish
		{`"1", W/"V"`, same},
		{`"V-gzip"`, same}, // Apache and Caddy
		{`"V--gzip"`, same},
		{`W/"V;gzip"`, same},
		{`"V-br", "x"`, same},
		{`"V-zstd"`, same},
		{`"a,b", "V,gzip"`, same},
		{`"1"`, other},
		{`""`, other},
		{`"abc"`, other},
		{`"*"`, other},
		{`"Vgzip"`, other},
		{`"V0"`, other},
		{`"2026-02-30T03:04:05.000000Z"`, other},
		{`"2026-01-02T03:04:05.000000Z"`, other},
		{`"0000-00-00T00:00:00.000000Z"`, other},
		{`"9999-12-31T23:59:59.999999Z"`, other},
		{`"0001-01-01T00:00:00.000000Z-gzip"`, other},
		{"\"\xff\"", other},
		{``, malformed},
		{`undefined`, malformed},
		{`null`, malformed},
		{`"`, malformed},
		{`'x'`, malformed},
		{`*, *`, malformed},
		{`W/`, malformed},
		{`V`, malformed},
	} {
		t.Run(row.value, func(t *testing.T) {
			t.Parallel()
			c := newClient(t)
			for _, r := range []struct{ header, method, path, body string }{
				{"If-None-Match", "GET", "", ""},
				{"If-Match", "PUT", "", `{"title": "changed"}`},
				{"If-Match", "PATCH", "", `{"title": "changed"}`},
				{"If-Match", "PATCH", "/complete", ""},
				{"If-Match", "DELETE", "", ""},
			} {
				created := c.do("POST", "", `{"title": "original"}`)
				path, etag := decode[wireTask](t, created.body).path(), created.header.Get("ETag")
				var headers []string
				value := strings.ReplaceAll(row.value, "V", strings.Trim(etag, `"`))
				for line := range strings.SplitSeq(value, "\n") {
					headers = append(headers, r.header, line)
				}
				want, changes := row.want, row.want == same && r.header == "If-Match"
				switch {
				case r.method == "GET":
					want = map[int]int{same: 304, other: 200, malformed: 422}[row.want]
				case r.method == "DELETE" && changes:
					want = 204
				}
				a := c.do(r.method, path+r.path, r.body, headers...)
				if a.status != want || a.status == 422 && !strings.HasPrefix(a.detail(), r.header+" must") {
					t.Errorf("%s %s with %s = %v, want %d", r.method, r.path, r.header, a, want)
				}
				if r.method == "GET" && want < 400 && a.header.Get("ETag") != etag {
					t.Errorf("GET with %s has the ETag %s, want %s", r.header, a.header.Get("ETag"), etag)
				}
				if after := c.do("GET", path, ""); (after.body != created.body) != changes {
					t.Errorf("%s %s changes %v to %v", r.method, r.path, created, after)
				}
				a = c.do(r.method, noTask+r.path, r.body, headers...)
				if want == 422 && a.status != 422 || want != 422 && a.status != 404 {
					t.Errorf("%s %s of no task with %s = %v, want 404, or 422", r.method, r.path, r.header, a)
				}
			}
		})
	}
}

// Of concurrent changes with the same ETag, exactly one is made.
func TestOneOfTwentyWins(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("original").path()
	etag := c.do("GET", path, "").header.Get("ETag")
	var winners []string
	for i, a := range atOnce(t, 20, func(i int) (answer, error) {
		return c.try("PATCH", c.path(path), fmt.Sprintf(`{"title": "client %d"}`, i), "If-Match", etag)
	}) {
		switch a.status {
		case 200:
			winners = append(winners, fmt.Sprint("client ", i))
		case 412:
		default:
			t.Errorf("client %d = %v, want 200 or 412", i, a)
		}
	}
	stored := decode[wireTask](t, c.do("GET", path, "").body)
	if !slices.Equal(winners, []string{stored.Title}) {
		t.Errorf("%q won, stored is %v", winners, stored)
	}
}

// A create with a key is made once. The same body again gets the task as it is now, and another
// body a 422. A key belongs to a user, and ends with its task.
func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	const name, body = "Idempotency-Key", `{"title": "once", "description": "only"}`
	const key1, key2 = "16-characters--1", "0b5c0f6e-3f53-4a4b-9a5c-0d2f3f6b8e11"
	// create reports whether the response repeats an earlier one.
	create := func(c *client, body, key string) (a answer, task wireTask, replayed bool) {
		t.Helper()
		if a = c.do("POST", "", body, name, key); a.status != 201 {
			t.Fatalf("create %s with %s = %v, want 201", body, key, a)
		}
		return a, decode[wireTask](t, a.body), a.header.Get("Idempotency-Replayed") == "true"
	}
	first, task, replayed := create(c, body, key1)
	if replayed {
		t.Error("the first create is replayed")
	}
	changed := c.do("PATCH", task.path(), `{"title": "changed since"}`)

	// The same body after decoding: the order of members, defaults, unknown members, escapes.
	for _, same := range []string{body,
		`{"completed": false, "description": "only", "title": "onc\u0065", "id": 7}`} {
		a, _, replayed := create(c, same, key1)
		if !replayed || a.body != changed.body {
			t.Errorf("repeated with %s = %v, replayed: %t, want the task as it is now: %v",
				same, a, replayed, changed)
		}
		if a.header.Get("ETag") != changed.header.Get("ETag") ||
			a.header.Get("Location") != first.header.Get("Location") {
			t.Errorf("repeated with %s = %v, want the ETag of now and the Location of the first, %v",
				same, a.header, first.header)
		}
	}
	for _, other := range []string{
		`{"title": "Once", "description": "only"}`, `{"title": "changed since", "description": "only"}`,
		`{"title": "once"}`, `{"title": "once", "description": ""}`,
		`{"title": "once", "description": "only", "completed": true}`,
	} {
		a := c.do("POST", "", other, name, key1)
		if a.status != 422 || !strings.Contains(a.detail(), name) {
			t.Errorf("the key with %s = %v, want 422 that names the header", other, a)
		}
	}
	if a := c.do("GET", task.path(), ""); a.body != changed.body {
		t.Errorf("after the repeats the task is %v, want %v", a, changed)
	}

	if _, other, replayed := create(newClient(t), body, key1); replayed || other.ID == task.ID {
		t.Errorf("the same key of another user: replayed %t, %v, want another task", replayed, other)
	}
	if _, other, replayed := create(c, body, key2); replayed || other.ID == task.ID {
		t.Errorf("another key: replayed %t, %v, want another task", replayed, other)
	}
	c.do("DELETE", task.path(), "")
	if _, _, replayed := create(c, body, key1); replayed {
		t.Error("the key of a deleted task is replayed, want another task")
	}

	for _, bad := range []string{"", "undefined", strings.Repeat("k", 15), strings.Repeat("k", 256),
		"a key with blanks", "a-key-with-a\ttab", "a-key-with-an-ä", "a-key-with-a-\x80"} {
		a := c.do("POST", "", body, name, bad)
		if a.status != 422 || !strings.Contains(a.detail(), name) {
			t.Errorf("key %q = %v, want 422 that names the header", bad, a)
		}
	}
	if a := c.do("POST", "", body, name, key1, name, key1); a.status != 422 {
		t.Errorf("two keys = %v, want 422", a)
	}
	create(c, body, strings.Repeat("!~", 127)+"!")
	if got := c.list(""); len(got) != 3 {
		t.Errorf("%d tasks in the end, want 3: %v", len(got), got)
	}
}

// A create that is sent many times, to two instances, makes one task.
func TestIdempotencyKeyOnTwoInstances(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	other := *c
	other.service = startService(t, startDB(t, openDB(t, os.Getenv("DATABASE_URL"))), settings{}).url
	instances := []*client{c, &other}
	for round := range 5 {
		key := fmt.Sprint("key-of-the-round-", round)
		ids, made := map[int64]bool{}, 0
		for i, a := range atOnce(t, 20, func(i int) (answer, error) {
			return instances[i%2].try("POST", c.path(""), `{"title": "once"}`, "Idempotency-Key", key)
		}) {
			if a.status != 201 {
				t.Fatalf("request %d = %v, want 201", i, a)
			}
			ids[decode[wireTask](t, a.body).ID] = true
			if a.header.Get("Idempotency-Replayed") == "" {
				made++
			}
		}
		if len(ids) != 1 || made != 1 {
			t.Errorf("20 creates with one key made %d tasks, %d are not replayed, want 1 and 1",
				len(ids), made)
		}
	}
	if got := c.list(""); len(got) != 5 {
		t.Errorf("%d tasks in the end, want one for each key: 5", len(got))
	}
}

// The stored fingerprint of a body is a fixed function of the fields that differ from their
// defaults, so that no release invalidates keys in use.
func TestFingerprint(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	const odd = "<a href='x'>&amp;\u2028\u2029\u007f\ufffd\\\"🌍\n"
	literal, err := json.Marshal(odd)
	if err != nil {
		t.Fatal(err)
	}
	for i, row := range []struct {
		body   string
		fields []string
	}{
		{`{"title": "x"}`, []string{"title", "x"}},
		{`{"completed": false, "description": null, "title": " x", "new": 1}`, []string{"title", " x"}},
		{`{"description": "", "title": "x"}`, []string{"title", "x", "description", ""}},
		{`{"completed": true, "title": "x"}`, []string{"title", "x", "completed", "true"}},
		{fmt.Sprintf(`{"completed": true, "description": %[1]s, "title": %[1]s}`, literal),
			[]string{"title", odd, "description", odd, "completed", "true"}},
	} {
		key := fmt.Sprint("key-of-the-row-of-", i)
		if a := c.do("POST", "", row.body, "Idempotency-Key", key); a.status != 201 {
			t.Fatalf("create %s = %v, want 201", row.body, a)
		}
		want := sha256.Sum256([]byte(strings.Join(row.fields, "\x00")))
		got := sqlValue[[]byte](t, sharedDB.pool, `
			SELECT request_hash
			FROM public.tasks
			WHERE user_id = $1 AND idempotency_key = $2`, c.user, key)
		if !slices.Equal(got, want[:]) {
			t.Errorf("the fingerprint of %s = %x, want %x", row.body, got, want)
		}
	}
}
