package main

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// serveBare is what the service is measured against: net/http and pgx alone,
// which run the same two queries for whoever asks, without token, validation
// or log.
func serveBare() {
	db, err := openDatabase(os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	answer := func(w http.ResponseWriter, r *http.Request, sql string, args ...any) []wireTask {
		rows, err := db.pool.Query(r.Context(), sql, args...)
		if err != nil {
			panic(err)
		}
		tasks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t wireTask, err error) {
			return t, row.Scan(&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, &t.CreatedAt, &t.UpdatedAt)
		})
		if err != nil {
			panic(err)
		}
		w.Header().Set("Content-Type", "application/json")
		return tasks
	}
	http.HandleFunc("GET /api/{user}/tasks", func(w http.ResponseWriter, r *http.Request) {
		tasks := answer(w, r, `SELECT id, user_id, title, description, completed, created_at, updated_at
			FROM tasks WHERE user_id = $1 AND ($2::boolean IS NULL OR completed = $2) AND id < $3 ORDER BY id DESC LIMIT $4 OFFSET $5`,
			r.PathValue("user"), (*bool)(nil), int64(1)<<62, 51, 0)
		json.NewEncoder(w).Encode(tasks[:50])
	})
	http.HandleFunc("GET /api/{user}/tasks/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, _ := strconv.ParseInt(r.PathValue("id"), 10, 64)
		tasks := answer(w, r, `SELECT id, user_id, title, description, completed, created_at, updated_at
			FROM tasks WHERE user_id = $1 AND id = $2`, r.PathValue("user"), id)
		json.NewEncoder(w).Encode(tasks[0])
	})
	http.HandleFunc("GET /health/live", func(http.ResponseWriter, *http.Request) {})
	panic(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}

