package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
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
		{"PATCH", "/api/u/tasks/1/complete/", 404, ""},
		{"BREW", "/api/u/tasks", 405, "GET, HEAD, POST"},
		{"OPTIONS", "/api/u/tasks/x", 405, "DELETE, GET, HEAD, PATCH, PUT"},
		{"HEAD", "/api/u/tasks/1/complete", 405, "PATCH"},
		{"PATCH", "/api/u/tasks/1/complete", 401, ""},
		{"GET", "/openapi.json", 200, ""},
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

// HEAD has the status and headers of GET, also of errors.
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

// rawCreate returns the text of a create by c, with more header lines.
func (c *client) rawCreate(body string, headers ...string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n%s\r\n\r\n%s",
		c.path(""), c.authorization, strings.Join(headers, "\r\n"), body)
}

// readAnswer reads the one response that is expected on a connection.
func readAnswer(t testing.TB, conn net.Conn) answer {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("read a response: %v", err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("read the body of a response: %v", err)
	}
	return answer{res.StatusCode, res.Header, string(body)}
}

// isClosed reports whether the service closes a connection without sending anything more.
func isClosed(conn net.Conn) bool {
	n, err := conn.Read(make([]byte, 1))
	return n == 0 && err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
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
		{create, chunked + "\r\nContent-Type: text/json", "", 415},
		{create, "Content-Length: 65537\r\nContent-Type: text/json", "", 413},
		{create, chunked, "40000000\r\n " + padded, 413}, // although the body does not end
		{"POST /api/other/tasks", chunked, "", 403},
		{"GET /openapi.json", "Content-Length: 9", "", 200},                // a large response
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
	p := startProgram(t, os.Args[0], nil, "DATABASE_URL="+noDatabase)
	p.waitHealth("live")
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
		{"header and database", list, strings.Repeat("x", 10) + "\r\n\r\n", `^HTTP/1.1 503 `},
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

// A listed origin may read each response, errors too. Any other one is logged.
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
		"If-None-Match, Idempotency-Key, X-Request-Id, authorization, traceparent")
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
	port := freePort()
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
	p := startProgram(t, os.Args[0], nil, "DATABASE_URL="+noDatabase) // listens on all addresses
	p.waitHealth("live")
	_, port, _ = net.SplitHostPort(strings.TrimPrefix(p.url, "http://"))
	addresses, _ := net.InterfaceAddrs()
	for _, address := range addresses {
		if ip := address.(*net.IPNet).IP; !ip.IsLinkLocalUnicast() { // which needs a zone
			dialRaw(t, net.JoinHostPort(ip.String(), port), "")
		}
	}
	p = startProgram(t, os.Args[0], nil, "DATABASE_URL="+noDatabase, "LOG_LEVEL=x")
	if status := p.wait(); status != 1 || len(p.output.lines(t)) != 1 ||
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

