package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Start and shutdown of the process.

// shutdownLimit is the time that a shutdown may take. Cloud Run kills the process after 10 s.
const shutdownLimit = 9 * time.Second

func TestStart(t *testing.T) {
	t.Parallel()
	start := time.Now()
	p := startProcess(t)
	c := p.newClient()
	live := time.Since(start)
	c.list("")
	t.Logf("live after %v, first list after %v", live, time.Since(start))
	if live > 5*time.Second {
		t.Errorf("live after %v, want at once", live)
	}
	if status := p.health("ready"); status != 200 {
		t.Errorf("/health/ready = %d, want 200", status)
	}
	if rss := p.memory("VmRSS"); rss > 30<<20 {
		t.Errorf("%d bytes of memory at rest, want under 30 MiB", rss)
	}
}

// A database that does not respond anymore does not delay the shutdown.
func TestShutdownDespiteSilence(t *testing.T) {
	t.Parallel()
	d, r := openOverRelay(t, sharedDatabaseURL())
	port := freePort(t)
	c := newClientOf(t, "http://127.0.0.1:"+port, newUser())
	ctx, shutDown := context.WithCancel(t.Context())
	defer shutDown()
	ended := make(chan error, 1)
	s := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
	go func() { ended <- s.serve(ctx, port, "") }()
	eventually(t, "first list", func() bool {
		a, err := c.try("GET", c.path(""), "")
		return err == nil && a.status == 200
	})
	r.stalled.Store(true)
	answered := make(chan answer, 1)
	go func() {
		a, err := c.try("GET", c.path(""), "")
		if err != nil {
			t.Error(err)
		}
		answered <- a
	}()
	eventually(t, "list in progress", func() bool { return d.pool.Stat().AcquiredConns() == 1 })
	start := time.Now()
	shutDown()
	if err := <-ended; err != nil || time.Since(start) > shutdownLimit {
		t.Errorf("shutdown = %v after %v, want none within %v", err, time.Since(start), shutdownLimit)
	}
	if a := <-answered; a.status != http.StatusServiceUnavailable {
		t.Errorf("the list = %v, want 503", a)
	}
	r.heal()
}

func TestShutdownCancelsStatement(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	c := p.newClient()
	path := c.path(c.create("locked").path())
	tx := lockTasks(t, c.user)
	answered := make(chan time.Time, 1)
	go func() {
		a, err := c.try("PATCH", path, `{"title": "changed"}`)
		answered <- time.Now()
		if err != nil || a.status != 503 {
			t.Errorf("blocked change = %v %v, want 503", a, err)
		}
	}()
	waitBlocked(t, tx, 1)
	signaled := time.Now()
	p.signal(syscall.SIGTERM)
	if status := p.wait(shutdownLimit); status != 0 {
		t.Errorf("exit status %d, want 0: %s", status, p.output.String())
	}
	if took := (<-answered).Sub(signaled); took < 6*time.Second || took > shutdownLimit {
		t.Errorf("the blocked change is answered %v after the signal, want 7 s", took)
	}
	waitBlocked(t, tx, 0)
}

func TestShutdownWithStalledBody(t *testing.T) {
	t.Parallel()
	patient, impatient, idle := startProcess(t), startProcess(t), startProcess(t)
	var response *bufio.Reader // of patient
	for _, p := range []*process{impatient, patient} {
		create := p.newClient().rawCreate(`{"title":`, "Content-Length: 30", "Expect: 100-continue")
		response = bufio.NewReader(dialRaw(t, p.url, create))
		// The interim response tells that the service waits for the body.
		if line, err := response.ReadString('\n'); !strings.Contains(line, " 100 ") {
			t.Fatalf("interim response = %q, %v, want 100", line, err)
		}
	}
	idle.waitLive()

	start := time.Now()
	patient.signal(syscall.SIGTERM)
	impatient.signal(syscall.SIGTERM)
	idle.signal(syscall.SIGINT)
	if status := idle.wait(5 * time.Second); status != 0 {
		t.Errorf("SIGINT: exit status %d, want 0: %s", status, idle.output.String())
	}
	impatient.signal(syscall.SIGTERM)
	if status := impatient.wait(3 * time.Second); status == 0 {
		t.Error("a second SIGTERM: exit status 0, want that of the signal")
	}
	if status := patient.wait(shutdownLimit - time.Since(start)); status != 0 {
		t.Errorf("SIGTERM with a stalled body: exit status %d, want 0: %s",
			status, patient.output.String())
	}
	if text, _ := io.ReadAll(response); !strings.Contains(string(text), "HTTP/1.1 408 ") {
		t.Errorf("a stalled body is answered %q at shutdown, want 408", text)
	}
}

// The process ends under load: nothing is made twice, and what was acknowledged is stored.
func TestShutdownUnderLoad(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		signal         os.Signal
		status         int
		unacknowledged int // changes, at most
	}{
		{os.Kill, -1, 16},
		{syscall.SIGTERM, 0, 0},
	} {
		t.Run(row.signal.String(), func(t *testing.T) {
			t.Parallel()
			takeTurns(t)
			p := startProcess(t)
			p.waitLive()
			l := newLedger(t, sharedDB, p.url, "todo-app")
			l.run()
			p.signal(row.signal)
			if status := p.wait(shutdownLimit); status != row.status {
				t.Errorf("exit status %d, want %d: %s", status, row.status, p.output.String())
			}
			l.end()
			if n := l.check(); n > row.unacknowledged {
				t.Errorf("%d changes were made and not acknowledged, want %d at most", n, row.unacknowledged)
			}
		})
	}
}

