package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Four hundred connections do at once what no client should. They are cut, and
// others are served meanwhile.
func TestAbuse(t *testing.T) {
	t.Parallel()
	const crowd = 400
	const head = "GET /health/live HTTP/1.1\r\nHost: todo\r\n"
	const pipelined = 50
	patience := 5 * time.Second // of the others
	if underRace() {
		patience = 20 * time.Second
	}
	for _, row := range []struct {
		name    string
		text    func(c *client) string // of a connection of its own user
		trickle bool                   // a byte from time to time
		rounds  int                    // connections of each, one after the other
		answers string                 // statuses that each gets before it is cut
	}{
		{"slow headers", func(*client) string { return head + "X-Slow: " }, true, 1, ""},
		{"slow bodies", func(c *client) string { return c.post(`{"title":`, "Content-Length: 65536") }, true, 1, "408"},
		{"huge headers", func(*client) string { return head + "X-Large: " + strings.Repeat("x", 1<<20) }, false, 1, "431"},
		{"many headers", func(*client) string { return head + strings.Repeat("X: 1\r\n", 10<<10) }, false, 1, "431"},
		{"many header names", func(*client) string { return head + names(10_000) }, false, 1, "431"},
		{"unfinished header names", func(*client) string { return head + names(2_000) + "X-Slow: " }, true, 1, ""},
		{"header names, and no token and no body", func(c *client) string {
			return "POST /api/x/tasks HTTP/1.1\r\nHost: todo\r\nContent-Length: 100\r\n" + names(2_000) + "\r\n"
		}, false, 12, "401"},
		{"garbage pipelined", func(*client) string { return strings.Repeat(head+"\r\n", pipelined) + "\x00\xff\r\n\r\n" }, false, 1,
			strings.Repeat("200 ", pipelined) + "400"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "LOG_LEVEL=error")
			p.waitLive()
			c := newClientOf(t, p.url, "test-"+rand.Text())
			var abusers sync.WaitGroup
			var whole, wrong atomic.Int64
			for range crowd {
				conn := raw(t, p.url, "")
				abuser := &client{t: t, user: "test-" + rand.Text()}
				abuser.authorization = authorization(t, abuser.user)
				text := row.text(abuser)
				round := func(conn net.Conn) {
					start := time.Now()
					defer conn.Close()
					go func() {
						_, err := io.WriteString(conn, text)
						for ; row.trickle && err == nil; time.Sleep(300 * time.Millisecond) {
							_, err = io.WriteString(conn, "x")
						}
					}()
					var answers []string
					for in := bufio.NewReader(conn); ; {
						res, err := http.ReadResponse(in, nil)
						if err == nil {
							_, err = io.Copy(io.Discard, res.Body)
						}
						if err != nil {
							break
						}
						answers = append(answers, strconv.Itoa(res.StatusCode))
					}
					took, got := time.Since(start), strings.Join(answers, " ")
					if got == row.answers {
						whole.Add(1)
					}
					// The last answer may be lost where the connection is cut upon what was sent beyond it.
					if (!strings.HasPrefix(row.answers, got) || took > 20*time.Second) && wrong.Add(1) == 1 {
						t.Errorf("answered %q and cut after %v, want %q, and all within 20 s", got, took, row.answers)
					}
				}
				abusers.Go(func() {
					round(conn)
					for range row.rounds - 1 {
						next, err := net.Dial("tcp", conn.RemoteAddr().String())
						if err != nil {
							t.Error(err)
							return
						}
						round(next)
					}
				})
			}
			done := make(chan struct{})
			go func() {
				abusers.Wait()
				close(done)
			}()
			var waits []time.Duration
			for {
				start := time.Now()
				if a, err := c.try("GET", "/api/"+c.user+"/tasks", ""); err != nil || a.status != 200 || time.Since(start) > patience {
					t.Errorf("meanwhile a list = %d %s %v after %v, want 200 within %v", a.status, a.body, err, time.Since(start), patience)
				}
				waits = append(waits, time.Since(start))
				select {
				case <-done:
					if n := whole.Load(); n < int64(crowd*row.rounds/2) {
						t.Errorf("%d of %d were answered %q", n, crowd*row.rounds, row.answers)
					}
					if peak := p.memory("VmHWM"); peak > 128<<20 {
						t.Errorf("%d bytes of memory, want 128 MiB at most", peak)
					}
					slices.Sort(waits)
					t.Logf("a list of another user took %v, median of %d", waits[len(waits)/2], len(waits))
					if median := waits[len(waits)/2]; len(waits) >= 20 && median > 100*time.Millisecond && !underRace() {
						t.Errorf("a list of another user took %v, median of %d, want 100 ms at most", median, len(waits))
					}
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
}

// names returns n header lines with names of two or three letters, all different.
func names(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%s:\n", strconv.FormatInt(int64(36+i), 36))
	}
	return b.String()
}

// FuzzHandler sends any request to the whole handler, with the token of a user
// of the fuzzer's, whose tasks nobody else sees.
func FuzzHandler(f *testing.F) {
	// With -fuzz, workers of other processes run this too, and are killed: the users are the same, and the first process removes them.
	const variable = "TODO_APP_FUZZ_RUN"
	run := cmp.Or(os.Getenv(variable), rand.Text())
	f.Setenv(variable, run)
	stranger, c := newClientOf(f, sharedURL, "test-stranger-"+run), newClientOf(f, sharedURL, "test-"+run)
	secret := "secret-" + rand.Text()
	id := stranger.create(secret).ID
	own := c.create("Milk")
	s := newServer(sharedAuth, sharedDB, slog.New(slog.DiscardHandler), []string{"https://app.example.com"}, "")

	tasks := "/api/" + c.user + "/tasks"
	one := fmt.Sprint(tasks, "/", own.ID)
	const asJSON = "Content-Type: application/json\r\n"
	for _, seed := range []struct{ method, target, headers, body string }{
		{"GET", tasks, "", ""},
		{"GET", tasks + "?limit=1&before=9&completed=true&total=true", "", ""},
		{"GET", tasks + "?offset=9223372036854775807&limit=100", "", ""},
		{"GET", tasks + "?limit=%zz;a=b&limit=2", "", ""},
		{"HEAD", one, "If-None-Match: W/\"1\", *\r\n", ""},
		{"POST", tasks, asJSON, `{"title": "Milk", "description": null, "completed": true}`},
		{"POST", tasks, asJSON + "Idempotency-Key: k\r\n", `{"title": "\u0000\ud83d\ude00"}`},
		{"POST", tasks, "Idempotency-Key: \xff k\r\nContent-Type: x/y+json; charset\r\n", "{\"title\": \"\xff\"}"},
		{"PUT", one, asJSON + "If-Match: \"253402300799999999\"\r\n", `{"title": "\u2003", "completed": null}`},
		{"PATCH", one + "/complete", "If-Match: *\r\nIf-Match: \"-1\"\r\n", ``},
		{"PATCH", one + "/complete", asJSON, `{"completed": true}{`},
		{"DELETE", tasks + "/9223372036854775808", "", ""},
		{"DELETE", fmt.Sprint(tasks, "/", id), "", ""},
		{"GET", fmt.Sprintf("/api/%s/tasks/%d", stranger.user, id), "", ""},
		{"GET", "/api/%2F/tasks", "Authorization: Bearer e30.e30.e30\r\n", ""},
		{"GET", "//api/../%00/tasks/?%00", "", ""},
		{"OPTIONS", tasks, "Origin: https://app.example.com\r\nAccess-Control-Request-Method: PUT\r\n", ""},
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
		if !strings.Contains(headers, "Transfer-Encoding") && !strings.Contains(headers, "Content-Length") {
			text += fmt.Sprintf("Content-Length: %d\r\n", len(body))
		}
		r, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(text+"\r\n"), bytes.NewReader(body))))
		if err != nil || r.RequestURI == "*" {
			return // net/http answers it itself
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		answer := answer{w.Code, w.Result().Header, w.Body.String()}
		switch {
		case w.Code >= 300 && w.Code < 400 && w.Code != http.StatusNotModified: // the mux cleans a path
		case w.Code == http.StatusInternalServerError || w.Code < 200 || w.Code > 599:
			t.Errorf("%q = %d %s", text, w.Code, w.Body)
		case strings.Contains(fmt.Sprint(answer), secret):
			t.Errorf("%q = %d %s: another user's task", text, w.Code, w.Body)
		case w.Code >= 400:
			if detail(t, answer) == "" || w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("%q = %d %s, want JSON with a detail", text, w.Code, w.Body)
			}
		}
		for _, name := range []string{"X-Request-Id", "X-Content-Type-Options", "Vary"} {
			if w.Header().Get(name) == "" {
				t.Errorf("%q = %d without %s", text, w.Code, name)
			}
		}
		if !strings.HasPrefix(r.Pattern, r.Method+" ") {
			return // of no route
		}
		if err := undeclared(r.Method, r.URL.EscapedPath(), answer); err != nil {
			t.Errorf("%q is not as openapi.json says: %v", text, err)
		}
	})
}
