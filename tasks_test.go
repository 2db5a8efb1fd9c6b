package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"
)

// The tests run through HTTP on a real database, which others may use at the
// same time: each test has users of its own, and removes what they created.

const testSecret = "a secret that only the tests use, 0123456789"

// What most tests share: one service, in this process, over DATABASE_URL.
var (
	sharedDB   *database
	sharedAuth *authenticator
	sharedURL  string
)

func TestMain(m *testing.M) {
	switch os.Getenv("TODO_APP_TEST_RUNS") { // the test binary is another process, of a test
	case "main":
		main()
		return
	case "bare":
		serveBare()
		return
	}
	if os.Getenv("DATABASE_URL") == "" {
		fmt.Println("the tests need a database: run ./with-postgres go test ./..., or set DATABASE_URL to a Neon branch")
		os.Exit(1)
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	var err error
	if sharedDB, err = openDatabase(os.Getenv("DATABASE_URL")); err == nil {
		err = sharedDB.prepare(context.Background(), slog.New(slog.DiscardHandler))
	}
	if err != nil {
		fmt.Println("the tests' database:", err)
		return 1
	}
	defer sharedDB.pool.Close()
	if sharedAuth, err = newAuthenticator(testSecret, "", "", ""); err != nil {
		fmt.Println(err)
		return 1
	}
	service := httptest.NewServer(newServer(context.Background(), sharedAuth, sharedDB, slog.New(slog.DiscardHandler), nil, ""))
	defer service.Close()
	sharedURL = service.URL
	return m.Run()
}

func openDatabase(databaseURL string) (*database, error) {
	config, err := poolConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	return newDatabase(config)
}

// A wireTask is what a client decodes: written out again, so that a change of
// the wire format breaks a test.
type wireTask struct {
	ID          int64     `json:"id"`
	UserID      string    `json:"user_id"`
	Title       string    `json:"title"`
	Description *string   `json:"description"`
	Completed   bool      `json:"completed"`
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

// A client speaks to a service as one user.
type client struct {
	t             testing.TB
	http          *http.Client
	service, user string
	authorization string // "" sends none
}

// newClient returns a client of the shared service with a user of its own,
// whose tasks are removed when the test ends.
func newClient(t testing.TB) *client {
	t.Helper()
	return newClientOf(t, sharedURL, "test-"+rand.Text())
}

// newClientOf is newClient for a user of that name and a service that keeps
// its tasks in the tests' database too.
func newClientOf(t testing.TB, service, user string) *client {
	t.Helper()
	token, err := sharedAuth.sign(user)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := sharedDB.pool.Exec(context.Background(), `DELETE FROM tasks WHERE user_id = $1`, user); err != nil {
			t.Errorf("remove the tasks of %s: %v", user, err)
		}
	})
	return &client{t: t, http: http.DefaultClient, service: service, user: user, authorization: "Bearer " + token}
}

// An answer is a response, read.
type answer struct {
	status int
	header http.Header
	body   string
}

// do sends a request to a path under the user's tasks, such as "" or "/7".
// Headers are given as name, value, name, value. A body is sent as JSON.
func (c *client) do(method, path, body string, headers ...string) answer {
	c.t.Helper()
	return c.send(method, "/api/"+url.PathEscape(c.user)+"/tasks"+path, body, headers...)
}

