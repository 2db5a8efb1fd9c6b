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
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// A request is answered within 20 s of its first byte: the header's time and the request's.
	headerTimeout  = 4 * time.Second
	requestTimeout = 15 * time.Second
	readTimeout    = 10 * time.Second // header and body
	writeTimeout   = 20 * time.Second // from the header to the last byte of the answer
	idleTimeout    = 2 * time.Minute  // between the requests of a connection
	readyTimeout   = 3 * time.Second

	// percent; the live heap is some 4 MB, and collected at four times that a list costs a quarter less.
	gcPercent = 300
	// bytes; from here on it is collected as often as need be. Fly.io's smallest machine has 256 MB.
	memoryLimit = 100 << 20

	maxHeader = 64<<10 - 4<<10 // bytes; net/http grants 4 KiB more
	maxBody   = 64 << 10       // bytes; four times the largest sensible task

	// Cloud Run kills 10 s after SIGTERM. Reckoned from the signal:
	cancelWork  = 7 * time.Second         // database work still running is cancelled
	closeConns  = 8 * time.Second         // connections that still wait for a body are cut
	leaveAtOnce = 8500 * time.Millisecond // the pool is given up
)

func main() {
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	if err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdout); err != nil {
		out := os.Stdout
		if len(os.Args) > 1 {
			out = os.Stderr // stdout is for the token
		}
		newLogger(out, slog.LevelInfo).Error(err.Error())
		os.Exit(1)
	}
}

// run serves until ctx is done or a signal comes, or makes a token. An error
// before it serves names the setting that is missing or bad.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	auth, err := newAuthenticator(getenv("BETTER_AUTH_SECRET"), getenv("BETTER_AUTH_SECRETS"), getenv("JWT_AUDIENCE"), getenv("JWT_ISSUER"))
	if err != nil {
		return err
	}
	switch {
	case len(args) == 0:
		set, err := readSettings(getenv)
		if err != nil {
			return err
		}
		return serve(ctx, set, auth, newLogger(stdout, set.level))
	case len(args) == 2 && args[0] == "token":
		token, err := auth.sign(args[1])
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(stdout, token)
		return err
	}
	return errors.New("usage: todo-app serves; todo-app token USER_ID prints a token for an hour")
}

// The settings of the service but for those of its tokens.
type settings struct {
	port, metricsPort string // metricsPort: "" for no metrics
	level             slog.Level
	origins           []string // whose pages may call the API
	project           string   // Google Cloud's, or ""
	pool              *pgxpool.Config
}

func readSettings(getenv func(string) string) (settings, error) {
	set := settings{project: getenv("GOOGLE_CLOUD_PROJECT")}
	var errs [5]error
	set.port, errs[0] = portNumber("PORT", cmp.Or(getenv("PORT"), "8080"))
	if port := getenv("METRICS_PORT"); port != "" {
		set.metricsPort, errs[1] = portNumber("METRICS_PORT", port)
	}
	set.level, errs[2] = logLevel(getenv("LOG_LEVEL"))
	set.origins, errs[3] = corsOrigins(getenv("CORS_ORIGINS"))
	set.pool, errs[4] = poolConfig(getenv("DATABASE_URL"))
	return set, cmp.Or(errs[:]...)
}

// portNumber checks the setting name, a TCP port.
func portNumber(name, value string) (string, error) {
	if n, err := strconv.ParseUint(value, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("%s must be a port number from 1 to 65535", name)
	}
	return value, nil
}

// corsOrigins splits the setting CORS_ORIGINS into origins as browsers send them.
func corsOrigins(list string) ([]string, error) {
	if list == "" {
		return nil, nil
	}
	origins := strings.Split(list, ",")
	for i, origin := range origins {
		origins[i] = strings.TrimSpace(origin)
		u, err := url.Parse(origins[i])
		if err != nil || u.Scheme == "" || u.Host == "" || strings.ToLower(u.Scheme+"://"+u.Host) != origins[i] || strings.Contains(u.Host, "*") {
			return nil, errors.New("CORS_ORIGINS must list origins like https://app.example.com, separated by commas: no *, no path, no slash at the end, lower case")
		}
	}
	return origins, nil
}

func logLevel(value string) (slog.Level, error) {
	levels := map[string]slog.Level{
		"": slog.LevelInfo, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	}
	level, ok := levels[strings.ToLower(value)]
	if !ok {
		return 0, errors.New("LOG_LEVEL must be debug, info, warn or error")
	}
	return level, nil
}