// BenchmarkBesideBare runs the service and the bare handler in turn, as two
// processes, and reports the service's requests a second and processor time a
// request as parts of the bare handler's.
func BenchmarkBesideBare(b *testing.B) {
	c := newClient(b)
	var id int64
	for i := range 60 {
		id = c.create(fmt.Sprintf("Task %d of the benchmark", i)).ID
	}
	for _, request := range []struct{ name, path string }{{"list50", ""}, {"get", fmt.Sprintf("/%d", id)}} {
		b.Run(request.name, func(b *testing.B) {
			sides := [2]*measured{startMeasured(b, "main", c), startMeasured(b, "bare", c)}
			for b.Loop() {
				for _, side := range sides {
					side.load(b, "/api/"+c.user+"/tasks"+request.path, 2000)
				}
			}
			for _, side := range sides {
				side.stop()
			}
			service, bare := sides[0], sides[1]
			b.ReportMetric(bare.wall.Seconds()/service.wall.Seconds(), "requests/s-ratio")
			b.ReportMetric(service.cpu.Seconds()/bare.cpu.Seconds(), "cpu/request-ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkDistance puts 64 reading clients on an instance whose compute is
// further and further away: each of its 15 connections waits for every answer.
func BenchmarkDistance(b *testing.B) {
	var near float64
	for _, roundTrip := range []time.Duration{5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(roundTrip.String(), func(b *testing.B) {
			d, r := openOver(b)
			connect(b, d, maxConns)
			c := newClientOf(b, newService(b, d), "test-"+rand.Text())
			c.http = keepingConnections(b)
			c.create("Milk")
			r.delay.Store(int64(roundTrip))
			start := time.Now()
			for b.Loop() {
				var clients sync.WaitGroup
				for range 64 {
					clients.Go(func() {
						for range 5 {
							if a, err := c.try("GET", "/api/"+c.user+"/tasks", ""); err != nil || a.status != 200 {
								b.Errorf("list = %d %s %v", a.status, a.body, err)
							}
						}
					})
				}
				clients.Wait()
			}
			perSecond := float64(b.N) * 64 * 5 / time.Since(start).Seconds()
			near = reportRate(b, perSecond, near)
			b.ReportMetric(0, "ns/op")
		})
	}
}

// reportRate reports a rate, and its ratio to the first one, which it returns.
func reportRate(b *testing.B, perSecond, first float64) float64 {
	first = cmp.Or(first, perSecond)
	b.ReportMetric(perSecond, "requests/s")
	b.ReportMetric(perSecond/first, "requests/s-ratio")
	return first
}

// BenchmarkInstances puts the same load, 64 clients that read and write, on one
// instance and on eight, which only a pooler has room for on a small compute.
func BenchmarkInstances(b *testing.B) {
	const clients, each = 64, 40
	c := newClient(b)
	var ids [clients]int64
	for i := range ids {
		ids[i] = c.create(fmt.Sprintf("Task %d of the benchmark", i)).ID
	}
	var alone float64
	for _, instances := range []int{1, 8} {
		b.Run(fmt.Sprint(instances), func(b *testing.B) {
			var services []*measured
			for range instances {
				services = append(services, startMeasured(b, "main", c))
			}
			var answered, unavailable atomic.Int64
			start := time.Now()
			for b.Loop() {
				var wg sync.WaitGroup
				for i := range clients {
					service := services[i%instances]
					wg.Go(func() {
						c := &client{t: b, http: service.http, service: service.url, user: c.user, authorization: c.authorization}
						for n := range each {
							var a answer
							if n%4 == 0 {
								a = c.do("PATCH", fmt.Sprintf("/%d/complete", ids[i]), "")
							} else {
								a = c.do("GET", "", "")
							}
							switch a.status {
							case 200:
								answered.Add(1)
							case 503:
								unavailable.Add(1)
							default:
								b.Errorf("%d %s", a.status, a.body)
							}
						}
					})
				}
				wg.Wait()
			}
			perSecond := float64(answered.Load()) / time.Since(start).Seconds()
			alone = reportRate(b, perSecond, alone)
			b.ReportMetric(float64(unavailable.Load()), "answers-503")
			var held float64
			for _, service := range services {
				held += service.metric(b, "todo_db_connections_open")
			}
			b.ReportMetric(held, "client-connections")
			var backends float64
			if err := sharedDB.pool.QueryRow(b.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()`).Scan(&backends); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(backends, "server-connections")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// A measured is a process under load.
type measured struct {
	*process
	http          *http.Client
	metrics       string
	authorization string
	wall, cpu     time.Duration
}

// startMeasured starts the service, "main", or what it is compared with, "bare".
func startMeasured(b *testing.B, which string, c *client) *measured {
	b.Helper()
	port, metricsPort := freePort(b), freePort(b)
	m := &measured{
		process:       &process{t: b, cmd: exec.Command(os.Args[0]), url: "http://127.0.0.1:" + port, exited: make(chan struct{})},
		http:          keepingConnections(b),
		metrics:       "http://127.0.0.1:" + metricsPort + "/metrics",
		authorization: c.authorization,
	}
	// Its log goes to /dev/null: to read it would cost the processor that is measured.
	m.cmd.Env = append(os.Environ(), "TODO_APP_TEST_RUNS="+which, "PORT="+port, "METRICS_PORT="+metricsPort, "BETTER_AUTH_SECRET="+testSecret)
	if err := m.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	go func() {
		m.cmd.Wait()
		close(m.exited)
	}()
	b.Cleanup(m.stop)
	m.waitLive()
	m.load(b, "/api/"+c.user+"/tasks", 200)
	m.wall = 0
	return m
}

// load sends n requests from 16 clients and adds up the time they took.
func (m *measured) load(b *testing.B, path string, n int) {
	const clients = 16
	start := time.Now()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			c := &client{t: b, http: m.http, service: m.url, authorization: m.authorization}
			for range n / clients {
				if a, err := c.try("GET", path, ""); err != nil || a.status != 200 {
					b.Errorf("%s = %d %s %v", path, a.status, a.body, err)
				}
			}
		})
	}
	wg.Wait()
	m.wall += time.Since(start)
}

// metric reads one figure from the metrics page.
func (m *measured) metric(b *testing.B, name string) (value float64) {
	b.Helper()
	res, err := m.http.Get(m.metrics)
	if err != nil {
		b.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		if _, err := fmt.Sscanf(lines.Text(), name+" %g", &value); err == nil {
			return value
		}
	}
	b.Fatalf("the metrics lack %s", name)
	return 0
}

// stop ends the process and tells what it used.
func (m *measured) stop() {
	m.http.CloseIdleConnections()
	m.cmd.Process.Kill()
	<-m.exited
	m.cpu = m.cmd.ProcessState.UserTime() + m.cmd.ProcessState.SystemTime()
}