// A creator is clients that keep their connections and create tasks, with short breaks.
type creator struct {
	t       *testing.T
	created atomic.Int64
	lost    atomic.Int64 // requests without a response

	mu        sync.Mutex
	closing   time.Time // when the first response with Connection: close was read
	last      time.Time // when the last request with a response was sent
	keptAlive int       // responses without Connection: close to requests that were sent after closing
}

// run creates tasks of a user until connections are refused.
func (l *creator) run(c *client) {
	const body = `{"title": "x"}`
	text := c.rawCreate(body, fmt.Sprint("Content-Length: ", len(body)))
	for {
		conn, err := net.Dial("tcp", strings.TrimPrefix(c.service, "http://"))
		if err != nil {
			if !errors.Is(err, syscall.ECONNREFUSED) {
				l.t.Errorf("connect: %v", err)
			}
			return
		}
		l.use(conn, text)
		conn.Close()
	}
}

// use sends requests on a connection until a response asks to close it.
func (l *creator) use(conn net.Conn, text string) {
	conn.SetDeadline(time.Now().Add(time.Minute))
	in := bufio.NewReader(conn)
	for n := 1; ; n++ {
		time.Sleep(mathrand.N(4 * time.Millisecond)) // the break
		sent := time.Now()
		_, err := io.WriteString(conn, text)
		var res *http.Response
		if err == nil {
			res, err = http.ReadResponse(in, nil)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
		if err != nil {
			l.lost.Add(1)
			l.t.Logf("request %d of a connection was lost: %v", n, err)
			return
		}
		if res.StatusCode != 201 {
			l.t.Errorf("create = %v, want 201", res)
		}
		l.created.Add(1)
		l.mu.Lock()
		switch {
		case res.Close && l.closing.IsZero():
			l.closing = time.Now()
		case !res.Close && !l.closing.IsZero() && sent.After(l.closing):
			l.keptAlive++
		}
		if sent.After(l.last) {
			l.last = sent
		}
		l.mu.Unlock()
		if res.Close {
			return
		}
	}
}

// Each request that a client sends gets its response, on new connections as on old ones.
func TestShutdownLosesNothing(t *testing.T) {
	t.Parallel()
	for range 8 {
		p := startProcess(t, "DATABASE_URL="+withParam(sharedDatabaseURL(), "pool_max_conns=8"),
			"LOG_LEVEL=warn")
		p.waitReady()
		l := &creator{t: t}
		clients, users := make(chan *client, 16), []string{}
		for range cap(clients) / 2 {
			c := newClientOf(t, p.url, newUser())
			users = append(users, c.user)
			clients <- c
			clients <- c
		}
		done := inParallel(cap(clients), func() { l.run(<-clients) })
		eventually(t, "load", func() bool { return l.created.Load() > 200 })
		start := time.Now()
		p.signal(syscall.SIGTERM)
		if status := p.wait(shutdownLimit); status != 0 {
			t.Errorf("exit status %d, want 0: %s", status, p.output.String())
		}
		ended := time.Since(start)
		<-done
		last, created, lost := l.last.Sub(start), l.created.Load(), l.lost.Load()
		t.Logf("%d requests, %d lost; the last one %v after the signal, the exit after %v",
			created+lost, lost, last, ended)
		if lost > 0 {
			t.Errorf("%d requests were lost, want none", lost)
		}
		if l.closing.IsZero() || l.keptAlive > 0 {
			t.Errorf("%d responses of the shutdown lack Connection: close, want none", l.keptAlive)
		}
		if last < graceTime-200*time.Millisecond {
			t.Errorf("requests are accepted for %v after the signal, want %v", last, graceTime)
		}
		const count = `SELECT count(*) FROM public.tasks WHERE user_id = ANY ($1)`
		stored := sqlValue[int64](t, sharedDB.pool, count, users)
		if stored != created {
			t.Errorf("%d tasks, want the %d that were acknowledged", stored, created)
		}
	}
}

// A connection was accepted before the socket was closed, and its first request comes later.
func TestRequestAfterTheSocketClosed(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitReady()
	c := p.newClient()
	const body = `{"title": "x"}`
	conn := dialRaw(t, p.url, "")
	p.signal(syscall.SIGTERM)
	eventually(t, "closed socket", func() bool {
		other, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err == nil {
			other.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	closed := time.Now()
	eventually(t, "later time", func() bool { return time.Since(closed) > settleTime/4 })
	io.WriteString(conn, c.rawCreate(body, fmt.Sprint("Content-Length: ", len(body))))
	if a := readAnswer(t, conn); a.status != 201 || !isClosed(conn) {
		t.Errorf("create = %v, want 201, and a closed connection", a)
	}
	if status := p.wait(shutdownLimit); status != 0 {
		t.Errorf("exit status %d, want 0: %s", status, p.output.String())
	}
}

// The second signal does not wait for the grace period.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitLive()
	p.signal(syscall.SIGTERM)
	eventually(t, "line about the shutdown", func() bool {
		return strings.Contains(p.output.String(), `"shutting down"`)
	})
	start := time.Now()
	p.signal(syscall.SIGTERM)
	if status := p.wait(shutdownLimit); status != -1 || time.Since(start) > graceTime/2 {
		t.Errorf("exit status %d after %v, want the signal's at once", status, time.Since(start))
	}
}
