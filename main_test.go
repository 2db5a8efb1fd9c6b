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
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// The HTTP edge and the settings. answer.check has what every response must have.

// The router answers before the token is checked. What it redirects is logged and counted too.
func TestPathsAndMethods(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{})
	c.authorization = ""
	c.http = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
	for _, row := range []struct {
		method, path string
		status       int
		header       string // Allow or Location
	}{
		{"GET", "/api/u/tasks/", 404, ""},
		{"DELETE", "/api/u/tasks/1/", 404, ""},
		{"PATCH", "/api/u/tasks/1/complete/", 404, ""},
		{"BREW", "/coffee", 404, ""},
		{"BREW", "/api/u/tasks", 405, "GET, HEAD, POST"},
		{"OPTIONS", "/api/u/tasks/x", 405, "DELETE, GET, HEAD, PATCH, PUT"},
		{"HEAD", "/api/u/tasks/1/complete", 405, "PATCH"},
		{"PATCH", "/api/u/tasks/1/complete", 401, ""},
		{"GET", "/openapi.json", 200, ""},
		{"GET", "/health/live", 200, ""},
		{"GET", "//health/live", 307, "/health/live"},
		{"POST", "/api/../docs", 307, "/docs"},
	} {
		a := c.send(row.method, row.path, "")
		got := a.header.Get("Allow") + a.header.Get("Location")
		if a.status != row.status || got != row.header {
			t.Errorf("%s %s = %v, %q, want %d, %q", row.method, row.path, a, got, row.status, row.header)
		}
		line := s.log.request(t, a.header.Get("X-Request-Id"))
		if line["status"] != float64(row.status) {
			t.Errorf("%s %s = %v is logged as %v", row.method, row.path, a, line)
		}
	}
	page := httptest.NewRecorder()
	s.serveMetrics(page, nil)
	if text := page.Body.String(); !strings.Contains(text, `method="GET",status="307"} 1`) {
		t.Errorf("the metrics lack a redirect: %s", text)
	}
}

