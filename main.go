// Todo-app is a small multi-user task API on serverless Postgres. A Next.js
// front end with Better Auth signs its users in and sends HS256 tokens; this
// service verifies them (auth.go) and keeps each user's tasks (tasks.go) in
// Neon (db.go). This file is the process and the HTTP edge.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	// A request is answered within 20 s of its first byte: the header's time and the request's.
	headerTimeout  = 4 * time.Second
	requestTimeout = 15 * time.Second
	readTimeout    = 10 * time.Second // header and body
	writeTimeout   = 20 * time.Second // from the header to the last byte of the answer
	idleTimeout    = 2 * time.Minute  // between the requests of a connection
	readyTimeout   = 3 * time.Second

	// percent; the live heap is some 4 MB, and a list costs a quarter less processor time than at Go's 100.
	gcPercent = 300
	// bytes; from here on it is collected as often as need be. Fly.io's smallest machine has 256 MB.
	memoryLimit = 100 << 20

	maxHeader = 64<<10 - 4<<10 // bytes; net/http grants 4 KiB more
	maxLogged = 2 << 10        // bytes of a text that a client or a statement decides, in the log
	maxBody   = 64 << 10       // bytes; four times the largest sensible task

	// Cloud Run kills 10 s after SIGTERM. Reckoned from the signal:
	cancelWork = 7 * time.Second         // database work still running is cancelled
	closeConns = 8 * time.Second         // connections that still have a request are cut
	leave      = 8500 * time.Millisecond // whether or not the pool has closed
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	if err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdout); err != nil {
		out := os.Stdout
		if len(os.Args) > 1 {
			out = os.Stderr // stdout is for the token
		}
		newLogger(out, slog.LevelInfo).Error(err.Error())
		os.Exit(1)
	}
}

// run serves until ctx is done or a signal arrives, prints a token, or applies the schema. An error
// before it serves names the setting that is missing or invalid.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	command := strings.Join(args[:min(len(args), 1)], "")
	switch {
	case command == "" || command == "migrate" && len(args) == 1:
	case command == "token" && len(args) == 2:
		auth, err := readAuth(getenv)
		if err != nil {
			return err
		}
		token, err := auth.sign(args[1])
		if err == nil {
			_, err = fmt.Fprintln(stdout, token)
		}
		return err
	default:
		return errors.New("usage: todo-app serves; todo-app migrate applies the schema; " +
			"todo-app token USER_ID prints a token that is valid for an hour")
	}
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "": slog.LevelInfo, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	level, ok := levels[strings.ToLower(getenv("LOG_LEVEL"))]
	if !ok {
		return errors.New("LOG_LEVEL must be debug, info, warn or error")
	}
	log := newLogger(stdout, level)
	if command == "migrate" {
		db, err := openDatabase(getenv("DATABASE_URL"), log)
		if err != nil {
			return err
		}
		defer db.pool.Close()
		ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		return db.start(ctx)
	}
	auth, err := readAuth(getenv)
	if err != nil {
		return err
	}
	origins, err := corsOrigins(getenv("CORS_ORIGINS"))
	if err != nil {
		return err
	}
	db, err := openDatabase(getenv("DATABASE_URL"), log)
	if err != nil {
		return err
	}
	s := newServer(auth, db, log, origins, getenv("GOOGLE_CLOUD_PROJECT"))
	return s.serve(ctx, cmp.Or(getenv("PORT"), "8080"), getenv("METRICS_PORT"))
}

func readAuth(getenv func(string) string) (*authenticator, error) {
	return newAuthenticator(getenv("BETTER_AUTH_SECRET"), getenv("BETTER_AUTH_SECRETS"),
		getenv("JWT_AUDIENCE"), getenv("JWT_ISSUER"))
}

// openDatabase logs a WARNING for the parameters of the connection string that are ignored.
func openDatabase(databaseURL string, log *slog.Logger) (*database, error) {
	config, ignored, err := poolConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	if ignored != "" {
		log.Warn(ignored)
	}
	return newDatabase(config, log)
}

// corsOrigins splits the setting CORS_ORIGINS into origins as browsers send them.
func corsOrigins(list string) ([]string, error) {
	if list == "" {
		return nil, nil
	}
	origin := regexp.MustCompile(`^[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?$`)
	origins := strings.Split(strings.ReplaceAll(list, " ", ""), ",")
	for _, o := range origins {
		if !origin.MatchString(o) {
			return nil, errors.New("CORS_ORIGINS must list origins like https://app.example.com, separated by commas: no *, no path, no slash at the end, lower case")
		}
	}
	return origins, nil
}

