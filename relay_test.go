package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The faults that tests inject, and the load under which they do. There are no tests in this file.

// A relay carries the packets between a service and its database, below TLS,
// and has the faults of networks, poolers and servers.
type relay struct {
	name         string       // application_name of the service
	dials, trips atomic.Int64 // connections begun; requests that got an answer
	delay        atomic.Int64 // of each answer, in nanoseconds
	stalled      atomic.Bool  // packets wait
	down         atomic.Bool  // whoever connects is hung up on
	room         atomic.Int64 // beyond so many connections whoever connects is hung up on; 0 for no limit
	loseRequests atomic.Int64 // so many are dropped before the server has them, with their connections
	loseAnswers  atomic.Int64 // and so many when the server has done its work
	forward      func() (net.Conn, error)
	listener     net.Listener

	mu    sync.Mutex
	links map[*link]bool
}

// A link is one connection.
type link struct {
	client, server net.Conn
	asked          atomic.Bool // a request was sent, its answer has not come
	silent         atomic.Bool // packets are swallowed
}

func (l *link) close() {
	l.client.Close()
	l.server.Close()
}

func (r *relay) serve() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer client.Close()
			r.dials.Add(1)
			r.mu.Lock()
			room := r.room.Load()
			full := room > 0 && int64(len(r.links)) >= room
			r.mu.Unlock()
			if r.down.Load() || full {
				return
			}
			server, err := r.forward()
			if err != nil {
				return
			}
			l := &link{client: client, server: server}
			r.mu.Lock()
			r.links[l] = true
			r.mu.Unlock()
			go r.pass(l, client, server, &r.loseRequests)
			r.pass(l, server, client, &r.loseAnswers)
			r.mu.Lock()
			delete(r.links, l)
			r.mu.Unlock()
		}()
	}
}

// pass carries one direction, until an end closes or lose says so.
func (r *relay) pass(l *link, from, to net.Conn, lose *atomic.Int64) {
	defer l.close()
	packet := make([]byte, 32<<10)
	for {
		n, err := from.Read(packet)
		if err != nil {
			return
		}
		for r.stalled.Load() {
			time.Sleep(time.Millisecond)
		}
		answer := false
		if from == l.client {
			l.asked.Store(true)
		} else if answer = l.asked.Swap(false); answer {
			r.trips.Add(1)
			time.Sleep(time.Duration(r.delay.Load()))
		}
		if l.silent.Load() {
			continue
		}
		if (from == l.client || answer) && lose.Load() > 0 && lose.Add(-1) >= 0 {
			return
		}
		if _, err := to.Write(packet[:n]); err != nil {
			return
		}
	}
}

func (r *relay) heal() {
	r.down.Store(false)
	r.stalled.Store(false)
	r.delay.Store(0)
	r.loseRequests.Store(0)
	r.loseAnswers.Store(0)
}

// cut ends every connection, as a database or a pooler does that restarts.
func (r *relay) cut() { r.each((*link).close) }

// silence leaves every connection open, and nobody at its other end.
func (r *relay) silence() { r.each(func(l *link) { l.silent.Store(true) }) }

func (r *relay) each(do func(*link)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for l := range r.links {
		do(l)
	}
}

