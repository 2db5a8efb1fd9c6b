package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What the tests use, and no test:
//
//	service         the product in this process: startService, or startDetached without a database
//	process         the product as a process: startProcess, or startProgram for any program
//	client          sends requests as one user: newClient(t) is one of the service that tests share
//	answer          a response whose body was read; client validates it against openapi.json
//	openDB          a pool of connections to a database; startDB also applies the schema
//	createDatabase  an empty database, for tests that would disturb others
//
// The tests run through HTTP on a real database, which others may use at the same time: each test
// has separate users, or a separate database, and removes what it created.

const testSecret = "a secret that only the tests use, 0123456789"

// What most tests share: one service in this process on DATABASE_URL. Without DATABASE_URL,
// sharedDB is nil, and testDB skips the tests that need it.
var (
	sharedDB   *database
	sharedAuth *authenticator
	sharedURL  string
	pooled     bool // DATABASE_URL is a pooler
)

func TestMain(m *testing.M) {
	switch os.Getenv("TODO_APP_TEST_RUNS") { // this is a process that startProgram started
	case "main":
		main()
		return
	case "bare":
		serveBare()
		return
	}
	// Most tests wait most of the time, so 12 of them run at once, unless -parallel is given.
	flag.CommandLine.Parse(append([]string{"-test.parallel=12"}, os.Args[1:]...))
	os.Exit(testMain(m))
}

func testMain(m *testing.M) (status int) {
	sharedAuth, _ = newAuthenticator(env("BETTER_AUTH_SECRET=" + testSecret))
	databaseURL := os.Getenv("DATABASE_URL")
	if databaseURL == "" {
		m.Run()
		fmt.Println("The tests that need a database were skipped. These commands run all tests:\n" +
			"./with-postgres go test ./...\nDATABASE_URL=... go test ./...    (a Neon branch)")
		return 1
	}
	var err error
	sharedDB, err = openDatabase(databaseURL, slog.New(slog.DiscardHandler))
	if err == nil {
		err = sharedDB.ensureSchema(context.Background())
	}
	if err != nil {
		fmt.Println("the tests' database:", err)
		return 1
	}
	defer sharedDB.pool.Close()
	conn, err := pgx.Connect(context.Background(), withParam(databaseURL, "options=-cwork_mem%3D4MB"))
	if pooled = err != nil; !pooled { // only a pooler rejects options
		conn.Close(context.Background())
	}
	set := settings{auth: sharedAuth}
	listener := httptest.NewServer(newServer(set, sharedDB, slog.New(slog.DiscardHandler)))
	defer listener.Close()
	sharedURL = listener.URL
	return m.Run()
}

// testDB returns the tests' database, or skips the test if there is none.
func testDB(t testing.TB) *database {
	t.Helper()
	if sharedDB == nil {
		t.Skip("needs a database")
	}
	return sharedDB
}

// env returns the getenv of an environment of "NAME=VALUE" entries. A later entry wins.
func env(entries ...string) func(string) string {
	return func(name string) (value string) {
		for _, entry := range entries {
			if v, ok := strings.CutPrefix(entry, name+"="); ok {
				value = v
			}
		}
		return value
	}
}

// A service is the product in this process.
type service struct {
	*server
	t   testing.TB
	url string
	log lockedBuffer
}

// startService starts a service on a database until the test ends. The auth of settings is
// sharedAuth if nil.
func startService(t testing.TB, d *database, set settings) *service {
	t.Helper()
	if set.auth == nil {
		set.auth = sharedAuth
	}
	s := &service{t: t}
	s.server = newServer(set, d, newLogger(&s.log, set.logLevel))
	listener := httptest.NewUnstartedServer(s.server)
	listener.Config.BaseContext = func(net.Listener) context.Context { return d.work }
	listener.Start()
	t.Cleanup(listener.Close)
	s.url = listener.URL
	return s
}

// noDatabase is a database that is never reached. Its pool has one slot for each user.
const noDatabase = "postgres://u:p@localhost:1/d?pool_max_conns=3"

// startDetached starts a service that never reaches its database, and returns a client of it.
func startDetached(t testing.TB, set settings) (*service, *client) {
	t.Helper()
	s := startService(t, openDB(t, noDatabase), set)
	return s, newClientOf(t, s.url, "alice")
}

// newClient returns a client of the service with a new user.
func (s *service) newClient() *client {
	s.t.Helper()
	return newClientOf(s.t, s.url, newUser())
}

// A client sends requests as one user.
type client struct {
	t             testing.TB
	http          *http.Client
	service, user string // the service's URL
	authorization string // "" to send none
}

