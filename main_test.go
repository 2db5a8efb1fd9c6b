package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// The HTTP edge and the settings. What every response must have is checked in answer.check. Most
// of these requests get their response before a database is needed.

// noDatabase is a database that is never reached. Its pool has one slot for each user.
const noDatabase = "postgres://u:p@localhost:1/d?pool_max_conns=3"

// startDetached starts a service that never reaches its database, and returns a client of it.
func startDetached(t testing.TB, set settings) (*service, *client) {
	t.Helper()
	s := startService(t, openDB(t, noDatabase), set)
	return s, newClientOf(t, s.url, "anyone")
}

// startDetachedProcess is startDetached for a process, which exits after 30 s.
func startDetachedProcess(t testing.TB, settings ...string) *process {
	t.Helper()
	program, err := thisRelease()
	if err != nil {
		t.Fatal(err)
	}
	return startProgram(t, program, nil, append(settings, "DATABASE_URL="+noDatabase)...)
}

// The router answers before the token is checked. What it redirects is logged and counted too.
func TestPathsAndMethods(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{})
	c.authorization = ""
	c.http = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
	const list, one = "GET, HEAD, POST", "DELETE, GET, HEAD, PATCH, PUT"
	for _, row := range []struct {
		method, path string
		status       int
		header       string // Allow or Location
	}{
		{"GET", "/api/u/tasks/", 404, ""},
		{"OPTIONS", "/api/u/tasks/", 404, ""},
		{"DELETE", "/api/u/tasks/1/", 404, ""},
		{"PATCH", "/api/u/tasks/1/complete/", 404, ""},
		{"GET", "/health/live/", 404, ""},
		{"GET", "/API/u/tasks", 404, ""},
		{"BREW", "/coffee", 404, ""},
		{"OPTIONS", "/api/u/tasks", 405, list},
		{"BREW", "/api/u/tasks", 405, list},
		{"POST", "/api/u/tasks/x", 405, one},
		{"HEAD", "/api/u/tasks/1/complete", 405, "PATCH"},
		{"POST", "/health/live", 405, "GET, HEAD"},
		{"PATCH", "/api/u/tasks/1/complete", 401, ""},
		{"GET", "/health/live", 200, ""},
		{"GET", "/health/ready", 503, ""}, // before the database was reached
		{"GET", "//health/live", 307, "/health/live"},
		{"POST", "/api/../docs", 307, "/docs"},
	} {
		id := rand.Text()
		a := c.send(row.method, row.path, "", "X-Request-Id", id)
		got := a.header.Get("Allow") + a.header.Get("Location")
		if a.status != row.status || got != row.header {
			t.Errorf("%s %s = %v, %q, want %d, %q", row.method, row.path, a, got, row.status, row.header)
		}
		if line := s.log.request(t, id); line["status"] != float64(row.status) {
			t.Errorf("%s %s = %v is logged as %v", row.method, row.path, a, line)
		}
	}
	page := httptest.NewRecorder()
	s.serveMetrics(page, nil)
	counted := `{route="/health/live",method="GET",status="307"} 1`
	if !strings.Contains(page.Body.String(), counted) {
		t.Errorf("the metrics lack %s: %s", counted, page.Body)
	}
}

func TestHeadIsGetWithoutBody(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	task := c.create("head")
	for _, path := range []string{c.path("?total=true"), c.path(task.path()), c.path("?limit=0"),
		"/api/u/tasks", "/nothing", "/health/live", "/openapi.json", "/docs"} {
		get, head := c.send("GET", path, ""), c.send("HEAD", path, "")
		for _, name := range []string{"Date", "X-Request-Id"} {
			get.header.Del(name)
			head.header.Del(name)
		}
		if head.status != get.status || head.body != "" || !reflect.DeepEqual(head.header, get.header) {
			t.Errorf("HEAD %s = %v %v, want as GET: %v %v", path, head, head.header, get, get.header)
		}
	}
}

// After the start, no health route uses the database.
func TestHealthRoutesUseNoDatabase(t *testing.T) {
	t.Parallel()
	d, r := startOverRelay(t)
	c := newClientOf(t, startService(t, d, settings{}).url, newUser())
	r.down.Store(true)
	r.cut()
	dials := r.dials.Load()
	for _, path := range []string{"/health/live", "/health/ready"} {
		if a := c.send("GET", path, ""); a.status != 200 || r.dials.Load() != dials {
			t.Errorf("GET %s = %v and %d dials, want 200 and none", path, a, r.dials.Load()-dials)
		}
	}
}

