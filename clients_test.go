package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

func TestIfMatch(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for _, tc := range []struct {
		ifMatch string // E stands for the task's ETag
		holds   bool
	}{
		{`E`, true},
		{`*`, true},
		{`"1", E , "2"`, true},
		{`W/"5",, E`, true},
		// As proxies that compress rewrite it: nginx, HAProxy and Varnish; Apache and Caddy.
		{`W/E`, true},
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
		for _, change := range []struct{ method, path, body string }{
			{"PUT", "", `{"title": "changed"}`}, {"PATCH", "", `{"title": "changed"}`}, {"PATCH", "/complete", ``}, {"DELETE", "", ``},
		} {
			id := c.create("original").ID
			path := fmt.Sprintf("/%d", id)
			before := c.do("GET", path, "")
			etag := before.header.Get("ETag")
			ifMatch := strings.NewReplacer("E", etag, "V", strings.Trim(etag, `"`)).Replace(tc.ifMatch)
			a := c.do(change.method, path+change.path, change.body, "If-Match", ifMatch)
			after := c.do("GET", path, "")
			if !tc.holds {
				if a.status != 412 || detail(t, a) == "" || after.body != before.body {
					t.Errorf("%s %s If-Match: %s = %d %s, then %s; want 412 and nothing changed", change.method, change.path, tc.ifMatch, a.status, a.body, after.body)
				}
			} else if a.status/100 != 2 || after.body == before.body {
				t.Errorf("%s %s If-Match: %s = %d %s, then %s; want it done", change.method, change.path, tc.ifMatch, a.status, a.body, after.body)
			}
			if a := c.do(change.method, "/9223372036854775807"+change.path, change.body, "If-Match", ifMatch); a.status != 404 {
				t.Errorf("%s of no task, If-Match: %s = %d %s, want 404", change.method, tc.ifMatch, a.status, a.body)
			}
		}
	}
}

// What is no list of entity-tags, such as a variable of a buggy client, is not a conflict.
func TestMalformedConditions(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("original").ID)
	before := c.do("GET", path, "")
	many := strings.Repeat(`"x", `, maxTags) + before.header.Get("ETag")
	for _, value := range []string{"", "undefined", "null", `"`, `'x'`, `"a" "b"`, `"a""b"`, "*, *", `*, "x"`, `"a b"`, "W/", "2026-01-02T03:04:05.000000Z", many} {
		for _, request := range []struct{ method, path, body, header string }{
			{"GET", "", "", "If-None-Match"}, {"PUT", "", `{}`, "If-Match"}, {"PATCH", "", `{}`, "If-Match"},
			{"PATCH", "/complete", ``, "If-Match"}, {"DELETE", "", ``, "If-Match"},
		} {
			for _, id := range []string{path, "/9223372036854775807"} { // the 422 comes before the 404
				a := c.do(request.method, id+request.path, request.body, request.header, value)
				if a.status != 422 || !strings.Contains(detail(t, a), request.header) {
					t.Errorf("%s %s, %s: %.40q = %d %s, want 422 that names the header", request.method, request.path, request.header, value, a.status, a.body)
				}
			}
		}
	}
	if after := c.do("GET", path, ""); after.body != before.body {
		t.Errorf("the task is %s afterwards, want %s", after.body, before.body)
	}
}

// A list has the version of each task: its updated_at in quotes.
func TestETagIsUpdatedAt(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("Milk").ID)
	for range 20 { // some have trailing zeros
		a := c.do("PATCH", path, `{}`)
		var listed []struct {
			UpdatedAt string `json:"updated_at"`
		}
		if err := json.Unmarshal([]byte(c.do("GET", "", "").body), &listed); err != nil {
			t.Fatal(err)
		}
		at := listed[0].UpdatedAt
		if a.header.Get("ETag") != `"`+at+`"` || len(at) != len("2026-11-25T17:01:06.947270Z") {
			t.Fatalf("ETag %s, updated_at %s, want the same with six fractional digits", a.header.Get("ETag"), at)
		}
	}
}

