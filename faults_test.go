package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// A network is the way to the database, below TLS, and its faults.
type network struct {
	dials atomic.Int64 // tries to connect
	down  atomic.Bool  // they are refused
	lose  atomic.Int64 // so many answers are received, and lost together with their connection

	mu    sync.Mutex
	links map[*link]bool
}

type link struct {
	net.Conn
	n     *network
	asked atomic.Bool
}

func (l *link) Write(p []byte) (int, error) {
	l.asked.Store(l.n.lose.Load() > 0)
	return l.Conn.Write(p)
}

func (l *link) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if err == nil && l.asked.Swap(false) && l.n.lose.Add(-1) >= 0 { // the statement has run
		l.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// cut ends every connection, as a database or a pooler does that restarts.
func (n *network) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for l := range n.links {
		l.Conn.Close()
	}
	clear(n.links)
}

// openOver opens the tests' database over a network of its own, connected twice.
func openOver(t *testing.T) (*database, *network) {
	t.Helper()
	n := &network{links: map[*link]bool{}}
	d := open(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			n.dials.Add(1)
			if n.down.Load() {
				return nil, errors.New("connection refused, by the test")
			}
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			l := &link{Conn: c, n: n}
			n.mu.Lock()
			defer n.mu.Unlock()
			n.links[l] = true
			return l, nil
		}
	})
	prepare(t, d)
	var conns [2]*pgxpool.Conn
	for i := range conns {
		var err error
		if conns[i], err = d.pool.Acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range conns {
		conn.Release()
	}
	return d, n
}

func TestLostAnswers(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, method, path, body string
		headers                  []string
		lost                     int64
		status                   int
		title                    string // of how many tasks there are then, and
		tasks                    int
		completed, there         bool // what became of the task that was there before
	}{
		{"list", "GET", "", "", nil, 1, 200, "", 0, false, true},
		{"get", "GET", "/ID", "", nil, 1, 200, "", 0, false, true},
		{"create", "POST", "", `{"title": "lost"}`, nil, 1, 503, "lost", 1, false, true},
		{"create with a key", "POST", "", `{"title": "lost"}`, []string{"Idempotency-Key", "k"}, 1, 201, "lost", 1, false, true},
		{"toggle", "PATCH", "/ID/complete", "", nil, 1, 503, "", 0, true, true},
		{"patch", "PATCH", "/ID", `{"completed": true}`, nil, 1, 503, "", 0, true, true},
		{"delete", "DELETE", "/ID", "", nil, 1, 503, "", 0, false, false},
	} {
		d, n := openOver(t)
		c := newClientOf(t, newService(t, d), "test-"+rand.Text())
		before := c.create("before")
		id := fmt.Sprint(before.ID)
		path := strings.ReplaceAll(row.path, "ID", id)
		n.lose.Store(row.lost)
		a := c.do(row.method, path, row.body, row.headers...)
		if a.status != row.status || a.status == 503 && a.header.Get("Retry-After") == "" {
			t.Errorf("%s: %d %s, want %d", row.name, a.status, a.body, row.status)
		}
		n.lose.Store(0)
		if row.headers != nil { // repeated with its key it makes no second one
			if a := c.do(row.method, path, row.body, row.headers...); a.status != 201 || a.header.Get("Idempotency-Replayed") != "true" {
				t.Errorf("%s, repeated: %d %v, want 201, replayed", row.name, a.status, a.header)
			}
		}
		made, there, completed := 0, false, false
		for _, task := range decode[[]wireTask](t, c.do("GET", "", "").body) {
			if task.ID == before.ID {
				there, completed = true, task.Completed
			} else if task.Title == row.title {
				made++
			} else {
				t.Errorf("%s: a task %+v", row.name, task)
			}
		}
		if made != row.tasks || there != row.there || completed != row.completed {
			t.Errorf("%s: made %d, the task is there %v and completed %v; want %d, %v, %v", row.name, made, there, completed, row.tasks, row.there, row.completed)
		}
	}
}

// A ledger is what clients know of their writes.
type ledger struct {
	mu    sync.Mutex
	sure  map[string]bool // titles of creates that were acknowledged
	maybe map[string]bool // and of those that were not
}

// load creates and reads tasks until stop is closed. Every answer is of the contract.
func (l *ledger) load(t *testing.T, c *client, name string, stop <-chan struct{}) {
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		title := fmt.Sprintf("%s-%d", name, i)
		var headers []string
		if i%2 == 0 {
			headers = []string{"Idempotency-Key", title}
		}
		start := time.Now()
		for try := 0; ; try++ {
			a, err := c.try("POST", "/api/"+c.user+"/tasks", fmt.Sprintf(`{"title": %q}`, title), headers...)
			if took := time.Since(start); took > 20*time.Second*time.Duration(try+1) {
				t.Errorf("an answer took %v", took)
			}
			if err == nil && a.status != 201 && (a.status != 503 || a.header.Get("Retry-After") == "") {
				t.Errorf("create = %d %s", a.status, a.body)
			}
			acknowledged := err == nil && a.status == 201
			if !acknowledged && headers != nil && err == nil && try < 20 {
				continue // repeated until it is acknowledged
			}
			l.mu.Lock()
			if l.maybe[title] = true; acknowledged {
				l.sure[title] = true
			}
			l.mu.Unlock()
			if err != nil {
				return // the service is gone
			}
			break
		}
		if a, err := c.try("GET", "/api/"+c.user+"/tasks?limit=5", ""); err == nil && a.status != 200 && a.status != 503 {
			t.Errorf("list = %d %s", a.status, a.body)
		}
	}
}