// The policy of /docs allows what the page loads, by version and hash, and nothing else.
func TestDocsPolicy(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	if a := c.send("GET", "/openapi.json", ""); a.status != 200 || a.body != string(openAPI) {
		t.Errorf("GET /openapi.json = %v, want the file", a)
	}
	docs := c.send("GET", "/docs", "")
	policy := docs.header.Get("Content-Security-Policy")
	script := regexp.MustCompile(`(?s)<script>(.*?)</script>`).FindStringSubmatch(docs.body)
	loads := regexp.MustCompile(`(?:src|href)="(https:.*/)[^"/]*"\s+integrity="sha384-\S{64}"`).
		FindAllStringSubmatch(docs.body, -1)
	if script == nil || len(loads) != 2 || strings.Count(docs.body, `="http`) != 2 {
		t.Fatalf("/docs = %v with %q and %q, want a script and a style sheet", docs, script, loads)
	}
	hash := sha256.Sum256([]byte(script[1]))
	for _, part := range []string{
		"default-src 'none';", "frame-ancestors 'none'", "style-src " + loads[0][1] + ";",
		"script-src " + loads[1][1] + " 'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "';",
	} {
		if !strings.Contains(policy, part) {
			t.Errorf("the policy %s lacks %s", policy, part)
		}
	}
}

// A request breaks every rule and gets the error of the first one. Then one rule after the other is
// kept. TestIfMatch has the last checks: whether the task exists, and its version.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{})
	held := make(chan struct{})
	s.mux.HandleFunc("GET /hold/{user_id}", s.forUser(
		func(_ http.ResponseWriter, r *http.Request, _ taskKey) error {
			close(held)
			<-r.Context().Done()
			return errNotSent
		}))
	busy, other, forger := newClientOf(t, s.url, "busy"), newClientOf(t, s.url, "other"), *c
	forger.authorization = "Bearer x.y.z"
	dialRaw(t, s.url, fmt.Sprintf("GET /hold/busy HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n\r\n",
		busy.authorization))
	<-held // busy's only slot

	for _, route := range []struct{ method, path, field, header string }{
		{"POST", "", "title", "Idempotency-Key"},
		{"PUT", "/ID", "title", "If-Match"},
		{"PATCH", "/ID/complete", "completed", "If-Match"},
	} {
		t.Run(route.method, func(t *testing.T) {
			t.Parallel()
			as, owner, method, id, end := &forger, other, "BREW", "abc", "/none/none"
			contentType, body := "text/plain", strings.Repeat(" ", maxBody+1)
			expect := func(want apiError) {
				t.Helper()
				path := owner.path(strings.Replace(route.path, "ID", id, 1)) + end
				a := as.send(method, path, body, "Content-Type", contentType, route.header, "undefined")
				if a.status != want.status || !strings.HasPrefix(a.detail(), want.detail) {
					t.Errorf("%s %s %.40q = %v, want %d %s", method, path, body, a, want.status, want)
				}
			}
			expect(errNoPath)
			end = ""
			expect(errMethod)
			method = route.method
			expect(errBadToken)
			as = busy
			expect(errOtherUser)
			owner = busy
			if route.path != "" {
				expect(errNotFound)
			}
			id = "7"
			expect(errTooMany)
			as, owner = c, c
			expect(errLargeBody)
			body = `{"title": 7, "completed": 7, "unknown": "\ud800"}`
			expect(errNotJSON)
			contentType = "application/json"
			expect(errBadJSON)
			body = `{"title": 7, "completed": 7}`
			expect(apiError{422, route.field})
			body = `{"title": "x", "completed": true}`
			expect(apiError{422, route.header})
		})
	}
}