// httpClient keeps the connections of many concurrent requests. The default one keeps two.
var httpClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// newUser returns the id of a user that no other test has.
func newUser() string { return "test-" + rand.Text() }

// newClient returns a client of the shared service with a new user.
func newClient(t testing.TB) *client {
	t.Helper()
	testDB(t)
	return newClientOf(t, sharedURL, newUser())
}

// newClientOf returns a client of a service with a given user. When the test ends, it removes the
// tasks of a user of newUser from the tests' database. Separate databases may have any users.
func newClientOf(t testing.TB, service, user string) *client {
	t.Helper()
	if strings.Contains(user, "test-") {
		t.Cleanup(func() {
			sqlExec(t, sharedDB.pool, `DELETE FROM public.tasks WHERE user_id = $1`, user)
		})
	}
	token, err := sharedAuth.sign(user)
	if err != nil {
		t.Fatal(err)
	}
	return &client{t, httpClient, service, user, "Bearer " + token}
}

// An answer is a response whose body was read.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) String() string { return fmt.Sprintf("%d %.500s", a.status, a.body) }

// path returns the path of something under the user's tasks, such as "" or "/7".
func (c *client) path(suffix string) string {
	return "/api/" + url.PathEscape(c.user) + "/tasks" + suffix
}

// do sends a request to a path under the user's tasks. Headers are given as name, value, name,
// value; a name that is given twice is sent twice. A body is sent as JSON.
func (c *client) do(method, suffix, body string, headers ...string) answer {
	c.t.Helper()
	return c.send(method, c.path(suffix), body, headers...)
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

// try is send for a request that may get no response.
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
		r.Header.Del(headers[i])
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	res, err := c.http.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	a := answer{res.StatusCode, res.Header, string(text)}
	if _, benchmark := c.t.(*testing.B); err == nil && !benchmark {
		if err := a.check(method, r.URL.EscapedPath()); err != nil {
			c.t.Errorf("%s %s = %v %v: %v", method, path, a, a.header, err)
		}
	}
	return a, err
}

// check validates what the contract promises of every response, and what openapi.json declares.
func (a answer) check(method, path string) error {
	id := a.header.Get("X-Request-Id")
	switch {
	case id == "" || len(id) > 128:
		return errors.New("X-Request-Id is not of sane form")
	case a.header.Get("X-Content-Type-Options") != "nosniff":
		return errors.New("X-Content-Type-Options is not nosniff")
	case strings.HasPrefix(path, "/api/") && a.header.Get("Cache-Control") != "no-store":
		return errors.New("Cache-Control is not no-store")
	case a.status >= 400 && a.header.Get("Content-Type") != "application/json":
		return errors.New("Content-Type is not JSON")
	}
	if a.status >= 400 && method != http.MethodHead {
		var e struct{ Detail string }
		if err := decodeStrictly(a.body, &e); err != nil || e.Detail == "" {
			return fmt.Errorf("it has no detail (%v)", err)
		}
	}
	return undeclared(method, path, a)
}

// detail returns the text of an error response.
func (a answer) detail() string {
	var e struct{ Detail string }
	json.Unmarshal([]byte(a.body), &e)
	return e.Detail
}

// atOnce makes n concurrent requests, each of which must get a response, and returns these in
// order.
func atOnce(t testing.TB, n int, request func(i int) (answer, error)) []answer {
	t.Helper()
	answers, errs := make([]answer, n), make([]error, n)
	<-inParallel(n, func(i int) { answers[i], errs[i] = request(i) })
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return answers
}

// inParallel runs f(0) to f(n-1). The channel is closed when all have returned.
func inParallel(n int, f func(i int)) <-chan struct{} {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	return done
}