// Two header lines are one list (RFC 9110, 5.3).
func TestIfMatchLines(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("task").ID)
	r, err := http.NewRequest("PATCH", c.service+"/api/"+c.user+"/tasks"+path, strings.NewReader(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Authorization": {c.authorization}, "If-Match": {`"1"`, c.do("GET", path, "").header.Get("ETag")}}
	res, err := c.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 200 {
		t.Errorf("the ETag in a second If-Match line = %d, want 200", res.StatusCode)
	}
}

func TestOneOfTwentyWins(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("original").ID)
	etag := c.do("GET", path, "").header.Get("ETag")
	var answers [20]answer
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() {
			answers[i], _ = c.try("PATCH", "/api/"+c.user+"/tasks"+path, fmt.Sprintf(`{"title": "client %d"}`, i), "If-Match", etag)
		})
	}
	wg.Wait()
	winner := ""
	for i, a := range answers {
		switch {
		case a.status == 200 && winner == "":
			winner = fmt.Sprintf("client %d", i)
		case a.status != 412:
			t.Errorf("client %d = %d %s, want one 200 and else 412", i, a.status, a.body)
		}
	}
	if got := decode[wireTask](t, c.do("GET", path, "").body); got.Title != winner {
		t.Errorf("stored %q, want what the winner sent, %q", got.Title, winner)
	}
}

