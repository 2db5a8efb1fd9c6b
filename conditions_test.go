package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Safe changes: ETag, If-Match, If-None-Match and Idempotency-Key.

// noTask is the path of a task that does not exist.
const noTask = "/9223372036854775807"

// conditionalChanges are the requests that If-Match applies to.
var conditionalChanges = []struct{ method, path, body string }{
	{"PUT", "", `{"title": "changed"}`},
	{"PATCH", "", `{"title": "changed"}`},
	{"PATCH", "/complete", ``},
	{"DELETE", "", ``},
}

func TestIfMatch(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		ifMatch string // V stands for the version, without quotes
		matches bool
	}{
		{`"V"`, true},
		{`*`, true},
		{`"1", "V" , "2"`, true},
		{`W/"5",, "V"`, true},
		// As compressing proxies rewrite it: nginx, HAProxy and Varnish; Apache and Caddy.
		{`W/"V"`, true},
		{`"V-gzip"`, true},
		{`"V--gzip"`, true},
		{`W/"V;gzip"`, true},
		{`"V-br", "x"`, true},
		{`"V-zstd"`, true},
		{`"a,b", "V,gzip"`, true},
		// Well-formed, and not the version.
		{`"1"`, false},
		{`""`, false},
		{`"abc"`, false},
		{`"Vgzip"`, false},
		{`"V0"`, false},
		{`"2026-02-30T03:04:05.000000Z"`, false},
		{`"2026-01-02T03:04:05.000000Z"`, false},
		{`"0000-00-00T00:00:00.000000Z"`, false},
		{`"9999-12-31T23:59:59.999999Z"`, false},
		{`"0001-01-01T00:00:00.000000Z-gzip"`, false},
		{"\"\xff\"", false},
	} {
		t.Run(row.ifMatch, func(t *testing.T) {
			t.Parallel()
			c := newClient(t)
			for _, change := range conditionalChanges {
				path := c.create("original").path()
				before := c.do("GET", path, "")
				ifMatch := strings.ReplaceAll(row.ifMatch, "V", strings.Trim(before.header.Get("ETag"), `"`))
				a := c.do(change.method, path+change.path, change.body, "If-Match", ifMatch)
				if row.matches != (a.status/100 == 2) || !row.matches && a.status != 412 {
					t.Errorf("%s %s = %v, want success: %t", change.method, change.path, a, row.matches)
				}
				if after := c.do("GET", path, ""); (after.body != before.body) != row.matches {
					t.Errorf("%s %s changes %v to %v", change.method, change.path, before, after)
				}
				if a := c.do(change.method, noTask+change.path, change.body, "If-Match",
					ifMatch); a.status != 404 {
					t.Errorf("%s %s of no task = %v, want 404", change.method, change.path, a)
				}
			}
		})
	}
}

// A value that is no list of entity-tags, such as a variable of a buggy client, is no conflict.
func TestMalformedConditions(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("original").path()
	before := c.do("GET", path, "")
	for _, value := range []string{"", "undefined", "null", `"`, `'x'`, `"a" "b"`, `"a""b"`, "*, *",
		`*, "x"`,
		`"a b"`, "W/", "2026-01-02T03:04:05.000000Z",
		strings.Repeat(`"x", `, maxTags) + before.header.Get("ETag")} {
		type request struct{ header, method, path, body string }
		requests := []request{{"If-None-Match", "GET", "", ""}}
		for _, change := range conditionalChanges {
			requests = append(requests, request{"If-Match", change.method, change.path, change.body})
		}
		for _, r := range requests {
			for _, task := range []string{path, noTask} { // the 422 comes before the 404
				a := c.do(r.method, task+r.path, r.body, r.header, value)
				if a.status != 422 || !strings.Contains(a.detail(), r.header) {
					t.Errorf("%s %s, %s: %.40q = %v, want 422 that names the header",
						r.method, r.path, r.header, value, a)
				}
			}
		}
	}
	if after := c.do("GET", path, ""); after.body != before.body {
		t.Errorf("the task is %v afterwards, want %v", after, before)
	}
}

// Every task of a list carries its version: the ETag is updated_at in quotes.
func TestETagIsUpdatedAt(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("Milk").path()
	for range 20 { // some have trailing zeros
		etag := c.do("PATCH", path, `{}`).header.Get("ETag")
		var listed []struct {
			UpdatedAt string `json:"updated_at"`
		}
		if err := json.Unmarshal([]byte(c.do("GET", "", "").body), &listed); err != nil {
			t.Fatal(err)
		}
		if want := `"` + listed[0].UpdatedAt + `"`; etag != want {
			t.Fatalf("ETag = %s, want %s", etag, want)
		}
	}
}

// Two header lines are one list (RFC 9110, section 5.3).
func TestIfMatchLines(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("task").path()
	etag := c.do("GET", path, "").header.Get("ETag")
	if a := c.do("PATCH", path, `{}`, "If-Match", `"1"`, "If-Match", etag); a.status != 200 {
		t.Errorf("the ETag in a second If-Match line = %v, want 200", a)
	}
}

