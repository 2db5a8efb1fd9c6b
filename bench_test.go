package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// fill makes a database of so many tasks, and a hundredth as many users. The
// user "listed" has 1,000 of them, and of a million the user "deep" 100,000.
func fill(b *testing.B, tasks int) (databaseURL string) {
	b.Helper()
	databaseURL = createDatabase(b)
	d := startDB(b, openDB(b, databaseURL))
	sqlExec(b, d.pool, fmt.Sprintf(`
		INSERT INTO tasks (user_id, title, description, completed)
		SELECT CASE WHEN i %% (%[1]d / 1000) = 0 THEN 'listed'
		            WHEN i %% 10 = 1 AND %[1]d >= 1000000 THEN 'deep'
		            ELSE 'user ' || i / 10 %% (%[1]d / 100) END,
		       'Task ' || i, CASE WHEN i %% 2 = 0 THEN 'What there is to say about it' END, i %% 3 = 0
		FROM generate_series(1, %[1]d) AS i`, tasks))
	sqlExec(b, d.pool, `VACUUM ANALYZE tasks`) // as autovacuum does
	return databaseURL
}

// A call is a request that is made again and again.
type call struct{ method, path, body, token string }

func callOf(b *testing.B, user, method, path, body string) call {
	b.Helper()
	token, err := sharedAuth.sign(user, nil)
	if err != nil {
		b.Fatal(err)
	}
	return call{method, "/api/" + user + "/tasks" + path, body, token}
}

// serve has h answer the call, and returns how long that took.
func (c call) serve(h http.Handler) time.Duration {
	r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
	r.Header.Set("Authorization", "Bearer "+c.token)
	w := httptest.NewRecorder()
	start := time.Now()
	h.ServeHTTP(w, r)
	took := time.Since(start)
	if w.Code/100 != 2 {
		panic(fmt.Sprint(c.path, " = ", w.Code, " ", w.Body))
	}
	return took
}

// openService is the service with its log, over databaseURL.
func openService(databaseURL string, tracer *statementTracer) (*server, error) {
	config, _, err := poolConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	if tracer != nil {
		config.ConnConfig.Tracer = tracer
	}
	d, err := newTracedDatabase(config)
	if err != nil {
		return nil, err
	}
	close(d.ready)
	return newServer(sharedAuth, d, newLogger(io.Discard, slog.LevelInfo), nil, ""), nil
}

// asked returns the statement that the service runs for a call.
func (c call) asked(databaseURL string) (pgx.TraceQueryStartData, error) {
	var tracer statementTracer
	s, err := openService(databaseURL, &tracer)
	if err != nil {
		return pgx.TraceQueryStartData{}, err
	}
	defer s.db.pool.Close()
	c.serve(s)
	return tracer.asked[0], nil
}

// bare is what the service is measured against: a handler without token,
// validation, retry or log, which runs the very statement of one call.
func bare(databaseURL string, c call) (http.Handler, *pgxpool.Pool, error) {
	asked, err := c.asked(databaseURL)
	if err != nil {
		return nil, nil, err
	}
	config, _, err := poolConfig(databaseURL)
	if err != nil {
		return nil, nil, err
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rows, err := pool.Query(r.Context(), asked.SQL, asked.Args...)
		if err != nil {
			panic(err)
		}
		tasks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t wireTask, err error) {
			fields := []any{&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, &t.CreatedAt, &t.UpdatedAt}
			err = row.Scan(append(fields, make([]any, len(row.FieldDescriptions())-len(fields))...)...)
			return t, err
		})
		if err != nil {
			panic(err)
		}
		w.Header().Set("Content-Type", "application/json")
		if len(tasks) == 1 {
			json.NewEncoder(w).Encode(tasks[0])
		} else {
			json.NewEncoder(w).Encode(tasks[:len(tasks)-1]) // the last one is of the next page
		}
	}), pool, err
}