// terminate has the server end every connection. Behind a pooler, a backend
// may change hands between the look and the kill: no other test may run.
func (r *relay) terminate(t *testing.T) {
	sqlExec(t, sharedDB.pool, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1`, r.name)
}

// openOver is openPrepared for the tests' database, over a relay of its own.
func openOver(t testing.TB) (*database, *relay) {
	t.Helper()
	d, r := openDatabaseOver(t, sharedDatabaseURL())
	prepare(t, d)
	return d, r
}

func openDatabaseOver(t testing.TB, databaseURL string) (*database, *relay) {
	t.Helper()
	listener := listenLocally(t)
	r := &relay{name: "test-" + rand.Text(), listener: listener, links: map[*link]bool{}}
	d := open(t, databaseURL, func(config *pgxpool.Config) {
		conn := config.ConnConfig
		network, address := pgconn.NetworkAddress(conn.Host, conn.Port)
		r.forward = func() (net.Conn, error) { return net.Dial(network, address) }
		dial := conn.DialFunc
		conn.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, "tcp", listener.Addr().String())
		}
		conn.RuntimeParams["application_name"] = r.name
	})
	go r.serve()
	return d, r
}

var crowded sync.Mutex

// takeTurns makes a test, which opens as many connections as a service may,
// wait for the others of that kind: Neon's smallest compute takes 97.
func takeTurns(t *testing.T) {
	crowded.Lock()
	t.Cleanup(crowded.Unlock)
}

// connect opens n connections, before anything goes wrong.
func connect(t testing.TB, d *database, n int) {
	t.Helper()
	for range n {
		conn, err := d.acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
	}
}

// runStatements runs each statement of a service once on each of n connections, as a service has
// done that has run for a while: the statements are prepared.
func runStatements(t testing.TB, d *database, service string, n int) {
	t.Helper()
	c := newClientOf(t, service, "test-"+rand.Text())
	prepared := map[*pgx.Conn]bool{}
	for range n {
		var held []*pgxpool.Conn // all but one that has prepared nothing
		for range n {
			conn, err := d.acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, conn)
		}
		i := slices.IndexFunc(held, func(c *pgxpool.Conn) bool { return !prepared[c.Conn()] })
		prepared[held[i].Conn()] = true
		held[i].Release()
		c.do("POST", "", `{"title": "keyed"}`, "Idempotency-Key", rand.Text())
		for _, match := range []string{"*", `"another"`} {
			task := fmt.Sprintf("/%d", c.create("plain").ID)
			c.do("PATCH", task, `{}`, "If-Match", match)
			c.do("DELETE", task, "", "If-Match", match)
			c.do("GET", task, "")
		}
		c.do("GET", "?total=true", "")
		c.do("GET", "?total=true&completed=true", "")
		for j, conn := range held {
			if j != i {
				conn.Release()
			}
		}
	}
	sqlExec(t, d.pool, `DELETE FROM public.tasks WHERE user_id = $1`, c.user)
}

// A ledger is what clients know of their tasks. Each task has a life: it is
// new, then done, then open again, and half of them go.
type ledger struct {
	t     *testing.T
	users [8]*client
	via   string       // the service's application_name
	db    *database    // has its tasks
	reads bool         // must always succeed
	made  atomic.Int64 // changes that were acknowledged

	clients sync.WaitGroup
	stop    atomic.Bool

	mu     sync.Mutex
	states map[string][]string // by title: which a task may be in
}

func newLedger(t *testing.T, service, via string) *ledger {
	l := &ledger{t: t, via: via, db: sharedDB, states: map[string][]string{}}
	for i := range l.users {
		l.users[i] = newClientOf(t, service, "test-"+rand.Text())
		l.users[i].http = keepingConnections(t)
	}
	return l
}

func (l *ledger) names() (names []string) {
	for _, c := range l.users {
		names = append(names, c.user)
	}
	return names
}

// run has 16 clients change tasks until end is called, or the test ends.
func (l *ledger) run() {
	for i := range 16 {
		c := l.users[i%len(l.users)]
		l.clients.Go(func() {
			for n := 0; !l.stop.Load(); n++ {
				l.life(c, fmt.Sprint(c.user, " ", i, " ", n), n)
			}
		})
	}
	l.t.Cleanup(l.end) // before their tasks are removed
	eventually(l.t, "load", func() bool { return l.made.Load() > 100 })
}

// end returns when the clients have ended.
func (l *ledger) end() {
	l.stop.Store(true)
	l.clients.Wait()
}

func (l *ledger) life(c *client, title string, n int) {
	tasks := "/api/" + c.user + "/tasks"
	var key []string
	if n%2 == 0 {
		key = []string{"Idempotency-Key", strings.ReplaceAll(title, " ", "-")}
	}
	a, created := l.change(c, title, "absent", "new", "POST", tasks, fmt.Sprintf(`{"title": %q}`, title), key...)
	if created == 0 {
		return
	}
	path := fmt.Sprint(tasks, "/", decode[wireTask](l.t, a.body).ID)
	a, toggled := l.change(c, title, "new", "done", "PATCH", path+"/complete", "")
	if toggled == 0 {
		return
	}
	_, opened := l.change(c, title, "done", "open", "PATCH", path, `{"completed": false}`, "If-Match", a.header.Get("ETag"))
	if opened == 0 {
		return
	}
	if n%4 < 2 && created == 1 { // or the first try, still under way, might make the task anew: its key goes with it
		l.change(c, title, "open", "absent", "DELETE", path, "")
	}
	a, err := c.try("GET", tasks+"?limit=5", "")
	if err != nil || a.status != 200 {
		if l.reads || err == nil && a.status != 503 {
			l.t.Errorf("list = %d %s %v, want 200", a.status, a.body, err)
		}
		return
	}
	for _, task := range decode[[]wireTask](l.t, a.body) {
		if task.UserID != c.user || !strings.HasPrefix(task.Title, c.user) {
			l.t.Errorf("a list of %s has %+v", c.user, task)
		}
	}
}

// change sends a change that moves a task on, and returns at which try that is
// known to have happened, or 0. Only with a header there is a second try.
func (l *ledger) change(c *client, title, before, after, method, path, body string, header ...string) (answer, int) {
	l.set(title, before, after)
	for try := 1; ; try++ {
		start := time.Now()
		a, err := c.try(method, path, body, header...)
		if took := time.Since(start); took > 20*time.Second {
			l.t.Errorf("%s %s took %v", method, path, took)
		}
		switch {
		case err == nil && (a.status/100 == 2 || a.status == 412 && try > 1): // 412: a try before has done it
			l.set(title, after)
			l.made.Add(1)
			return a, try
		case err == nil && (a.status != 503 || a.header.Get("Retry-After") == ""):
			l.t.Errorf("%s %s = %d %s", method, path, a.status, a.body)
			return a, 0
		case header == nil || l.stop.Load():
			return a, 0
		case err != nil:
			time.Sleep(10 * time.Millisecond) // it listens again, or the test ends
		}
	}
}

func (l *ledger) set(title string, states ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.states[title] = states
}

// check compares the ledger with the database, when the statements have ended
// whose clients have not waited for them. It returns how many changes were
// made that nobody acknowledged.
func (l *ledger) check() (unacknowledged int) {
	l.t.Helper()
	now := sqlValue[time.Time](l.t, l.db.pool, `SELECT clock_timestamp()`)
	eventually(l.t, "end of the changes under way", func() bool {
		return sqlValue[int](l.t, l.db.pool, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'active' AND query ~ 'tasks'
			AND query_start < $1 AND application_name = $2 AND pid <> pg_backend_pid()`, now, l.via) == 0
	})
	type row struct{ User, Title, State string }
	rows, _ := l.db.pool.Query(l.t.Context(), `
		SELECT user_id, title, CASE WHEN completed THEN 'done' WHEN updated_at = created_at THEN 'new' ELSE 'open' END
		FROM public.tasks WHERE user_id = ANY ($1)`, l.names())
	stored, err := pgx.CollectRows(rows, pgx.RowToStructByPos[row])
	if err != nil {
		l.t.Fatal(err)
	}
	states := map[string]string{}
	for _, r := range stored {
		if states[r.Title] != "" || l.states[r.Title] == nil || !strings.HasPrefix(r.Title, r.User) {
			l.t.Errorf("%q of %s is there twice, or was never sent", r.Title, r.User)
		}
		states[r.Title] = r.State
	}
	doubtful := 0
	for title, may := range l.states {
		is := cmp.Or(states[title], "absent")
		if !slices.Contains(may, is) {
			l.t.Errorf("%q is %s, want %v", title, is, may)
		}
		if len(may) > 1 {
			doubtful++
			if is == may[1] {
				unacknowledged++
			}
		}
	}
	l.t.Logf("%d changes acknowledged, %d not, of which %d were made", l.made.Load(), doubtful, unacknowledged)
	return unacknowledged
}

// tracks a client's requests: the longest, and how many got a 503.
type tracker struct {
	http.RoundTripper
	longest, unavailable atomic.Int64
}

func (m *tracker) RoundTrip(r *http.Request) (*http.Response, error) {
	start := time.Now()
	res, err := m.RoundTripper.RoundTrip(r)
	took := int64(time.Since(start))
	for longest := m.longest.Load(); took > longest; longest = m.longest.Load() {
		if m.longest.CompareAndSwap(longest, took) {
			break
		}
	}
	if err == nil && res.StatusCode == http.StatusServiceUnavailable {
		m.unavailable.Add(1)
	}
	return res, err
}
