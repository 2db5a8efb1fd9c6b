package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
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
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The helpers of the tests: the shared service, clients, processes, databases. There are no tests in
// this file.

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
	defer os.RemoveAll(releaseDir)
	var err error
	if sharedDB, err = openDatabase(os.Getenv("DATABASE_URL"), slog.New(slog.DiscardHandler)); err == nil {
		err = sharedDB.start(context.Background())
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
	service := httptest.NewServer(newServer(sharedAuth, sharedDB, slog.New(slog.DiscardHandler), nil, ""))
	defer service.Close()
	sharedURL = service.URL
	return m.Run()
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
	t.Cleanup(func() {
		if _, err := sharedDB.pool.Exec(context.Background(), `DELETE FROM tasks WHERE user_id = $1`, user); err != nil {
			t.Errorf("remove the tasks of %s: %v", user, err)
		}
	})
	return &client{t: t, http: http.DefaultClient, service: service, user: user, authorization: authorization(t, user)}
}

// authorization returns the header of a request of that user.
func authorization(t testing.TB, user string) string {
	t.Helper()
	token, err := sharedAuth.sign(user, nil)
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + token
}

// keepingConnections returns an HTTP client for many requests at a time, whose
// connections live until the test ends. The default one keeps two.
func keepingConnections(t testing.TB) *http.Client {
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
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
	a := answer{res.StatusCode, res.Header, string(text)}
	if _, measured := c.t.(*testing.B); err == nil && !measured {
		if err := undeclared(method, r.URL.EscapedPath(), a); err != nil {
			c.t.Errorf("%s %s is not as openapi.json says: %v", method, path, err)
		}
	}
	return a, err
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

// fill gives the client's user n tasks, of which each third is completed, and returns their ids, the newest first.
func (c *client) fill(n int) (ids []int64) {
	c.t.Helper()
	rows, err := sharedDB.pool.Query(c.t.Context(), `
		INSERT INTO tasks (user_id, title, completed)
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

// atOnce sends n requests of a client at the same time, and returns the answers in their order.
func (c *client) atOnce(n int, request func(i int) (method, path, body string)) []answer {
	c.t.Helper()
	answers := make([]answer, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			method, path, body := request(i)
			var err error
			if answers[i], err = c.try(method, "/api/"+url.PathEscape(c.user)+"/tasks"+path, body); err != nil {
				c.t.Errorf("%s %s: %v", method, path, err)
			}
		})
	}
	all.Wait()
	if c.t.Failed() {
		c.t.FailNow()
	}
	return answers
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

func equalTasks(a, b wireTask) bool {
	if (a.Description == nil) != (b.Description == nil) || a.Description != nil && *a.Description != *b.Description {
		return false
	}
	a.Description, b.Description = nil, nil
	return a == b
}

// raw sends text as it is on a connection of its own.
func raw(t testing.TB, service, text string) net.Conn {
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

// post is the text of a create by c, with further header lines.
func (c *client) post(body string, headers ...string) string {
	return fmt.Sprintf("POST /api/%s/tasks HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n%s\r\n\r\n%s",
		c.user, c.authorization, strings.Join(headers, "\r\n"), body)
}

// readAnswer reads the one answer that is due on a connection.
func readAnswer(t testing.TB, conn net.Conn) answer {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("read an answer: %v", err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("read an answer's body: %v", err)
	}
	return answer{res.StatusCode, res.Header, string(body)}
}

// closed reports whether the service closes a connection, and sends no more on it.
func closed(conn net.Conn) bool {
	n, err := conn.Read(make([]byte, 1))
	return n == 0 && err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// newService returns the URL of a service of its own over the tests' database,
// one instance of several or one with other settings.
func newService(t testing.TB, db *database, origins ...string) string {
	t.Helper()
	service := httptest.NewServer(newServer(sharedAuth, db, slog.New(slog.DiscardHandler), origins, ""))
	t.Cleanup(service.Close)
	return service.URL
}

// serviceOf is a service of its own environment over the tests' database, with
// its log, which is whole once the service is closed.
func serviceOf(t testing.TB, secret, secrets, audience, issuer string) (*httptest.Server, *bytes.Buffer) {
	t.Helper()
	auth, err := newAuthenticator(secret, secrets, audience, issuer)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	service := httptest.NewServer(newServer(auth, sharedDB, newLogger(&log, slog.LevelDebug), nil, ""))
	t.Cleanup(service.Close)
	return service, &log
}

// A process is the whole service: the test binary, told by TestMain to run main.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	url    string
	output lockedBuffer // stdout and stderr
	exited chan struct{}
}

// startProcess starts the service on a free port and the tests' database.
// Settings are given as "K=V", and win over those. It is killed when the test ends.
func startProcess(t testing.TB, settings ...string) *process {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return startProgram(t, program, nil, settings...)
}

// startProgram is startProcess for another binary, or with arguments.
func startProgram(t testing.TB, program string, args []string, settings ...string) *process {
	t.Helper()
	port := freePort(t)
	p := &process{t: t, cmd: exec.Command(program, args...), url: "http://127.0.0.1:" + port, exited: make(chan struct{})}
	p.cmd.Env = append([]string{"TODO_APP_TEST_RUNS=main", "GORACE=atexit_sleep_ms=0", // with -race, an exit would take a second longer
		"PORT=" + port, "DATABASE_URL=" + os.Getenv("DATABASE_URL"), "BETTER_AUTH_SECRET=" + testSecret}, settings...)
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

// freePort returns a TCP port on which nothing listens, below those that the
// kernel gives to outgoing connections: one of them could take it meanwhile.
func freePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(10000 + mathrand.N(10000))
		if l, err := net.Listen("tcp", ":"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port between 10000 and 20000")
	return ""
}

// listenLocally listens on a free port of this machine until the test ends.
func listenLocally(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener
}

// waitLive returns when /health/live answers.
func (p *process) waitLive() {
	p.t.Helper()
	eventually(p.t, "answer of /health/live", func() bool {
		select {
		case <-p.exited:
			p.t.Fatalf("the service ended: %s", p.output.String())
		default:
		}
		res, err := http.Get(p.url + "/health/live")
		if err == nil {
			res.Body.Close()
		}
		return err == nil && res.StatusCode == 200
	})
}

func (p *process) waitReady() {
	p.t.Helper()
	eventually(p.t, "ready service", func() bool {
		select {
		case <-p.exited:
			p.t.Fatalf("the service ended: %s", p.output.String())
		default:
		}
		return p.health("ready") == 200
	})
}

// health returns the status of a health route, 0 if nothing listens.
func (p *process) health(route string) int {
	res, err := http.Get(p.url + "/health/" + route)
	if err != nil {
		return 0
	}
	res.Body.Close()
	return res.StatusCode
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wait returns the exit status, -1 where a signal ended the process.
func (p *process) wait(limit time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(limit):
		p.t.Fatalf("the service still runs after %v: %s", limit, p.output.String())
	}
	return p.cmd.ProcessState.ExitCode()
}

// request returns the log line of the request with that X-Request-Id.
func (p *process) request(id string) (line map[string]any) {
	p.t.Helper()
	eventually(p.t, "log line of request "+id, func() bool {
		for _, line = range p.output.lines(p.t) {
			if line["request_id"] == id {
				return true
			}
		}
		return false
	})
	return line
}

// messages returns the log's messages of a severity, other than those of requests.
func (p *process) messages(severity string) (messages []string) {
	p.t.Helper()
	for _, line := range p.output.lines(p.t) {
		if line["severity"] == severity && line["message"] != "request" {
			messages = append(messages, fmt.Sprint(line["message"], " ", line["reason"]))
		}
	}
	return messages
}

// memory returns a figure of the process's memory, VmRSS for now or VmHWM for
// the most, in bytes. It is 0 where it cannot be known or does not count.
func (p *process) memory(figure string) int {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	_, value, found := strings.Cut(string(status), figure+":")
	if err != nil || !found || underRace() {
		p.t.Log("memory not measured")
		return 0
	}
	kib, err := strconv.Atoi(strings.Fields(value)[0])
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Logf("%s %d KiB", figure, kib)
	return kib << 10
}

// underRace reports whether the race detector runs, under which figures of
// time and memory say nothing.
func underRace() bool {
	build, _ := debug.ReadBuildInfo()
	return slices.Contains(build.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// stopLimit is what a stop may take: Cloud Run kills after 10 s.
const stopLimit = 9 * time.Second

// releaseDir contains the binaries that the tests build. testMain removes it.
var releaseDir = filepath.Join(os.TempDir(), fmt.Sprint("todo-app-releases-", os.Getpid()))

// Binaries of later releases, by the steps that they append to schema.sql. Each is built once.
var (
	laterSteps = `
-- step 2: add a column
ALTER TABLE public.tasks ADD COLUMN priority integer;

-- step 3: record the release's name
CREATE TABLE public.releases (name text);
INSERT INTO public.releases VALUES ('it''s step 3');
`
	laterRelease = sync.OnceValues(func() (string, error) { return buildRelease("later", laterSteps) })

	slowSteps = `
-- step 2: sleep for three seconds
DO $$ BEGIN ASSERT current_setting('statement_timeout') = '0'; END $$;
SELECT pg_sleep(3);

-- step 3: read titles as numbers
SELECT sum(title::integer) FROM public.tasks;
`
	slowRelease = sync.OnceValues(func() (string, error) { return buildRelease("slow", slowSteps) })
)

// buildRelease builds this checkout with more steps, which leaves its files as they are.
func buildRelease(name, steps string) (program string, err error) {
	original, err := filepath.Abs("schema.sql")
	if err != nil {
		return "", err
	}
	file := func(name string) string { return filepath.Join(releaseDir, name) }
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{original: file(name + ".sql")}})
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(releaseDir, 0o700); err != nil {
		return "", err
	}
	for path, text := range map[string]string{name + ".sql": schema + steps, name + ".json": string(overlay)} {
		if err := os.WriteFile(file(path), []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	if out, err := exec.Command("go", "build", "-overlay", file(name+".json"), "-o", file(name), ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the release %s: %w: %s", name, err, out)
	}
	return file(name), nil
}

// startRelease starts a later release on a database.
func startRelease(t testing.TB, release func() (string, error), databaseURL string, args ...string) *process {
	t.Helper()
	program, err := release()
	if err != nil {
		t.Fatal(err)
	}
	return startProgram(t, program, args, "DATABASE_URL="+databaseURL)
}

// runMigrate runs todo-app migrate to its end, with no setting but DATABASE_URL.
func runMigrate(t testing.TB, release func() (string, error), databaseURL string) (status int, p *process) {
	t.Helper()
	program, err := release()
	if err != nil {
		t.Fatal(err)
	}
	p = startProgram(t, program, []string{"migrate"}, "DATABASE_URL="+databaseURL, "BETTER_AUTH_SECRET=", "PORT=")
	return p.wait(20 * time.Second), p
}

// thisRelease is the test binary, which runs main.
func thisRelease() (string, error) { return os.Executable() }

// A lockedBuffer keeps what is logged.
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

// lines returns the lines that are complete, each of which must be a JSON object.
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

// eventually waits for a condition.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s in 20 s", what)
		}
	}
}

// open opens databaseURL with a changed configuration until the test ends. It
// knows already whether a pooler is there.
func open(t testing.TB, databaseURL string, change func(*pgxpool.Config)) *database {
	t.Helper()
	config, _, err := poolConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	change(config)
	d, err := newTracedDatabase(config)
	if err != nil {
		t.Fatal(err)
	}
	d.pooler.Store(sharedDB.pooler.Load())
	t.Cleanup(d.pool.Close)
	return d
}

// openPrepared is open for a database that has the schema or gets it.
func openPrepared(t testing.TB, databaseURL string) *database {
	t.Helper()
	d := open(t, databaseURL, func(*pgxpool.Config) {})
	prepare(t, d)
	return d
}

// openPreparedLike opens the same database once more.
func openPreparedLike(t testing.TB, d *database) *database {
	t.Helper()
	return open(t, d.pool.Config().ConnString(), func(*pgxpool.Config) {})
}

func prepare(t testing.TB, d *database) {
	t.Helper()
	if err := d.start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// ownDatabase makes an empty database, with options of CREATE DATABASE, and returns its connection
// string.
func ownDatabase(t testing.TB, options ...string) string {
	t.Helper()
	name := "test_" + strings.ToLower(rand.Text())
	sqlExec(t, sharedDB.pool, `CREATE DATABASE `+name+` `+strings.Join(options, ` `))
	t.Cleanup(func() {
		eventually(t, "removal of the test's database", func() bool { // autovacuum may be in it
			_, err := sharedDB.pool.Exec(context.Background(), `DROP DATABASE `+name+` WITH (FORCE)`)
			return err == nil || sqlState(err) == "3D000" // or an earlier try was successful
		})
	})
	u, err := url.Parse(sharedDatabaseURL())
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

// alterDatabase changes the settings of sessions that begin later.
func alterDatabase(t testing.TB, databaseURL, sql string) {
	t.Helper()
	sqlExec(t, sharedDB.pool, `ALTER DATABASE `+databaseName(t, databaseURL)+` `+sql)
}

// renewSessions has a pooler use new sessions of a database, which see its settings.
func renewSessions(t testing.TB, databaseURL string) {
	t.Helper()
	if sharedDB.pooler.Load() {
		sqlExec(t, sharedDB.pool, `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1`, databaseName(t, databaseURL))
	}
}

var testDatabase = regexp.MustCompile(`^/test_[a-z0-9_]+$`)

func databaseName(t testing.TB, databaseURL string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil || !testDatabase.MatchString(u.Path) {
		t.Fatalf("%s is not a test's own database: %v", databaseURL, err)
	}
	return u.Path[1:]
}

func sharedDatabaseURL() string { return sharedDB.pool.Config().ConnString() }

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

// catalogState describes everything in the schema public. It changes with every statement that
// changes a definition, even if it changes it to the same.
func catalogState(t testing.TB, on runner) string {
	t.Helper()
	return sqlValue[string](t, on, `
		SELECT string_agg(line, E'\n' ORDER BY line)
		FROM (SELECT format('%s %s %s %s', c.relname, c.oid, c.xmin,
		                 (SELECT string_agg(concat(d.objsubid, d.description, d.xmin), ',' ORDER BY d.objsubid)
		                  FROM pg_description d WHERE d.objoid = c.oid))
		      FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace
		      UNION ALL
		      SELECT format('%s.%s %s', a.attrelid, a.attname, a.xmin)
		      FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
		      WHERE c.relnamespace = 'public'::regnamespace
		      UNION ALL
		      SELECT format('%s %s', i.indexrelid, i.xmin)
		      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
		      WHERE c.relnamespace = 'public'::regnamespace) AS lines (line)`)
}

// A statementTracer keeps the statements about tasks that the service sent. It is set as the Tracer
// of a configuration before newTracedDatabase.
type statementTracer struct {
	*database
	mu    sync.Mutex
	asked []pgx.TraceQueryStartData
}

func (s *statementTracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if strings.Contains(data.SQL, "tasks") && !strings.Contains(data.SQL, "EXPLAIN") {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked = append(s.asked, data)
	}
	return s.database.TraceQueryStart(ctx, conn, data)
}

// newTracedDatabase is newDatabase with a log that is discarded.
func newTracedDatabase(config *pgxpool.Config) (*database, error) {
	tracer, ok := config.ConnConfig.Tracer.(*statementTracer)
	d, err := newDatabase(config, slog.New(slog.DiscardHandler))
	if ok {
		tracer.database, config.ConnConfig.Tracer = d, tracer
	}
	return d, err
}

// A plan is a node of what EXPLAIN (FORMAT JSON) says.
type plan struct {
	Type    string  `json:"Node Type"`
	Index   string  `json:"Index Name"`
	Removed float64 `json:"Rows Removed by Filter"`
	Rows    float64 `json:"Actual Rows"`
	Hit     int     `json:"Shared Hit Blocks"` // of the node and those below it
	Read    int     `json:"Shared Read Blocks"`
	Plans   []plan  `json:"Plans"`
}

// nodes returns the plan's nodes, the topmost first.
func (p plan) nodes() []plan {
	all := []plan{p}
	for _, below := range p.Plans {
		all = append(all, below.nodes()...)
	}
	return all
}

// explain returns the plan of a statement, and what running it took.
func explain(t testing.TB, d *database, asked pgx.TraceQueryStartData) plan {
	t.Helper()
	text := sqlValue[string](t, d.pool, `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) `+asked.SQL, asked.Args...)
	var plans []struct{ Plan plan }
	if err := json.Unmarshal([]byte(text), &plans); err != nil {
		t.Fatal(err)
	}
	return plans[0].Plan
}