// serve runs the service until ctx is done or a signal comes. It listens before
// the database answers, so that a cold one does not fail a deploy: requests
// wait for it within their deadline.
func serve(ctx context.Context, set settings, auth *authenticator, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	db, err := newDatabase(set.pool)
	if err != nil {
		return err
	}
	work, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := newServer(work, auth, db, log, set.origins, set.project)
	public := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 3)
	if err := listen(public, "PORT", set.port, failed); err != nil {
		return err
	}
	if set.metricsPort != "" {
		metrics := http.NewServeMux()
		metrics.HandleFunc("GET /metrics", s.metrics)
		private := &http.Server{Handler: metrics, ReadTimeout: readTimeout, WriteTimeout: writeTimeout}
		if err := listen(private, "METRICS_PORT", set.metricsPort, failed); err != nil {
			return err
		}
		defer private.Close()
	}
	log.Info("listening", "port", set.port)
	go func() {
		if err := db.prepare(ctx, log); err != nil && ctx.Err() == nil {
			failed <- err
		}
	}()

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the process at once
	log.Info("stopping")
	time.AfterFunc(cancelWork, cancel)
	drain(public, db)
	log.Info("stopped")
	return nil
}

// listen serves on all addresses of a port, and sends how that ended to failed.
func listen(s *http.Server, name, port string, failed chan<- error) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	go func() { failed <- s.Serve(listener) }()
	return nil
}

// drain lets the requests in flight finish, as far as the time goes.
func drain(s *http.Server, db *database) {
	leave, cancelLeave := context.WithTimeout(context.Background(), leaveAtOnce)
	defer cancelLeave()
	finish, cancelFinish := context.WithTimeout(leave, closeConns)
	defer cancelFinish()
	if err := s.Shutdown(finish); err != nil {
		s.Close()
	}
	db.close(leave)
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
				a.Key = "severity"
				if a.Value.Any() == slog.LevelWarn {
					a.Value = slog.StringValue("WARNING")
				}
			}
			return a
		},
	}))
}

// A server is the API over one database.
type server struct {
	work    context.Context // of everything the database does; done when a stop takes too long
	auth    *authenticator
	db      *database
	log     *slog.Logger
	origins []string // whose pages may call, CORS_ORIGINS
	project string   // GOOGLE_CLOUD_PROJECT
	mux     *http.ServeMux

	mu     sync.Mutex
	counts map[kind]count
}

func newServer(work context.Context, auth *authenticator, db *database, log *slog.Logger, origins []string, project string) *server {
	s := &server{work: work, auth: auth, db: db, log: log, origins: origins, project: project, mux: http.NewServeMux(), counts: map[kind]count{}}
	allowed := map[string][]string{}
	for pattern, e := range s.routes() {
		method, path, _ := strings.Cut(pattern, " ")
		s.mux.HandleFunc(pattern, s.handle(e))
		allowed[path] = append(allowed[path], method)
		if method == http.MethodGet {
			allowed[path] = append(allowed[path], http.MethodHead)
		}
	}
	// The mux would answer these two itself, in plain text.
	for path, methods := range allowed {
		slices.Sort(methods)
		allow := strings.Join(methods, ", ")
		s.mux.HandleFunc(path, s.handle(func(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Allow", allow)
			return errMethod
		}))
	}
	s.mux.HandleFunc("/", s.handle(func(context.Context, http.ResponseWriter, *http.Request) error { return errNoPath }))
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

// An endpoint answers a request or returns an error, never both. Its context
// ends with the request's deadline and not when the client goes away: an
// abandoned write may be committed all the same, and cancelling it would cost
// its connection.
type endpoint func(ctx context.Context, w http.ResponseWriter, r *http.Request) error

// handle makes a handler of an endpoint, and its error or panic the answer.
func (s *server) handle(e endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(s.work, requestTimeout)
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
func (s *server) forUser(e func(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error) endpoint {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		user, err := s.auth.user(r)
		if err != nil {
			return err
		}
		if r.PathValue("user_id") != user {
			return errNotYours
		}
		return e(ctx, w, r, user)
	}
}

// ServeHTTP gives every answer its common headers and logs it in one line.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	id := r.Header.Get("X-Request-Id")
	if !saneID(id) {
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
	_, route, found := strings.Cut(r.Pattern, " ")
	if !found {
		route = r.Pattern
	}
	s.count(kind{route, r.Method, w.status}, took)
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
		slog.Float64("duration_ms", float64(took.Microseconds())/1000),
		slog.Int("bytes", w.bytes))
	if w.err != nil {
		attrs = append(attrs, slog.String("error", w.err.Error()))
	}
	if trace := traceID(r.Header); trace != "" {
		if s.project != "" {
			trace = "projects/" + s.project + "/traces/" + trace
		}
		attrs = append(attrs, slog.String("logging.googleapis.com/trace", trace))
	}
	s.log.LogAttrs(context.Background(), level, "request", attrs...)
}

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

// saneID reports whether a client's request id may go into the log and back.
func saneID(id string) bool {
	return id != "" && len(id) <= 128 && !strings.ContainsFunc(id, func(c rune) bool {
		return !('0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || strings.ContainsRune("-._:/+=", c))
	})
}

// traceID returns the trace that Cloud Run, or whoever speaks W3C Trace
// Context, says the request belongs to: 32 hexadecimal digits, or "".
func traceID(h http.Header) string {
	id, _, _ := strings.Cut(h.Get("X-Cloud-Trace-Context"), "/")
	if _, rest, ok := strings.Cut(h.Get("Traceparent"), "-"); id == "" && ok {
		id, _, _ = strings.Cut(rest, "-")
	}
	if len(id) != 32 || strings.Trim(id, "0123456789abcdefABCDEF") != "" {
		return ""
	}
	return id
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
	errUnavailable = refusal{503, "The database cannot be reached or is waking up, and nothing was changed: try again in a moment."}
	errNoAnswer    = refusal{503, "The database did not answer in time, and a change may have been made or not: it is safe to repeat with the same Idempotency-Key or If-Match."}
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
	case errUnavailable, errNoAnswer:
		w.Header().Set("Retry-After", "1") // seconds; Neon wakes in less
	}
	writeJSON(w, answer.status, map[string]string{"detail": answer.detail})
}

// writeJSON answers with v. It cannot fail but on a type that JSON does not
// have, or a client that is gone.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	body = append(body, '\n')
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
	return nil
}

