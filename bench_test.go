package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The benchmarks. docs/performance.md explains the method and has the figures.

const (
	loadUsers = 8 // over which clients are spread: a user's share of the pool is a third
	loadTime  = time.Second
)

// fill creates a database with that many tasks of a hundredth as many users. The users loadUser(0)
// to loadUser(7) have 1,000 each, and of a million the user "deep" has 100,000.
func fill(b *testing.B, tasks int) (databaseURL string) {
	b.Helper()
	databaseURL = createDatabase(b)
	d := startDB(b, openDB(b, databaseURL))
	sqlExec(b, d.pool, fmt.Sprintf(`
		INSERT INTO tasks (user_id, title, description, completed)
		SELECT CASE WHEN i %% (%[1]d / 1000) < %[2]d THEN 'load-' || i %% (%[1]d / 1000)
		            WHEN i %% 10 = 9 AND %[1]d >= 1000000 THEN 'deep'
		            ELSE 'user-' || i / 10 %% (%[1]d / 100) END,
		       'Task ' || i, CASE WHEN i %% 2 = 0 THEN 'A description' END, i %% 3 = 0
		FROM generate_series(1, %[1]d) AS i`, tasks, loadUsers))
	sqlExec(b, d.pool, `VACUUM ANALYZE tasks`) // as autovacuum does
	return databaseURL
}

func loadUser(i int) string { return fmt.Sprint("load-", i%loadUsers) }

// nthTask returns the id of a user's n-th task, the newest first.
func nthTask(b *testing.B, d *database, user string, n int) int64 {
	b.Helper()
	return sqlValue[int64](b, d.pool, `
		SELECT id FROM tasks WHERE user_id = $1 ORDER BY id DESC LIMIT 1 OFFSET $2`, user, n)
}

// serveBare is what the service is compared with: the handlers that a good developer writes first,
// with net/http's and pgx's defaults. They have no token, validation, log, deadline or retry.
func serveBare() {
	pool, err := pgxpool.New(context.Background(), os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	respond := func(w http.ResponseWriter, status int, v any, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(v)
	}
	queryTask := func(w http.ResponseWriter, r *http.Request, status int, sql string, args ...any) {
		rows, _ := pool.Query(r.Context(), sql, args...) // CollectExactlyOneRow returns the error
		t, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[wireTask])
		respond(w, status, t, err)
	}
	decodeTask := func(r *http.Request) (t wireTask, err error) {
		err = json.NewDecoder(r.Body).Decode(&t)
		return t, err
	}
	http.HandleFunc("GET /health/live", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /api/{user_id}/tasks", func(w http.ResponseWriter, r *http.Request) {
		rows, _ := pool.Query(r.Context(), `
			SELECT id, user_id, title, description, completed, created_at, updated_at
			FROM tasks WHERE user_id = $1 ORDER BY id DESC LIMIT $2`, r.PathValue("user_id"), 50)
		tasks, err := pgx.CollectRows(rows, pgx.RowToStructByPos[wireTask])
		respond(w, http.StatusOK, tasks, err)
	})
	http.HandleFunc("GET /api/{user_id}/tasks/{id}", func(w http.ResponseWriter, r *http.Request) {
		queryTask(w, r, http.StatusOK, `
			SELECT id, user_id, title, description, completed, created_at, updated_at
			FROM tasks WHERE user_id = $1 AND id = $2`, r.PathValue("user_id"), r.PathValue("id"))
	})
	http.HandleFunc("POST /api/{user_id}/tasks", func(w http.ResponseWriter, r *http.Request) {
		t, err := decodeTask(r)
		if err != nil {
			respond(w, 0, nil, err)
			return
		}
		queryTask(w, r, http.StatusCreated, `
			INSERT INTO tasks (user_id, title, description, completed) VALUES ($1, $2, $3, $4)
			RETURNING id, user_id, title, description, completed, created_at, updated_at`,
			r.PathValue("user_id"), t.Title, t.Description, t.Completed)
	})
	http.HandleFunc("PATCH /api/{user_id}/tasks/{id}", func(w http.ResponseWriter, r *http.Request) {
		t, err := decodeTask(r)
		if err != nil {
			respond(w, 0, nil, err)
			return
		}
		queryTask(w, r, http.StatusOK, `
			UPDATE tasks SET title = $3, updated_at = now() WHERE user_id = $1 AND id = $2
			RETURNING id, user_id, title, description, completed, created_at, updated_at`,
			r.PathValue("user_id"), r.PathValue("id"), t.Title)
	})
	panic(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}