// A wireTask is what a client decodes. It repeats the wire format, so that a change of the format
// breaks a test.
type wireTask struct {
	ID          int64     `json:"id"`
	UserID      string    `json:"user_id"`
	Title       string    `json:"title"`
	Description *string   `json:"description"`
	Completed   bool      `json:"completed"`
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

func (w wireTask) String() string {
	text, _ := json.Marshal(w)
	return string(text)
}

// path returns the task's path under the user's tasks.
func (w wireTask) path() string { return fmt.Sprintf("/%d", w.ID) }

// create creates a task with a title.
func (c *client) create(title string) wireTask {
	c.t.Helper()
	body, err := json.Marshal(map[string]string{"title": title})
	if err != nil {
		c.t.Fatal(err)
	}
	a := c.do("POST", "", string(body))
	if a.status != http.StatusCreated {
		c.t.Fatalf("create %q = %v, want 201", title, a)
	}
	return decode[wireTask](c.t, a.body)
}

// list returns the tasks of a list with a query such as "?limit=1".
func (c *client) list(query string) []wireTask {
	c.t.Helper()
	a := c.do("GET", query, "")
	if a.status != http.StatusOK {
		c.t.Fatalf("list %s = %v, want 200", query, a)
	}
	return decode[[]wireTask](c.t, a.body)
}

// fill gives the user n tasks, of which every third one is completed, and returns their ids, the
// newest first.
func (c *client) fill(n int) (ids []int64) {
	c.t.Helper()
	rows, err := sharedDB.pool.Query(c.t.Context(), `
		INSERT INTO public.tasks (user_id, title, completed)
		SELECT $1::text, 'task ' || i, i % 3 = 0
		FROM generate_series(1, $2::int) AS i
		RETURNING id`, c.user, n)
	if err == nil {
		ids, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	if err != nil {
		c.t.Fatal(err)
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	return ids
}

// decode decodes JSON, which must have no member that T does not have.
func decode[T any](t testing.TB, body string) (v T) {
	t.Helper()
	if err := decodeStrictly(body, &v); err != nil {
		t.Fatalf("decode %s: %v", body, err)
	}
	return v
}

func decodeStrictly(body string, v any) error {
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// dialRaw sends text as it is on a new connection, which is closed when the test ends.
func dialRaw(t testing.TB, service, text string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(service, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	return conn
}

// A process is the service as a process.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	url    string
	output lockedBuffer // stdout and stderr
	exited chan struct{}
}

// startProcess starts the service on a free port and the tests' database. Settings such as "K=V"
// take precedence.
func startProcess(t testing.TB, settings ...string) *process {
	t.Helper()
	testDB(t)
	return startProgram(t, os.Args[0], nil, settings...)
}

// startProgram is startProcess for any program. The process is killed when the test ends.
func startProgram(t testing.TB, program string, args []string, settings ...string) *process {
	t.Helper()
	port := freePort()
	p := &process{t: t, cmd: exec.Command(program, args...), url: "http://127.0.0.1:" + port,
		exited: make(chan struct{})}
	p.cmd.Env = append([]string{"TODO_APP_TEST_RUNS=main", "PORT=" + port,
		"DATABASE_URL=" + os.Getenv("DATABASE_URL"), "BETTER_AUTH_SECRET=" + testSecret,
		"GORACE=atexit_sleep_ms=0", // with -race, an exit would take a second longer
	}, settings...)
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exited
	})
	return p
}

// lastPort is the port that freePort returned last. Each run begins at another one.
var lastPort atomic.Int64

// freePort returns a port on which nothing listens, and which no other test of this run gets. It is
// below the ports of outgoing connections.
func freePort() string {
	lastPort.CompareAndSwap(0, mathrand.Int64N(10_000))
	for {
		port := fmt.Sprint(10_000 + lastPort.Add(1)%10_000)
		if l, err := net.Listen("tcp", ":"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// newClient returns a client of the process with a new user, once the process is live.
func (p *process) newClient() *client {
	p.t.Helper()
	p.waitHealth("live")
	return newClientOf(p.t, p.url, newUser())
}

// health returns the status of a health route, 0 if there is no response.
func (p *process) health(route string) int {
	res, err := http.Get(p.url + "/health/" + route)
	if err != nil {
		return 0
	}
	res.Body.Close()
	return res.StatusCode
}

func (p *process) waitHealth(route string) {
	p.t.Helper()
	eventually(p.t, "200 of /health/"+route, func() bool {
		select {
		case <-p.exited:
			p.t.Fatalf("the service exited: %s", p.output.String())
		default:
		}
		return p.health(route) == 200
	})
}

// wait returns the exit status, -1 if a signal ended the process.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		p.t.Fatalf("the service has not exited after 20 s: %s", p.output.String())
	}
	return p.cmd.ProcessState.ExitCode()
}

// A lockedBuffer collects a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// lines returns the complete lines, each of which must be a JSON object.
func (l *lockedBuffer) lines(t testing.TB) (lines []map[string]any) {
	t.Helper()
	text := l.String()
	for line := range strings.Lines(text[:strings.LastIndex(text, "\n")+1]) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("log line %s: %v", line, err)
		}
		lines = append(lines, v)
	}
	return lines
}

// request returns the line of the request with that X-Request-Id.
func (l *lockedBuffer) request(t testing.TB, id string) (line map[string]any) {
	t.Helper()
	eventually(t, "log line of request "+id, func() bool {
		for _, line = range l.lines(t) {
			if line["request_id"] == id && line["message"] == "request" {
				return true
			}
		}
		return false
	})
	return line
}

// messages returns the messages of a severity, with their errors, except those of requests.
func (l *lockedBuffer) messages(t testing.TB, severity string) (messages []string) {
	t.Helper()
	for _, line := range l.lines(t) {
		if line["severity"] == severity && line["message"] != "request" {
			messages = append(messages, fmt.Sprint(line["message"], " ", line["error"]))
		}
	}
	return messages
}

// eventually waits until a condition is true.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s in 20 s", what)
		}
	}
}