// newLogger writes one JSON object a line, in the field names and severities
// of Google Cloud's logs, which Fly.io takes as they are.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case slog.MessageKey:
				a.Key = "message"
			case slog.LevelKey:
				a = slog.String("severity", strings.Replace(a.Value.String(), "WARN", "WARNING", 1))
			}
			return a
		},
	}))
}

// A server is the API over one database.
type server struct {
	auth    *authenticator
	db      *database
	log     *slog.Logger
	origins []string // whose pages may call, CORS_ORIGINS
	project string   // GOOGLE_CLOUD_PROJECT
	mux     *http.ServeMux

	work   context.Context // of everything the database does
	cancel func()          // ends it, when a stop takes too long

	mu     sync.Mutex
	counts map[series]sums
}

func newServer(auth *authenticator, db *database, log *slog.Logger, origins []string, project string) *server {
	s := &server{auth: auth, db: db, log: log, origins: origins, project: project, mux: http.NewServeMux(), counts: map[series]sums{}}
	s.work, s.cancel = context.WithCancel(context.Background())
	for pattern, e := range s.routes() {
		s.mux.HandleFunc(pattern, s.handle(e))
	}
	s.mux.HandleFunc("/", s.handle(s.noRoute))
	return s
}

// routes is every route of the service.
func (s *server) routes() map[string]endpoint {
	return map[string]endpoint{
		"GET /api/{user_id}/tasks":                 s.forUser(s.listTasks),
		"POST /api/{user_id}/tasks":                s.forUser(s.createTask),
		"GET /api/{user_id}/tasks/{id}":            s.forUser(s.getTask),
		"PUT /api/{user_id}/tasks/{id}":            s.forUser(s.updateTask),
		"PATCH /api/{user_id}/tasks/{id}":          s.forUser(s.updateTask),
		"PATCH /api/{user_id}/tasks/{id}/complete": s.forUser(s.completeTask),
		"DELETE /api/{user_id}/tasks/{id}":         s.forUser(s.deleteTask),
		"GET /health/live":                         s.live,
		"GET /health/ready":                        s.ready,
		"GET /openapi.json":                        document("application/json", openAPI),
		"GET /docs":                                document("text/html; charset=utf-8", docs),
	}
}

// serve runs the service until ctx is done, a signal comes or it fails. It
// listens before the database answers, so that a cold one does not fail a
// deploy: requests wait for it within their deadline.
func (s *server) serve(ctx context.Context, port, metricsPort string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	failed := make(chan error, 3)
	public, err := s.listen("PORT", port, s, failed)
	if err != nil {
		return err
	}
	if metricsPort != "" {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /metrics", s.metrics)
		mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { writeError(w, errNoPath) })
		private, err := s.listen("METRICS_PORT", metricsPort, mux, failed)
		if err != nil {
			return err
		}
		defer private.Close()
	}
	s.log.Info("listening", "port", port)
	go func() {
		if err := s.db.start(ctx); err != nil && ctx.Err() == nil {
			failed <- err
		}
	}()

	select {
	case err = <-failed:
		s.cancel()
	case err = <-s.db.failed:
		s.cancel()
	case <-ctx.Done():
	}
	stop() // a second signal ends the process at once
	s.log.Info("stopping")
	s.drain(public)
	s.log.Info("stopped")
	return err
}

// listen serves h on all addresses of the setting's port, and sends how that
// ended to failed.
func (s *server) listen(setting, port string, h http.Handler, failed chan<- error) (*http.Server, error) {
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, fmt.Errorf("%s must be a port number from 1 to 65535", setting)
	}
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	hs := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	go func() { failed <- hs.Serve(listener) }()
	return hs, nil
}

// drain lets the requests in flight finish, as far as the time goes.
func (s *server) drain(public *http.Server) {
	time.AfterFunc(cancelWork, s.cancel)
	late := time.After(leave)
	ctx, cancel := context.WithTimeout(context.Background(), closeConns)
	defer cancel()
	if err := public.Shutdown(ctx); err != nil {
		public.Close()
	}
	closed := make(chan struct{})
	go func() {
		s.db.pool.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-late:
	}
}