// A bug is a 500 whose cause is in the log alone. It releases the user's slot.
func TestInternalErrorsShowNothing(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{})
	for cause, fail := range map[string]func() error{
		"main_test.go:": func() error { panic("hunter2") },
		"make it: ":     func() error { return fmt.Errorf("make it: %w", errors.New("hunter2")) },
	} {
		id := rand.Text()
		s.mux.HandleFunc("GET /"+id+"/{user_id}", s.forUser(
			func(http.ResponseWriter, *http.Request, taskKey) error { return fail() }))
		a := c.send("GET", "/"+id+"/"+c.user, "", "X-Request-Id", id)
		if a.status != 500 || strings.Contains(fmt.Sprint(a), "hunter2") {
			t.Errorf("%s = %v, want 500 without the cause", cause, a)
		}
		logged := fmt.Sprint(s.log.request(t, id)["error"])
		if !strings.Contains(logged, "hunter2") || !strings.Contains(logged, cause) {
			t.Errorf("%q is logged, want the cause %s", logged, cause)
		}
		if a := c.do("POST", "", "[]"); a.status != 400 {
			t.Errorf("the next request = %v, want 400", a)
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	for id, kept := range map[string]bool{
		"1": true, "Root=1-67891233-abcdef012345678912345678": true, strings.Repeat("x", 128): true,
		"": false, strings.Repeat("x", 129): false, "two words": false, `quo"te`: false, "\xff": false,
	} {
		got := c.send("GET", "/health/live", "", "X-Request-Id", id).header.Get("X-Request-Id")
		if (got == id) != kept {
			t.Errorf("X-Request-Id %q is answered with %q, want it kept: %t", id, got, kept)
		}
	}
}

// A response does not wait for a body that is not read: this server has no timeouts that would end
// the wait. A connection on which a body is incomplete is closed.
func TestBodyLength(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	const object, chunked = `{"title": ""}`, "Transfer-Encoding: chunked" // a 422 once it is read
	create, padded := "POST "+c.path(""), fmt.Sprintf("%-65536s", object)
	for _, row := range []struct {
		request, header, body string
		status                int
	}{
		{create, "Content-Length: 65536", padded, 422},
		{create, chunked, "10000\r\n" + padded + "\r\n0\r\n\r\n", 422},
		{create, "Content-Length: 65537\r\nContent-Type: text/plain", "", 413},
		{create, chunked, "40000000\r\n " + padded, 413}, // although the body does not end
		{create, chunked + "\r\nContent-Type: text/plain", "", 415},
		{create, "Content-Length: 9\r\nContent-Encoding: gzip", "", 415},
		{"POST /api/other/tasks", chunked, "", 403},
		{"PUT " + c.path(""), "Content-Length: 9", "", 405},
		{"GET /health/live", "Content-Length: 9", "", 200},
		{create, "Content-Length: 14", object, 400}, // the connection ends before the body
		{create, chunked, "20\r\n" + object, 400},
		{create, chunked, "d\r\n" + object + "\r\n", 400},
		{create, chunked, "zz\r\n" + object + "\r\n0\r\n\r\n", 400},
	} {
		conn := dialRaw(t, c.service, fmt.Sprintf("%s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n"+
			"%s\r\n\r\n%s", row.request, c.authorization, row.header, row.body))
		if row.status == 400 {
			conn.(*net.TCPConn).CloseWrite()
		}
		a := readAnswer(t, conn)
		if a.status != row.status || row.status != 422 && !isClosed(conn) {
			t.Errorf("%s with %q, %.20q = %v, want %d", row.request, row.header, row.body, a, row.status)
		}
	}
}

func TestContentTypeAndEncoding(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	for header, accepted := range map[string]bool{
		"Content-Type:": true, "Content-Type:Application/JSON;charset=UTF-8": true,
		"Content-Type:application/merge-patch+json":        true,
		"Content-Type:application/vnd.api+json; version=1": true,
		"Content-Type:text/plain;charset=UTF-8":            false, // what fetch sends with a string
		"Content-Type:application/x-www-form-urlencoded":   false,
		"Content-Type:text/json":                           false,
		"Content-Type:+json":                               false,
		"Content-Type:application/json-seq":                false,
		"Content-Encoding:":                                true, "Content-Encoding: Identity": true,
		"Content-Encoding:gzip": false, "Content-Encoding:identity, br": false,
	} {
		name, value, _ := strings.Cut(header, ":")
		a := c.do("POST", "", `{"title": ""}`, name, value)
		want, accepts := 422, "" // a body that is read
		if !accepted {
			want = 415
		}
		if !accepted && name == "Content-Encoding" {
			accepts = "identity"
		}
		if got := a.header.Get("Accept-Encoding"); a.status != want || got != accepts {
			t.Errorf("%s = %v, Accept-Encoding %q, want %d, %q", header, a, got, want, accepts)
		}
	}
}

// What is not one JSON object in valid UTF-8 is a 400 on every route.
func TestBodiesThatAreNotOneObject(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	const object, with = `{"title": "", "completed": ""}`, `{"title": "", "completed": "", "x": `
	deep := func(n int) string { return with + strings.Repeat("[", n) + strings.Repeat("]", n) + "}" }
	for status, bodies := range map[int][]string{
		422: {" " + object + "\r\n\t", "\ufeff" + object, deep(500), with + `"\u0000"}`,
			with + `"\uD83D\ude00"}`, with + `"\\ud800\\\\udc00"}`},
		400: {"\ufeff\ufeff" + object, "\ufeff", " \n", object + `{}`, object + `x`, object + "\x00",
			`null`, `[]`, `[` + object + `]`, `"x"`, `7`, `{`, `{"title": "`, `{"title": "",}`, deep(20000),
			with + `NaN}`, with + "\"a\nb\"}", with + `"\x"}`,
			with + "\"\xff\"}", with + "\"\xed\xa0\x80\"}", `{"` + "\xc3" + `": 1}`, // invalid UTF-8
			with + `"\ud800"}`, with + `"\udc00"}`, with + `"\uDE00\uD83D"}`, with + `"\\\ud800"}`,
			with + `"\ud800\ud800\udc00"}`, with + `"\ud800\\udc00"}`, `{"title": "", "\udfff": 1}`},
	} {
		for _, body := range bodies {
			for path, method := range map[string]string{"": "POST", "/7": "PUT", "/7/complete": "PATCH"} {
				if a := c.do(method, path, body); a.status != status {
					t.Errorf("%s %s %.80q = %v, want %d", method, path, body, a, status)
				}
			}
		}
	}
	for path, method := range map[string]string{"": "POST", "/7": "PUT"} {
		if a := c.do(method, path, "", "Content-Type", "text/plain"); a.status != 400 {
			t.Errorf("%s %s without a body = %v, want 400", method, path, a)
		}
	}
}

func TestHeaderLimits(t *testing.T) {
	t.Parallel()
	p := startDetachedProcess(t)
	p.waitLive()
	const head, end = "GET /health/live HTTP/1.1\r\nHost: todo\r\nX: ", "\r\n\r\n"
	large, names := strings.Repeat("x", 16<<10-len(head)-len(end)), ""
	for i := range 99 {
		names += fmt.Sprintf("\r\nX-%d: x", i)
	}
	for _, row := range []struct {
		name, header string
		status       int
	}{
		{"16 KiB", large, 200},
		{"more than 16 KiB", large + "x", 431},
		{"100 names, one of them twice", names + "\r\nX: x", 200},
		{"101 names", names + "\r\nY: x", 431},
	} {
		a := readAnswer(t, dialRaw(t, p.url, head+row.header+end))
		err := a.check("GET", "/health/live")
		if a.status != row.status || err != nil && row.header != large+"x" { // that 431 is net/http's
			t.Errorf("a header of %s = %v, want %d (%v)", row.name, a, row.status, err)
		}
	}
}

// A connection is answered or closed within 20 s, whatever the client and the database do.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	p := startDetachedProcess(t)
	p.waitLive()
	c := newClientOf(t, p.url, "anyone")
	head := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: todo\r\nConnection: close\r\nAuthorization: %s\r\n",
		c.path(""), c.authorization)
	for _, row := range []struct{ name, text, end, want string }{
		{"a header without an end", head + "X: ", "", `^($|HTTP/1.1 400 )`},
		{"a slow body", c.rawCreate("{", "Content-Length: 65536"), "", `^HTTP/1.1 40[08] `},
		{"a slow header, no database", head + "X: ", "\r\n\r\n", `^HTTP/1.1 503 `},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			conn := dialRaw(t, p.url, row.text)
			go func() {
				for i := 0; ; i++ {
					more := "x"
					if i >= 30 && row.end != "" { // after 3 s
						more = row.end
					}
					_, err := io.WriteString(conn, more)
					if err != nil || more == row.end {
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
			}()
			got, _ := io.ReadAll(conn)
			took := time.Since(start)
			if !regexp.MustCompile(row.want).Match(got) || took > 20*time.Second {
				t.Errorf("%s after %v, want %s within 20 s", got, took, row.want)
			}
		})
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const app, local = "https://app.example.com", "http://localhost:3000"
	s, c := startDetached(t, settings{origins: []string{app, local}})
	expect := func(method, path string, status int, origin string, want http.Header) {
		t.Helper()
		a := c.send(method, path, "", "Origin", origin, "Access-Control-Request-Headers",
			"authorization,traceparent, (bad), two words", "Access-Control-Request-Method", "PUT")
		got := http.Header{}
		for name, values := range a.header {
			if strings.HasPrefix(name, "Access-Control-") || name == "Vary" {
				got[name] = values
			}
		}
		if a.status != status || !reflect.DeepEqual(got, want) {
			t.Errorf("%s %s from %q = %v %v, want %d %v", method, path, origin, a, got, status, want)
		}
	}
	allowed := func(origin string) http.Header {
		return http.Header{"Vary": {"Origin"}, "Access-Control-Allow-Origin": {origin},
			"Access-Control-Allow-Credentials": {"true"},
			"Access-Control-Expose-Headers": {"ETag, Link, Location, X-Total-Count, X-Request-Id, " +
				"Retry-After, Idempotency-Replayed, WWW-Authenticate"}}
	}
	strangers := []string{"https://evil.example.com", "null", app + ".evil.com",
		"https://APP.example.com", ""}
	for _, row := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/health/live", 200}, {"POST", c.path(""), 400}, {"GET", "/api/x/tasks", 403},
		{"GET", "/nothing", 404}, {"PUT", c.path(""), 405}, {"GET", c.path("?limit=0"), 422},
	} {
		expect(row.method, row.path, row.status, app, allowed(app))
		expect(row.method, row.path, row.status, local, allowed(local))
		for _, origin := range strangers {
			expect(row.method, row.path, row.status, origin, http.Header{"Vary": {"Origin"}})
		}
	}
	warnings := strings.Join(s.log.messages(t, "WARNING"), "\n")
	for _, origin := range strangers[:4] {
		if !strings.Contains(warnings, `"`+origin+`" is not in CORS_ORIGINS`) {
			t.Errorf("the log has %q, want a WARNING about %s", warnings, origin)
		}
	}

	c.authorization = "" // a preflight has none
	preflight := allowed(app)
	preflight.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
	preflight.Set("Access-Control-Max-Age", "7200")
	preflight.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, If-Match, "+
		"If-None-Match, Idempotency-Key, X-Request-Id, traceparent")
	expect("OPTIONS", c.path("/7"), 204, app, preflight)
	expect("OPTIONS", c.path("/7"), 405, strangers[0], http.Header{"Vary": {"Origin"}})

	_, c = startDetached(t, settings{}) // without CORS_ORIGINS
	expect("GET", "/health/live", 200, app, http.Header{})
	expect("OPTIONS", c.path("/7"), 405, app, http.Header{})
}