// readBody returns a request's body, which is JSON as far as its Content-Type says.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > maxBody {
		return nil, errLargeBody
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, errLargeBody
	}
	if contentType := r.Header.Get("Content-Type"); contentType != "" && len(body) > 0 {
		media, _, _ := mime.ParseMediaType(contentType)
		if media != "application/json" && !strings.HasSuffix(media, "+json") {
			return nil, errNotJSON
		}
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%w: %w", errSlowBody, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errCutBody, err)
	}
	return body, nil
}

// parseObject returns the members of a JSON object, under their exact names.
// encoding/json would put U+FFFD in the place of malformed text; here it is refused.
func parseObject(body []byte) (map[string]json.RawMessage, error) {
	var members map[string]json.RawMessage
	err := json.Unmarshal(body, &members)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadJSON, err)
	}
	if members == nil || !utf8.Valid(body) || loneSurrogate(body) { // nil: the body is null
		return nil, errBadJSON
	}
	return members, nil
}

// loneSurrogate reports whether valid JSON has a \u escape that is half of a
// surrogate pair, and so no character (RFC 8259, 8.2).
func loneSurrogate(text []byte) bool {
	unit := func(at int) rune { // the UTF-16 unit that is escaped there, or -1
		if !bytes.HasPrefix(text[at:], []byte(`\u`)) {
			return -1
		}
		n, _ := strconv.ParseUint(string(text[at+2:at+6]), 16, 16)
		return rune(n)
	}
	for at := 0; at < len(text); at++ {
		if text[at] != '\\' {
			continue
		}
		switch first := unit(at); {
		case !utf16.IsSurrogate(first):
			at++ // also past the second backslash of \\
		case utf16.DecodeRune(first, unit(at+6)) == utf8.RuneError:
			return true
		default:
			at += 11
		}
	}
	return false
}

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docs []byte

// docsPolicy allows docs.html its one script, Swagger UI of one version, and calls to this API.
const docsPolicy = "default-src 'none'; " +
	"script-src https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/ 'sha256-iH8ahaXmL3oCvTQtv4MGS33RJ8UfK8Vy90qTpVQJ2kI='; " +
	"style-src https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/; " +
	"img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// document serves content from memory.
func document(contentType string, content []byte) endpoint {
	etag := fmt.Sprintf(`"%x"`, sha256.Sum256(content))
	return func(_ context.Context, w http.ResponseWriter, r *http.Request) error {
		if notModified(w, r, etag) {
			return nil
		}
		w.Header().Set("Content-Security-Policy", docsPolicy)
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		w.WriteHeader(http.StatusOK)
		w.Write(content)
		return nil
	}
}