// check compares the ledger with the database, once the writes whose answers
// were lost have ended too.
func (l *ledger) check(t *testing.T, user string) {
	t.Helper()
	now := sqlValue[time.Time](t, sharedDB.pool, `SELECT clock_timestamp()`)
	eventually(t, "end of the writes under way", func() bool {
		return sqlValue[int](t, sharedDB.pool, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'active' AND query LIKE '%INSERT INTO tasks%'
			AND query_start < $1 AND pid <> pg_backend_pid()`, now) == 0
	})
	stored := map[string]int{}
	rows, err := sharedDB.pool.Query(t.Context(), `SELECT title FROM tasks WHERE user_id = $1`, user)
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var title string
		if err := rows.Scan(&title); err != nil {
			t.Fatal(err)
		}
		stored[title]++
	}
	if rows.Err() != nil || len(l.sure) == 0 {
		t.Fatalf("%d acknowledged writes, %v", len(l.sure), rows.Err())
	}
	for title := range l.sure {
		if stored[title] == 0 {
			t.Errorf("%s was acknowledged and is lost", title)
		}
	}
	for title, n := range stored {
		if n > 1 || !l.maybe[title] {
			t.Errorf("%s is there %d times, sent %v", title, n, l.maybe[title])
		}
	}
	t.Logf("%d writes, %d acknowledged", len(l.maybe), len(l.sure))
}

func TestNothingIsLost(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(*network, int){
		"connections cut again and again": func(n *network, i int) {
			if i%3 == 0 { // or a busy machine never gets through a TLS and SCRAM handshake
				n.cut()
			}
		},
		"answers lost":      func(n *network, _ int) { n.lose.Store(2) },
		"database restarts": func(n *network, i int) { n.down.Store(i%20 < 12); n.cut() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, n := openOver(t)
			c := newClientOf(t, newService(t, d), "test-"+rand.Text())
			l := &ledger{sure: map[string]bool{}, maybe: map[string]bool{}}
			stop := make(chan struct{})
			var clients sync.WaitGroup
			for i := range 16 {
				clients.Go(func() { l.load(t, c, fmt.Sprint("client-", i), stop) })
			}
			for i, tick := 0, time.NewTicker(100*time.Millisecond); i < 40; i++ {
				<-tick.C
				fault(n, i)
			}
			n.down.Store(false)
			n.lose.Store(0)
			start := time.Now()
			if a := c.do("GET", "", ""); a.status != 200 || time.Since(start) > poolPatience {
				// On an idle machine it takes under a second; here the other tests' load runs beside it.
				t.Errorf("after the faults a list is %d %s after %v, want 200 soon", a.status, a.body, time.Since(start))
			}
			close(stop)
			clients.Wait()
			l.check(t, c.user)
			if tries := n.dials.Load(); tries > 2000 { // 15 places, 40 ticks, a few tries each
				t.Errorf("%d tries to connect in 4 s: a storm", tries)
			}
		})
	}
}

func TestNothingIsLostByAKill(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	c := newClientOf(t, p.url, "test-"+rand.Text())
	l := &ledger{sure: map[string]bool{}, maybe: map[string]bool{}}
	var clients sync.WaitGroup
	for i := range 16 {
		clients.Go(func() { l.load(t, c, fmt.Sprint("client-", i), nil) })
	}
	eventually(t, "hundred acknowledged writes", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.sure) > 100
	})
	p.signal(os.Kill)
	clients.Wait()
	l.check(t, c.user)
}

// All connections are blocked by somebody's lock: who comes then is told soon.
func TestExhaustedPool(t *testing.T) {
	t.Parallel()
	d, n := openOver(t)
	c := newClientOf(t, newService(t, d), "test-"+rand.Text())
	path := fmt.Sprintf("/api/%s/tasks/%d", c.user, c.create("locked").ID)
	tx := begin(t, sharedDB)
	sqlExec(t, tx, `SELECT FROM tasks WHERE user_id = $1 FOR UPDATE`, c.user)
	var blocked sync.WaitGroup
	for range maxConns {
		blocked.Go(func() {
			if a, err := c.try("PATCH", path, `{}`); err != nil || a.status != 200 {
				t.Errorf("blocked for 5 s = %d %s %v, want 200", a.status, a.body, err)
			}
		})
	}
	eventually(t, "fifteen statements under way", func() bool { return len(d.slots) == maxConns })
	var late sync.WaitGroup
	for range 30 {
		late.Go(func() {
			start := time.Now()
			a, err := c.try("GET", path, "")
			took := time.Since(start)
			if err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" || took > poolPatience+3*time.Second {
				t.Errorf("beside fifteen blocked = %d %s %v after %v, want 503 after %v", a.status, a.body, err, took, poolPatience)
			}
		})
	}
	start := time.Now()
	if a := c.send("GET", "/health/live", ""); a.status != 200 || time.Since(start) > time.Second {
		t.Errorf("/health/live = %d after %v, want 200 at once", a.status, time.Since(start))
	}
	late.Wait()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	blocked.Wait()
	if a := c.send("GET", path, ""); a.status != 200 {
		t.Errorf("afterwards = %d %s, want 200", a.status, a.body)
	}
	if dials := n.dials.Load(); dials > maxConns+2 {
		t.Errorf("%d connections, want no more than %d", dials, maxConns)
	}
}