// A malformed setting ends the start with one line that names it.
func TestMalformedSettings(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, taken, _ := net.SplitHostPort(listener.Addr().String())
	done, cancel := context.WithCancel(t.Context())
	cancel() // ends a service that starts nevertheless
	for name, values := range map[string][]string{
		"PORT":         {"x", "-1", "65536", "80 80", taken},
		"METRICS_PORT": {"x", taken},
		"LOG_LEVEL":    {"verbose", "warning", "0"},
		"CORS_ORIGINS": {"*", "https://*.example.com", "example.com", "null", ",", "https://a.example,",
			"https://a.example/", "https://a.example?x", "https://a.example#", "https://u@a.example",
			"https://A.example", "https://a.example:443", "http://a.example:80", "https://",
			"https://a.example https://b.example"},
	} {
		for _, value := range values {
			getenv := env("DATABASE_URL="+noDatabase, "BETTER_AUTH_SECRET="+testSecret,
				"PORT="+freePort(t), name+"="+value)
			message := fmt.Sprint(run(done, nil, getenv, io.Discard))
			if !regexp.MustCompile("^" + name + "[: ].*$").MatchString(message) {
				t.Errorf("%s=%s: %q, want one line that begins with the name", name, value, message)
			}
		}
	}
	p := startDetachedProcess(t, "METRICS_PORT="+taken)
	if status := p.wait(20 * time.Second); status != 1 || len(p.output.lines(t)) != 1 ||
		!strings.Contains(p.output.messages(t, "ERROR")[0], "METRICS_PORT") {
		t.Errorf("exit status %d with %s, want 1 with one ERROR", status, p.output.String())
	}
	for _, args := range []string{"serve", "migrate x", "token", "token a b"} {
		err := run(done, strings.Fields(args), env(), io.Discard)
		if err == nil || !strings.HasPrefix(err.Error(), "usage: todo-app") {
			t.Errorf("todo-app %s: %v, want the usage", args, err)
		}
	}
}