// send is do for a whole path.
func (c *client) send(method, path, body string, headers ...string) answer {
	c.t.Helper()
	a, err := c.try(method, path, body, headers...)
	if err != nil {
		c.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// try is send where no answer may come.
func (c *client) try(method, path, body string, headers ...string) (answer, error) {
	r, err := http.NewRequest(method, c.service+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if c.authorization != "" {
		r.Header.Set("Authorization", c.authorization)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	res, err := c.http.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(text)}, err
}

// create makes a task of that title and returns it.
func (c *client) create(title string) wireTask {
	c.t.Helper()
	body, err := json.Marshal(map[string]string{"title": title})
	if err != nil {
		c.t.Fatal(err)
	}
	a := c.do("POST", "", string(body))
	if a.status != http.StatusCreated {
		c.t.Fatalf("create %q = %d %s, want 201", title, a.status, a.body)
	}
	return decode[wireTask](c.t, a.body)
}

// decode reads an answer's body, which must have no member that T lacks.
func decode[T any](t testing.TB, body string) (v T) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader([]byte(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("decode %s: %v", body, err)
	}
	return v
}

// detail returns the text of an error's answer, which must have nothing else.
func detail(t testing.TB, a answer) string {
	t.Helper()
	return decode[struct{ Detail string }](t, a.body).Detail
}

func TestStory(t *testing.T) {
	t.Parallel()
	c := newClient(t)

	a := c.do("GET", "", "")
	if a.status != 200 || strings.TrimSpace(a.body) != "[]" {
		t.Fatalf("list of a new user = %d %s, want 200 []", a.status, a.body)
	}

	a = c.do("POST", "", `{"title": "  Grüße <&> 🌍 ", "description": "two\nlines"}`)
	if a.status != 201 {
		t.Fatalf("create = %d %s, want 201", a.status, a.body)
	}
	milk := decode[wireTask](t, a.body)
	path := fmt.Sprintf("/%d", milk.ID)
	if got, want := a.header.Get("Location"), "/api/"+c.user+"/tasks"+path; got != want {
		t.Errorf("Location = %q, want %q", got, want)
	}
	if milk.UserID != c.user || milk.Title != "  Grüße <&> 🌍 " || milk.Description == nil || *milk.Description != "two\nlines" || milk.Completed {
		t.Errorf("created %+v, not as sent", milk)
	}
	if !milk.CreatedAt.Equal(milk.UpdatedAt) || time.Since(milk.CreatedAt).Abs() > time.Minute {
		t.Errorf("created at %v, updated at %v, want both now", milk.CreatedAt, milk.UpdatedAt)
	}
	etag := a.header.Get("ETag")

	a = c.do("GET", path, "")
	if got := decode[wireTask](t, a.body); a.status != 200 || !equalTasks(got, milk) || a.header.Get("ETag") != etag {
		t.Errorf("get = %d %s %s, want 200 %s %+v", a.status, a.header.Get("ETag"), a.body, etag, milk)
	}

	// Each change shows, leaves the rest alone and moves the version on.
	last := milk
	for _, step := range []struct {
		method, path, body string
		want               func(*wireTask)
	}{
		{"PUT", "", `{"title": "Milk"}`, func(w *wireTask) { w.Title = "Milk" }},
		{"PATCH", "", `{"description": null}`, func(w *wireTask) { w.Description = nil }},
		{"PATCH", "", `{}`, func(*wireTask) {}},
		{"PUT", "", `{"id": 1, "user_id": "somebody", "created_at": "now", "Title": "not this", "unknown": [1]}`, func(*wireTask) {}},
		{"PATCH", "/complete", ``, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{}`, func(w *wireTask) { w.Completed = false }},
		{"PATCH", "/complete", `{"completed": true, "title": "ignored here"}`, func(w *wireTask) { w.Completed = true }},
		{"PATCH", "/complete", `{"completed": true}`, func(w *wireTask) { w.Completed = true }},
		{"PUT", "", `{"completed": false, "description": ""}`, func(w *wireTask) { w.Completed = false; w.Description = new("") }},
	} {
		a := c.do(step.method, path+step.path, step.body)
		if a.status != 200 {
			t.Fatalf("%s %s %s = %d %s, want 200", step.method, step.path, step.body, a.status, a.body)
		}
		got, want := decode[wireTask](t, a.body), last
		step.want(&want)
		want.UpdatedAt = got.UpdatedAt
		if !equalTasks(got, want) {
			t.Errorf("%s %s %s = %+v, want %+v", step.method, step.path, step.body, got, want)
		}
		if !got.UpdatedAt.After(last.UpdatedAt) || a.header.Get("ETag") == etag {
			t.Errorf("%s %s %s: updated_at %v after %v, ETag %s after %s: want both new", step.method, step.path, step.body,
				got.UpdatedAt, last.UpdatedAt, a.header.Get("ETag"), etag)
		}
		last, etag = got, a.header.Get("ETag")
	}

	eggs := c.create("Eggs")
	if got := decode[[]wireTask](t, c.do("GET", "", "").body); len(got) != 2 || !equalTasks(got[0], eggs) || !equalTasks(got[1], last) {
		t.Errorf("list = %+v, want the newest first: %+v, %+v", got, eggs, last)
	}
	if a := c.do("DELETE", path, ""); a.status != 204 || a.body != "" {
		t.Errorf("delete = %d %q, want 204 and nothing", a.status, a.body)
	}
	for _, method := range []string{"GET", "DELETE"} {
		if a := c.do(method, path, ""); a.status != 404 || detail(t, a) == "" {
			t.Errorf("%s of a deleted task = %d %s, want 404", method, a.status, a.body)
		}
	}
}

func equalTasks(a, b wireTask) bool {
	if (a.Description == nil) != (b.Description == nil) || a.Description != nil && *a.Description != *b.Description {
		return false
	}
	a.Description, b.Description = nil, nil
	return a == b
}