// ServeHTTP gives every answer its common headers and logs it in one line.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	id := r.Header.Get("X-Request-Id")
	if !saneID.MatchString(id) {
		id = rand.Text()
	}
	w := &response{ResponseWriter: rw}
	w.Header().Set("X-Request-Id", id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if strings.HasPrefix(r.URL.Path, "/api/") {
		w.Header().Set("Cache-Control", "no-store")
	}
	if !s.cors(w, r) {
		s.mux.ServeHTTP(w, r)
	}

	took := time.Since(start)
	route := r.Pattern[strings.Index(r.Pattern, " ")+1:]
	s.observe(series{route, r.Method, w.status}, took)
	level := slog.LevelInfo
	switch {
	case w.status == http.StatusServiceUnavailable:
		level = slog.LevelWarn
	case w.status >= 500:
		level = slog.LevelError
	}
	attrs := append(make([]slog.Attr, 0, 8),
		slog.String("request_id", id),
		slog.String("method", r.Method),
		slog.String("route", route),
		slog.Int("status", w.status),
		slog.Int64("duration_us", took.Microseconds()),
		slog.Int("bytes", w.bytes))
	if w.err != nil {
		attrs = append(attrs, slog.String("error", w.err.Error()))
	}
	if trace := traceID.FindString(r.Header.Get("X-Cloud-Trace-Context") + " " + r.Header.Get("Traceparent")); trace != "" {
		if s.project != "" {
			trace = "projects/" + s.project + "/traces/" + trace
		}
		attrs = append(attrs, slog.String("logging.googleapis.com/trace", trace))
	}
	s.log.LogAttrs(context.Background(), level, "request", attrs...)
}

var (
	// A client's request id that may go into the log and back.
	saneID = regexp.MustCompile(`^[0-9A-Za-z._:/+=-]{1,128}$`)
	// The trace in Cloud Run's header, or that of W3C Trace Context.
	traceID = regexp.MustCompile(`\b[0-9a-fA-F]{32}\b`)
)

