package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Hostile clients.

// abuse sends text on a new connection, then a byte from time to time if trickle is set. It returns
// the statuses of the responses until the service closes the connection.
func abuse(service, text string, trickle bool) (statuses string, err error) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(service, "http://"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	go func() {
		_, err := io.WriteString(conn, text)
		for ; trickle && err == nil; time.Sleep(300 * time.Millisecond) {
			_, err = io.WriteString(conn, "x")
		}
	}()
	var all []string
	for in := bufio.NewReader(conn); ; {
		res, err := http.ReadResponse(in, nil)
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
		if err != nil {
			return strings.Join(all, " "), nil
		}
		all = append(all, strconv.Itoa(res.StatusCode))
	}
}

// Four hundred connections send what no client should. The service closes them and serves others in
// the meantime.
func TestAbuse(t *testing.T) {
	t.Parallel()
	const pipelined = 50
	crowd := 400
	if underRace() {
		crowd = 100 // as much work for the processor
	}
	const head = "GET /health/live HTTP/1.1\r\nHost: todo\r\n"
	get := func(text string) func(*client) string { return func(*client) string { return text } }
	for _, row := range []struct {
		name     string
		text     func(*client) string // by a user with one connection
		trickle  bool                 // a byte from time to time
		rounds   int                  // connections of each, one after the other
		statuses string               // until the connection is closed
	}{
		{"slow headers", get(head + "X-Slow: "), true, 1, ""},
		{"slow bodies", func(c *client) string {
			return c.rawCreate(`{"title":`, "Content-Length: 65536")
		}, true, 1, "408"},
		{"huge headers", get(head + "X-Large: " + strings.Repeat("x", 1<<20)), false, 1, "431"},
		{"many headers", get(head + strings.Repeat("X: 1\r\n", 10<<10)), false, 1, "431"},
		{"many header names", get(head + headerNames(10_000)), false, 1, "431"},
		{"unfinished header names", get(head + headerNames(2_000) + "X-Slow: "), true, 1, ""},
		{"header names, no token, no body", get("POST /api/x/tasks HTTP/1.1\r\nHost: todo\r\n" +
			"Content-Length: 100\r\n" + headerNames(2_000) + "\r\n"), false, 12, "401"},
		{"garbage after pipelined requests", get(strings.Repeat(head+"\r\n", pipelined) +
			"\x00\xff\r\n\r\n"),
			false, 1, strings.Repeat("200 ", pipelined) + "400"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "LOG_LEVEL=error")
			other := p.newClient()
			var complete, wrong atomic.Int64
			done := inParallel(crowd, func() {
				c := &client{user: newUser()}
				token, err := sharedAuth.sign(c.user, nil)
				c.authorization = "Bearer " + token
				for range row.rounds {
					start := time.Now()
					var got string
					if err == nil {
						got, err = abuse(p.url, row.text(c), row.trickle)
					}
					if got == row.statuses {
						complete.Add(1)
					}
					// The last response may be dropped when the connection is closed on unread data. If the
					// timeout cuts a header line, net/http takes its part for a line and sends a 400.
					took, prefix := time.Since(start), strings.HasPrefix(cmp.Or(row.statuses, "400"), got)
					if (err != nil || !prefix || took > 20*time.Second) && wrong.Add(1) == 1 {
						t.Errorf("%q, %v, closed after %v, want %q within 20 s", got, err, took, row.statuses)
					}
				}
			})
			median, longest := other.listUntil(done)
			t.Logf("a list of another user takes %v (median), %v at most", median, longest)
			if n, all := complete.Load(), int64(crowd*row.rounds); n < all/10 {
				t.Errorf("%d of %d got all of %q", n, all, row.statuses)
			}
			if peak := p.memory("VmHWM"); peak > 128<<20 {
				t.Errorf("%d bytes of memory, want 128 MiB at most", peak)
			}
			if !underRace() && (median > time.Second || longest > 5*time.Second) {
				t.Errorf("a list of another user takes %v (median), %v at most, want 1 s and 5 s",
					median, longest)
			}
		})
	}
}

// headerNames returns n header lines with different names of two or three letters.
func headerNames(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%s:\n", strconv.FormatInt(int64(36+i), 36))
	}
	return b.String()
}

// FuzzHandler sends any request to the whole handler, with the token of a user whose tasks no other
// test sees.
func FuzzHandler(f *testing.F) {
	// With -fuzz, worker processes run this function too, and are killed. They must use the same
	// users, whose tasks the first process removes.
	const variable = "TODO_APP_FUZZ_RUN"
	run := cmp.Or(os.Getenv(variable), rand.Text())
	f.Setenv(variable, run)
	other := newClientOf(f, sharedURL, "test-other-"+run)
	c := newClientOf(f, sharedURL, "test-"+run)
	secret := "secret-" + rand.Text()
	otherTask := other.create(secret)
	task := c.path(c.create("Milk").path())
	origins := []string{"https://app.example.com"}
	s := newServer(sharedAuth, sharedDB, newLogger(io.Discard, 0), origins, "")

	const asJSON = "Content-Type: application/json\r\n"
	for _, seed := range []struct{ method, target, headers, body string }{
		{"GET", c.path(""), "", ""},
		{"GET", c.path("?limit=1&before=9&completed=true&total=true"), "", ""},
		{"GET", c.path("?offset=9223372036854775807&limit=100"), "", ""},
		{"GET", c.path("?limit=%zz;a=b&limit=2"), "", ""},
		{"HEAD", task, "If-None-Match: W/\"1\", *\r\n", ""},
		{"POST", c.path(""), asJSON, `{"title": "Milk", "description": null, "completed": true}`},
		{"POST", c.path(""), asJSON + "Idempotency-Key: k\r\n", `{"title": "\u0000\ud83d\ude00"}`},
		{"POST", c.path(""), "Idempotency-Key: \xff k\r\nContent-Type: x/y+json; charset\r\n",
			"{\"title\": \"\xff\"}"},
		{"PUT", task, asJSON + "If-Match: \"253402300799999999\"\r\n",
			`{"title": "\u2003", "completed": null}`},
		{"PATCH", task + "/complete", "If-Match: *\r\nIf-Match: \"-1\"\r\n", ``},
		{"PATCH", task + "/complete", asJSON, `{"completed": true}{`},
		{"DELETE", c.path("/9223372036854775808"), "", ""},
		{"DELETE", c.path(otherTask.path()), "", ""},
		{"GET", other.path(otherTask.path()), "", ""},
		{"GET", "/api/%2F/tasks", "Authorization: Bearer e30.e30.e30\r\n", ""},
		{"GET", "//api/../%00/tasks/?%00", "", ""},
		{"OPTIONS", c.path(""), "Origin: https://app.example.com\r\nAccess-Control-Request-Method: PUT\r\n", ""},
		{"GET", "/openapi.json", "If-None-Match: *\r\n", ""},
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
		if a.status/100 == 3 && a.status != http.StatusNotModified {
			return // the mux cleans a path
		}
		if a.status < 200 || a.status >= 500 {
			t.Errorf("%q = %v", text, a)
		}
		if vary := a.header.Get("Vary"); vary != "Origin" {
			t.Errorf("%q = %v, Vary %q, want Origin", text, a, vary)
		}
		path := r.URL.EscapedPath()
		if !strings.HasPrefix(r.Pattern, r.Method+" ") {
			path = "/" // of no route
		}
		if err := a.check(r.Method, path); err != nil {
			t.Errorf("%q = %v %v: %v", text, a, a.header, err)
		}
	})
}