// serveBare is bare as a process, for the call that it is given.
func serveBare() {
	var c call
	for value, name := range map[*string]string{&c.method: "METHOD", &c.path: "PATH", &c.token: "TOKEN"} {
		*value = os.Getenv("TODO_APP_BARE_" + name)
	}
	var err error
	if sharedAuth, err = newAuthenticator(testSecret, "", "", ""); err != nil {
		panic(err)
	}
	h, _, err := bare(os.Getenv("DATABASE_URL"), c)
	if err != nil {
		panic(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/", h)
	mux.HandleFunc("GET /health/live", func(http.ResponseWriter, *http.Request) {})
	// net/http's own timeouts are not what is measured.
	s := http.Server{Addr: "127.0.0.1:" + os.Getenv("PORT"), Handler: mux,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout}
	panic(s.ListenAndServe())
}

// BenchmarkMillion measures each operation on a database of a million tasks,
// the service and a bare handler in turn, in this process: time and
// allocations from the request to its answer.
func BenchmarkMillion(b *testing.B) {
	large := fill(b, 1_000_000)
	small := fill(b, 10_000)
	s, err := openService(large, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.db.pool.Close)
	id := func(s *server, user string, offset int) int64 {
		return sqlValue[int64](b, s.db.pool, `SELECT id FROM tasks WHERE user_id = $1 ORDER BY id DESC LIMIT 1 OFFSET $2`, user, offset)
	}
	one := fmt.Sprint("/", id(s, "listed", 500))
	last := fmt.Sprint("?limit=100&before=", id(s, "deep", 99_899)) // page 1,000 of 100 tasks
	for _, row := range []struct{ name, user, method, path, body string }{
		{"list", "listed", "GET", "", ""},
		{"depth", "deep", "GET", fmt.Sprint("?before=", id(s, "deep", 50_000)), ""},
		{"get", "listed", "GET", one, ""},
		{"create", "somebody", "POST", "", `{"title": "Buy milk"}`}, // or the first page of "listed" would lie close together
		{"update", "listed", "PATCH", one, `{"completed": true}`},
	} {
		b.Run(row.name, func(b *testing.B) {
			c := callOf(b, row.user, row.method, row.path, row.body)
			h, pool, err := bare(large, c)
			if err != nil {
				b.Fatal(err)
			}
			defer pool.Close()
			inTurn(b, "service", s, c, "bare", h, c)
			nothing := allocs(c, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
			b.ReportMetric(allocs(c, s)-nothing, "service-allocs")
			b.ReportMetric(allocs(c, h)-nothing, "bare-allocs")
		})
	}
	b.Run("page1000", func(b *testing.B) {
		inTurn(b, "page1000", s, callOf(b, "deep", "GET", last, ""), "page1", s, callOf(b, "deep", "GET", "?limit=100", ""))
	})

	// A user of a thousand tasks, in a table of a million and in one of ten thousand.
	few, err := openService(small, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(few.db.pool.Close)
	for _, row := range []struct{ name, path, fewerPath string }{
		{"growth-of-list", "", ""},
		{"growth-of-get", fmt.Sprint("/", id(s, "listed", 600)), fmt.Sprint("/", id(few, "listed", 600))}, // the other one was updated, and its row has many versions
	} {
		b.Run(row.name, func(b *testing.B) {
			c, fewer := callOf(b, "listed", "GET", row.path, ""), callOf(b, "listed", "GET", row.fewerPath, "")
			inTurn(b, "million", s, c, "ten-thousand", few, fewer)
			b.ReportMetric(c.blocks(b, large), "million-blocks")
			b.ReportMetric(fewer.blocks(b, small), "ten-thousand-blocks")
		})
	}
}

// inTurn has two handlers serve a call each, in turn, and reports the median
// times and their ratio.
func inTurn(b *testing.B, name string, h http.Handler, c call, otherName string, other http.Handler, otherCall call) {
	for range 50 {
		c.serve(h)
		otherCall.serve(other)
	}
	var took, otherTook []time.Duration
	for b.Loop() {
		took = append(took, c.serve(h))
		otherTook = append(otherTook, otherCall.serve(other))
	}
	slices.Sort(took)
	slices.Sort(otherTook)
	m, n := took[len(took)/2], otherTook[len(otherTook)/2]
	b.ReportMetric(float64(m.Nanoseconds())/1000, name+"-us")
	b.ReportMetric(float64(n.Nanoseconds())/1000, otherName+"-us")
	b.ReportMetric(float64(m)/float64(n), "time-ratio")
	b.ReportMetric(0, "ns/op")
}

func allocs(c call, h http.Handler) float64 {
	return testing.AllocsPerRun(100, func() { c.serve(h) })
}

// blocks returns how many pages of index and table the call's statement touches.
func (c call) blocks(b *testing.B, databaseURL string) float64 {
	b.Helper()
	asked, err := c.asked(databaseURL)
	if err != nil {
		b.Fatal(err)
	}
	p := explain(b, openDB(b, databaseURL), asked)
	return float64(p.Hit + p.Read)
}

// BenchmarkLoad runs the service and the bare handler in turn, as two processes
// under the load of 16 clients, on a million tasks too, and reports the
// service's requests a second and processor time a request as parts of the bare
// handler's.
func BenchmarkLoad(b *testing.B) {
	large := fill(b, 1_000_000)
	id := sqlValue[int64](b, openDB(b, large).pool, `SELECT max(id) FROM tasks WHERE user_id = 'listed'`)
	for name, path := range map[string]string{"list": "", "get": fmt.Sprint("/", id)} {
		b.Run(name, func(b *testing.B) {
			c := callOf(b, "listed", "GET", path, "")
			sides := [2]*measured{startMeasured(b, "main", large, c), startMeasured(b, "bare", large, c)}
			for b.Loop() {
				for _, side := range sides {
					side.load(b, 2000)
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

// BenchmarkStart starts the service on a database that has the schema, and
// reports when, after exec, it listens, has its database, and has answered the
// first list.
func BenchmarkStart(b *testing.B) {
	c := newClient(b)
	c.create("Milk")
	times := map[string][]time.Duration{}
	for b.Loop() {
		start := time.Now()
		p := startProcess(b)
		c.service = p.url
		for {
			if a, err := c.try("GET", "/api/"+c.user+"/tasks", ""); err == nil {
				times["list-ms"] = append(times["list-ms"], time.Since(start))
				if a.status != 200 {
					b.Fatalf("the first list = %d %s", a.status, a.body)
				}
				break
			}
			time.Sleep(100 * time.Microsecond) // it does not listen yet
		}
		for name, message := range map[string]string{"listening-ms": "listening", "database-ms": "database ready"} {
			eventually(b, message, func() bool {
				for _, line := range p.output.lines(b) {
					if line["message"] == message {
						at, err := time.Parse(time.RFC3339Nano, line["time"].(string))
						times[name] = append(times[name], at.Sub(start))
						return err == nil
					}
				}
				return false
			})
		}
		p.cmd.Process.Kill()
		<-p.exited
	}
	for name, took := range times {
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, name)
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDistance puts 64 reading clients on an instance whose compute is
// further and further away: each of its 15 connections waits for every answer.
func BenchmarkDistance(b *testing.B) {
	var near float64
	for _, roundTrip := range []time.Duration{5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(roundTrip.String(), func(b *testing.B) {
			d, r := startOverRelay(b)
			connect(b, d, defaultMaxConns)
			c := startService(b, d, settings{}).newClient()
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
				services = append(services, startMeasured(b, "main", os.Getenv("DATABASE_URL"), callOf(b, c.user, "GET", "", "")))
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
	http      *http.Client
	call      call
	metrics   string
	wall, cpu time.Duration
}

// startMeasured starts the service, "main", or what it is compared with, "bare".
func startMeasured(b *testing.B, which, databaseURL string, c call) *measured {
	b.Helper()
	port, metricsPort := freePort(b), freePort(b)
	m := &measured{
		process: &process{t: b, cmd: exec.Command(os.Args[0]), url: "http://127.0.0.1:" + port, exited: make(chan struct{})},
		http:    keepingConnections(b),
		call:    c,
		metrics: "http://127.0.0.1:" + metricsPort + "/metrics",
	}
	// Its log goes to /dev/null: to read it would cost the processor that is measured.
	m.cmd.Env = append(os.Environ(), "TODO_APP_TEST_RUNS="+which, "DATABASE_URL="+databaseURL, "PORT="+port, "METRICS_PORT="+metricsPort, "BETTER_AUTH_SECRET="+testSecret,
		"TODO_APP_BARE_METHOD="+c.method, "TODO_APP_BARE_PATH="+c.path, "TODO_APP_BARE_TOKEN="+c.token)
	if err := m.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	go func() {
		m.cmd.Wait()
		close(m.exited)
	}()
	b.Cleanup(m.stop)
	m.waitLive()
	m.load(b, 200)
	m.wall = 0
	return m
}

// load sends n requests from 16 clients and adds up the time they took.
func (m *measured) load(b *testing.B, n int) {
	const clients = 16
	start := time.Now()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range n / clients {
				r, err := http.NewRequest(m.call.method, m.url+m.call.path, nil)
				if err != nil {
					b.Error(err)
					return
				}
				r.Header.Set("Authorization", "Bearer "+m.call.token)
				res, err := m.http.Do(r)
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != 200 {
					b.Errorf("%s = %d %v", m.call.path, res.StatusCode, err)
				}
				res.Body.Close()
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
