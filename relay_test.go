package main

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
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

// The faults that tests inject between a service and its database, and the load under which they do
// it:
//
//	relay            carries the packets between them and injects the faults: openOverRelay, or
//	                 startOverRelay for the tests' database with the schema
//	link             one connection through a relay
//	connect, occupy  open connections of the pool; occupy keeps them in use
//	ledger           runs clients and records what they know about their tasks; check compares that
//	                 with the database

// A relay carries the packets between a service and its database, below TLS. It has the faults of
// networks, poolers and servers.
type relay struct {
	name          string       // application_name of the service's sessions
	dials, trips  atomic.Int64 // connections accepted; requests that got a response
	delay         atomic.Int64 // of each response, in nanoseconds
	stalled       atomic.Bool  // packets wait
	down          atomic.Bool  // new connections are closed
	room          atomic.Int64 // new connections are closed if there are this many; 0 for no limit
	dropRequests  atomic.Int64 // this many requests never reach the server; their connections close
	dropResponses atomic.Int64 // responses that never reach the service; the server did the work
	forward       func() (net.Conn, error)
	mu            sync.Mutex
	links         map[*link]bool
}

// A link is one connection through a relay.
type link struct {
	client, server net.Conn
	pending        atomic.Bool // a request was sent and its response has not arrived
	silent         atomic.Bool // packets are dropped
}

func (l *link) close() {
	l.client.Close()
	l.server.Close()
}

func (r *relay) serve(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer client.Close()
			r.dials.Add(1)
			server, err := r.forward()
			if err != nil {
				return
			}
			l := &link{client: client, server: server}
			if !r.add(l) {
				l.close()
				return
			}
			go r.pass(l, client, server, &r.dropRequests)
			r.pass(l, server, client, &r.dropResponses)
			r.mu.Lock()
			delete(r.links, l)
			r.mu.Unlock()
		}()
	}
}

// add reports whether the relay accepts another connection.
func (r *relay) add(l *link) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if room := r.room.Load(); r.down.Load() || room > 0 && int64(len(r.links)) >= room {
		return false
	}
	r.links[l] = true
	return true
}

// pass carries the packets of one direction until an end closes or a packet is dropped.
func (r *relay) pass(l *link, from, to net.Conn, drop *atomic.Int64) {
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
		response := false
		if from == l.client {
			l.pending.Store(true)
		} else if response = l.pending.Swap(false); response {
			r.trips.Add(1)
			time.Sleep(time.Duration(r.delay.Load()))
		}
		if l.silent.Load() {
			continue
		}
		if (from == l.client || response) && drop.Load() > 0 && drop.Add(-1) >= 0 {
			return
		}
		if _, err := to.Write(packet[:n]); err != nil {
			return
		}
	}
}

// heal ends all faults but those of connections that are cut or silent.
func (r *relay) heal() {
	r.room.Store(0)
	r.down.Store(false)
	r.stalled.Store(false)
	r.delay.Store(0)
	r.dropRequests.Store(0)
	r.dropResponses.Store(0)
}

// cut closes every connection, as a database or a pooler does when it restarts.
func (r *relay) cut() { r.each((*link).close) }

// silence leaves every connection open without a server behind it.
func (r *relay) silence() { r.each(func(l *link) { l.silent.Store(true) }) }

func (r *relay) each(do func(*link)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for l := range r.links {
		do(l)
	}
}

// openOverRelay opens a database through a relay.
func openOverRelay(
	t testing.TB, databaseURL string, changes ...func(*pgxpool.Config),
) (*database, *relay) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	r := &relay{name: newUser(), links: map[*link]bool{}}
	d := openDB(t, databaseURL, append(changes, func(config *pgxpool.Config) {
		conn := config.ConnConfig
		network, address := pgconn.NetworkAddress(conn.Host, conn.Port)
		r.forward = func() (net.Conn, error) { return net.Dial(network, address) }
		dial := conn.DialFunc
		conn.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, "tcp", listener.Addr().String())
		}
		conn.RuntimeParams["application_name"] = r.name
	})...)
	t.Cleanup(r.heal) // before the pool is closed, which waits for its connections
	go r.serve(listener)
	return d, r
}

// startOverRelay opens the tests' database through a relay, with the schema.
func startOverRelay(t testing.TB, changes ...func(*pgxpool.Config)) (*database, *relay) {
	t.Helper()
	testDB(t)
	d, r := openOverRelay(t, os.Getenv("DATABASE_URL"), changes...)
	return startDB(t, d), r
}

// connect opens n connections, which become idle.
func connect(t testing.TB, d *database, n int) {
	t.Helper()
	occupy(t, d, n)()
}