func TestHeadIsGetWithoutBody(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	for _, path := range []string{c.path(c.create("head").path()), c.path("?total=true"),
		c.path("?limit=0"), "/nothing", "/health/ready", "/openapi.json", "/docs"} {
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

// The policy of /docs allows what the page loads, by version and hash, and nothing else.
func TestDocsPolicy(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
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
// kept. TestPathsAndMethods has the first checks, TestIfMatch the last ones.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{})
	busy, other, forger := newClientOf(t, s.url, "busy"), newClientOf(t, s.url, "other"), *c
	forger.authorization = "Bearer x.y.z"
	s.slots.acquire(t.Context(), busy.user) // the only one
	for _, route := range []struct{ method, path, field, header string }{
		{"POST", "", "title", "Idempotency-Key"},
		{"PUT", "/ID", "title", "If-Match"},
		{"PATCH", "/ID/complete", "completed", "If-Match"},
	} {
		t.Run(route.method, func(t *testing.T) {
			t.Parallel()
			as, owner, id := &forger, other, "abc"
			kind, body := "text/plain", strings.Repeat(" ", maxBody+1)
			expect := func(want apiError) {
				t.Helper()
				path := owner.path(strings.Replace(route.path, "ID", id, 1))
				a := as.send(route.method, path, body, "Content-Type", kind, route.header, "undefined")
				if a.status != want.status || !strings.HasPrefix(a.detail(), want.detail) {
					t.Errorf("%s %.40q = %v, want %d %s", path, body, a, want.status, want)
				}
			}
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
			kind = "application/json"
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
		"hunter2":       func() error { return fmt.Errorf("hunter2") },
	} {
		id := rand.Text()
		s.mux.HandleFunc("GET /"+id+"/{user_id}", s.forUser(
			func(http.ResponseWriter, *http.Request, taskKey) error { return fail() }))
		a := c.send("GET", "/"+id+"/"+c.user, "", "X-Request-Id", id)
		next := c.do("POST", "", "[]")
		if a.status != 500 || strings.Contains(fmt.Sprint(a), "hunter2") || next.status != 400 {
			t.Errorf("%s = %v, then %v, want 500 without the cause, then 400", cause, a, next)
		}
		if logged := fmt.Sprint(s.log.request(t, id)["error"]); !strings.Contains(logged, cause) {
			t.Errorf("%q is logged, want the cause %s", logged, cause)
		}
	}
}

// A body that is not read delays no response, also in this server without timeouts.
func TestHeadersOfBodies(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	const object, chunked = `{"title": ""}`, "Transfer-Encoding: chunked" // a 422 once it is read
	const typed = "Content-Length: 13\r\nContent-Type: "
	const encoded = "Content-Length: 13\r\nContent-Encoding: "
	create, padded := "POST "+c.path(""), fmt.Sprintf("%-65536s", object)
	for _, row := range []struct {
		request, header, body string
		status                int
	}{
		{create, "Content-Length: 65536", padded, 422},
		{create, chunked, "10000\r\n" + padded + "\r\n0\r\n\r\n", 422},
		{create, typed + "Application/JSON;charset=UTF-8", object, 422},
		{create, typed + "application/vnd.api+json; version=1", object, 422},
		{create, encoded + " Identity", object, 422},
		{create, typed + "text/plain;charset=UTF-8", "", 415}, // what fetch sends with a string
		{create, encoded + "gzip", "", 415},
		{create, encoded + "identity, br", "", 415},
		{create, chunked + "\r\nContent-Type: text/json", "", 415},
		{create, "Content-Length: 65537\r\nContent-Type: text/json", "", 413},
		{create, chunked, "40000000\r\n " + padded, 413}, // although the body does not end
		{"POST /api/other/tasks", chunked, "", 403},
		{"GET /health/live", "Content-Length: 9", "", 200},
		{create, "Connection: close\r\nContent-Type: text/plain", "", 400}, // there is no body
		{create, "Content-Length: 14", object, 400},                        // the connection ends
		{create, chunked, "zz\r\n" + object + "\r\n0\r\n\r\n", 400},
	} {
		conn := dialRaw(t, c.service, fmt.Sprintf("%s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n"+
			"%s\r\n\r\n%s", row.request, c.authorization, row.header, row.body))
		if row.status == 400 && row.body != "" {
			conn.(*net.TCPConn).CloseWrite()
		}
		a := readAnswer(t, conn)
		if a.status != row.status || row.status != 422 && !isClosed(conn) {
			t.Errorf("%s with %q, %.20q = %v, want %d", row.request, row.header, row.body, a, row.status)
		}
		accepts := a.header.Get("Accept-Encoding") == "identity"
		if accepts != (a.status == 415 && strings.Contains(row.header, encoded)) {
			t.Errorf("%s with %q = %v, with Accept-Encoding: %t", row.request, row.header, a, accepts)
		}
	}
}

// What is not one JSON object in valid UTF-8 is a 400.
func TestBodiesThatAreNotOneObject(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	const object, with = `{"title": ""}`, `{"title": "", "x": ` // a 422 once it is read
	deep := func(n int) string { return with + strings.Repeat("[", n) + strings.Repeat("]", n) + "}" }
	for status, bodies := range map[int][]string{
		422: {" " + object + "\r\n\t", "\ufeff" + object, deep(500), with + `"\u0000"}`,
			with + `"\uD83D\ude00"}`, with + `"\\ud800\\\\udc00"}`},
		400: {"\ufeff\ufeff" + object, "\ufeff", " \n", "", object + `{}`, object + `x`, object + "\x00",
			`null`, `[]`, `[` + object + `]`, `"x"`, `7`, `{`, `{"title": "`, `{"title": "",}`, deep(20000),
			with + `NaN}`, with + "\"a\nb\"}", with + `"\x"}`,
			with + "\"\xff\"}", with + "\"\xed\xa0\x80\"}", `{"` + "\xc3" + `": 1}`, // invalid UTF-8
			with + `"\ud800"}`, with + `"\udc00"}`, with + `"\uDE00\uD83D"}`, with + `"\\\ud800"}`,
			with + `"\ud800\ud800"}`, with + `"\ud800\\udc00"}`, `{"title": "", "\udfff": 1}`},
	} {
		for _, body := range bodies {
			if a := c.do("POST", "", body); a.status != status {
				t.Errorf("%.80q = %v, want %d", body, a, status)
			}
		}
	}
}

// A connection is answered or closed within 20 s, whatever the client and the database do.
func TestLargeHeadersAndSlowClients(t *testing.T) {
	t.Parallel()
	p := startDetachedProcess(t)
	p.waitLive()
	const head, end = "GET /health/live HTTP/1.1\r\nHost: todo\r\nX: ", "\r\n\r\n"
	large, names := strings.Repeat("x", 16<<10-len(head)-len(end)), ""
	for i := range 99 {
		names += fmt.Sprintf("\r\nX-%d: x", i)
	}
	for header, status := range map[string]int{
		large: 200, large + "x": 431, // 16 KiB and a byte more
		names + "\r\nX: x": 200, names + "\r\nY: x": 431, // 100 names, one of them twice, and 101
	} {
		a := readAnswer(t, dialRaw(t, p.url, head+header+end))
		err := a.check("GET", "/health/live")
		if a.status != status || err != nil && header != large+"x" { // that 431 is net/http's
			t.Errorf("a header of %d bytes, %.9q = %v (%v), want %d", len(header), header, a, err, status)
		}
	}
	c := newClientOf(t, p.url, "anyone")
	list := strings.NewReplacer("POST", "GET", "\r\n\r\n", "").
		Replace(c.rawCreate("", "Connection: close", "X: "))
	create := newClientOf(t, p.url, "another").rawCreate("{", "Content-Length: 65536")
	var clients sync.WaitGroup
	for _, row := range []struct{ name, text, slowly, want string }{
		{"header", list, strings.Repeat("x", 200), `^($|HTTP/1.1 400 )`},
		{"body", create, strings.Repeat("x", 200), `^HTTP/1.1 40[08] `},
		{"header and database", list, strings.Repeat("x", 30) + "\r\n\r\n", `^HTTP/1.1 503 `},
	} {
		start, conn := time.Now(), dialRaw(t, p.url, row.text)
		clients.Go(func() {
			go func() {
				for _, b := range []byte(row.slowly) {
					conn.Write([]byte{b})
					time.Sleep(100 * time.Millisecond)
				}
			}()
			got, _ := io.ReadAll(conn)
			took, want := time.Since(start), regexp.MustCompile(row.want)
			if !want.Match(got) || took > 20*time.Second {
				t.Errorf("slow %s: %s after %v, want %s within 20 s", row.name, got, took, row.want)
			}
		})
	}
	clients.Wait()
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const app, local, evil = "https://app.example.com", "http://localhost:3000", "https://evil.example"
	s, c := startDetached(t, settings{origins: []string{app, local}})
	expect := func(method, path string, status int, origin string, want http.Header) {
		t.Helper()
		a := c.send(method, path, "", "Origin", origin, "Access-Control-Request-Headers",
			"authorization,traceparent, (bad), two words")
		maps.DeleteFunc(a.header, func(name string, _ []string) bool {
			return name != "Vary" && !strings.HasPrefix(name, "Access-Control-")
		})
		if a.status != status || !reflect.DeepEqual(a.header, want) {
			t.Errorf("%s %s from %q = %v %v, want %d %v", method, path, origin, a, a.header, status, want)
		}
	}
	allow := func(origin string) http.Header {
		return http.Header{"Vary": {"Origin"}, "Access-Control-Allow-Origin": {origin},
			"Access-Control-Allow-Credentials": {"true"},
			"Access-Control-Expose-Headers": {"ETag, Link, Location, X-Total-Count, X-Request-Id, " +
				"Retry-After, Idempotency-Replayed, WWW-Authenticate"}}
	}
	vary := http.Header{"Vary": {"Origin"}}
	origins := map[string]http.Header{app: allow(app), local: allow(local), "": vary, evil: vary,
		app + ".evil.example": vary, "https://APP.example.com": vary}
	for request, status := range map[string]int{
		"GET /health/live": 200, "POST " + c.path(""): 400, "GET /api/other/tasks": 403,
		"GET /nothing": 404, "PUT " + c.path(""): 405, "GET " + c.path("?limit=0"): 422,
	} {
		method, path, _ := strings.Cut(request, " ")
		for origin, want := range origins {
			expect(method, path, status, origin, want)
		}
	}
	warnings := strings.Join(s.log.messages(t, "WARNING"), "\n")
	for origin, want := range origins {
		warned := strings.Contains(warnings, `"`+origin+`" is not in CORS_ORIGINS`)
		if warned != (len(want) == 1 && origin != "") {
			t.Errorf("a WARNING about %s: %t in %s", origin, warned, warnings)
		}
	}
	c.authorization = "" // a preflight has none
	preflight := allow(app)
	preflight.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
	preflight.Set("Access-Control-Max-Age", "7200")
	preflight.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, If-Match, "+
		"If-None-Match, Idempotency-Key, X-Request-Id, traceparent")
	expect("OPTIONS", c.path("/7"), 204, app, preflight)
	expect("OPTIONS", c.path("/7"), 405, evil, vary)
	_, c = startDetached(t, settings{})
	expect("OPTIONS", c.path("/7"), 405, app, http.Header{}) // without CORS_ORIGINS
}

// A malformed setting ends the start with one line that names it. White space around it is removed.
func TestSettings(t *testing.T) {
	t.Parallel()
	done, cancel := context.WithCancel(t.Context())
	cancel() // ends a service that starts nevertheless
	port := freePort(t)
	for name, values := range map[string][]string{
		"PORT":         {"x", "-1", "65536", "80 80"},
		"METRICS_PORT": {"x", port}, // in use
		"LOG_LEVEL":    {"verbose", "warning", "0"},
		"CORS_ORIGINS": {"*", "https://*.b.example", "b.example", "https://b.example,", "https://B.test",
			"https://b.example/", "https://u@b.example", "https://b.example:443", "http://b.example:80"},
	} {
		for _, value := range values {
			getenv := env("DATABASE_URL="+noDatabase, "BETTER_AUTH_SECRET="+testSecret,
				"PORT="+port, name+"="+value)
			message := fmt.Sprint(run(done, nil, getenv, io.Discard))
			if !regexp.MustCompile("^" + name + "[: ].*$").MatchString(message) {
				t.Errorf("%s=%s: %q, want one line that begins with the name", name, value, message)
			}
		}
	}
	p := startDetachedProcess(t) // listens on all addresses
	p.waitLive()
	_, port, _ = net.SplitHostPort(strings.TrimPrefix(p.url, "http://"))
	addresses, _ := net.InterfaceAddrs()
	for _, address := range addresses {
		if ip := address.(*net.IPNet).IP; !ip.IsLinkLocalUnicast() { // which needs a zone
			dialRaw(t, net.JoinHostPort(ip.String(), port), "")
		}
	}
	p = startDetachedProcess(t, "LOG_LEVEL=x")
	if status := p.wait(20 * time.Second); status != 1 || len(p.output.lines(t)) != 1 ||
		len(p.output.messages(t, "ERROR")) != 1 {
		t.Errorf("exit status %d with %s, want 1 with one ERROR", status, p.output.String())
	}
	for _, args := range []string{"serve", "migrate x", "token", "token a b"} {
		message := fmt.Sprint(run(done, strings.Fields(args), env(), io.Discard))
		if !strings.HasPrefix(message, "usage: todo-app") {
			t.Errorf("todo-app %s: %s, want the usage", args, message)
		}
	}
	set, err := readSettings(env("BETTER_AUTH_SECRET="+testSecret, "PORT= 80\n", "METRICS_PORT=\t90 ",
		"LOG_LEVEL= debug\n", "GOOGLE_CLOUD_PROJECT= g\n",
		"CORS_ORIGINS= https://a.example ,\nhttp://[::1]:5173, capacitor://x\t"))
	got := fmt.Sprintln(set.port, set.metricsPort, set.logLevel, set.project, set.origins)
	if want := "80 90 DEBUG g [https://a.example http://[::1]:5173 capacitor://x]\n"; got != want {
		t.Errorf("the settings are %q, %v, want %q", got, err, want)
	}
}

// FuzzHandler sends any request to the whole handler, with the token of a separate user.
func FuzzHandler(f *testing.F) {
	origins := []string{"https://app.example.com"}
	s := newServer(settings{auth: sharedAuth, origins: origins}, testDB(f), newLogger(io.Discard, 0))
	// With -fuzz, worker processes run this function too, and are killed. They must use the same
	// users, whose tasks the first process removes.
	const variable = "TODO_APP_FUZZ_RUN"
	run, secret := cmp.Or(os.Getenv(variable), rand.Text()), "secret-"+rand.Text()
	f.Setenv(variable, run)
	other, c := newClientOf(f, sharedURL, "test-other-"+run), newClientOf(f, sharedURL, "test-"+run)
	hidden, task := other.create(secret).path(), c.path(c.create("Milk").path())
	for _, seed := range []struct{ method, target, headers, body string }{
		{"GET", c.path("?limit=1&before=9&completed=true&total=true"), "", ""},
		{"HEAD", task, "If-None-Match: W/\"1\", *\r\n", ""},
		{"POST", c.path(""), "Idempotency-Key: 0123456789abcdef\r\n", `{"title": "\u0000\ud83d\ude00"}`},
		{"PUT", task, "If-Match: \"2026-01-01T00:00:00.000000Z\"\r\n", `{"description": null}`},
		{"PATCH", task + "/complete", "If-Match: *\r\nIf-Match: \"-1\"\r\n", `{"completed": true}{`},
		{"DELETE", c.path(hidden), "", ""},
		{"GET", other.path(hidden), "X-Request-Id: \xff\r\nTraceparent: 00-0-0\r\n", ""},
		{"CONNECT", "//api/../%00/tasks/?%00", "Origin: " + origins[0] + "\r\n", ""},
	} {
		f.Add(seed.method, seed.target, seed.headers, []byte(seed.body))
	}
	f.Fuzz(func(t *testing.T, method, target, headers string, body []byte) {
		text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: todo\r\n%sAuthorization: %s\r\n\r\n",
			method, target, headers, c.authorization)
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil || r.RequestURI == "*" {
			return // net/http answers
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		a := answer{w.Code, w.Result().Header, w.Body.String()}
		err = a.check(r.Method, r.URL.EscapedPath())
		if a.status < 200 || a.status >= 500 || err != nil ||
			strings.Contains(fmt.Sprint(a.header, a.body), secret) {
			t.Errorf("%q = %v %v (%v), want no 500 and no other user's task", text, a, a.header, err)
		}
	})
}

// FuzzParseObject compares parseObject with encoding/json, which replaces half of a surrogate pair
// with U+FFFD. A body that contains U+FFFD itself is skipped.
func FuzzParseObject(f *testing.F) {
	for _, seed := range []string{
		``, `null`, `[]`, ` {"a": 1e999} `, `{}{}`, "{\"\xff\": 1}", `{"\ud800": "\u0041"}`,
		`{"a": ["\\ud800", "\\\ud800"]}`, `{"a": 1, "a": {"b": "\n\ud800\ud800\udc00"}}`,
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
