package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
)

// Tasks: their fields, ids and versions, their isolation, concurrent changes.

func TestStory(t *testing.T) {
	t.Parallel()
	c := newClient(t)

	a := c.do("GET", "", "")
	if a.status != 200 || strings.TrimSpace(a.body) != "[]" {
		t.Fatalf("list of a new user = %v, want 200 []", a)
	}

	a = c.do("POST", "", `{"title": "  Grüße <&> 🌍 ", "description": "two\nlines"}`)
	if a.status != 201 {
		t.Fatalf("create = %v, want 201", a)
	}
	milk := decode[wireTask](t, a.body)
	if got, want := a.header.Get("Location"), c.path(milk.path()); got != want {
		t.Errorf("Location = %q, want %q", got, want)
	}
	want := wireTask{ID: milk.ID, UserID: c.user, Title: "  Grüße <&> 🌍 ",
		Description: new("two\nlines"),
		CreatedAt:   milk.CreatedAt, UpdatedAt: milk.CreatedAt}
	if !equalTasks(milk, want) || time.Since(milk.CreatedAt).Abs() > time.Minute {
		t.Errorf("created %v, want %v, now", milk, want)
	}
	etag := a.header.Get("ETag")

	a = c.do("GET", milk.path(), "")
	if got := decode[wireTask](t, a.body); !equalTasks(got, milk) || a.header.Get("ETag") != etag {
		t.Errorf("get = %v %s, want %v %s", a, a.header.Get("ETag"), milk, etag)
	}

	// Each change is visible, leaves the other fields alone and makes a new version.
	last := milk
	for _, step := range []struct {
		method, path, body string
		want               func(*wireTask)
	}{
		{"PUT", "", `{"title": "Milk"}`, func(w *wireTask) { w.Title = "Milk" }},
		{"PATCH", "", `{"description": null}`, func(w *wireTask) { w.Description = nil }},
		{"PATCH", "", `{}`, func(*wireTask) {}},
		{"PUT", "", `{"id": 1, "user_id": "u", "created_at": "now", "updated_at": 7, "Title": "no", "other": [1]}`,
			func(*wireTask) {}},
		{"PATCH", "/complete", ``, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{}`, func(w *wireTask) { w.Completed = false }},
		{"PATCH", "/complete", `{"completed": true, "title": 7}`,
			func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{"completed": true}`, func(w *wireTask) { w.Completed = true }},
		{"PUT", "", `{"completed": false, "description": ""}`, func(w *wireTask) {
			w.Completed, w.Description = false, new("")
		}},
	} {
		a := c.do(step.method, milk.path()+step.path, step.body)
		if a.status != 200 {
			t.Fatalf("%s %s %s = %v, want 200", step.method, step.path, step.body, a)
		}
		got, want := decode[wireTask](t, a.body), last
		step.want(&want)
		want.UpdatedAt = got.UpdatedAt
		if !equalTasks(got, want) {
			t.Errorf("%s %s %s = %v, want %v", step.method, step.path, step.body, got, want)
		}
		if !got.UpdatedAt.After(last.UpdatedAt) || a.header.Get("ETag") == etag {
			t.Errorf("%s %s %s: updated_at %v, ETag %s, want a version after %v, %s", step.method, step.path,
				step.body, got.UpdatedAt, a.header.Get("ETag"), last.UpdatedAt, etag)
		}
		last, etag = got, a.header.Get("ETag")
	}

	eggs := c.create("Eggs")
	if got := c.list(""); !slices.EqualFunc(got, []wireTask{eggs, last}, equalTasks) {
		t.Errorf("list = %v, want the newest first: %v, %v", got, eggs, last)
	}
	if a := c.do("DELETE", milk.path(), ""); a.status != 204 || a.body != "" {
		t.Errorf("delete = %v, want 204 without a body", a)
	}
	for _, method := range []string{"GET", "DELETE"} {
		if a := c.do(method, milk.path(), ""); a.status != 404 {
			t.Errorf("%s of a deleted task = %v, want 404", method, a)
		}
	}
}