func TestOneOfTwentyWins(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("original").path()
	etag := c.do("GET", path, "").header.Get("ETag")
	winners := []string{}
	for i, a := range atOnce(t, 20, func(i int) (answer, error) {
		return c.try("PATCH", c.path(path), fmt.Sprintf(`{"title": "client %d"}`, i), "If-Match", etag)
	}) {
		switch a.status {
		case 200:
			winners = append(winners, fmt.Sprintf("client %d", i))
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

// A change that waits for a concurrent delete finds no task, with If-Match and without.
func TestDeleteWinsAgainstIfMatch(t *testing.T) {
	t.Parallel()
	c := startService(t, startDB(t, openDB(t, sharedDatabaseURL())), settings{}).newClient()
	for _, change := range conditionalChanges {
		for _, conditional := range []bool{true, false} {
			path := c.create("doomed").path()
			var headers []string
			if conditional {
				headers = []string{"If-Match", c.do("GET", path, "").header.Get("ETag")}
			}
			tx := begin(t, sharedDB)
			sqlExec(t, tx, `DELETE FROM public.tasks WHERE user_id = $1`, c.user)
			var a answer
			var err error
			var waiting sync.WaitGroup
			waiting.Go(func() {
				a, err = c.try(change.method, c.path(path+change.path), change.body, headers...)
			})
			waitBlocked(t, tx, 1)
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if waiting.Wait(); err != nil || a.status != 404 {
				t.Errorf("%s %s, conditional: %t, of a task that is deleted = %v %v, want 404",
					change.method, change.path, conditional, a, err)
			}
		}
	}
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := c.create("task").path()
	etag := c.do("GET", path, "").header.Get("ETag")
	version := strings.Trim(etag, `"`)
	for _, row := range []struct {
		ifNoneMatch string
		want        int
	}{
		{etag, 304},
		{"W/" + etag, 304},
		{`"1", ` + etag, 304},
		{`*`, 304},
		{`"` + version + `-gzip"`, 304},
		{`"` + version + `gzip"`, 200},
		{`"1"`, 200},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			a := c.do(method, path, "", "If-None-Match", row.ifNoneMatch)
			if a.status != row.want || a.header.Get("ETag") != etag {
				t.Errorf("%s, If-None-Match: %s = %v, ETag %s, want %d and %s", method, row.ifNoneMatch, a,
					a.header.Get("ETag"), row.want, etag)
			}
		}
	}
	if a := c.do("GET", noTask, "", "If-None-Match", "*"); a.status != 404 {
		t.Errorf("no task, If-None-Match: * = %v, want 404", a)
	}
}

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
	for _, same := range []string{body, `{"completed": false, "description": "only", "title": "onc\u0065", "id": 7}`} {
		a, _, replayed := create(c, same, key1)
		if !replayed || a.body != changed.body {
			t.Errorf("repeated with %s = %v, replayed: %t, want the task as it is now: %v",
				same, a, replayed, changed)
		}
		for header, want := range map[string]string{
			"ETag": changed.header.Get("ETag"), "Location": first.header.Get("Location"),
		} {
			if got := a.header.Get(header); got != want {
				t.Errorf("repeated with %s: %s = %s, want %s", same, header, got, want)
			}
		}
	}
	for _, other := range []string{ // TestFields changes each field
		`{"title": "once"}`, `{"title": "once", "description": ""}`,
		`{"title": "once", "description": "only", "completed": true}`,
	} {
		if a := c.do("POST", "", other, name, key1); a.status != 422 ||
			!strings.Contains(a.detail(), name) {
			t.Errorf("the key with %s = %v, want 422 that names the header", other, a)
		}
	}
	if a := c.do("GET", task.path(), ""); a.body != changed.body {
		t.Errorf("after the repeats the task is %v, want it untouched: %v", a, changed)
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

	for _, bad := range []string{"", "1", "undefined", "null", "[object Object]",
		strings.Repeat("k", 15),
		strings.Repeat("k", 256), "a key with blanks", "a-key-with-a\ttab", "a-key-with-an-ä",
		"a-key-with-a-\x80"} {
		if a := c.do("POST", "", body, name, bad); a.status != 422 ||
			!strings.Contains(a.detail(), name) {
			t.Errorf("key %q = %v, want 422 that names the header", bad, a)
		}
	}
	create(c, body, strings.Repeat("~", 255))
	if got := c.list(""); len(got) != 3 {
		t.Errorf("%d tasks in the end, want 3: %v", len(got), got)
	}
}

func TestIdempotencyKeyOnTwoInstances(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	other := *c
	other.service = startService(t, startDB(t, openDB(t, sharedDatabaseURL())), settings{}).url
	instances := []*client{c, &other}
	for round := range 5 {
		key := fmt.Sprint("key-of-the-round-", round)
		ids, fresh := map[int64]bool{}, 0
		for i, a := range atOnce(t, 20, func(i int) (answer, error) {
			return instances[i%2].try("POST", c.path(""), `{"title": "once"}`, "Idempotency-Key", key)
		}) {
			if a.status != 201 {
				t.Fatalf("request %d = %v, want 201", i, a)
			}
			ids[decode[wireTask](t, a.body).ID] = true
			if a.header.Get("Idempotency-Replayed") == "" {
				fresh++
			}
		}
		if len(ids) != 1 || fresh != 1 {
			t.Errorf("20 creates with one key made %d tasks, %d are not replayed, want 1 and 1",
				len(ids), fresh)
		}
	}
	if got := c.list(""); len(got) != 5 {
		t.Errorf("%d tasks in the end, want one for each key: 5", len(got))
	}
}

// The longest list of tags that is accepted. TestMalformedConditions has one that is longer by one.
func TestHundredTags(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	a := c.do("POST", "", `{"title": "x"}`)
	path := fmt.Sprint("/", decode[wireTask](t, a.body).ID)
	tags := strings.Repeat(`"x", `, 99) + a.header.Get("ETag")
	if a := c.do("PATCH", path, "{}", "If-Match", tags); a.status != 200 {
		t.Errorf("If-Match with 100 tags = %d %s, want 200", a.status, a.body)
	}
}
