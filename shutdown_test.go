package main

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
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
	if live > 2*time.Second {
		t.Errorf("live after %v, want under 2 s", live)
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
		t.Errorf("SIGTERM with a stalled body: exit status %d, want 0: %s", status, patient.output.String())
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