// occupy takes n connections of the pool until release is called or the test ends.
func occupy(t testing.TB, d *database, n int) (release func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var conns []*pgxpool.Conn
	release = func() {
		for _, conn := range conns {
			conn.Release()
		}
	}
	t.Cleanup(release)
	for range n {
		conn, err := d.connect(ctx)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	return release
}

// A ledger is what clients know about their tasks while they create, complete, reopen and delete
// them.
type ledger struct {
	t       *testing.T
	users   [8]*client
	via     string       // the application_name of the service's sessions
	db      *database    // that contains the tasks
	made    atomic.Int64 // changes that were acknowledged
	failed  atomic.Int64 // requests that got a 503 or no response
	clients sync.WaitGroup
	stop    atomic.Bool

	mu     sync.Mutex
	states map[string][]string // by title: the states in which a task may be
}

func newLedger(t *testing.T, d *database, service, via string) *ledger {
	l := &ledger{t: t, via: via, db: d, states: map[string][]string{}}
	for i := range l.users {
		l.users[i] = newClientOf(t, service, newUser())
	}
	return l
}

// run starts 16 clients that change tasks until end is called or the test ends.
func (l *ledger) run() {
	for i := range 16 {
		c := l.users[i%len(l.users)]
		l.clients.Go(func() {
			for n := 0; !l.stop.Load(); n++ {
				l.changeTask(c, fmt.Sprint(c.user, " ", i, " ", n), n)
			}
		})
	}
	l.t.Cleanup(l.end) // before their tasks are removed
	eventually(l.t, "load", func() bool { return l.made.Load() > 100 })
}

// end stops the clients.
func (l *ledger) end() {
	l.stop.Store(true)
	l.clients.Wait()
}

// changeTask creates a task, completes it, reopens it and, every second time, deletes it. It gives
// up at the first change that is not acknowledged.
func (l *ledger) changeTask(c *client, title string, n int) {
	var key []string
	if n%2 == 0 {
		key = []string{"Idempotency-Key", strings.ReplaceAll(title, " ", "-")}
	}
	body := fmt.Sprintf(`{"title": %q}`, title)
	a, created := l.change(c, title, "absent", "new", "POST", c.path(""), body, key...)
	if created == 0 {
		return
	}
	path := c.path(decode[wireTask](l.t, a.body).path())
	a, completed := l.change(c, title, "new", "done", "PATCH", path+"/complete", "")
	if completed == 0 {
		return
	}
	_, reopened := l.change(c, title, "done", "open", "PATCH", path, `{"completed": false}`,
		"If-Match", a.header.Get("ETag"))
	if reopened == 0 {
		return
	}
	// If the create was repeated, its first request may still run. Once the task and its key are
	// deleted, that request would create it again.
	if n%4 < 2 && created == 1 {
		l.change(c, title, "open", "absent", "DELETE", path, "")
	}
	a, err := c.try("GET", c.path("?limit=5"), "")
	if err != nil || a.status != 200 {
		l.failed.Add(1)
		if err == nil && a.status != 503 {
			l.t.Errorf("list = %v %v, want 200", a, err)
		}
		return
	}
	for _, task := range decode[[]wireTask](l.t, a.body) {
		if task.UserID != c.user || !strings.HasPrefix(task.Title, c.user) {
			l.t.Errorf("a list of %s contains %v", c.user, task)
		}
	}
}

// change sends a request that moves a task from one state to the next. It returns the number of the
// request that was acknowledged, or 0. Only a request with a header is repeated.
func (l *ledger) change(
	c *client, title, before, after, method, path, body string, header ...string,
) (answer, int) {
	l.set(title, before, after)
	for try := 1; ; try++ {
		a, err := c.try(method, path, body, header...)
		switch {
		// 412: an earlier try did it
		case err == nil && (a.status/100 == 2 || a.status == 412 && try > 1):
			l.set(title, after)
			l.made.Add(1)
			return a, try
		case err == nil && a.status != 503:
			l.t.Errorf("%s %s = %v", method, path, a)
			return a, 0
		}
		l.failed.Add(1)
		switch {
		case header == nil || l.stop.Load():
			return a, 0
		case err != nil:
			time.Sleep(10 * time.Millisecond) // the service listens again, or the test ends
		}
	}
}

func (l *ledger) set(title string, states ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.states[title] = states
}

// check compares the ledger with the database, once the statements of requests without a response
// have ended.
func (l *ledger) check() {
	l.t.Helper()
	now := sqlValue[time.Time](l.t, l.db.pool, `SELECT clock_timestamp()`)
	eventually(l.t, "end of the running changes", func() bool {
		return sqlValue[int](l.t, l.db.pool, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'active' AND query ~ 'tasks'
			AND query_start < $1 AND application_name = $2 AND pid <> pg_backend_pid()`, now, l.via) == 0
	})
	var users []string
	for _, c := range l.users {
		users = append(users, c.user)
	}
	type row struct{ User, Title, State string }
	rows, _ := l.db.pool.Query(l.t.Context(), `
		SELECT user_id, title,
		       CASE WHEN completed THEN 'done' WHEN updated_at = created_at THEN 'new' ELSE 'open' END
		FROM public.tasks
		WHERE user_id = ANY ($1)`, users)
	stored, err := pgx.CollectRows(rows, pgx.RowToStructByPos[row])
	if err != nil {
		l.t.Fatal(err)
	}
	states := map[string]string{}
	for _, r := range stored {
		switch {
		case states[r.Title] != "":
			l.t.Errorf("%q of %s exists twice", r.Title, r.User)
		case l.states[r.Title] == nil || !strings.HasPrefix(r.Title, r.User):
			l.t.Errorf("%q of %s was never sent", r.Title, r.User)
		}
		states[r.Title] = r.State
	}
	for title, allowed := range l.states {
		state := cmp.Or(states[title], "absent")
		if !slices.Contains(allowed, state) {
			l.t.Errorf("%q is %s, want %v", title, state, allowed)
		}
	}
}