// The fields that clients may set. All values are JSON.
var settableFields = []struct {
	name     string
	accepted []string // the first one is not the value of absent
	absent   string   // the value of a create without the field; "" if it is required
	nullable bool     // null clears the field
	rejected []string
	detail   string // of the 422, as a regular expression
}{
	{
		name: "title",
		accepted: []string{`"x"`, `"\u200b"`, `"\ufeff"`, "\"\u00a0x\u3000\"",
			`"` + strings.Repeat("🌍", 200) + `"`},
		rejected: slices.Concat(blankTitles(), []string{`""`, `"a\u0000b"`,
			`"` + strings.Repeat("x", 201) + `"`, `"` + strings.Repeat("🌍", 201) + `"`,
			`1`, `true`, `[]`, `{}`, `["x"]`}),
		detail: `^title must (not be blank|not contain U\+0000|not exceed 200 characters|be a string)$`,
	},
	{
		name:     "description",
		accepted: []string{`"x"`, `""`, `"` + strings.Repeat("🌍", 1000) + `"`},
		absent:   `null`,
		nullable: true,
		rejected: []string{`"\u0000"`, `"` + strings.Repeat("🌍", 1001) + `"`, `1`, `true`, `[]`, `{}`,
			`["x"]`},
		detail: `^description must (not contain U\+0000|not exceed 1000 characters|be a string)$`,
	},
	{
		name:     "completed",
		accepted: []string{`true`, `false`},
		absent:   `false`,
		rejected: []string{`"true"`, `""`, `0`, `1`, `[]`, `{}`},
		detail:   `^completed must be true or false$`,
	},
}

// blankTitles returns titles of a space and each other white space character of Unicode.
func blankTitles() (titles []string) {
	for _, space := range "\t\n\v\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005" +
		"\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000" {
		titles = append(titles, fmt.Sprintf(`" \u%04x"`, space))
	}
	return titles
}