// startQuiet starts the service, "main", or what it is compared with, "bare". Its log goes to
// /dev/null, because reading it would use the processor that is measured.
func startQuiet(b *testing.B, which, databaseURL string, settings ...string) *process {
	b.Helper()
	settings = append(settings, "TODO_APP_TEST_RUNS="+which, "DATABASE_URL="+databaseURL)
	p := startProgram(b, "/bin/sh", []string{"-c", `exec "$0" >/dev/null`, os.Args[0]}, settings...)
	p.waitLive()
	return p
}

// A caller sends requests on one connection. It uses a fraction of the processor time of net/http's
// client, which the service and PostgreSQL would lack.
type caller struct {
	conn     net.Conn
	in       *bufio.Reader
	requests []string // sent in turn
}

func newCaller(b *testing.B, service string, requests ...string) *caller {
	b.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(service, "http://"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return &caller{conn, bufio.NewReaderSize(conn, 32<<10), requests}
}

// request returns the text of a request of a user.
func request(b *testing.B, user, method, path, body string) string {
	b.Helper()
	return fmt.Sprintf("%s /api/%s/tasks%s HTTP/1.1\r\nHost: todo\r\nAuthorization: %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, user, path, newClientOf(b, "", user).authorization, len(body), body)
}

// send sends the n-th request and returns the status of the response, which it reads to its end.
func (c *caller) send(n int) (status int, err error) {
	if _, err := io.WriteString(c.conn, c.requests[n%len(c.requests)]); err != nil {
		return 0, err
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, err
}

// load has all callers send requests for loadTime. It returns the number of successful responses
// and of 503s.
func load(b *testing.B, callers []*caller) (succeeded, unavailable int64) {
	b.Helper()
	var stop atomic.Bool
	time.AfterFunc(loadTime, func() { stop.Store(true) })
	var ok, busy atomic.Int64
	var all sync.WaitGroup
	for _, c := range callers {
		all.Go(func() {
			for n := 0; !stop.Load(); n++ {
				status, err := c.send(n)
				switch {
				case err == nil && status/100 == 2:
					ok.Add(1)
				case err == nil && status == http.StatusServiceUnavailable:
					busy.Add(1)
				default:
					b.Errorf("%q = %d, %v", c.requests[n%len(c.requests)], status, err)
					return
				}
			}
		})
	}
	all.Wait()
	return ok.Load(), busy.Load()
}

// processStat returns the fields of /proc/PID/stat from the third one on, nil if there is no such
// process: proc_pid_stat(5).
func processStat(pid string) []string {
	text, _ := os.ReadFile("/proc/" + pid + "/stat")
	return strings.Fields(string(text[strings.LastIndex(string(text), ")")+1:]))
}

// processorTime returns what a process and its children have used, including the children that have
// ended.
func processorTime(pid string) time.Duration {
	children, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	ticks := 0
	for _, p := range append(strings.Fields(string(children)), pid) {
		if stat := processStat(p); stat != nil {
			for _, field := range stat[11:15] { // utime, stime, cutime, cstime
				n, _ := strconv.Atoi(field)
				ticks += n
			}
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

// postmaster returns the process that all of PostgreSQL's processes are children of.
func postmaster(b *testing.B) (pid string) {
	b.Helper()
	backend := sqlValue[int](b, sharedDB.pool, `SELECT pg_backend_pid()`)
	stat := processStat(strconv.Itoa(backend))
	if stat == nil {
		b.Fatal("the processor time of PostgreSQL is unknown: it does not run on this machine")
	}
	return stat[1]
}

// A usage is what one successful request takes on average.
type usage struct{ wall, service, postgres float64 } // seconds

// measure puts load on a service and returns what a request took.
func measure(b *testing.B, service *process, postmaster string, callers []*caller) usage {
	b.Helper()
	pid := strconv.Itoa(service.cmd.Process.Pid)
	start, before, postgresBefore := time.Now(), processorTime(pid), processorTime(postmaster)
	n, unavailable := load(b, callers)
	if unavailable > 0 {
		b.Errorf("%d responses are 503", unavailable)
	}
	per := func(d time.Duration) float64 { return d.Seconds() / float64(n) }
	return usage{wall: per(time.Since(start)), service: per(processorTime(pid) - before),
		postgres: per(processorTime(postmaster) - postgresBefore)}
}

func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// BenchmarkLoad compares the service with the bare handlers, each under the load of 32 clients, in
// alternate rounds on a table with a million tasks. It reports the medians of the rounds' ratios.
func BenchmarkLoad(b *testing.B) {
	const clients = 32
	databaseURL := fill(b, 1_000_000)
	d := startDB(b, openDB(b, databaseURL))
	var own [clients]string // each client updates its own task, so that none waits for a row lock
	for i := range own {
		own[i] = fmt.Sprint("/", nthTask(b, d, loadUser(i), 100+i/loadUsers))
	}
	databaseURL = withParam(databaseURL, fmt.Sprint("pool_max_conns=", defaultMaxConns))
	service, bare := startQuiet(b, "main", databaseURL), startQuiet(b, "bare", databaseURL)
	parent := postmaster(b)
	for _, row := range []struct {
		name, method string
		own          bool
		body         string
	}{
		{"list", "GET", false, ""},
		{"get", "GET", true, ""},
		{"create", "POST", false, `{"title": "Buy milk"}`},
		{"update", "PATCH", true, `{"title": "Buy oat milk"}`},
	} {
		b.Run(row.name, func(b *testing.B) {
			var callers, bareCallers []*caller
			for i := range clients {
				path := ""
				if row.own {
					path = own[i]
				}
				r := request(b, loadUser(i), row.method, path, row.body)
				callers = append(callers, newCaller(b, service.url, r))
				bareCallers = append(bareCallers, newCaller(b, bare.url, r))
			}
			load(b, callers) // opens the pools' connections and prepares the statements
			load(b, bareCallers)
			var requests, cpu, postgres, micros []float64
			for b.Loop() {
				s, o := measure(b, service, parent, callers), measure(b, bare, parent, bareCallers)
				requests = append(requests, o.wall/s.wall)
				cpu = append(cpu, s.service/o.service)
				postgres = append(postgres, s.postgres/o.postgres)
				micros = append(micros, s.service*1e6)
			}
			b.ReportMetric(median(requests), "req/bare")
			b.ReportMetric(median(cpu), "cpu/bare")
			b.ReportMetric(median(postgres), "pg-cpu/bare")
			b.ReportMetric(median(micros), "cpu-us")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkStart starts the service on a database that has the schema. It reports when, after exec,
// the service listens, has its database, and has sent the response to a first list.
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
		for name, message := range map[string]string{
			"listening-ms": "listening", "database-ms": "database ready",
		} {
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

// inTurn sends the requests of two callers alternately and reports the ratio of their median times.
func inTurn(b *testing.B, c, other *caller) {
	b.Helper()
	var times, otherTimes []time.Duration
	for n := 0; b.Loop(); n++ {
		for _, side := range []struct {
			caller *caller
			times  *[]time.Duration
		}{{c, &times}, {other, &otherTimes}} {
			start := time.Now()
			if status, err := side.caller.send(n); err != nil || status != http.StatusOK {
				b.Fatalf("%q = %d, %v", side.caller.requests[0], status, err)
			}
			*side.times = append(*side.times, time.Since(start))
		}
	}
	b.ReportMetric(float64(median(times))/float64(median(otherTimes)), "time-ratio")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkMillion compares the time of a request among a million tasks with the time among ten
// thousand, and that of page 1,000 of a list with that of page 1. The user has 1,000 tasks.
func BenchmarkMillion(b *testing.B) {
	large, small := fill(b, 1_000_000), fill(b, 10_000)
	service, smallService := startQuiet(b, "main", large), startQuiet(b, "main", small)
	d, smallDB := startDB(b, openDB(b, large)), startDB(b, openDB(b, small))
	for _, row := range []struct{ name, path, smallPath string }{
		{"list", "", ""},
		{"get", fmt.Sprint("/", nthTask(b, d, loadUser(0), 500)),
			fmt.Sprint("/", nthTask(b, smallDB, loadUser(0), 500))},
	} {
		b.Run(row.name, func(b *testing.B) {
			inTurn(b, newCaller(b, service.url, request(b, loadUser(0), "GET", row.path, "")),
				newCaller(b, smallService.url, request(b, loadUser(0), "GET", row.smallPath, "")))
		})
	}
	b.Run("page1000", func(b *testing.B) {
		last := fmt.Sprint("?limit=100&before=", nthTask(b, d, "deep", 99_899))
		inTurn(b, newCaller(b, service.url, request(b, "deep", "GET", last, "")),
			newCaller(b, service.url, request(b, "deep", "GET", "?limit=100", "")))
	})
}

// BenchmarkDistance puts 64 clients on a service whose database is far away, with a pool of 15 and
// with one of 60 connections, in alternate rounds.
func BenchmarkDistance(b *testing.B) {
	const clients = 64
	for _, ms := range []int{5, 20, 100} {
		roundTrip := time.Duration(ms) * time.Millisecond
		b.Run(roundTrip.String(), func(b *testing.B) {
			var sides [2][]*caller
			for i, conns := range []int{defaultMaxConns, 60} {
				d, r := openOverRelay(b, withParam(sharedDatabaseURL(), fmt.Sprint("pool_max_conns=", conns)))
				service := startService(b, startDB(b, d), settings{logLevel: slog.LevelError})
				for j := range clients {
					user := newUser()
					if j >= loadUsers {
						sides[i] = append(sides[i], newCaller(b, service.url, sides[i][j%loadUsers].requests[0]))
						continue
					}
					newClientOf(b, service.url, user).create("Milk")
					sides[i] = append(sides[i], newCaller(b, service.url, request(b, user, "GET", "", "")))
				}
				r.delay.Store(int64(roundTrip))
				load(b, sides[i]) // opens the connections and prepares the statement
			}
			var rates [2][]float64
			for b.Loop() {
				for i, callers := range sides {
					n, _ := load(b, callers)
					rates[i] = append(rates[i], float64(n)/loadTime.Seconds())
				}
			}
			b.ReportMetric(median(rates[0]), "15-req/s")
			b.ReportMetric(median(rates[1]), "60-req/s")
			b.ReportMetric(median(rates[1])/median(rates[0]), "60/15")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkInstances puts 64 clients on one instance and on eight, which only a pooler has room for
// on a small compute. Every fourth request is a change.
func BenchmarkInstances(b *testing.B) {
	const clients = 64
	var alone float64
	for _, instances := range []int{1, 8} {
		b.Run(fmt.Sprint(instances), func(b *testing.B) {
			var urls []string
			for range instances {
				urls = append(urls, startQuiet(b, "main", sharedDatabaseURL()).url)
			}
			var callers []*caller
			for i := range clients {
				c := newClientOf(b, urls[i%instances], newUser())
				list := request(b, c.user, "GET", "", "")
				toggle := request(b, c.user, "PATCH", c.create("Milk").path()+"/complete", "")
				callers = append(callers, newCaller(b, c.service, list, list, list, toggle))
			}
			load(b, callers) // opens the connections
			var rates []float64
			var sessions int
			for b.Loop() {
				n, unavailable := load(b, callers)
				if unavailable > 0 {
					b.Errorf("%d responses are 503", unavailable)
				}
				rates = append(rates, float64(n))
				sessions = sqlValue[int](b, sharedDB.pool, `
					SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()`)
			}
			alone = cmp.Or(alone, median(rates))
			b.ReportMetric(median(rates)/alone, "req/one")
			b.ReportMetric(float64(sessions), "server-sessions")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkParts measures what a request costs next to its statement and net/http.
func BenchmarkParts(b *testing.B) {
	c := newClient(b)
	service := startService(b, sharedDB, settings{})
	service.server.log = newLogger(io.Discard, slog.LevelInfo)
	r := httptest.NewRequest("GET", "/api/"+c.user+"/tasks", nil)
	r.Header.Set("Authorization", c.authorization)
	r.Pattern = "GET /api/{user_id}/tasks"
	w := &response{ResponseWriter: httptest.NewRecorder(), status: http.StatusOK}
	_, timing := withTiming(b.Context())
	b.Run("token", func(b *testing.B) {
		for b.Loop() {
			if _, err := service.auth.user(r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("turn", func(b *testing.B) {
		for b.Loop() {
			done, err := service.turns.take(b.Context(), sharedDB, c.user)
			if err != nil {
				b.Fatal(err)
			}
			done()
		}
	})
	b.Run("metrics", func(b *testing.B) {
		for b.Loop() {
			service.metrics.observe("/api/{user_id}/tasks", "GET", http.StatusOK, time.Millisecond)
		}
	})
	b.Run("log-and-metrics", func(b *testing.B) {
		for b.Loop() {
			service.record(w, r, timing, nil)
		}
	})
}