// A change that waits for somebody's delete finds no task, whatever it asked of it.
func TestDeleteWinsAgainstIfMatch(t *testing.T) {
	t.Parallel()
	c := newClientOf(t, newService(t, openPrepared(t, sharedDatabaseURL())), "test-"+rand.Text())
	for _, change := range []struct{ method, path string }{{"PATCH", ""}, {"PATCH", "/complete"}, {"DELETE", ""}} {
		for _, conditional := range []bool{true, false} {
			path := fmt.Sprintf("/%d", c.create("doomed").ID)
			var headers []string
			if conditional {
				headers = []string{"If-Match", c.do("GET", path, "").header.Get("ETag")}
			}
			tx := begin(t, sharedDB)
			sqlExec(t, tx, `DELETE FROM tasks WHERE user_id = $1`, c.user)
			var a answer
			var waiting sync.WaitGroup
			waiting.Go(func() {
				a, _ = c.try(change.method, "/api/"+c.user+"/tasks"+path+change.path, `{}`, headers...)
			})
			pid := sqlValue[int](t, tx, `SELECT pg_backend_pid()`)
			eventually(t, "change that waits for the delete", func() bool {
				return sqlValue[bool](t, sharedDB.pool, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid)))`, pid)
			})
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			waiting.Wait()
			if a.status != 404 {
				t.Errorf("%s %s, conditional %v, of a task deleted meanwhile = %d %s, want 404", change.method, change.path, conditional, a.status, a.body)
			}
		}
	}
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	path := fmt.Sprintf("/%d", c.create("task").ID)
	etag := c.do("GET", path, "").header.Get("ETag")
	for _, tc := range []struct {
		ifNoneMatch string
		want        int
	}{
		{etag, 304}, {"W/" + etag, 304}, {`"1", ` + etag, 304}, {`*`, 304}, {`"1"`, 200},
		{strings.TrimSuffix(etag, `"`) + `-gzip"`, 304}, {strings.TrimSuffix(etag, `"`) + `gzip"`, 200},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			a := c.do(method, path, "", "If-None-Match", tc.ifNoneMatch)
			if a.status != tc.want || a.header.Get("ETag") != etag || a.status == 304 && a.body != "" {
				t.Errorf("%s If-None-Match: %s = %d %q, ETag %s; want %d and %s", method, tc.ifNoneMatch, a.status, a.body, a.header.Get("ETag"), tc.want, etag)
			}
		}
	}
	if a := c.do("GET", "/9223372036854775807", "", "If-None-Match", "*"); a.status != 404 {
		t.Errorf("no task, If-None-Match: * = %d, want 404", a.status)
	}
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	const key1, key2 = "0b5c0f6e-0000-0001", "0b5c0f6e-0000-0002" // 18 characters
	const key, body = "Idempotency-Key", `{"title": "once", "description": "only"}`
	first := c.do("POST", "", body, key, key1)
	made := decode[wireTask](t, first.body)
	path := fmt.Sprintf("/%d", made.ID)
	if first.status != 201 || first.header.Get("Idempotency-Replayed") != "" {
		t.Fatalf("first = %d %v, want 201 and not replayed", first.status, first.header)
	}
	changed := c.do("PATCH", path, `{"title": "changed since"}`)

	// The same after decoding: other member order, defaults spelled out, unknown members, escapes.
	for _, same := range []string{
		body,
		`{"completed": false, "description": "only", "title": "onc\u0065", "id": 7}`,
	} {
		a := c.do("POST", "", same, key, key1)
		if a.status != 201 || a.body != changed.body || a.header.Get("Idempotency-Replayed") != "true" ||
			a.header.Get("ETag") != changed.header.Get("ETag") || a.header.Get("Location") != first.header.Get("Location") {
			t.Errorf("repeat with %s = %d %v %s, want 201, replayed, the task as it is now: %s", same, a.status, a.header, a.body, changed.body)
		}
	}
	for _, other := range []string{
		`{"title": "twice", "description": "only"}`, `{"title": "once"}`, `{"title": "once", "description": ""}`,
		`{"title": "once", "description": "only", "completed": true}`,
	} {
		if a := c.do("POST", "", other, key, key1); a.status != 422 || !strings.Contains(detail(t, a), key) {
			t.Errorf("the key with %s = %d %s, want 422 naming the header", other, a.status, a.body)
		}
	}
	if a := c.do("GET", path, ""); a.body != changed.body {
		t.Errorf("after the repeats the task is %s, want it untouched: %s", a.body, changed.body)
	}

	other := newClient(t)
	if a := other.do("POST", "", body, key, key1); a.status != 201 || a.header.Get("Idempotency-Replayed") != "" || decode[wireTask](t, a.body).ID == made.ID {
		t.Errorf("another user's same key = %d %v %s, want a task of its own", a.status, a.header, a.body)
	}
	if a := c.do("POST", "", body, key, key2); a.status != 201 || decode[wireTask](t, a.body).ID == made.ID {
		t.Errorf("another key = %d %s, want another task", a.status, a.body)
	}
	c.do("DELETE", path, "")
	if a := c.do("POST", "", body, key, key1); a.status != 201 || a.header.Get("Idempotency-Replayed") != "" {
		t.Errorf("the key of a deleted task = %d %v, want a new task", a.status, a.header)
	}

	for _, bad := range []string{"", "1", "undefined", "null", "[object Object]", strings.Repeat("k", 15), strings.Repeat("k", 256), "a key with blanks", "a-key-with-a\ttab", "a-key-with-an-ä", "a-key-with-a-\x80"} {
		if a := c.do("POST", "", body, key, bad); a.status != 422 || !strings.Contains(detail(t, a), key) {
			t.Errorf("key %q = %d %s, want 422 naming the header", bad, a.status, a.body)
		}
	}
	if a := c.do("POST", "", body, key, strings.Repeat("~", 255)); a.status != 201 {
		t.Errorf("a key of 255 characters = %d %s, want 201", a.status, a.body)
	}
	if got := decode[[]wireTask](t, c.do("GET", "", "").body); len(got) != 3 {
		t.Errorf("%d tasks in the end, want 3", len(got))
	}
}

func TestIdempotencyKeyOnTwoInstances(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	services := []string{c.service, newService(t, openPrepared(t, sharedDatabaseURL()))}
	for round := range 5 {
		var answers [20]answer
		var wg sync.WaitGroup
		for i := range answers {
			wg.Go(func() {
				instance := *c
				instance.service = services[i%2]
				answers[i], _ = instance.try("POST", "/api/"+c.user+"/tasks", `{"title": "once"}`, "Idempotency-Key", fmt.Sprint("key-of-the-round-", round))
			})
		}
		wg.Wait()
		ids, fresh := map[int64]bool{}, 0
		for i, a := range answers {
			if a.status != 201 {
				t.Fatalf("request %d = %d %s, want 201", i, a.status, a.body)
			}
			ids[decode[wireTask](t, a.body).ID] = true
			if a.header.Get("Idempotency-Replayed") == "" {
				fresh++
			}
		}
		if len(ids) != 1 || fresh != 1 {
			t.Errorf("twenty at once made %d tasks and gave %d answers as the first, want 1 and 1", len(ids), fresh)
		}
	}
	if got := decode[[]wireTask](t, c.do("GET", "", "").body); len(got) != 5 {
		t.Errorf("%d tasks in the end, want one a key: 5", len(got))
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const app, other = "https://app.example.com", "https://evil.example.com"
	c := newClient(t)
	c.service = newService(t, sharedDB, app, "http://localhost:3000")
	list := "/api/" + c.user + "/tasks"
	stranger := *c
	stranger.authorization = ""

	for _, tc := range []struct {
		c            *client
		method, path string
		want         int
	}{
		{c, "GET", list, 200}, {&stranger, "GET", list, 401}, {c, "GET", "/api/x/tasks", 403}, {c, "GET", list + "/9", 404},
		{c, "GET", "/nothing", 404}, {c, "PUT", list, 405}, {c, "POST", list, 400}, {c, "GET", list + "?limit=0", 422},
		{c, "GET", "/health/live", 200},
	} {
		for _, origin := range []string{app, "http://localhost:3000", other, "null", "", app + ".evil.com", "https://APP.example.com"} {
			a := tc.c.send(tc.method, tc.path, "", "Origin", origin)
			listed := origin == app || origin == "http://localhost:3000"
			want := ""
			if listed {
				want = origin
			}
			h := a.header
			if a.status != tc.want || h.Get("Access-Control-Allow-Origin") != want || h.Get("Vary") != "Origin" ||
				(h.Get("Access-Control-Allow-Credentials") == "true") != listed || (h.Get("Access-Control-Expose-Headers") != "") != listed {
				t.Errorf("%s %s from %q = %d %v, want %d for origin %q", tc.method, tc.path, origin, a.status, h, tc.want, want)
			}
		}
	}

	for _, path := range []string{list, list + "/7", "/nothing"} {
		a := stranger.send("OPTIONS", path, "", "Origin", app, "Access-Control-Request-Method", "PATCH",
			"Access-Control-Request-Headers", "authorization,content-type,if-match")
		h := a.header
		if a.status != 204 || h.Get("Access-Control-Allow-Origin") != app || h.Get("Vary") != "Origin" || h.Get("Access-Control-Max-Age") == "" {
			t.Errorf("preflight of %s = %d %v, want 204 for %s", path, a.status, h, app)
		}
		if got := h.Get("Access-Control-Allow-Methods"); got != "GET, POST, PUT, PATCH, DELETE" {
			t.Errorf("Access-Control-Allow-Methods = %q", got)
		}
		if got := h.Get("Access-Control-Allow-Headers"); got != "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-Id" {
			t.Errorf("Access-Control-Allow-Headers = %q", got)
		}
	}
	if a := stranger.send("OPTIONS", list, "", "Origin", other); a.header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("preflight from %s is allowed: %v", other, a.header)
	}
	exposed := c.send("GET", list, "", "Origin", app).header.Get("Access-Control-Expose-Headers")
	if exposed != "ETag, Link, Location, X-Total-Count, X-Request-Id, Retry-After, Idempotency-Replayed, WWW-Authenticate" {
		t.Errorf("Access-Control-Expose-Headers = %q", exposed)
	}

	c.service = sharedURL // CORS_ORIGINS unset
	for _, method := range []string{"GET", "OPTIONS"} {
		a := c.send(method, list, "", "Origin", app)
		for name := range a.header {
			if strings.HasPrefix(name, "Access-Control-") || name == "Vary" {
				t.Errorf("without CORS_ORIGINS %s has %s", method, name)
			}
		}
		if method == "OPTIONS" && (a.status != 405 || a.header.Get("Allow") != "GET, HEAD, POST") {
			t.Errorf("without CORS_ORIGINS OPTIONS = %d, Allow %q, want the router's 405", a.status, a.header.Get("Allow"))
		}
	}
}

func TestCORSOnPanic(t *testing.T) {
	t.Parallel()
	s := newServer(sharedAuth, sharedDB, slog.New(slog.DiscardHandler), []string{"https://app.example.com"}, "")
	s.mux.HandleFunc("GET /panic", s.handle(func(context.Context, http.ResponseWriter, *http.Request) error { panic("on purpose") }))
	rec := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "/panic", nil)
	r.Header.Set("Origin", "https://app.example.com")
	s.ServeHTTP(rec, r)
	if rec.Code != 500 || rec.Header().Get("Access-Control-Allow-Origin") != "https://app.example.com" || strings.Contains(rec.Body.String(), "purpose") {
		t.Errorf("a panic = %d %v %s, want a bare 500 with CORS headers", rec.Code, rec.Header(), rec.Body)
	}
}

func TestCORSOrigins(t *testing.T) {
	for _, bad := range []string{
		"*", "https://*", "https://*.example.com", "example.com", "https://app.example.com/", "https://app.example.com/x",
		"https://App.example.com", "https://user@app.example.com", "null", "https://a.example,", ",", "https://a.example:443", "http://a.example:80", "https://", "https://a.example?x",
		"https://a.example https://b.example", "https://a.example#",
	} {
		if got, err := corsOrigins(bad); err == nil || !strings.Contains(err.Error(), "CORS_ORIGINS") {
			t.Errorf("corsOrigins(%q) = %q, %v, want an error that names the setting", bad, got, err)
		}
	}
	got, err := corsOrigins("https://app.example.com, http://localhost:3000,capacitor://localhost,http://[::1]:5173")
	if err != nil || len(got) != 4 || got[1] != "http://localhost:3000" {
		t.Errorf("corsOrigins of four = %q, %v", got, err)
	}
}