// Each field is set by a create, a PUT and a PATCH and read back, is kept if it is absent, is
// cleared or rejects null, rejects invalid values, and is part of the body that an Idempotency-Key
// identifies.
func TestFields(t *testing.T) {
	t.Parallel()
	for _, f := range settableFields {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			c := newClient(t)
			set := func(literal string) string {
				return fmt.Sprintf(`{"title": "t", %q: %s}`, f.name,
					literal)
			}
			want := func(what, body, literal string) {
				t.Helper()
				got := decode[map[string]any](t, body)[f.name]
				if want := decode[any](t, literal); !reflect.DeepEqual(got, want) {
					t.Errorf("%s = %.300v, want %.300v", what, got, want)
				}
			}
			succeed := func(method, path, body string) answer {
				t.Helper()
				a := c.do(method, path, body)
				if a.status/100 != 2 {
					t.Fatalf("%s %.80s = %v, want success", method, body, a)
				}
				return a
			}
			for i, literal := range f.accepted {
				created := succeed("POST", "", set(literal))
				path := decode[wireTask](t, created.body).path()
				want("create", created.body, literal)
				want("get", succeed("GET", path, "").body, literal)
				list := decode[[]json.RawMessage](t, succeed("GET", "?limit=1", "").body)
				want("list", string(list[0]), literal)
				other := f.accepted[(i+1)%len(f.accepted)]
				for _, method := range []string{"PUT", "PATCH"} {
					want(method, succeed(method, path, fmt.Sprintf(`{%q: %s}`, f.name, other)).body, other)
					want(method+" {}", succeed(method, path, `{}`).body, other)
					for _, g := range settableFields {
						if g.name != f.name {
							body := fmt.Sprintf(`{%q: %s}`, g.name, g.accepted[0])
							want(method+" of "+g.name, succeed(method, path, body).body, other)
						}
					}
					want("get after "+method, succeed("GET", path, "").body, other)
					if f.nullable {
						want(method+" null", succeed(method, path, fmt.Sprintf(`{%q: null}`, f.name)).body, `null`)
						want("get after null", succeed("GET", path, "").body, `null`)
					}
					want(method+" again", succeed(method, path, fmt.Sprintf(`{%q: %s}`, f.name, literal)).body,
						literal)
				}
			}
			if f.absent != "" {
				want("create without", succeed("POST", "", `{"title": "t"}`).body, f.absent)
			} else if a := c.do("POST", "", `{"description": "x", "Title": "x"}`); a.status != 422 ||
				a.detail() != f.name+" is required" {
				t.Errorf("create without = %v, want 422", a)
			}
			if f.nullable {
				want("create with null", succeed("POST", "", set(`null`)).body, `null`)
			}

			const key = "key-of-TestFields"
			for _, row := range []struct {
				literal string
				status  int
			}{{f.accepted[0], 201}, {f.accepted[0], 201}, {f.accepted[1], 422}} {
				a := c.do("POST", "", set(row.literal), "Idempotency-Key", key)
				if a.status != row.status {
					t.Errorf("create with a key, then with %.80s = %v, want %d", row.literal, a, row.status)
				}
			}

			before := c.do("GET", "?limit=100", "")
			task := decode[[]wireTask](t, before.body)[0]
			requests := []struct{ method, path string }{{"POST", ""}, {"PUT", task.path()},
				{"PATCH", task.path()}}
			if f.name == "completed" {
				requests = append(requests, struct{ method, path string }{"PATCH", task.path() + "/complete"})
			}
			rejected := slices.Clone(f.rejected)
			if !f.nullable {
				rejected = append(rejected, `null`)
			}
			for _, request := range requests {
				for _, literal := range rejected {
					a := c.do(request.method, request.path, set(literal))
					if a.status != 422 || !regexp.MustCompile(f.detail).MatchString(a.detail()) {
						t.Errorf("%s %s with %.80s = %v, want 422 %s",
							request.method, request.path, literal, a, f.detail)
					}
				}
			}
			if after := c.do("GET", "?limit=100", ""); after.body != before.body {
				t.Errorf("the tasks after rejected changes = %s, want %s", after.body, before.body)
			}
		})
	}

	var names []string
	for _, f := range settableFields {
		names = append(names, f.name)
	}
	slices.Sort(names)
	schemas := openAPIDocument()["components"].(object)["schemas"].(object)
	for _, schema := range []string{"Task", "TaskCreate", "TaskUpdate"} {
		properties := maps.Clone(schemas[schema].(object)["properties"].(object))
		for _, name := range []string{"id", "user_id", "created_at", "updated_at"} {
			delete(properties, name)
		}
		if declared := slices.Sorted(maps.Keys(properties)); !slices.Equal(declared, names) {
			t.Errorf("openapi.json, %s: %v can be set, tested are %v", schema, declared, names)
		}
	}
}