// White space around settings is removed. The service listens on all addresses.
func TestSettingsWithWhiteSpace(t *testing.T) {
	t.Parallel()
	port, metricsPort := freePort(t), freePort(t)
	origins := []string{"https://a.example", "http://[::1]:5173", "capacitor://localhost"}
	p := startDetachedProcess(t, "PORT= "+port+"\n", "METRICS_PORT=\t"+metricsPort+" ",
		"LOG_LEVEL= info\n", "CORS_ORIGINS= "+strings.Join(origins, " ,\n"), "GOOGLE_CLOUD_PROJECT= g ")
	p.url = "http://127.0.0.1:" + port
	p.waitLive()
	trace := strings.Repeat("1a", 16)
	for _, origin := range origins {
		a := newClientOf(t, p.url, "anyone").send("GET", "/health/live", "", "Origin", origin,
			"X-Request-Id", origin[:5], "X-Cloud-Trace-Context", trace+"/1")
		if got := a.header.Get("Access-Control-Allow-Origin"); got != origin {
			t.Errorf("the origin %s is answered with %q", origin, got)
		}
	}
	line := p.output.request(t, "https")
	if got := line["logging.googleapis.com/trace"]; got != "projects/g/traces/"+trace {
		t.Errorf("the trace is %v", got)
	}
	addresses, _ := net.InterfaceAddrs()
	for _, a := range addresses {
		ip := a.(*net.IPNet).IP
		for _, port := range []string{port, metricsPort} {
			if !ip.IsLinkLocalUnicast() {
				dialRaw(t, net.JoinHostPort(ip.String(), port), "")
			}
		}
	}
	set, err := readSettings(env("BETTER_AUTH_SECRET="+testSecret, "PORT= ", "LOG_LEVEL= "))
	if err != nil || set.port != "8080" || set.logLevel != slog.LevelInfo {
		t.Errorf("settings without values are %+v, %v", set, err)
	}
}