// cors lets the pages of the listed origins call, and answers their preflight
// requests, which carry no token.
func (s *server) cors(w http.ResponseWriter, r *http.Request) (preflight bool) {
	if len(s.origins) == 0 {
		return false
	}
	h := w.Header()
	h.Set("Vary", "Origin")
	origin := r.Header.Get("Origin")
	if !slices.Contains(s.origins, origin) {
		return false
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Allow-Credentials", "true")
	h.Set("Access-Control-Expose-Headers", "ETag, Link, Location, X-Total-Count, X-Request-Id, Retry-After, Idempotency-Replayed, WWW-Authenticate")
	if r.Method != http.MethodOptions {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-Id")
	h.Set("Access-Control-Max-Age", "7200") // seconds; Chromium takes no more
	w.WriteHeader(http.StatusNoContent)
	return true
}

// A response remembers what the log needs to know of an answer.
type response struct {
	http.ResponseWriter
	status, bytes int
	err           error
}

func (w *response) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes += n
	return n, err
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// An endpoint answers a request or returns an error, never both. Its context
// ends with the request's deadline and not when the client goes away: an
// abandoned write may be committed all the same, and cancelling it would cost
// its connection.
type endpoint func(ctx context.Context, w http.ResponseWriter, r *http.Request) error

// handle makes a handler of an endpoint, for ServeHTTP, and its error or panic the answer.
func (s *server) handle(e endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, _ := withTrace(s.work)
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		answer := w.(*response)
		defer func() {
			if v := recover(); v != nil {
				answer.err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
			if answer.err != nil && answer.status == 0 {
				writeError(w, answer.err)
			}
		}()
		answer.err = e(ctx, w, r)
	}
}

// forUser makes an endpoint of one that serves the verified user of the path.
func (s *server) forUser(e func(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error) endpoint {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		user, err := s.auth.user(r)
		if err != nil {
			return err
		}
		if r.PathValue("user_id") != user {
			return errNotYours
		}
		at := target{user: user}
		if text := r.PathValue("id"); text != "" {
			id, err := strconv.ParseUint(text, 10, 63)
			if err != nil || id == 0 {
				return errNoTask
			}
			at.id = int64(id)
		}
		return e(ctx, w, r, at)
	}
}

// methods are those that the Allow header and the metrics know.
var methods = []string{"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}

// noRoute refuses what no route takes. The mux by itself would do so in plain text.
func (s *server) noRoute(_ context.Context, w http.ResponseWriter, r *http.Request) error {
	var allow []string
	for _, method := range methods {
		if _, pattern := s.mux.Handler(&http.Request{Method: method, URL: r.URL}); pattern != "/" {
			allow = append(allow, method)
			r.Pattern = pattern // for the log
		}
	}
	if allow == nil {
		return errNoPath
	}
	w.Header().Set("Allow", strings.Join(allow, ", "))
	return errMethod
}

// A refusal is an error with a text for the client. Whatever wraps it is for the log.
type refusal struct {
	status int
	detail string
}

func (e refusal) Error() string { return e.detail }

// The API's errors, but for the values that invalid refuses.
var (
	errBadJSON   = refusal{400, "The request body must be one JSON object in valid UTF-8."}
	errCutBody   = refusal{400, "The request body is malformed or ended before its length."}
	errNoToken   = refusal{401, "Send an access token, as Authorization: Bearer <token>."}
	errBadToken  = refusal{401, "The access token is not valid or has expired: get a new one."}
	errNotYours  = refusal{403, "The access token is not for the user in the path."}
	errNoPath    = refusal{404, "There is nothing at this path."}
	errNoTask    = refusal{404, "There is no such task."}
	errMethod    = refusal{405, "This path does not take this method: the Allow header lists those it takes."}
	errSlowBody  = refusal{408, "The request body did not arrive in time."}
	errChanged   = refusal{412, "The task is not the version that If-Match names: get it again and decide anew."}
	errLargeBody = refusal{413, fmt.Sprintf("The request body must not exceed %d bytes.", maxBody)}
	errNotJSON   = refusal{415, "The request body must be JSON: send Content-Type: application/json."}
	errKeyReused = refusal{422, "This Idempotency-Key was used for another task: send a new key with a new body."}

	errInternal    = refusal{500, "Something went wrong on our side: report it with the X-Request-Id of this answer."}
	errUnavailable = refusal{503, "The database cannot be reached, is waking up or did not answer in time: try again in a moment; a change may have been made or not, and is safe to repeat with the same Idempotency-Key or If-Match."}
)

// invalid refuses a value, named together with its rule.
func invalid(format string, args ...any) error {
	return refusal{422, fmt.Sprintf(format, args...)}
}

// writeError is where an error becomes an answer. One that is no refusal is ours.
func writeError(w http.ResponseWriter, err error) {
	answer, ok := errors.AsType[refusal](err)
	if !ok {
		answer = errInternal
	}
	switch answer {
	case errNoToken:
		w.Header().Set("WWW-Authenticate", `Bearer`)
	case errBadToken:
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`) // RFC 6750, 3.1
	case errCutBody, errSlowBody, errLargeBody:
		w.Header().Set("Connection", "close") // what is left of the body is not read
	case errUnavailable:
		w.Header().Set("Retry-After", "1") // seconds; Neon wakes in less
	}
	writeJSON(w, answer.status, map[string]string{"detail": answer.detail})
}

// writeJSON answers with v. It cannot fail but on a type that JSON does not have.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(v); err != nil {
		return err
	}
	write(w, status, "application/json", body.Bytes())
	return nil
}

// write answers with a body. Should that fail, the client is gone.
func write(w http.ResponseWriter, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

// readObject returns the members of a request's body, nil if that is empty. It
// does not wait for a body when ctx is done.
func readObject(ctx context.Context, w http.ResponseWriter, r *http.Request) (map[string]json.RawMessage, error) {
	if r.ContentLength > maxBody {
		return nil, errLargeBody
	}
	defer context.AfterFunc(ctx, func() { http.NewResponseController(w).SetReadDeadline(time.Now()) })()
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	media, _, _ := mime.ParseMediaType(cmp.Or(r.Header.Get("Content-Type"), "application/json"))
	_, subtype, _ := strings.Cut(media, "/")
	switch {
	case tooLarge:
		return nil, errLargeBody
	case len(body) > 0 && media != "application/json" && !strings.HasSuffix(subtype, "+json"):
		return nil, errNotJSON
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%w: %w", errSlowBody, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errCutBody, err)
	case len(body) == 0:
		return nil, nil
	}
	return parseObject(body)
}

// parseObject returns the members of a JSON object, under their exact names.
// encoding/json would put U+FFFD in the place of malformed text; here it is refused.
func parseObject(body []byte) (map[string]json.RawMessage, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadJSON, err)
	}
	if members == nil || !utf8.Valid(body) || bytes.Contains(body, []byte(`\u`)) && !paired.Match(body) { // nil: the body is null
		return nil, errBadJSON
	}
	return members, nil
}

// paired matches JSON in which every surrogate that is escaped is one of a
// pair: half of one is no character (RFC 8259, 8.2).
var paired = regexp.MustCompile(`^(?:[^\\]|\\[^u]|\\u(?:[^dD]|[dD][0-7])|\\u[dD][89abAB]..\\u[dD][c-fC-F])*$`)

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docs []byte

// document serves content from memory.
func document(contentType string, content []byte) endpoint {
	return func(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
		write(w, http.StatusOK, contentType, content)
		return nil
	}
}

// live answers as long as the process does. It must not touch the database: a
// platform's check every 30 s would never let Neon sleep.
func (s *server) live(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "alive"})
}

// ready answers whether the database can serve; for people and smoke tests.
func (s *server) ready(ctx context.Context, w http.ResponseWriter, _ *http.Request) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.db.check(ctx); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
}

// A series of requests, of which there are few: routes are patterns.
type series struct {
	route, method string
	status        int
}

type sums struct {
	requests int
	took     time.Duration
}

// observe counts a request for the metrics.
func (s *server) observe(of series, took time.Duration) {
	if !slices.Contains(methods, of.method) {
		of.method = "other" // clients may invent any number
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counts[of]
	s.counts[of] = sums{c.requests + 1, c.took + took}
}

// metrics answers in Prometheus' text format, from what the process knows by itself.
func (s *server) metrics(w http.ResponseWriter, _ *http.Request) {
	text := bytes.NewBufferString("# HELP todo_http_requests_total Requests answered.\n# TYPE todo_http_requests_total counter\n")
	seconds := bytes.NewBufferString("# HELP todo_http_request_seconds_total Time from a request to its answer.\n# TYPE todo_http_request_seconds_total counter\n")
	s.mu.Lock()
	for of, c := range s.counts {
		labels := fmt.Sprintf("{route=%q,method=%q,status=\"%d\"}", of.route, of.method, of.status)
		fmt.Fprintf(text, "todo_http_requests_total%s %d\n", labels, c.requests)
		fmt.Fprintf(seconds, "todo_http_request_seconds_total%s %g\n", labels, c.took.Seconds())
	}
	s.mu.Unlock()
	seconds.WriteTo(text)
	pool := s.db.pool.Stat()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	for _, m := range []struct {
		name, kind, help string
		value            float64
	}{
		{"todo_db_connections_acquired", "gauge", "Database connections in use.", float64(pool.AcquiredConns())},
		{"todo_db_connections_idle", "gauge", "Database connections that are free.", float64(pool.IdleConns())},
		{"todo_db_connections_open", "gauge", "Database connections in all, those that are being opened too.", float64(pool.TotalConns())},
		{"todo_db_connections_max", "gauge", "Database connections there may be.", float64(pool.MaxConns())},
		{"todo_db_connections_new_total", "counter", "Database connections begun.", float64(pool.NewConnsCount())},
		{"todo_db_acquires_total", "counter", "Statements that got a connection.", float64(pool.AcquireCount())},
		{"todo_db_acquire_waits_total", "counter", "Statements that waited for one, to be free or opened.", float64(pool.EmptyAcquireCount())},
		{"todo_db_acquire_wait_seconds_total", "counter", "Time they waited.", pool.EmptyAcquireWaitTime().Seconds()},
		{"todo_db_acquires_canceled_total", "counter", "Waits that were in vain.", float64(pool.CanceledAcquireCount())},
		{"todo_goroutines", "gauge", "Goroutines.", float64(runtime.NumGoroutine())},
		{"todo_heap_bytes", "gauge", "Memory that live and dead objects take.", float64(memory.HeapAlloc)},
		{"todo_memory_bytes", "gauge", "Memory the Go runtime holds.", float64(memory.Sys - memory.HeapReleased)},
	} {
		fmt.Fprintf(text, "# HELP %s %s\n# TYPE %s %s\n%s %g\n", m.name, m.help, m.name, m.kind, m.name, m.value)
	}
	write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", text.Bytes())
}

// truncate returns the first bytes of text that are whole characters, n at most.
func truncate(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "")
}