func TestTextComesBackAsSent(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for _, text := range []string{
		"  around \t\r\n", "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳", "e\u0301 \u00e9 \u212b \u00c5 ﬁ ＡＢ İıſK",
		"שלום \u202eabc\u202c \u0627\u0644\u0639", "\ufffd", "a\u2028b\u2029c",
		`"quoted" 'and' \back\ /slash/ \n \u0041 \ud800`, "<script>alert(1)</script> &amp; &",
		"\u200b\u200d\ufeff", "\u0001\u0008\u001f\u007f\u0080\u009f", "\ufffe\uffff \U0010ffff \ue000",
		"'; DROP TABLE tasks; -- @user $1 %s {} NULL null", "\\", "%00 %41 +",
		strings.Repeat("z\u0300\u0301\u0302", 50),
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
			a := c.do("POST", "", body)
			if a.status != 201 {
				t.Errorf("create %s = %v, want 201", body, a)
				continue
			}
			created := decode[wireTask](t, a.body)
			want := created
			want.Title, want.Description = text, &text
			got := decode[wireTask](t, c.do("GET", created.path(), "").body)
			if !equalTasks(created, want) || !equalTasks(got, want) {
				t.Errorf("create %s = %v, then get = %v, want %v", literal, created, got, want)
			}
		}
	}
}

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
	bad := []string{"0", "00", "9223372036854775807", "9223372036854775808", "18446744073709551617",
		"99999999999999999999", "abc", "null", "%20", "%2E"}
	for _, spelling := range []string{"-%d", "+%d", "%%2B%d", "%d%%2E0", "%de0", "%d%%00", "%%00%d",
		"%d%%20",
		"%%20%d", "0x%d", "%d,", "%d_0", "%d%%2F", "%d%%0A", "%%D9%%A1%d"} {
		bad = append(bad, fmt.Sprintf(spelling, task.ID))
	}
	arabic := func(r rune) rune { return r - '0' + '٠' }
	bad = append(bad, strings.Map(arabic, fmt.Sprint(task.ID)))
	for _, request := range []struct{ method, path, body string }{
		{"GET", "/%s", ""}, {"PUT", "/%s", `{"title": "x"}`}, {"PATCH", "/%s", `{"title": "x"}`},
		{"PATCH", "/%s/complete", ""}, {"DELETE", "/%s", ""},
	} {
		for _, id := range bad {
			if id == "%2E" && request.path != "/%s" {
				continue // net/http redirects to the cleaned path
			}
			a := c.do(request.method, fmt.Sprintf(request.path, id), request.body)
			if a.status != 404 || a.detail() != errNotFound.detail {
				t.Errorf("%s "+request.path+" = %v, want 404 %s", request.method, id, a, errNotFound.detail)
			}
		}
	}
	if got := c.list(""); !slices.EqualFunc(got, []wireTask{task}, equalTasks) {
		t.Errorf("the tasks afterwards = %v, want %v", got, task)
	}
}

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
		got := b.do(r.method, secret.path()+r.path, r.body)
		none := b.do(r.method, "/9223372036854775807"+r.path, r.body)
		if got.status != 404 || got.body != none.body || got.header.Get("ETag") != "" {
			t.Errorf("%s%s of another user's task = %v, want it like no task: %v",
				r.method, r.path, got, none)
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
		if tasks := decode[[]wireTask](t, got.body); !slices.EqualFunc(tasks, row.want, equalTasks) {
			t.Errorf("list %s = %v, want %v", row.query, tasks, row.want)
		}
		if total := got.header.Get("X-Total-Count"); total != row.total {
			t.Errorf("list %s has %s tasks in all, want %s", row.query, total, row.total)
		}
	}
}

func TestConcurrentToggles(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	milk := c.create("Milk")
	path := c.path(milk.path() + "/complete")
	for _, n := range []int{20, 41} { // an even number and an odd one
		var states []wireTask
		for _, a := range atOnce(t, n, func(int) (answer, error) { return c.try("PATCH", path, "") }) {
			if a.status != 200 {
				t.Fatalf("toggle = %v, want 200", a)
			}
			states = append(states, decode[wireTask](t, a.body))
		}
		// In the order of their versions, each one toggles what the one before stored.
		slices.SortFunc(states, func(a, b wireTask) int { return a.UpdatedAt.Compare(b.UpdatedAt) })
		for _, s := range states {
			if !s.UpdatedAt.After(milk.UpdatedAt) || s.Completed == milk.Completed {
				t.Errorf("%v follows %v", s, milk)
			}
			milk = s
		}
	}
	if got := c.list(""); !got[0].Completed {
		t.Errorf("after 61 toggles = %v, want it completed", got)
	}
}