// openDB opens a database with a changed configuration until the test ends. Requests wait until
// startDB has applied the schema.
func openDB(t testing.TB, databaseURL string, changes ...func(*pgxpool.Config)) *database {
	t.Helper()
	config, err := poolConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range changes {
		change(config)
	}
	tracer := config.ConnConfig.Tracer
	d, err := newDatabase(config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if tracer != nil {
		config.ConnConfig.Tracer = multitracer.New(config.ConnConfig.Tracer, tracer)
	}
	t.Cleanup(d.pool.Close)
	return d
}

// startDB applies the schema and returns d.
func startDB(t testing.TB, d *database) *database {
	t.Helper()
	if err := d.ensureSchema(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

// createDatabase creates an empty database and returns its connection string. The database is
// dropped when the test ends.
func createDatabase(t testing.TB) string {
	t.Helper()
	name := "test_" + strings.ToLower(rand.Text())
	sqlExec(t, testDB(t).pool, `CREATE DATABASE `+name)
	t.Cleanup(func() {
		eventually(t, "removal of the test's database", func() bool { // autovacuum may be in it
			_, err := sharedDB.pool.Exec(context.Background(), `DROP DATABASE `+name+` WITH (FORCE)`)
			return err == nil || sqlState(err) == "3D000" // an earlier try succeeded
		})
	})
	return changeURL(t, func(u *url.URL) { u.Path = "/" + name })
}

// changeURL returns a changed connection string of the tests' database.
func changeURL(t testing.TB, change func(*url.URL)) string {
	t.Helper()
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	change(u)
	return u.String()
}

// withParam appends a parameter to a connection string.
func withParam(databaseURL, param string) string {
	if strings.Contains(databaseURL, "?") {
		return databaseURL + "&" + param
	}
	return databaseURL + "?" + param
}

// databaseName returns the name of a database of createDatabase.
func databaseName(t testing.TB, databaseURL string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil || !strings.HasPrefix(u.Path, "/test_") {
		t.Fatalf("%s is not a database of createDatabase: %v", databaseURL, err)
	}
	return u.Path[1:]
}

// alterDatabase changes the settings of later sessions of a database.
func alterDatabase(t testing.TB, databaseURL, sql string) {
	t.Helper()
	sqlExec(t, sharedDB.pool, `ALTER DATABASE `+databaseName(t, databaseURL)+` `+sql)
}

// A runner is a pool or a transaction.
type runner interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func sqlExec(t testing.TB, on runner, sql string, args ...any) {
	t.Helper()
	if _, err := on.Exec(context.Background(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// sqlValue returns the only value of a statement's only row.
func sqlValue[T any](t testing.TB, on runner, sql string, args ...any) (v T) {
	t.Helper()
	if err := on.QueryRow(context.Background(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// begin returns a transaction that is rolled back when the test ends.
func begin(t testing.TB, d *database) pgx.Tx {
	t.Helper()
	tx, err := d.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback(context.Background()) })
	return tx
}

// lockTasks locks the tasks of a user in the tests' database until the transaction ends.
func lockTasks(t testing.TB, user string) pgx.Tx {
	t.Helper()
	tx := begin(t, sharedDB)
	sqlExec(t, tx, `SELECT FROM public.tasks WHERE user_id = $1 FOR UPDATE`, user)
	return tx
}

// waitBlocked waits until n sessions wait for a lock of a transaction.
func waitBlocked(t testing.TB, tx pgx.Tx, n int) {
	t.Helper()
	pid := sqlValue[int](t, tx, `SELECT pg_backend_pid()`)
	eventually(t, fmt.Sprint(n, " blocked sessions"), func() bool {
		return sqlValue[int](t, sharedDB.pool, `SELECT count(*) FROM pg_stat_activity
			WHERE $1 = ANY (pg_blocking_pids(pid))`, pid) == n
	})
}