// notModified sets the ETag of an answer, and gives it, 304, to a client that has this version.
func notModified(w http.ResponseWriter, r *http.Request, etag string) bool {
	w.Header().Set("ETag", etag)
	header := r.Header["If-None-Match"]
	if header == nil || !slices.ContainsFunc(tags(header), func(tag string) bool {
		return tag == "*" || strings.TrimPrefix(tag, "W/") == etag // RFC 9110, 13.1.2: the comparison is weak
	}) {
		return false
	}
	w.WriteHeader(http.StatusNotModified)
	return true
}

// tags splits the entity tags of an If-Match or If-None-Match header.
func tags(header []string) []string {
	list := strings.Split(strings.Join(header, ","), ",") // no tag of ours has a comma in it
	for i := range list {
		list[i] = strings.TrimSpace(list[i])
	}
	return list
}

// live answers as long as the process does. It must not touch the database: a
// platform's check every 30 s would never let Neon sleep.
func (s *server) live(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "alive"})
}

// ready answers whether the database does, too; for people and smoke tests.
func (s *server) ready(ctx context.Context, w http.ResponseWriter, _ *http.Request) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.db.ping(ctx); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
}

// A kind of request, of which there are few: routes are patterns.
type kind struct {
	route, method string
	status        int
}

type count struct {
	requests int
	took     time.Duration
}

func (s *server) count(k kind, took time.Duration) {
	if !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}, k.method) {
		k.method = "other" // clients may invent any number
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counts[k]
	s.counts[k] = count{c.requests + 1, c.took + took}
}

// metrics answers in Prometheus' text format, from what the process knows by itself.
func (s *server) metrics(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	counts := maps.Clone(s.counts)
	s.mu.Unlock()
	pool := s.db.pool.Stat()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)

	var page bytes.Buffer
	family := func(name, kind, help string) {
		fmt.Fprintf(&page, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	single := func(name, kind, help string, value float64) {
		family(name, kind, help)
		fmt.Fprintf(&page, "%s %g\n", name, value)
	}
	requests := func(name, help string, value func(count) float64) {
		family(name, "counter", help)
		for k, c := range counts {
			fmt.Fprintf(&page, "%s{route=%q,method=%q,status=\"%d\"} %g\n", name, k.route, k.method, k.status, value(c))
		}
	}
	requests("todo_http_requests_total", "Requests answered.", func(c count) float64 { return float64(c.requests) })
	requests("todo_http_request_seconds_total", "Time from a request to its answer.", func(c count) float64 { return c.took.Seconds() })
	family("todo_db_connections", "gauge", "Database connections open, by what they do.")
	fmt.Fprintf(&page, "todo_db_connections{state=\"acquired\"} %d\n", pool.AcquiredConns())
	fmt.Fprintf(&page, "todo_db_connections{state=\"idle\"} %d\n", pool.IdleConns())
	fmt.Fprintf(&page, "todo_db_connections{state=\"constructing\"} %d\n", pool.ConstructingConns())
	single("todo_db_connections_open", "gauge", "Database connections open in all.", float64(pool.TotalConns()))
	single("todo_db_connections_max", "gauge", "Database connections open at most.", float64(pool.MaxConns()))
	single("todo_db_acquires_total", "counter", "Statements that got a connection.", float64(pool.AcquireCount()))
	single("todo_db_acquire_waits_total", "counter", "Statements that waited for a connection to be free or opened.", float64(pool.EmptyAcquireCount()+s.db.waits.Load()))
	single("todo_db_acquire_wait_seconds_total", "counter", "Time they waited.", (pool.EmptyAcquireWaitTime() + time.Duration(s.db.waited.Load())).Seconds())
	single("todo_db_acquires_canceled_total", "counter", "Statements that gave up waiting.", float64(pool.CanceledAcquireCount()+s.db.canceled.Load()))
	single("todo_db_connections_new_total", "counter", "Database connections begun.", float64(pool.NewConnsCount()))
	single("todo_goroutines", "gauge", "Goroutines.", float64(runtime.NumGoroutine()))
	single("todo_heap_bytes", "gauge", "Memory that live and dead objects take.", float64(memory.HeapAlloc))
	single("todo_memory_bytes", "gauge", "Memory the Go runtime holds.", float64(memory.Sys-memory.HeapReleased))
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(page.Bytes())
}
