package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
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
	if milk.String() != want.String() || milk.ID <= 0 {
		t.Errorf("created %v, want %v", milk, want)
	}
	if got, want := a.header.Get("Location"), c.path(milk.path()); got != want {
		t.Errorf("Location = %q, want %q", got, want)
	}
	etag := a.header.Get("ETag")
	if got := c.do("GET", milk.path(), ""); got.body != a.body || got.header.Get("ETag") != etag {
		t.Errorf("get = %v %s, want %v %s", got, got.header.Get("ETag"), a, etag)
	}

	// Each change is visible, keeps the other fields and makes a new version.
	last := milk
	for _, step := range []struct {
		method, path, body string
		change             func(*wireTask)
	}{
		{"PUT", "", `{"title": "Milk"}`, func(w *wireTask) { w.Title = "Milk" }},
		{"PATCH", "", `{"description": null}`, func(w *wireTask) { w.Description = nil }},
		{"PUT", "", `{"id": 1, "user_id": "u", "created_at": "now", "updated_at": 7, "Title": "no"}`,
			func(*wireTask) {}},
		{"PATCH", "/complete", ``, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{}`, func(w *wireTask) { w.Completed = false }},
		{"PATCH", "/complete", `{"completed": true}`, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{"completed": true, "title": 7}`, func(*wireTask) {}},
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
		if got.String() != want.String() || a.header.Get("ETag") == etag {
			t.Errorf("%s %s %s = %v, ETag %s, want %v and a new ETag",
				step.method, step.path, step.body, got, a.header.Get("ETag"), want)
		}
		last, etag = got, a.header.Get("ETag")
	}

	eggs := c.create("Eggs")
	if got := c.list(""); fmt.Sprint(got) != fmt.Sprint([]wireTask{eggs, last}) {
		t.Errorf("list = %v, want the newest first: %v, %v", got, eggs, last)
	}
	if a := c.do("DELETE", eggs.path(), ""); a.status != 204 || a.body != "" {
		t.Errorf("delete = %v, want 204 without a body", a)
	}
	if a := c.do("GET", eggs.path(), ""); a.status != 404 {
		t.Errorf("get of a deleted task = %v, want 404", a)
	}
	if next := c.create("Bread"); next.ID <= eggs.ID {
		t.Errorf("the id after %d, which was deleted, is %d, want a larger one", eggs.ID, next.ID)
	}
}

