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

// The benchmarks, whose figures docs/performance.md has. They report ratios, of services that get
// the same load in turn.

const loadTime = time.Second

// loadUser returns one of eight users, because one may have a third of the pool's connections.
func loadUser(i int) string { return fmt.Sprint("load-", i%8) }

// createTasks creates a database with a million tasks of some 10,000 users. loadUser(0) to
// loadUser(7) have 1,000 each, and the user "deep" has 100,000.
func createTasks(b *testing.B) (*database, string) {
	databaseURL := createDatabase(b)
	d := startDB(b, openDB(b, databaseURL))
	sqlExec(b, d.pool, `
		INSERT INTO public.tasks (user_id, title, description, completed)
		SELECT CASE WHEN i % 1000 < 8 THEN 'load-' || i % 1000
		            WHEN i % 10 = 9 THEN 'deep'
		            ELSE 'user-' || i / 10 % 10000 END,
		       'Task ' || i, CASE WHEN i % 2 = 0 THEN 'A description' END, i % 3 = 0
		FROM generate_series(1, 1000000) AS i`)
	sqlExec(b, d.pool, `VACUUM ANALYZE public.tasks`) // as autovacuum does
	return d, databaseURL
}

// nthTask returns the id of a user's n-th task, the newest first.
func nthTask(b *testing.B, d *database, user string, n int) int64 {
	return sqlValue[int64](b, d.pool, `
		SELECT id FROM public.tasks WHERE user_id = $1 ORDER BY id DESC LIMIT 1 OFFSET $2`, user, n)
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
	list := func(w http.ResponseWriter, r *http.Request) {
		rows, _ := pool.Query(r.Context(), `SELECT `+columns+`
			FROM tasks WHERE user_id = $1 ORDER BY id DESC LIMIT $2`, r.PathValue("user_id"), 50)
		tasks, err := pgx.CollectRows(rows, pgx.RowToStructByPos[wireTask])
		respond(w, http.StatusOK, tasks, err)
	}
	task := func(status int, sql string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			args := []any{r.PathValue("user_id")}
			if id := r.PathValue("id"); id != "" {
				args = append(args, id)
			}
			if r.Method != http.MethodGet {
				var t wireTask
				if err := json.NewDecoder(r.Body).Decode(&t); err != nil {
					respond(w, 0, nil, err)
					return
				}
				args = append(args, t.Title, t.Description, t.Completed)
			}
			rows, _ := pool.Query(r.Context(), sql, args...) // CollectExactlyOneRow returns the error
			t, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[wireTask])
			respond(w, status, t, err)
		}
	}
	http.HandleFunc("GET /health/live", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /api/{user_id}/tasks", list)
	http.HandleFunc("GET /api/{user_id}/tasks/{id}", task(http.StatusOK,
		`SELECT `+columns+` FROM tasks WHERE user_id = $1 AND id = $2`))
	http.HandleFunc("POST /api/{user_id}/tasks", task(http.StatusCreated, `
		INSERT INTO tasks (user_id, title, description, completed) VALUES ($1, $2, $3, $4)
		RETURNING `+columns))
	http.HandleFunc("PATCH /api/{user_id}/tasks/{id}", task(http.StatusOK, `
		UPDATE tasks SET title = $3, description = $4, completed = $5, updated_at = now()
		WHERE user_id = $1 AND id = $2 RETURNING `+columns))
	panic(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}

// startQuiet starts a program on a database. Its log goes to /dev/null, because reading it would
// use the processor that is measured. runs tells the test binary what it is: "main" or "bare".
func startQuiet(b *testing.B, program, runs, databaseURL string) *process {
	b.Helper()
	p := startProgram(b, "/bin/sh", []string{"-c", `exec "$0" >/dev/null`, program},
		"TODO_APP_TEST_RUNS="+runs, "DATABASE_URL="+withParam(databaseURL, "pool_max_conns=15"))
	p.waitHealth("live")
	return p
}

// A caller sends a request again and again on one connection. It uses a fraction of the processor
// time of net/http's client, which the service and PostgreSQL would lack.
type caller struct {
	conn    net.Conn
	in      *bufio.Reader
	request string
}

func newCaller(b *testing.B, service, user, method, suffix, body string) *caller {
	b.Helper()
	conn := dialRaw(b, service, "")
	conn.SetDeadline(time.Time{})
	c := newClientOf(b, service, user)
	return &caller{conn, bufio.NewReaderSize(conn, 32<<10), fmt.Sprintf("%s %s HTTP/1.1\r\n"+
		"Host: todo\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d"+
		"\r\n\r\n%s", method, c.path(suffix), c.authorization, len(body), body)}
}

// send sends the request and reads the response, which must be a 2xx.
func (c *caller) send() error {
	if _, err := io.WriteString(c.conn, c.request); err != nil {
		return err
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return err
	}
	if _, err = io.Copy(io.Discard, res.Body); err == nil && res.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", c.request, res.Status)
	}
	return err
}