// Each request has one line in the log, with its fields. No line is long or contains a secret, no
// matter what a client sends.
func TestLog(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "GOOGLE_CLOUD_PROJECT=project", "LOG_LEVEL=debug", "CORS_ORIGINS=http://a")
	c := p.newClient()
	const id, trace = "0aZ._:/+=-", "105445aa7843bc8bf206b12000100000"
	long := func(text string) string { return strings.Repeat(text, 9<<10/len(text)) }
	list := c.path("")
	for i, row := range []struct{ request, header, body, want string }{
		{"POST " + list, "", `{"title": "hunter2", "description": "hunter2"}`, "POST /tasks 201"},
		{"GET " + list + "?title=hunter2", "X-Request-Id: " + id, "", "GET /tasks 200"},
		{"GET " + list + "?hunter2=%zz", "", "", "GET /tasks 422"},
		{"GET " + list + "/hunter2", `X-Request-Id: hunter2"`, "", "GET /tasks/{id} 404"},
		{"POST " + list, "", `{"title": "hunter2`, "POST /tasks 400"},
		{"POST " + list, "", `{"title": "hunter2\u0000"}`, "POST /tasks 422"},
		{"GET " + list, "Authorization: " + c.authorization + "hunter2", "", "GET /tasks 401"},
		{"GET /api/hunter2/tasks", "", "", "GET /tasks 403"},
		{"GET /?access_token=hunter2", "Traceparent: " + long("ab"), "", "GET / 404"},
		{"TRACE /docs", "Traceparent: 00-" + trace + "-b7ad6b7169203331-01", "", "other /docs 405"},
		{"GET /docs", "X-Cloud-Trace-Context: " + trace + "/1;o=1", "", "GET /docs 200"},
		{"GET /docs", "X-Request-Id: " + long("id"), "", "GET /docs 200"},
		{long("METHOD") + " /docs", "", "", "other /docs 405"},
		{"GET /" + long("path"), "", "", "GET / 404"},
		{"GET /", "Origin: " + long(`"\`), "", "GET / 404"},
	} {
		method, path, _ := strings.Cut(row.request, " ")
		name, value, _ := strings.Cut(row.header, ": ")
		a := c.send(method, path, row.body, cmp.Or(name, "X-Nothing"), value)
		sent := a.header.Get("X-Request-Id")
		if name == "X-Request-Id" && (sent == value) != (value == id) {
			t.Errorf("X-Request-Id: %.40s is answered with %s", value, sent)
		}
		line := p.output.request(t, sent)
		route := strings.TrimPrefix(fmt.Sprint(line["route"]), "/api/{user_id}")
		got := fmt.Sprint(line["method"], " ", route, " ", line["status"])
		if got != row.want || line["bytes"] != float64(len(a.body)) {
			t.Errorf("row %d is logged as %v, want %s and %d bytes", i, line, row.want, len(a.body))
		}
		took, db := line["duration_us"].(float64), line["db_us"].(float64)
		if line["db_wait_us"].(float64) > db || db > took || a.status == 201 && db == 0 {
			t.Errorf("row %d is logged as %v, want db_wait_us <= db_us <= duration_us", i, line)
		}
		traced := line["logging.googleapis.com/trace"] == "projects/project/traces/"+trace
		if (line["error"] != nil) != (a.status >= 400) || traced != strings.Contains(value, trace) {
			t.Errorf("row %d is logged as %v, want its error and the trace in %q", i, line, row.header)
		}
	}
	form := regexp.MustCompile(`^{"time":"2[^"]+","severity":"(DEBUG|INFO|WARNING)","message":.+}\n$`)
	for line := range strings.Lines(p.output.String()) {
		if len(line) > 8<<10 || !form.MatchString(line) {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
	password := cmp.Or(sharedDB.pool.Config().ConnConfig.Password, testSecret)
	for _, secret := range []string{"hunter2", testSecret, password, c.authorization[7:]} {
		if strings.Contains(p.output.String(), secret) {
			t.Errorf("the log contains %q", secret)
		}
	}
}

// Slow statements are logged at WARNING, all of them at DEBUG: with SQL and request id, without
// arguments. A failed one has its SQLSTATE, and its cause is in the log only.
func TestStatementLog(t *testing.T) {
	t.Parallel()
	d := startDB(t, openDB(t, createDatabase(t)))
	sqlExec(t, d.pool, `
		CREATE FUNCTION public.act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.completed THEN PERFORM pg_sleep(1.1); END IF;
			IF NEW.description = 'fail' THEN RAISE '%', repeat(E'cause\x01"', 5000); END IF;
			RETURN NEW; END $$;
		CREATE TRIGGER act BEFORE INSERT ON public.tasks FOR EACH ROW EXECUTE FUNCTION public.act()`)
	for _, level := range []string{"debug", "info", "warn"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "DATABASE_URL="+d.pool.Config().ConnString(), "LOG_LEVEL="+level)
			p.waitHealth("live")
			c := newClientOf(t, p.url, "argument-"+rand.Text())
			c.do("GET", "", "", "X-Request-Id", "list")
			c.do("POST", "", `{"title": "argument", "completed": true}`, "X-Request-Id", "slow")
			a := c.do("POST", "", `{"title": "argument", "description": "fail"}`, "X-Request-Id", "fail")
			cause, _ := p.output.request(t, "fail")["error"].(string)
			if !strings.HasPrefix(cause, "ERROR: cause") || a.status != 500 {
				t.Errorf("a failed statement is answered %v, and the log has the error %s", a, cause)
			}
			for line := range strings.Lines(p.output.String()) {
				if len(line) > 8<<10 {
					t.Errorf("a line has %d bytes", len(line))
				}
			}
			got := map[string]bool{}
			for _, line := range p.output.lines(t) {
				took, _ := line["duration_us"].(float64)
				if strings.Contains(fmt.Sprint(line["sql"]), "public.tasks") && took > 0 {
					got[fmt.Sprintln(line["severity"], line["request_id"], line["rows"], line["sqlstate"])] = true
				}
			}
			want := map[string]bool{"WARNING slow 1 <nil>\n": true}
			if level == "debug" {
				want["DEBUG list 0 <nil>\n"], want["DEBUG fail 0 P0001\n"] = true, true
			}
			if fmt.Sprint(got) != fmt.Sprint(want) || strings.Contains(p.output.String(), "argument") {
				t.Errorf("the log is %s, want %v and no argument", p.output.String(), want)
			}
		})
	}
}

// The service goes on when the reader of its log ends.
func TestLogReaderEnds(t *testing.T) {
	t.Parallel()
	testDB(t)
	p := startProgram(t, "bash", []string{"-c", `exec "$0" > >(read)`, os.Args[0]})
	c := p.newClient()
	c.list("")
}

// METRICS_PORT serves the metrics, the public port does not. A page costs no query.
func TestMetrics(t *testing.T) {
	t.Parallel()
	port := freePort()
	p := startProcess(t, "METRICS_PORT="+port, "DATABASE_URL="+withParam(os.Getenv("DATABASE_URL"),
		"default_query_exec_mode=exec&pool_max_conns=7")) // exec: no statement is sent twice
	c := p.newClient()
	for i := range 3 {
		c.create("counted")
		c.do("GET", "/0", "")
		c.send(fmt.Sprint("BREW", i), "/docs", "")
	}
	get := func(port, request string) answer {
		return readAnswer(t, dialRaw(t, "http://127.0.0.1:"+port, request+" HTTP/1.0\r\n\r\n"))
	}
	if a, b := get(port, "POST /metrics"), get(port, "GET /docs"); a.status+b.status != 405+404 {
		t.Errorf("POST /metrics = %v, GET /docs = %v, want 405 and 404", a, b)
	}
	if a := c.send("GET", "/metrics", ""); a.status != 404 {
		t.Errorf("GET /metrics on the public port = %v, want 404", a)
	}
	page := get(port, "GET /metrics").body
	for name, want := range map[string]float64{ // -1: any number above 0
		`todo_http_requests_total{route="/api/{user_id}/tasks",method="POST",status="201"}`:     3,
		`todo_http_requests_total{route="/api/{user_id}/tasks/{id}",method="GET",status="404"}`: 3,
		`todo_http_requests_total{route="/docs",method="other",status="405"}`:                   3,
		"todo_db_statements_total": 3, "todo_db_statement_seconds_total": -1,
		"todo_db_connections_acquired": 0, "todo_db_connections_idle": 1,
		"todo_db_connections_open": 1, "todo_db_connections_max": 7,
		"todo_db_acquires_total": -1, "todo_db_acquire_waits_total": -1,
		"todo_db_acquire_wait_seconds_total": -1, "todo_db_acquires_canceled_total": 0,
		"go_goroutines": -1, "go_memstats_heap_alloc_bytes": -1, "go_memstats_sys_bytes": -1,
	} {
		var value float64
		_, line, _ := strings.Cut(page, "\n"+name+" ")
		_, err := fmt.Sscan(line, &value)
		if err != nil || value != want && (want >= 0 || value <= 0) {
			t.Errorf("%s = %g %v, want %g", name, value, err, want)
		}
	}
	figures := regexp.MustCompile(`(?m)^todo_db.*`)
	again := get(port, "GET /metrics").body
	if fmt.Sprint(figures.FindAllString(page, -1)) != fmt.Sprint(figures.FindAllString(again, -1)) {
		t.Errorf("the page of the metrics uses the database: %s, then %s", page, again)
	}
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(page)
	if out, err := check.CombinedOutput(); len(out) > 0 { // nothing also if it is not installed
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// A hundred costly requests of one user occupy a third of the pool. Those of others are served.
func TestFairness(t *testing.T) {
	t.Parallel()
	d, _ := startOverRelay(t)
	s := startService(t, d, settings{})
	greedy, other := s.newClient(), s.newClient()
	ids := greedy.fill(100)
	tx := lockTasks(t, greedy.user)
	var rejected atomic.Int64
	done := inParallel(100, func(i int) {
		start := time.Now()
		a, err := greedy.try("PATCH", greedy.path(fmt.Sprint("/", ids[i])), `{"title": "changed"}`)
		switch late := time.Since(start) >= 5*time.Second; {
		case late && a.status == 429:
			rejected.Add(1)
		case a.status != 200:
			t.Errorf("request of the greedy user = %v %v, want 200, or 429 after 5 s", a, err)
		}
	})
	waitBlocked(t, tx, 5)
	for range 50 { // without slots, the first one would wait for the lock's end
		other.list("")
	}
	eventually(t, "95 rejected requests", func() bool { return rejected.Load() == 95 })
	tx.Rollback(t.Context())
	<-done
	greedy.list("") // a slot is free
}

// A request that has sent no statement ends when its client disconnects: it is logged and counted
// as 499, and frees its slot. The 429 comes also while the database is unreachable.
func TestDisconnectedBeforeTheStatement(t *testing.T) {
	t.Parallel()
	testDB(t)
	d := openDB(t, os.Getenv("DATABASE_URL"), func(c *pgxpool.Config) { c.MaxConns = 7 })
	s := startService(t, d, settings{}) // two slots; requests wait for the schema
	c := s.newClient()
	check := func(conn net.Conn, id string) {
		conn.Close()
		if line := s.log.request(t, id); line["status"] != 499.0 {
			t.Errorf("a request that waited for %s is logged as %v, want 499", id, line)
		}
	}
	var slots [2]net.Conn
	for i := range slots {
		slots[i] = dialRaw(t, s.url, c.rawCreate("", "Expect: 100-continue", "Content-Length: 14",
			fmt.Sprint("X-Request-Id: schema-", i)))
		// The interim response tells that the service reads the body, with a slot.
		if line, err := bufio.NewReader(slots[i]).ReadString('\n'); !strings.Contains(line, " 100 ") {
			t.Fatalf("interim response %q, %v, want 100", line, err)
		}
		io.WriteString(slots[i], `{"title": "x"}`)
	}
	check(dialRaw(t, s.url, c.rawCreate("", "X-Request-Id: slot")), "slot")
	check(slots[0], "schema-0")
	check(slots[1], "schema-1")
	page := httptest.NewRecorder()
	if s.serveMetrics(page, nil); !strings.Contains(page.Body.String(), `"POST",status="499"} 3`) {
		t.Errorf("the metrics are %s, want three POST with 499", page.Body)
	}
	statuses := make(chan int, 3) // two get the slots
	inParallel(3, func(int) {
		a, _ := c.try("GET", c.path(""), "")
		statuses <- a.status
	})
	first := <-statuses
	startDB(t, d)
	if second, third := <-statuses, <-statuses; first != 429 || second != 200 || third != 200 {
		t.Errorf("three requests = %d, %d and %d, want 429, 200, 200", first, second, third)
	}
}

// A request whose statement was sent is finished when its client disconnects. One that waits for
// the connection ends.
func TestDisconnectedAfterTheStatement(t *testing.T) {
	t.Parallel()
	testDB(t)
	d := openDB(t, os.Getenv("DATABASE_URL"), func(c *pgxpool.Config) { c.MaxConns = 1 })
	s := startService(t, startDB(t, d), settings{})
	c, other := s.newClient(), s.newClient()
	path := c.create("locked").path()
	tx := lockTasks(t, c.user)
	send := func(c *client, request, id string, header ...string) net.Conn {
		text := c.rawCreate("", append(header, "X-Request-Id: "+id)...)
		return dialRaw(t, s.url, strings.Replace(text, "POST "+c.path(""), request, 1))
	}
	sent := send(c, "PATCH "+c.path(path+"/complete"), "sent")
	waitBlocked(t, tx, 1)
	sent.Close()
	send(other, "GET "+other.path(""), "waits").Close()
	if line := s.log.request(t, "waits"); line["status"] != 499.0 || line["db_wait_us"] == 0.0 {
		t.Errorf("a request that waited for a connection is logged as %v, want 499", line)
	}
	waitBlocked(t, tx, 1)
	tx.Rollback(t.Context())
	if line := s.log.request(t, "sent"); line["status"] != 200.0 {
		t.Errorf("a request whose statement was sent is logged as %v, want 200", line)
	}
	a := c.do("GET", path, "")
	if !decode[wireTask](t, a.body).Completed {
		t.Errorf("the task is %v, want it completed", a)
	}

	// A second statement is sent too, here the one that tells 412 from 404.
	tx = lockTasks(t, c.user)
	sent = send(c, "PATCH "+c.path(path+"/complete"), "second", "If-Match: "+a.header.Get("ETag"))
	waitBlocked(t, tx, 1)
	sent.Close()
	send(other, "GET "+other.path(""), "again").Close()
	s.log.request(t, "again")
	sqlExec(t, tx, `UPDATE public.tasks SET updated_at = now() WHERE user_id = $1`, c.user)
	sqlExec(t, tx, `COMMIT`)
	if line := s.log.request(t, "second"); line["status"] != 412.0 {
		t.Errorf("a request with two statements is logged as %v, want 412", line)
	}
}

// The service occupies under 128 MiB next to 400 connections that are slow or send thousands of
// short headers. Others are served.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	testDB(t)
	program := filepath.Join(t.TempDir(), "todo-app") // without the tests' code
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	p := startProgram(t, program, nil, "LOG_LEVEL=error")
	c, other := p.newClient(), p.newClient()
	head := "POST " + c.path("") + " HTTP/1.1\r\nHost: todo\r\n"
	names := "" // just under 16 KiB
	for i := range 3000 {
		names += fmt.Sprintf("%x:\n", 256+i)
	}
	for range 10 {
		dialRaw(t, p.url, head+"X-Slow: ")
		dialRaw(t, p.url, c.rawCreate(`{"title":`, "Content-Length: 65536"))
	}
	done := inParallel(380, func(int) {
		for range 4 {
			conn := dialRaw(t, p.url, head+"Content-Length: 1000000\r\n"+names+"\r\n")
			io.Copy(io.Discard, conn)
		}
	})
	for range 30 {
		other.list("")
	}
	<-done
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	_, value, _ := strings.Cut(string(status), "VmHWM:")
	var peak int // in KiB; 0 if the system does not tell
	if fmt.Sscan(value, &peak); peak >= 128<<10 {
		t.Errorf("%d KiB of memory next to hostile clients, want under 128 MiB", peak)
	}
}

const exitLimit = 9 * time.Second // of a shutdown; Cloud Run kills the process after 10 s

// Without requests the service exits within 2 s of a signal, and closes its connections until then.
// A second signal ends it at once.
func TestSignals(t *testing.T) {
	t.Parallel()
	paused := watchPauses(t)
	p, impatient := startProcess(t), startProcess(t)
	p.waitHealth("ready")
	impatient.waitHealth("ready")
	start := time.Now()
	p.cmd.Process.Signal(syscall.SIGINT)
	status, took := p.wait(), time.Since(start)
	if status != 0 || took > 2*time.Second && !paused() {
		t.Errorf("exit status %d after %v, want 0 within 2 s: %s", status, took, p.output.String())
	}
	impatient.cmd.Process.Signal(syscall.SIGTERM)
	eventually(t, "response with Connection: close", func() bool {
		res, err := http.Get(impatient.url + "/health/live")
		return err == nil && res.Body.Close() == nil && res.Close
	})
	impatient.cmd.Process.Signal(syscall.SIGTERM)
	if status := impatient.wait(); status != -1 {
		t.Errorf("exit status %d after a second signal, want -1: that of the signal", status)
	}
}

// watchPauses returns a function that reports whether the machine has paused: then several timers
// of the service may have expired at once, and its times tell nothing.
func watchPauses(t *testing.T) (paused func() bool) {
	var found atomic.Bool
	go func() {
		for last := time.Now(); t.Context().Err() == nil; last = time.Now() {
			time.Sleep(10 * time.Millisecond)
			if time.Since(last) > 500*time.Millisecond {
				found.Store(true)
			}
		}
	}()
	return found.Load
}

// A statement that still runs 7 s after the signal is canceled on the server and answered 503.
func TestShutdownCancelsStatements(t *testing.T) {
	t.Parallel()
	paused := watchPauses(t)
	p := startProcess(t)
	c := p.newClient()
	path := c.path(c.create("locked").path())
	tx := lockTasks(t, c.user)
	var a answer
	var took time.Duration
	answered := inParallel(1, func(int) {
		start := time.Now()
		a, _ = c.try("PATCH", path, `{"title": "changed"}`)
		took = time.Since(start)
	})
	waitBlocked(t, tx, 1)
	start := time.Now()
	p.cmd.Process.Signal(syscall.SIGTERM)
	status, exited := p.wait(), time.Since(start)
	<-answered
	if status != 0 || exited > exitLimit && !paused() {
		t.Errorf("exit status %d after %v, want 0 in 9 s: %s", status, exited, p.output.String())
	}
	if a.status != 503 || took < 7*time.Second {
		t.Errorf("blocked change = %v after %v, want 503 7 s after the signal", a, took)
	}
	waitBlocked(t, tx, 0)
}

// No request is lost while a router goes on sending for 5 s after the signal. A client that never
// stops does not delay the exit.
func TestShutdownLosesNoRequest(t *testing.T) {
	t.Parallel()
	paused := watchPauses(t)
	p := startProcess(t, "LOG_LEVEL=warn")
	c, endless := p.newClient(), p.newClient()
	var created, lost atomic.Int64
	var end atomic.Pointer[time.Time]
	router := inParallel(8, func(int) {
		for e := end.Load(); e == nil || time.Now().Before(*e); e = end.Load() {
			a, err := c.try("POST", c.path(""), `{"title": "x"}`)
			if err != nil || a.status != 201 {
				lost.Add(1)
				t.Logf("create = %v %v, want 201", a, err)
				return
			}
			created.Add(1)
		}
	})
	rest := inParallel(1, func(int) {
		for err := error(nil); err == nil; {
			_, err = endless.try("GET", "/health/live", "")
		}
	})
	eventually(t, "load", func() bool { return created.Load() > 100 })
	start := time.Now()
	end.Store(new(start.Add(5 * time.Second)))
	p.cmd.Process.Signal(syscall.SIGTERM)
	status, took := p.wait(), time.Since(start)
	<-router
	<-rest
	if status != 0 || (took > exitLimit || lost.Load() > 0) && !paused() {
		t.Errorf("exit status %d after %v, %d creates are lost, want 0 in 9 s and none: %s", status,
			took, lost.Load(), p.output.String())
	}
	stored := sqlValue[int64](t, sharedDB.pool,
		`SELECT count(*) FROM public.tasks WHERE user_id = $1`, c.user)
	if stored != created.Load() {
		t.Errorf("%d tasks of %d creates that were acknowledged", stored, created.Load())
	}
}