func TestConcurrentChangesOfDifferentFields(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("Milk")
	for round := range 10 {
		want := task
		want.Title, want.Description = fmt.Sprint("title ", round), new(fmt.Sprint("description ", round))
		want.Completed = round%2 == 0
		bodies := []string{
			fmt.Sprintf(`{"title": %q}`, want.Title), fmt.Sprintf(`{"description": %q}`, *want.Description),
			fmt.Sprintf(`{"completed": %t}`, want.Completed), `{}`,
		}
		method := []string{"PATCH", "PUT"}[round/2%2]
		etags := map[string]bool{}
		for i, a := range atOnce(t, len(bodies), func(i int) (answer, error) {
			return c.try(method, c.path(task.path()), bodies[i])
		}) {
			if a.status != 200 {
				t.Fatalf("%s = %v, want 200", bodies[i], a)
			}
			etags[a.header.Get("ETag")] = true
		}
		got := decode[wireTask](t, c.do("GET", task.path(), "").body)
		want.UpdatedAt = got.UpdatedAt
		if !equalTasks(got, want) || len(etags) != len(bodies) {
			t.Fatalf("after %q = %v with %d ETags, want %v with %d",
				bodies, got, len(etags), want, len(bodies))
		}
	}
}

func TestConcurrentDeletes(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.path(c.create("Milk").path())
	statuses := map[int]int{}
	for _, a := range atOnce(t, 20, func(int) (answer, error) { return c.try("DELETE", path, "") }) {
		statuses[a.status]++
	}
	if want := map[int]int{204: 1, 404: 19}; !maps.Equal(statuses, want) {
		t.Errorf("20 deletes of one task = %v, want %v", statuses, want)
	}
}

func TestConcurrentCreates(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	ids := map[int64]bool{}
	for i, a := range atOnce(t, 50, func(i int) (answer, error) {
		return c.try("POST", c.path(""), fmt.Sprintf(`{"title": "%d"}`, i))
	}) {
		if a.status != 201 {
			t.Fatalf("create = %v, want 201", a)
		}
		task := decode[wireTask](t, a.body)
		if task.Title != fmt.Sprint(i) {
			t.Errorf("create %d = %v", i, task)
		}
		ids[task.ID] = true
	}
	total := c.do("GET", "?total=true", "").header.Get("X-Total-Count")
	if len(ids) != 50 || total != "50" {
		t.Errorf("50 creates made %d ids and a list of %s, want 50 of each", len(ids), total)
	}
	// The largest id is not reused when its task is deleted.
	largest := slices.Max(slices.Collect(maps.Keys(ids)))
	c.do("DELETE", fmt.Sprintf("/%d", largest), "")
	if next := c.create("next").ID; next <= largest {
		t.Errorf("the id after %d = %d, want a larger one", largest, next)
	}
}

func TestUpdatedAtIncreasesEvenFromTheFuture(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	last := c.create("Milk")
	last.UpdatedAt = last.UpdatedAt.Add(time.Hour) // as if the clock had been set back since
	sqlExec(t, sharedDB.pool, `UPDATE public.tasks SET updated_at = $1 WHERE user_id = $2`,
		last.UpdatedAt, c.user)
	for range 3 {
		got := decode[wireTask](t, c.do("PATCH", last.path(), `{}`).body)
		if !got.UpdatedAt.After(last.UpdatedAt) || !got.CreatedAt.Equal(last.CreatedAt) {
			t.Errorf("%v follows %v", got, last)
		}
		last = got
	}
}

// The time zone of the process does not matter. TestSessionFormats changes that of the database.
func TestTimesAreUTC(t *testing.T) {
	t.Parallel()
	c := startProcess(t, "TZ=Asia/Kolkata").newClient()
	if created := c.create("Chai").CreatedAt; time.Since(created).Abs() > 10*time.Minute {
		t.Errorf("created at %v, want now", created)
	}
}