// load has all callers send requests for loadTime. It returns the number of responses per second.
func load(b *testing.B, callers []*caller) float64 {
	b.Helper()
	var stop atomic.Bool
	var responses atomic.Int64
	var all sync.WaitGroup
	start := time.Now()
	for _, c := range callers {
		all.Go(func() {
			for !stop.Load() {
				if err := c.send(); err != nil {
					b.Error(err)
					return
				}
				responses.Add(1)
			}
		})
	}
	time.Sleep(loadTime)
	stop.Store(true)
	all.Wait()
	return float64(responses.Load()) / time.Since(start).Seconds()
}

// processorTime returns the clock ticks that a process has used: proc_pid_stat(5).
func processorTime(b *testing.B, p *process) float64 {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return float64(user + system)
}

func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// BenchmarkLoad compares the service with serveBare and, if it is set, with the program that
// TODO_APP_OTHER names, such as an earlier release. Each gets the load of 32 clients, in alternate
// rounds. The figures are the medians of the rounds' ratios.
func BenchmarkLoad(b *testing.B) {
	const clients = 32
	d, databaseURL := createTasks(b)
	names, services := []string{"this", "bare"}, []*process{
		startQuiet(b, os.Args[0], "main", databaseURL), startQuiet(b, os.Args[0], "bare", databaseURL)}
	if other := os.Getenv("TODO_APP_OTHER"); other != "" {
		names = append(names, "other")
		services = append(services, startQuiet(b, other, "main", databaseURL))
	}
	for _, row := range []struct{ name, method, body string }{
		{"list", "GET", ""}, {"get", "GET", ""}, {"create", "POST", `{"title": "Buy milk"}`},
		{"update", "PATCH", `{"title": "Buy oat milk"}`},
	} {
		b.Run(row.name, func(b *testing.B) {
			callers := make([][]*caller, len(services))
			for i := range clients {
				suffix := ""
				if row.name == "get" || row.name == "update" { // its own task: no wait for a row lock
					suffix = fmt.Sprint("/", nthTask(b, d, loadUser(i), 100+i/8))
				}
				for s, p := range services {
					callers[s] = append(callers[s],
						newCaller(b, p.url, loadUser(i), row.method, suffix, row.body))
				}
			}
			for s := range services {
				load(b, callers[s]) // opens the connections and prepares the statement
			}
			requests, times := make([][]float64, len(services)), make([][]float64, len(services))
			for b.Loop() {
				var rate, perRequest [3]float64
				for s, p := range services {
					before := processorTime(b, p)
					rate[s] = load(b, callers[s])
					perRequest[s] = (processorTime(b, p) - before) / rate[s]
					requests[s] = append(requests[s], rate[0]/rate[s])
					times[s] = append(times[s], perRequest[0]/perRequest[s])
				}
			}
			for s := 1; s < len(services); s++ {
				b.ReportMetric(median(requests[s]), "req/"+names[s])
				b.ReportMetric(median(times[s]), "cpu/"+names[s])
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkPages compares page 1,000 of a list with page 1. The figure is the ratio of the medians.
func BenchmarkPages(b *testing.B) {
	d, databaseURL := createTasks(b)
	service := startQuiet(b, os.Args[0], "main", databaseURL)
	last := fmt.Sprint("?limit=100&before=", nthTask(b, d, "deep", 99_899))
	pages := []*caller{newCaller(b, service.url, "deep", "GET", last, ""),
		newCaller(b, service.url, "deep", "GET", "?limit=100", "")}
	var times [2][]time.Duration
	for b.Loop() {
		for i, page := range pages {
			start := time.Now()
			if err := page.send(); err != nil {
				b.Fatal(err)
			}
			times[i] = append(times[i], time.Since(start))
		}
	}
	b.ReportMetric(float64(median(times[0]))/float64(median(times[1])), "page1000/page1")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDistance puts 64 clients on a service whose database is far away, with a pool of 60
// connections and with one of 15, in alternate rounds. The figure is the ratio of their medians.
func BenchmarkDistance(b *testing.B) {
	testDB(b)
	for _, roundTrip := range []time.Duration{5e6, 20e6, 100e6} {
		b.Run(roundTrip.String(), func(b *testing.B) {
			var sides [2][]*caller
			for i, conns := range []string{"60", "15"} {
				d, r := openOverRelay(b, withParam(os.Getenv("DATABASE_URL"), "pool_max_conns="+conns))
				service := startService(b, startDB(b, d), settings{logLevel: slog.LevelError})
				for range 8 {
					c := service.newClient()
					c.create("Milk")
					for range 8 {
						sides[i] = append(sides[i], newCaller(b, service.url, c.user, "GET", "", ""))
					}
				}
				r.delay.Store(int64(roundTrip))
				load(b, sides[i]) // opens the connections and prepares the statement
			}
			var rates [2][]float64
			for b.Loop() {
				for i, callers := range sides {
					rates[i] = append(rates[i], load(b, callers))
				}
			}
			b.ReportMetric(median(rates[0])/median(rates[1]), "60/15")
			b.ReportMetric(0, "ns/op")
		})
	}
}