// FuzzHandler sends any request to the whole handler, with the token of a user whose tasks no other
// test sees.
func FuzzHandler(f *testing.F) {
	testDB(f)
	// With -fuzz, worker processes run this function too, and are killed. They must use the same
	// users, whose tasks the first process removes.
	const variable = "TODO_APP_FUZZ_RUN"
	run := cmp.Or(os.Getenv(variable), rand.Text())
	f.Setenv(variable, run)
	other, c := newClientOf(f, sharedURL, "test-other-"+run), newClientOf(f, sharedURL, "test-"+run)
	secret := "secret-" + rand.Text()
	otherTask, task := other.create(secret), c.path(c.create("Milk").path())
	s := newServer(settings{auth: sharedAuth, origins: []string{"https://app.example.com"}}, sharedDB,
		slog.New(slog.DiscardHandler))

	const asJSON = "Content-Type: application/json\r\n"
	for _, seed := range []struct{ method, target, headers, body string }{
		{"GET", c.path("?limit=1&before=9&completed=true&total=true"), "", ""},
		{"GET", c.path("?limit=%zz;a=b&limit=2"), "", ""},
		{"HEAD", task, "If-None-Match: W/\"1\", *\r\n", ""},
		{"POST", c.path(""), asJSON + "Idempotency-Key: 0123456789abcdef\r\n",
			`{"title": "\u0000\ud83d\ude00", "description": null, "completed": true}`},
		{"POST", c.path(""), "Idempotency-Key: \xff k\r\nContent-Type: x/y+json; charset\r\n", "{\"\xff"},
		{"PUT", task, asJSON + "If-Match: \"2026-01-01T00:00:00.000000Z\"\r\n", `{"title": "\u2003"}`},
		{"PATCH", task + "/complete", "If-Match: *\r\nIf-Match: \"-1\"\r\n", `{"completed": true}{`},
		{"DELETE", c.path("/9223372036854775808"), "", ""},
		{"DELETE", c.path(otherTask.path()), "", ""},
		{"GET", other.path(otherTask.path()), "", ""},
		{"GET", "/api/%2F/tasks", "Authorization: Bearer e30.e30.e30\r\n", ""},
		{"GET", "//api/../%00/tasks/?%00", "", ""},
		{"OPTIONS", c.path(""), "Origin: https://app.example.com\r\n", ""},
		{"GET", "/docs", "X-Request-Id: \xff\r\nTraceparent: 00-0-0\r\n", ""},
		{"CONNECT", "/health/ready", "Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"},
		{"TRACE", "*", "Expect: 100-continue\r\nContent-Length: 3\r\n", "abcd"},
	} {
		f.Add(seed.method, seed.target, seed.headers, []byte(seed.body))
	}
	f.Fuzz(func(t *testing.T, method, target, headers string, body []byte) {
		text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: todo\r\n%s", method, target, headers)
		if !strings.Contains(headers, "Authorization") {
			text += "Authorization: " + c.authorization + "\r\n"
		}
		if !strings.Contains(headers, "Transfer-Encoding") &&
			!strings.Contains(headers, "Content-Length") {
			text += fmt.Sprintf("Content-Length: %d\r\n", len(body))
		}
		in := io.MultiReader(strings.NewReader(text+"\r\n"), bytes.NewReader(body))
		r, err := http.ReadRequest(bufio.NewReader(in))
		if err != nil || r.RequestURI == "*" {
			return // net/http answers
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		a := answer{w.Code, w.Result().Header, w.Body.String()}
		if strings.Contains(fmt.Sprint(a.header, a.body), secret) {
			t.Errorf("%q = %v %v contains another user's task", text, a, a.header)
		}
		redirect := a.status/100 == 3 && a.status != http.StatusNotModified
		if err := a.check(r.Method, r.URL.EscapedPath()); err != nil && !redirect ||
			a.status < 200 || a.status >= 500 {
			t.Errorf("%q = %v %v: %v", text, a, a.header, err)
		}
	})
}

// FuzzParseObject compares parseObject with encoding/json, which replaces half of a surrogate pair
// with U+FFFD. A body that contains U+FFFD itself is skipped.
func FuzzParseObject(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, ` {"a": 1} `, `null`, `[]`, `{}{}`, "\ufeff{}", "{\"\xff\": 1}", `{"a": 1e999}`,
		`{"a": "\ud83d\ude00"}`, `{"a": "\udc00\ud800"}`, `{"\ud800": 1}`, `{"a": "\ud800\u0041"}`,
		`{"a": "\\ud800"}`, `{"a": "\\\ud800"}`, `{"a": ["\ud83d", "\ude00"]}`,
		`{"a": 1, "a": {"b": "\ud800\ud800\udc00"}}`, `{"a": "\ud83d\u005cude00"}`,
		`{"a": "\n\"\ud83d\ude00\/"}`, `{"a": "\uD800\\uDC00"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if regexp.MustCompile(`(?i)\\ufffd|\x{fffd}`).Match(body) && utf8.Valid(body) {
			return
		}
		want := json.Valid(body) && utf8.Valid(body) && bytes.TrimLeft(body, " \t\r\n")[0] == '{'
		d := json.NewDecoder(bytes.NewReader(body))
		d.UseNumber() // 1e999 is JSON and no float64
		for token, err := d.Token(); want && err == nil; token, err = d.Token() {
			text, _ := token.(string)
			want = !strings.Contains(text, "\ufffd")
		}
		if _, err := parseObject(body); (err == nil) != want {
			t.Errorf("parseObject(%q) = %v, want it accepted: %t", body, err, want)
		}
	})
}