// The fields that clients may set. All values are JSON.
var settableFields = []struct {
	name     string
	accepted []string
	absent   string // the value after a create with {"title": "t"}
	rejected []string
	detail   string // of the 422, as a regular expression
}{
	{
		name: "title",
		accepted: append(texts, `"\u200b"`, `"\ufeff"`, `"\u00a0x\u3000"`,
			`"`+strings.Repeat("🌍", 200)+`"`),
		absent: `"t"`,
		rejected: []string{`""`, `" "`, blank, `"a\u0000b"`, `"` + strings.Repeat("x", 201) + `"`,
			`"` + strings.Repeat("🌍", 201) + `"`, `1`, `true`, `null`, `[]`, `{}`, `["x"]`},
		detail: `^title must (not be blank|not contain U\+0000|not exceed 200 characters|be a string)$`,
	},
	{
		name:     "description",
		accepted: append(texts, `""`, `null`, `"`+strings.Repeat("🌍", 1000)+`"`),
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

// texts are stored exactly as sent.
var texts = []string{`"x"`, `"  around \t\r\n"`, `"👩‍👩‍👧 \ud83c\udff3\ufe0f\u200d\ud83c\udf08"`,
	`"e\u0301 \u00e9 \u212b ﬁ ＡＢ İıſ"`, `"שלום \u202eabc\u202c \u0627"`, `"a\u2028b\u2029 \ufffd"`,
	`"\"quoted\" 'and' \\back\\ \/slash/ \\u0041 \\ud800"`, `"<script>alert(1)</script> &amp;"`,
	`"\u0001\u001f\u007f\u0080\u009f \ufffe\uffff \udbff\udfff"`,
	`"'; DROP TABLE tasks; -- @user $1 %s {} NULL null %00 +"`}

// blank is a title of all white space characters of Unicode.
const blank = `"\t\n\u000b\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007` +
	`\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"`

// A create, a PUT and a PATCH store each field as sent, and keep it if it is absent. An invalid
// value is a 422 that names the field and its rule, and changes nothing.
func TestFields(t *testing.T) {
	t.Parallel()
	var names []string
	for _, f := range settableFields {
		names = append(names, f.name)
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
			send("POST", "", `{"title": "t"}`, f.absent)
			for i, value := range f.accepted[:2] { // the fingerprint contains the field
				a := c.do("POST", "", with(value), "Idempotency-Key", "16-characters--1")
				if (a.status == 422) != (i == 1) {
					t.Errorf("create with %.80s and the key of another value = %v, want 422", value, a)
				}
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
	schemas := openAPIDocument()["components"].(object)["schemas"].(object)
	declared := schemas["TaskUpdate"].(object)["properties"].(object)
	slices.Sort(names)
	if !slices.Equal(names, slices.Sorted(maps.Keys(declared))) {
		t.Errorf("the tested fields are %q, those of TaskUpdate %v", names, declared)
	}
	a := newClient(t).do("POST", "", `{"description": "x", "Title": "x"}`)
	if a.status != 422 || a.detail() != "title is required" {
		t.Errorf("create without a title = %v, want 422", a)
	}
}

var sixDigits = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`)

// Times have six fractional digits and are in UTC, whatever the time zone of the process. Every
// successful change increases updated_at, also after the clock was set back, and the ETag is
// updated_at in quotes, so that each task of a list has its version.
func TestTimes(t *testing.T) {
	t.Parallel()
	c := startProcess(t, "TZ=Asia/Kolkata").newClient()
	task := c.create("Chai")
	if time.Since(task.CreatedAt).Abs() > time.Hour || !task.UpdatedAt.Equal(task.CreatedAt) {
		t.Errorf("created %v, want now", task)
	}
	// The clock is set back by an hour after the last change, which was at a full second.
	future := task.CreatedAt.UTC().Truncate(time.Second).Add(time.Hour)
	const update = `UPDATE public.tasks SET updated_at = $1 WHERE user_id = $2`
	sqlExec(t, sharedDB.pool, update, future, c.user)
	last := future.Format("2006-01-02T15:04:05.000000Z")
	for _, change := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"PUT", "", `{}`}, {"PATCH", "", `{"title": "Tea"}`},
		{"PATCH", "/complete", `{"completed": true}`}, {"PATCH", "/complete", `{"completed": true}`},
	} {
		a := c.do(change.method, task.path()+change.path, change.body)
		got := decode[map[string]any](t, a.body)
		created, updated := fmt.Sprint(got["created_at"]), fmt.Sprint(got["updated_at"])
		if !sixDigits.MatchString(created) || !sixDigits.MatchString(updated) {
			t.Errorf("%s%s = %v, want times with six digits and Z", change.method, change.path, a)
		}
		if (updated > last) != (change.method != "GET") {
			t.Errorf("%s%s after %s = %v, want a later time", change.method, change.path, last, a)
		}
		listed := decode[[]map[string]any](t, c.do("GET", "", "").body)
		if a.header.Get("ETag") != `"`+updated+`"` || !reflect.DeepEqual(listed[0], got) {
			t.Errorf("ETag = %s, list = %v, want updated_at: %v", a.header.Get("ETag"), listed, a)
		}
		last = updated
	}
}

// An id that is no positive 64-bit integer in digits is a 404, like one that does not exist.
func TestTaskIDs(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("the only one")
	if a := c.do("GET", fmt.Sprintf("/%040d", task.ID), ""); a.status != 200 {
		t.Errorf("GET of the id with leading zeros = %v, want 200", a)
	}
	arabic := func(r rune) rune { return r - '0' + '٠' }
	bad := []string{"0", "00", "9223372036854775807", "9223372036854775808", "18446744073709551617",
		"99999999999999999999", "abc", "null", "%20", strings.Map(arabic, fmt.Sprint(task.ID)),
		fmt.Sprint(1<<32 + task.ID)}
	for _, spelling := range []string{"-%d", "+%d", "%%2B%d", "%d%%2E0", "%de0", "%d%%00", "%%00%d",
		"%d%%20", "%%20%d", "0x%d", "%d,", "%d_0", "%d%%2F", "%d%%0A", "%%D9%%A1%d"} {
		bad = append(bad, fmt.Sprintf(spelling, task.ID))
	}
	for _, id := range bad {
		for _, r := range []struct{ method, path, body string }{
			{"GET", "", ""}, {"PUT", "", `{"title": "x"}`}, {"PATCH", "", `{"title": "x"}`},
			{"PATCH", "/complete", ""}, {"DELETE", "", ""},
		} {
			a := c.do(r.method, "/"+id+r.path, r.body)
			if a.status != 404 || !strings.Contains(a.detail(), "this id does not exist") {
				t.Errorf("%s /%s%s = %v, want 404", r.method, id, r.path, a)
			}
		}
	}
	if got := c.list(""); fmt.Sprint(got) != fmt.Sprint([]wireTask{task}) {
		t.Errorf("the tasks afterwards = %v, want %v", got, task)
	}
}

// A user id is opaque. It is compared byte for byte, after the path was decoded.
func TestUserIDs(t *testing.T) {
	t.Parallel()
	testDB(t)
	suffix := newUser()
	for _, row := range []struct {
		user              string   // without the suffix
		allowed, rejected []string // spellings, next to that of url.PathEscape
	}{
		{"0123456789abcdefABCDEF0123456789", nil, []string{"0123456789ABCDEFABCDEF0123456789"}},
		{"1", []string{"%31"}, []string{"01", "+1", "%221%22"}},
		{"ä@example.com", []string{"%c3%a4%40example.com", "ä@example.com"},
			[]string{"a%CC%88@example.com", "%E4@example.com", "%C3%84@example.com"}},
		{"a\u0308@example.com", nil, []string{"%C3%A4@example.com"}},
		{"../x/", []string{"%2E%2E%2Fx%2f"}, []string{"x", "..%252Fx%252F"}},
		{"a b", nil, []string{"a+b", "a%2520b", "ab", "a%C2%A0b"}},
		{"%41", []string{"%25%34%31"}, []string{"%41", "A"}},
		{"a?b#c;d&e", []string{"a%3fb%23c;d&e"}, []string{"a", "a%253Fb%2523c;d&e"}},
		{"\u200b\u202e\ufeff", nil, []string{"%E2%80%8B", ""}},
		{strings.Repeat("x", 512-len(suffix)), nil, []string{strings.Repeat("x", 511-len(suffix))}},
	} {
		c := newClientOf(t, sharedURL, row.user+suffix)
		for _, spelling := range append(row.allowed, url.PathEscape(row.user)) {
			a := c.send("POST", "/api/"+spelling+suffix+"/tasks", `{"title": "x"}`)
			if a.status != 201 || decode[wireTask](t, a.body).UserID != c.user {
				t.Fatalf("create by %q as %s = %v, want 201", c.user, spelling, a)
			}
			if got := c.send("GET", a.header.Get("Location"), ""); got.body != a.body {
				t.Errorf("GET %s by %q = %v, want %v", a.header.Get("Location"), c.user, got, a)
			}
		}
		for _, spelling := range row.rejected {
			a := c.send("GET", "/api/"+spelling+suffix+"/tasks", "")
			if a.status != 403 || strings.Contains(a.body, suffix) {
				t.Errorf("list of %s by %q = %v, want 403 that does not name the user", spelling, c.user, a)
			}
		}
	}
	for user, spelling := range map[string]string{"..": "%2E%2E", ".": "%2E", " ": "%20"} {
		c := newClientOf(t, sharedURL, user)
		if a := c.send("GET", "/api/"+spelling+"/tasks", ""); a.status != 200 {
			t.Errorf("list of %s by %q = %v, want 200", spelling, user, a)
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
		{b, "?total=true", []wireTask{recent, old}, "2"},
		{b, "?total=true&completed=true", nil, "0"},
		{b, fmt.Sprintf("?total=true&before=%d", secret.ID), []wireTask{old}, "2"}, // only a number
		{b, fmt.Sprintf("?total=true&completed=false&before=%d", secret.ID+1), []wireTask{old}, "2"},
	} {
		got := row.of.do("GET", row.query, "")
		tasks := decode[[]wireTask](t, got.body)
		if total := got.header.Get("X-Total-Count"); total != row.total ||
			fmt.Sprint(tasks) != fmt.Sprint(row.want) {
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
	made := map[time.Time]int{} // the request that made a version
	var versions []wireTask
	for i, a := range atOnce(t, 31, func(i int) (answer, error) {
		if i%2 == 0 {
			return c.try("PATCH", path+"/complete", "")
		}
		return c.try("PUT", path, fmt.Sprintf(`{"description": "%d"}`, i))
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
		if i%2 == 0 {
			want.Completed = !last.Completed
		} else {
			want.Description = new(fmt.Sprint(i))
		}
		if !got.UpdatedAt.After(last.UpdatedAt) || got.String() != want.String() {
			t.Errorf("change %d of %v made %v", i, last, got)
		}
		last = got
	}
}

var nextLink = regexp.MustCompile(`^(<(/api/[!-;=?-~]*)>; rel="next")?$`) // ASCII without < and >

// The pages of a list contain each task once, in order. The link to the next page has before, no
// offset, and every other parameter of the request.
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
		{"?limit=100&offset=49&total=true", all[49:], []int{100, 1}, "150"},
		{"?limit=20&offset=7&completed=true&total=true", completed[7:], []int{20, 20, 3}, "50"},
		{fmt.Sprintf("?limit=100&before=%d", all[9]), all[10:], []int{100, 40}, ""},
		{fmt.Sprintf("?completed=true&limit=30&total=true&before=%d", completed[9]), completed[10:],
			[]int{30, 10}, "50"},
		{fmt.Sprintf("?before=%d&total=true", all[149]), none, []int{0}, "150"},
		{"?before=9223372036854775807&limit=0100", all, []int{100, 50}, ""},
		{"?x=1&limit=99&x=2&Limit=0&%3E%22%3C=%26%3D+%3B%0A&empty&%C3%BC=%FF&Before=7&offset=7" +
			"&page=%3E%3B+rel%3D%22next&total=false", all[7:], []int{99, 44}, ""},
		{"?offset=9223372036854775807&limit=100&total=true&completed=false", none, []int{0}, "100"},
	} {
		got, pages := []int64{}, []int{}
		for next := c.path(row.query); next != "" && len(got) <= len(row.want); {
			sent, _ := url.Parse(next)
			a := c.send("GET", next, "")
			if total := a.header.Get("X-Total-Count"); a.status != 200 || total != row.total {
				t.Fatalf("%s = %v, %q in all, want 200, %q", next, a, total, row.total)
			}
			tasks := decode[[]wireTask](t, a.body)
			for _, task := range tasks {
				got = append(got, task.ID)
			}
			match := nextLink.FindStringSubmatch(a.header.Get("Link"))
			if match == nil {
				t.Fatalf("Link of %s = %q, want one URL with rel=\"next\"", sent, a.header.Get("Link"))
			}
			pages, next = append(pages, len(tasks)), match[2]
			if next == "" {
				break
			}
			link, err := url.Parse(next)
			want := sent.Query()
			want.Del("offset")
			want.Set("before", fmt.Sprint(got[len(got)-1]))
			if err != nil || !reflect.DeepEqual(link.Query(), want) || link.EscapedPath() != c.path("") {
				t.Errorf("Link of %s = %q, want the path of the list with %v", sent, next, want)
			}
		}
		if !slices.Equal(got, row.want) || !slices.Equal(pages, row.pages) {
			t.Errorf("list %s = pages of %v, ids %v, want pages of %v, ids %v",
				row.query, pages, got, row.pages, row.want)
		}
	}
}

// An invalid or repeated parameter is a 422 that names it and its rule. Unknown ones are ignored.
func TestQueryParameters(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	rejected := map[string]string{ // the details, as regular expressions
		"before=7&offset=0": `before.*offset`,
		"limit=101":         `^limit .* 1 to 100$`,
		"limit=0":           `^limit .* 1 to 100$`,
		"before=0":          `^before .* from 1 to`,
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
// the tasks of the user "many", and those of the user "few" except the ten oldest.
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
				FROM generate_series(1, 20000) AS i`) // the ids are 1 to 20000 too
			sqlExec(t, d.pool, row.after)
			service := startService(t, d, settings{})
			for _, list := range []struct {
				user, query string
				most        int64 // entries of the index that the list may read
			}{
				{"many", "limit=50", 51},
				{"many", "limit=1&offset=30", 32},
				{"many", "limit=5", 6},
				{"many", "limit=5&before=10000", 6},
				{"many", "limit=5&before=1000", 6},
				{"few", "limit=20&before=10000", 21},
			} {
				for _, filter := range []string{"", "&completed=true", "&completed=false"} {
					index := "tasks_pkey"
					if filter != "" {
						index = "tasks_user_id_completed_id_idx"
					}
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

// readsOf runs a statement again, with a plan_cache_mode. What the planner reads is included.
func readsOf(
	t testing.TB, d *database, mode, index string, asked *pgx.TraceQueryStartData,
) reads {
	tx := begin(t, d)
	defer tx.Rollback(t.Context()) // frees the connection for the next one
	count := func() []int64 {      // since the session last reported its counts to the server
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
// compressing proxy. A read with If-None-Match that contains it is a 304. A value that is no
// entity-tag is a 422 that names the header.
func TestIfMatchAndIfNoneMatch(t *testing.T) {
	t.Parallel()
	for status, values := range map[int][]string{ // the status of a change
		// V stands for the version, without quotes; \n separates two header lines (RFC 9110, 5.3).
		200: {`"V"`, `*`, ` * `, `"1", "V" , "2"`, `W/"5",, "V"`, "\"1\"\n\"V\"",
			`W/"V"`, `"1", W/"V"`, // nginx, HAProxy and Varnish
			`"V-gzip"`, `"V--gzip"`, `W/"V;gzip"`, `"V-br", "x"`, `"V-zstd"`, // Apache and Caddy
			`"a,b", "V,gzip"`, strings.Repeat(`"x", `, 99) + `"V"`},
		412: {`"1"`, `""`, `"abc"`, `"*"`, `"Vgzip"`, `"V0"`, "\"\xff\"",
			`"2026-02-30T03:04:05.000000Z"`, `"2026-01-02T03:04:05.000000Z"`,
			`"0000-00-00T00:00:00.000000Z"`, `"9999-12-31T23:59:59.999999Z"`,
			`"0001-01-01T00:00:00.000000Z-gzip"`},
		422: {``, `undefined`, `null`, `"`, `'x'`, `*, *`, `W/`, `V`},
	} {
		for _, value := range values {
			t.Run(value, func(t *testing.T) {
				t.Parallel()
				checkCondition(t, value, status)
			})
		}
	}
}

// checkCondition checks each request with a condition, of a task and of none.
func checkCondition(t *testing.T, value string, status int) {
	c := newClient(t)
	for _, r := range []struct {
		header, method, path, body string
		statuses                   map[int]int // by that of a change
	}{
		{"If-None-Match", "GET", "", "", map[int]int{200: 304, 412: 200}},
		{"If-Match", "PUT", "", `{"title": "changed"}`, nil},
		{"If-Match", "PATCH", "", `{"title": "changed"}`, nil},
		{"If-Match", "PATCH", "/complete", "", nil},
		{"If-Match", "DELETE", "", "", map[int]int{200: 204}},
	} {
		created := c.do("POST", "", `{"title": "original"}`)
		path, etag := decode[wireTask](t, created.body).path(), created.header.Get("ETag")
		var headers []string
		spelled := strings.ReplaceAll(value, "V", strings.Trim(etag, `"`))
		for line := range strings.SplitSeq(spelled, "\n") {
			headers = append(headers, r.header, line)
		}
		want, ofNone := cmp.Or(r.statuses[status], status), 404 // before the 412
		if status == 422 {
			ofNone = 422
		}
		a := c.do(r.method, path+r.path, r.body, headers...)
		if a.status != want || a.status == 422 && !strings.HasPrefix(a.detail(), r.header+" must") {
			t.Errorf("%s %s with %s = %v, want %d", r.method, r.path, r.header, a, want)
		}
		if r.method == "GET" && want < 400 && a.header.Get("ETag") != etag {
			t.Errorf("GET with %s has the ETag %s, want %s", r.header, a.header.Get("ETag"), etag)
		}
		changes := status == 200 && r.method != "GET"
		if after := c.do("GET", path, ""); (after.body != created.body) != changes {
			t.Errorf("%s %s with %s changes %v to %v", r.method, r.path, r.header, created, after)
		}
		if a := c.do(r.method, noTask+r.path, r.body, headers...); a.status != ofNone {
			t.Errorf("%s %s of no task with %s = %v, want %d", r.method, r.path, r.header, a, ofNone)
		}
	}
}

// Of concurrent changes with the same ETag, exactly one is made.
func TestOneOfTwentyWins(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("original").path()
	etag := c.do("GET", path, "").header.Get("ETag")
	won := 0
	for i, a := range atOnce(t, 20, func(i int) (answer, error) {
		return c.try("PATCH", c.path(path), fmt.Sprintf(`{"title": "client %d"}`, i), "If-Match", etag)
	}) {
		if a.status == 200 {
			won++
		} else if a.status != 412 {
			t.Errorf("client %d = %v, want 200 or 412", i, a)
		}
	}
	if won != 1 {
		t.Errorf("%d changes were made, want one", won)
	}
}

// A create with a key is made once. The same body again gets the task as it is now, and another
// body a 422. A key belongs to a user, and ends with its task.
func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	c, stranger := newClient(t), newClient(t)
	const name, key = "Idempotency-Key", "16-characters--1"
	const body = `{"title": "once", "description": "only"}`
	first := c.do("POST", "", body, name, key)
	path := decode[wireTask](t, first.body).path()
	changed := c.do("PATCH", path, `{"title": "changed since"}`)

	// The same body after decoding: the order of members, defaults, unknown members, escapes.
	for _, same := range []string{body,
		`{"completed": false, "description": "only", "title": "onc\u0065", "id": 7}`} {
		a := c.do("POST", "", same, name, key)
		if a.status != 201 || a.body != changed.body || a.header.Get("Idempotency-Replayed") != "true" {
			t.Errorf("repeated with %s = %v %v, want 201, replayed, with the task as it is now: %v",
				same, a, a.header, changed)
		}
		if a.header.Get("ETag") != changed.header.Get("ETag") ||
			a.header.Get("Location") != first.header.Get("Location") {
			t.Errorf("repeated with %s = %v, want the ETag of now and the Location of the first, %v",
				same, a.header, first.header)
		}
	}
	for _, rejected := range []struct{ body, key string }{
		{`{"title": "changed since", "description": "only"}`, key}, {`{"title": "once"}`, key},
		{`{"title": "once", "description": ""}`, key},
		{`{"title": "once", "description": "only", "completed": true}`, key},
		{body, ""}, {body, "undefined"}, {body, strings.Repeat("k", 15)},
		{body, strings.Repeat("k", 256)}, {body, "a key with blanks"}, {body, "a-key-with-a\ttab"},
		{body, "a-key-with-an-ä"}, {body, "a-key-with-a-\x80"},
	} {
		a := c.do("POST", "", rejected.body, name, rejected.key)
		if a.status != 422 || !strings.Contains(a.detail(), name) {
			t.Errorf("create %+v = %v, want 422 that names the header", rejected, a)
		}
	}
	if a := c.do("POST", "", body, name, key, name, key); a.status != 422 {
		t.Errorf("a header line twice = %v, want 422", a)
	}
	if got := c.do("GET", "", ""); got.body != "["+strings.TrimSpace(changed.body)+"]\n" {
		t.Errorf("the tasks afterwards = %v, want %v alone", got, changed)
	}

	c.do("DELETE", path, "")
	for what, a := range map[string]answer{
		"the first create":          first,
		"the key of a deleted task": c.do("POST", "", body, name, key),
		"the key of another user":   stranger.do("POST", "", body, name, key),
		"another key, of 255 bytes": c.do("POST", "", body, name, strings.Repeat("!~", 127)+"!"),
		"another key, of 16 bytes":  c.do("POST", "", body, name, "16-characters--2"),
	} {
		if a.status != 201 || a.header.Get("Idempotency-Replayed") != "" {
			t.Errorf("%s = %v %v, want a new task", what, a, a.header)
		}
	}
	if got := len(c.list("")) + len(stranger.list("")); got != 4 {
		t.Errorf("%d tasks in the end, want 4", got)
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
}

// The stored fingerprint of a body is a fixed function of the fields that differ from their
// defaults, so that no release invalidates keys in use.
func TestFingerprint(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for fields, body := range map[string]string{
		"title\x00 x": `{"completed": false, "description": null, "title": " x", "new": 1}`,
		"title\x00<&>\u2028\n\x00description\x00": `{"description": "", "title": "<&>\u2028\n"}`,
		"title\x00x\x00completed\x00true":         `{"completed": true, "title": "x"}`,
	} {
		key := rand.Text()
		c.do("POST", "", body, "Idempotency-Key", key)
		got := sqlValue[[]byte](t, sharedDB.pool, `
			SELECT request_hash
			FROM public.tasks
			WHERE user_id = $1 AND idempotency_key = $2`, c.user, key)
		if want := sha256.Sum256([]byte(fields)); !slices.Equal(got, want[:]) {
			t.Errorf("the fingerprint of %s = %x, want %x, of %q", body, got, want, fields)
		}
	}
}
