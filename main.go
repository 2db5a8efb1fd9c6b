// Todo-app is a small multi-user task API on serverless Postgres. A Next.js front end with Better
// Auth signs users in and sends HS256 tokens. This service verifies the tokens and stores each
// user's tasks in Neon.
//
// A request takes this path:
//
//	server.ServeHTTP  headers, deadline, panics, errors, log  main.go
//	server.forUser    token, user, task id, the user's slot   main.go, auth.go
//	createTask etc.   reads the body or query, writes a task  tasks.go
//	database.insert   SQL                                     tasks.go
//	query             schema, connection, retries             db.go
//
// An error is returned along the same path. writeError turns it into a response.
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
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

func main() {
	// Defaults for Fly.io's smallest machine, 256 MB. GOGC=300 saves a quarter of the processor time
	// of a list, because the live heap is only about 4 MB.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(300)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(100 << 20) // bytes
	}
	signal.Ignore(syscall.SIGPIPE) // if the reader of the log ends, only log lines are lost
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout); err != nil {
		newLogger(os.Stderr, slog.LevelInfo).Error(err.Error())
		os.Exit(1)
	}
}

// run executes a command: without arguments it serves until ctx is done. The error for a missing or
// invalid setting names it.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	switch {
	case len(args) == 0:
		return serve(ctx, getenv, stdout)
	case len(args) == 1 && args[0] == "migrate":
		return migrate(ctx, getenv, stdout)
	case len(args) == 2 && args[0] == "token":
		return printToken(args[1], getenv, stdout)
	}
	return errors.New("usage: todo-app | todo-app migrate | todo-app token USER_ID")
}

func serve(ctx context.Context, getenv func(string) string, stdout io.Writer) error {
	set, err := readSettings(getenv)
	if err != nil {
		return err
	}
	log := newLogger(stdout, set.logLevel)
	for _, warning := range set.auth.warnings {
		log.Warn(warning)
	}
	db, err := openDatabase(set.databaseURL, log)
	if err != nil {
		return err
	}
	return newServer(set, db, log).listenAndServe(ctx)
}

// migrate applies the schema and returns nil once the database is up to date. DATABASE_URL is its
// only setting.
func migrate(ctx context.Context, getenv func(string) string, stdout io.Writer) error {
	db, err := openDatabase(getenv("DATABASE_URL"), newLogger(stdout, slog.LevelInfo))
	if err != nil {
		return err
	}
	defer db.pool.Close()
	return db.ensureSchema(ctx)
}

// printToken prints a token for user that is valid for tokenLifetime.
func printToken(user string, getenv func(string) string, stdout io.Writer) error {
	auth, err := newAuthenticator(getenv)
	if err != nil {
		return err
	}
	token, err := auth.sign(user)
	if err == nil {
		_, err = fmt.Fprintln(stdout, token)
	}
	return err
}

// settings are the environment variables of the service. openDatabase validates databaseURL, and
// net.Listen the ports.
type settings struct {
	auth        *authenticator // BETTER_AUTH_SECRET, BETTER_AUTH_SECRETS, JWT_AUDIENCE, JWT_ISSUER
	databaseURL string         // DATABASE_URL; required
	origins     []string       // CORS_ORIGINS: those whose pages may call the API; optional
	port        string         // PORT; default 8080
	metricsPort string         // METRICS_PORT; optional: a second listener with /metrics
	logLevel    slog.Level     // LOG_LEVEL; default info
	project     string         // GOOGLE_CLOUD_PROJECT; optional: completes the log's trace field
}

// readSettings returns an error that names the first variable that is missing or invalid.
func readSettings(getenv func(string) string) (set settings, err error) {
	if set.auth, err = newAuthenticator(getenv); err != nil {
		return set, err
	}
	level := cmp.Or(strings.TrimSpace(getenv("LOG_LEVEL")), "info")
	if set.logLevel.UnmarshalText([]byte(level)) != nil {
		return set, errors.New("LOG_LEVEL must be debug, info, warn or error")
	}
	if set.origins, err = readOrigins(getenv); err != nil {
		return set, err
	}
	set.databaseURL = getenv("DATABASE_URL")
	set.port = cmp.Or(strings.TrimSpace(getenv("PORT")), "8080")
	set.metricsPort = strings.TrimSpace(getenv("METRICS_PORT"))
	set.project = strings.TrimSpace(getenv("GOOGLE_CLOUD_PROJECT"))
	return set, nil
}

// readOrigins returns the origins of CORS_ORIGINS. It rejects those that no browser sends.
func readOrigins(getenv func(string) string) ([]string, error) {
	if strings.TrimSpace(getenv("CORS_ORIGINS")) == "" {
		return nil, nil
	}
	form := regexp.MustCompile(`^[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?$`)
	defaultPort := regexp.MustCompile(`^(https://.*:443|http://.*:80)$`)
	origins := strings.Split(getenv("CORS_ORIGINS"), ",")
	for i, origin := range origins {
		origins[i] = strings.TrimSpace(origin)
		if !form.MatchString(origins[i]) || defaultPort.MatchString(origins[i]) {
			return nil, fmt.Errorf("CORS_ORIGINS: %q is not an origin as browsers send it, such as "+
				"https://app.example.com: lower case, no *, no path, no slash at the end, no default "+
				"port; separate origins by commas", origins[i])
		}
	}
	return origins, nil
}

// A server is the API over one database.
type server struct {
	settings
	db    *database
	log   *slog.Logger
	mux   *http.ServeMux
	slots slots
	// quiet is nil until a shutdown begins. It fires after quietTime without a new request.
	quiet atomic.Pointer[time.Timer]

	requestsMu sync.Mutex
	requests   map[requestLabels]int // the number of requests
}

// requestLabels are the labels of a request in the metrics.
type requestLabels struct {
	route, method string
	status        int
}

func newServer(set settings, db *database, log *slog.Logger) *server {
	s := &server{settings: set, db: db, log: log, mux: http.NewServeMux(),
		requests: map[requestLabels]int{}, slots: slots{users: map[string]*userSlots{}}}
	s.slots.limit = max(1, int(db.pool.Config().MaxConns)/3)
	for pattern, h := range s.routes() {
		s.mux.HandleFunc(pattern, h)
	}
	s.mux.HandleFunc("/", s.noRoute)
	return s
}

// routes returns every route of the service.
func (s *server) routes() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /api/{user_id}/tasks":                 s.forUser(s.listTasks),
		"POST /api/{user_id}/tasks":                s.forUser(s.createTask),
		"GET /api/{user_id}/tasks/{id}":            s.forUser(s.getTask),
		"PUT /api/{user_id}/tasks/{id}":            s.forUser(s.updateTask), // like PATCH: see change
		"PATCH /api/{user_id}/tasks/{id}":          s.forUser(s.updateTask),
		"PATCH /api/{user_id}/tasks/{id}/complete": s.forUser(s.completeTask),
		"DELETE /api/{user_id}/tasks/{id}":         s.forUser(s.deleteTask),
		"GET /health/live":                         s.live,
		"GET /health/ready":                        s.ready,
		"GET /openapi.json":                        s.openAPI,
		"GET /docs":                                s.docs,
	}
}

const (
	requestTimeout = 15 * time.Second       // from the end of a request's header to its response
	discardTimeout = 100 * time.Millisecond // to receive the rest of a body that is not read
	maxHeaderNames = 100
)

// ServeHTTP runs a request from its header to its log line. The handler of a route writes a
// response or sets the err of the request's entry, never both.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	client := r.Context() // ends when the client disconnects, or with db.work
	e := &entry{start: time.Now(), id: r.Header.Get("X-Request-Id")}
	if !saneID.MatchString(e.id) {
		e.id = rand.Text()
	}
	w := &response{ResponseWriter: rw, server: s}
	w.Header().Set("X-Request-Id", e.id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if strings.HasPrefix(r.URL.Path, "/api/") {
		w.Header().Set("Cache-Control", "no-store")
	}
	s.setCORS(w, r, e)
	if quiet := s.quiet.Load(); quiet != nil {
		quiet.Reset(quietTime)
	}
	if len(r.Header) > maxHeaderNames {
		// net/http keeps r until it has closed the connection. Thousands of short names in r.Header
		// occupy a megabyte.
		e.err, r.Header = errManyHeaders, nil
	}
	ctx, cancel := context.WithTimeout(context.WithValue(client, entryKey{}, e), requestTimeout)
	defer cancel()
	r = r.WithContext(ctx)
	w.request = r
	defer func() {
		if v := recover(); v != nil {
			e.err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
		if e.err != nil && w.status == 0 {
			writeError(w, e.err)
		}
		if errors.Is(e.err, errNotSent) && client.Err() != nil && s.db.work.Err() == nil {
			w.status = statusDisconnected // in the log and the metrics
		}
		s.record(w, r, e)
	}()
	if e.err == nil {
		s.mux.ServeHTTP(w, r)
	}
}

// saneID matches an X-Request-Id that is safe to log and to send back.
var saneID = regexp.MustCompile(`^[0-9A-Za-z._:/+=-]{1,128}$`)

// An entry collects what a request's log line contains. Only the goroutine of the request uses it.
type entry struct {
	id       string        // X-Request-Id
	start    time.Time     // when the request's header had been read
	database time.Duration // spent in query
	waiting  time.Duration // the part of database that was spent in connect
	sent     bool          // a statement was sent: the request goes on without its client
	err      error         // why the request failed
}

type entryKey struct{}

// entryOf returns the entry of the request of ctx, or a new one if ctx belongs to no request.
func entryOf(ctx context.Context) *entry {
	if e, ok := ctx.Value(entryKey{}).(*entry); ok {
		return e
	}
	return &entry{}
}

// A response is a ResponseWriter that records the status and the number of bytes.
type response struct {
	http.ResponseWriter
	server  *server
	request *http.Request
	status  int // 0 until the header is written
	bytes   int // of the body
}

// WriteHeader limits the time that net/http takes to read the rest of the request's body, which it
// does before it sends the header. Closing the connection instead could reset it before the client
// has read the response.
//
// Once a shutdown has begun, the response asks the client to close its connection.
// SetKeepAlivesEnabled(false) would also close idle connections, and lose requests on their way.
func (w *response) WriteHeader(status int) {
	if w.request.Body != http.NoBody {
		deadline := time.Now().Add(discardTimeout)
		http.NewResponseController(w.ResponseWriter).SetReadDeadline(deadline)
	}
	if w.server.quiet.Load() != nil {
		w.Header().Set("Connection", "close")
	}
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes += n
	return n, err
}

// forUser returns the handler of a route for the user of the path. It verifies the user, waits for
// a slot and calls handle, which either writes the response or returns an error.
func (s *server) forUser(
	handle func(w http.ResponseWriter, r *http.Request, key taskKey) error,
) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key, release, err := s.admit(r)
		if err == nil {
			defer release()
			err = handle(w, r, key)
		}
		entryOf(r.Context()).err = err
	}
}

// admit returns the verified user and the task id of a request's path, and takes a slot of the
// user. The caller must release the slot.
func (s *server) admit(r *http.Request) (key taskKey, release func(), err error) {
	if key.user, err = s.auth.user(r); err != nil {
		return key, nil, err
	}
	if r.PathValue("user_id") != key.user {
		return key, nil, errOtherUser
	}
	if text := r.PathValue("id"); text != "" {
		id, err := strconv.ParseUint(text, 10, 63)
		if err != nil || id == 0 {
			return key, nil, errNotFound
		}
		key.id = int64(id)
	}
	release, err = s.slots.acquire(r.Context(), key.user)
	return key, release, err
}

// slots limits each user to a third of the pool's connections. The pool is first come, first
// served, so without a limit the requests of one user would delay everyone else's.
type slots struct {
	limit int // requests in progress per user
	mu    sync.Mutex
	users map[string]*userSlots // of users with requests in progress or waiting
}

type userSlots struct {
	taken chan struct{} // contains a value for each request in progress
	refs  int           // requests in progress or waiting; at 0 the user is removed
}

// slotTimeout limits how long a request waits for a slot.
const slotTimeout = 5 * time.Second

// acquire waits for a slot of the user. It returns errTooMany after slotTimeout, and errNotSent if
// ctx ends first. The caller must call release at the end of the request.
func (s *slots) acquire(ctx context.Context, user string) (release func(), err error) {
	s.mu.Lock()
	u := s.users[user]
	if u == nil {
		u = &userSlots{taken: make(chan struct{}, s.limit)}
		s.users[user] = u
	}
	u.refs++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if u.refs--; u.refs == 0 {
			delete(s.users, user)
		}
	}
	select {
	case u.taken <- struct{}{}: // most requests need no timer
	default:
		select {
		case u.taken <- struct{}{}:
		case <-ctx.Done():
			err = fmt.Errorf("%w: wait for a slot: %w", errNotSent, ctx.Err())
		case <-time.After(slotTimeout):
			err = errTooMany
		}
	}
	if err != nil {
		leave()
		return nil, err
	}
	return func() { <-u.taken; leave() }, nil
}

// methods are those that the log and the metrics name. noRoute tries each for the Allow header.
var methods = []string{"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}

// noRoute answers requests that match no route: a preflight of a listed origin, or a 404 or 405 in
// JSON. A mux with a "/" pattern does not send 405 by itself, so noRoute asks it which methods the
// path accepts.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodOptions && slices.Contains(s.origins, r.Header.Get("Origin")) {
		preflight(w, r)
		return
	}
	var allow []string
	for _, method := range methods {
		if _, pattern := s.mux.Handler(&http.Request{Method: method, URL: r.URL}); pattern != "/" {
			allow = append(allow, method)
			r.Pattern = pattern // for the log
		}
	}
	e := entryOf(r.Context())
	e.err = errNoPath
	if allow != nil {
		w.Header().Set("Allow", strings.Join(allow, ", "))
		e.err = errMethod
	}
}

// An apiError is an error with a text for the client. Errors that wrap it add text for the log.
type apiError struct {
	status int
	detail string
}

func (e apiError) Error() string { return e.detail }

// The errors of the API, except validation errors, which invalid makes.
var (
	errBadJSON   = apiError{400, "The request body must be one JSON object in valid UTF-8."}
	errCutBody   = apiError{400, "The request body is malformed or shorter than its Content-Length."}
	errNoToken   = apiError{401, "Send an access token in the header Authorization: Bearer <token>."}
	errBadToken  = apiError{401, "The access token is invalid or has expired. Get a new one."}
	errOtherUser = apiError{403, "The access token belongs to another user than the one in the path."}
	errNoPath    = apiError{404, "There is no such path."}
	errNotFound  = apiError{404, "Not found: this id does not exist or belongs to another user."}
	errMethod    = apiError{405, "This path does not support this method. " +
		"The Allow header lists the supported methods."}
	errSlowBody = apiError{408, "The request body did not arrive in time."}
	errChanged  = apiError{412, "The version in If-Match is not the current one. " +
		"Get the current version, apply your change to it and try again."}
	errLargeBody = apiError{413, fmt.Sprintf("The request body must not exceed %d bytes.", maxBody)}
	errNotJSON   = apiError{415, "The request body must be JSON. " +
		"Send Content-Type: application/json."}
	errEncoded = apiError{415, "The request body must not be compressed. " +
		"Send it without Content-Encoding."}
	errKeyReused = apiError{422, "This Idempotency-Key was already used with another body. " +
		"Use a new key for a new request."}
	errTooMany = apiError{429, "Too many of your requests are in progress. " +
		"Try again shortly; nothing was changed."}
	errManyHeaders = apiError{431, fmt.Sprintf("The request must not have more than %d header names.",
		maxHeaderNames)}
	errInternal = apiError{500, "Internal error. Report it with the X-Request-Id of this response."}
	errNotSent  = apiError{503, "The database is unavailable. " +
		"Try again shortly; nothing was changed."}
	errMayHaveRun = apiError{503, "The database is unavailable or did not answer in time. " +
		"Try again shortly. A change may or may not have been made; " +
		"with the same Idempotency-Key or If-Match it is safe to repeat."}
)

// invalid returns the error for an invalid value. The text must name the value and its rule.
func invalid(format string, args ...any) error {
	return apiError{422, fmt.Sprintf(format, args...)}
}

// writeError is the one place where an error becomes a response. An error that is not an apiError
// is a bug of the service.
func writeError(w http.ResponseWriter, err error) {
	e, ok := errors.AsType[apiError](err)
	if !ok {
		e = errInternal
	}
	switch e {
	case errNoToken:
		w.Header().Set("WWW-Authenticate", `Bearer`)
	case errBadToken:
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`) // RFC 6750, section 3.1
	case errEncoded:
		w.Header().Set("Accept-Encoding", "identity") // RFC 9110, section 15.5.16
	case errTooMany, errNotSent, errMayHaveRun:
		w.Header().Set("Retry-After", "1") // seconds; Neon resumes in less
	}
	writeJSON(w, e.status, map[string]string{"detail": e.detail})
}

// writeJSON writes v. It returns an error only for a type that JSON cannot represent.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(v); err != nil {
		return err
	}
	writeBody(w, status, "application/json", body.Bytes())
	return nil
}

// writeBody writes a whole response. A failed Write is ignored: the client has disconnected.
func writeBody(w http.ResponseWriter, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

const maxBody = 64 << 10 // bytes; a task has at most 15 KB, with every character escaped

// readObject returns the members of the JSON object in a request's body, nil if the body is empty.
func readObject(r *http.Request) (map[string]json.RawMessage, error) {
	encoding := cmp.Or(r.Header.Get("Content-Encoding"), "identity")
	switch { // before the body is read
	case r.Body == http.NoBody:
		return nil, nil
	case r.ContentLength > maxBody:
		return nil, errLargeBody
	case !isJSON(r.Header.Get("Content-Type")):
		return nil, errNotJSON
	case !strings.EqualFold(encoding, "identity"):
		return nil, errEncoded
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%w: %w", errSlowBody, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errCutBody, err)
	case len(body) > maxBody:
		return nil, errLargeBody
	}
	r.Body = http.NoBody // tells WriteHeader that the whole body was read
	if len(body) == 0 {
		return nil, nil
	}
	return parseObject(bytes.TrimPrefix(body, []byte("\ufeff"))) // RFC 8259, section 8.1
}

// isJSON reports whether a Content-Type is absent or a JSON type.
func isJSON(contentType string) bool {
	media, _, _ := mime.ParseMediaType(contentType)
	_, subtype, _ := strings.Cut(media, "/")
	return contentType == "" || media == "application/json" || strings.HasSuffix(subtype, "+json")
}

// parseObject returns the members of a JSON object under their exact names, unlike decoding into a
// struct, which ignores case. It rejects text that encoding/json would replace with U+FFFD.
func parseObject(body []byte) (map[string]json.RawMessage, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadJSON, err)
	}
	// A backslash that remains after all whole escapes are removed begins half a surrogate pair.
	lone := bytes.ContainsRune(wholeEscape.ReplaceAll(body, nil), '\\')
	if members == nil || lone || !utf8.Valid(body) { // nil: the body is null
		return nil, errBadJSON
	}
	return members, nil
}

// wholeEscape matches the escapes of valid JSON that are a character or a surrogate pair (RFC 8259,
// sections 7 and 8.2).
var wholeEscape = regexp.MustCompile(
	`(?i)\\([^u]|u[^d]...|ud[0-7]..|ud[89ab]..\\ud[c-f]..)`)

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docsPage []byte

func (s *server) openAPI(w http.ResponseWriter, _ *http.Request) {
	writeBody(w, http.StatusOK, "application/json", openAPI)
}

// docsPolicy lets docs.html load the script and style sheet of Swagger UI, run its own script,
// which the hash names, and call this API.
const docsPolicy = "default-src 'none'; " +
	"script-src https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/ " +
	"'sha256-yXh1OrGy64wi+FamPYbkEUpk/8ci6RvuqFDyHak2/Ms='; " +
	"style-src https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/; " +
	"img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// docs serves Swagger UI.
func (s *server) docs(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Security-Policy", docsPolicy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	writeBody(w, http.StatusOK, "text/html; charset=utf-8", docsPage)
}

// live reports that the process is running. No health route uses the database, because platforms
// poll them, and Neon would never suspend the compute.
func (s *server) live(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]string{"status": "alive"})
}

// ready reports whether the start is done: the database was reached and the schema is in place.
func (s *server) ready(w http.ResponseWriter, r *http.Request) {
	select {
	case <-s.db.ready:
		writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
	default:
		entryOf(r.Context()).err = errNotSent
	}
}

// setCORS allows a listed origin to read the response. It logs an origin that is not listed,
// because the page shows only "Failed to fetch". A page of this host, such as /docs, needs no
// permission.
func (s *server) setCORS(w http.ResponseWriter, r *http.Request, e *entry) {
	if len(s.origins) == 0 {
		return
	}
	h := w.Header()
	h.Set("Vary", "Origin")
	origin := r.Header.Get("Origin")
	if !slices.Contains(s.origins, origin) {
		if origin != "" && !strings.HasSuffix(origin, "://"+r.Host) {
			s.log.Warn(fmt.Sprintf("the origin %q is not in CORS_ORIGINS", truncate(origin, 200)),
				"request_id", e.id)
		}
		return
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Allow-Credentials", "true")
	h.Set("Access-Control-Expose-Headers", "ETag, Link, Location, X-Total-Count, X-Request-Id, "+
		"Retry-After, Idempotency-Replayed, WWW-Authenticate")
}

// preflight answers an OPTIONS request of a listed origin. It allows every well-formed header that
// the page requests, because tracing libraries add their own. It always allows those that the API
// reads, because the browser caches the answer.
func preflight(w http.ResponseWriter, r *http.Request) {
	allowed := "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-Id"
	requested := strings.Join(r.Header["Access-Control-Request-Headers"], ",")
	for name := range strings.SplitSeq(requested, ",") {
		if name = strings.TrimSpace(name); headerName.MatchString(name) {
			allowed += ", " + name
		}
	}
	w.Header().Set("Access-Control-Allow-Headers", allowed)
	w.Header().Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
	w.Header().Set("Access-Control-Max-Age", "7200") // seconds; Chromium's maximum
	w.WriteHeader(http.StatusNoContent)
}

// headerName matches a header name (RFC 9110, section 5.6.2) of at most 64 characters.
var headerName = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$")

// maxValue limits a value in the log, because a line must not exceed 8 KiB and has one long value.
// JSON escapes a byte by up to six bytes, after truncate by two.
const maxValue = 3 << 10 // bytes

// newLogger returns a logger that writes one JSON object per line, with the field names and
// severities of Google Cloud's logs.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case slog.MessageKey:
				a.Key = "message"
			case slog.LevelKey:
				a = slog.String("severity", strings.Replace(a.Value.String(), "WARN", "WARNING", 1))
			}
			if a.Value.Kind() == slog.KindString && len(a.Value.String()) > maxValue/3 {
				a.Value = slog.StringValue(truncate(a.Value.String(), maxValue))
			}
			return a
		},
	}))
}

// statusDisconnected is nginx's status for a client that disconnected before its response.
const statusDisconnected = 499

// record logs a request in one line and counts it.
func (s *server) record(w *response, r *http.Request, e *entry) {
	took := time.Since(e.start)
	method, route := r.Method, r.Pattern[strings.IndexByte(r.Pattern, ' ')+1:] // without its method
	if !slices.Contains(methods, method) {
		method = "other" // clients can invent any number of methods, of any length
	}
	s.requestsMu.Lock()
	s.requests[requestLabels{route, method, w.status}]++ // bounded: route is a pattern of the mux
	s.requestsMu.Unlock()
	level := slog.LevelInfo
	switch {
	case w.status == http.StatusServiceUnavailable:
		level = slog.LevelWarn
	case w.status >= 500 || e.err != nil && w.status < 400: // an error after the header was written
		level = slog.LevelError
	}
	attrs := []slog.Attr{
		slog.String("request_id", e.id),
		slog.String("method", method),
		slog.String("route", route),
		slog.Int("status", w.status),
		slog.Int64("duration_us", took.Microseconds()),
		slog.Int("bytes", w.bytes),
		slog.Int64("db_us", e.database.Microseconds()),
		slog.Int64("db_wait_us", e.waiting.Microseconds()),
	}
	if e.err != nil {
		attrs = append(attrs, slog.String("error", e.err.Error()))
	}
	// The trace id is in Cloud Run's header, or in that of W3C Trace Context.
	traces := r.Header.Get("X-Cloud-Trace-Context") + " " + r.Header.Get("Traceparent")
	if id := traceID.FindString(traces); id != "" {
		if s.project != "" {
			id = "projects/" + s.project + "/traces/" + id
		}
		attrs = append(attrs, slog.String("logging.googleapis.com/trace", id))
	}
	s.log.LogAttrs(context.Background(), level, "request", attrs...)
}

var traceID = regexp.MustCompile(`\b[0-9a-fA-F]{32}\b`)

// truncate returns at most the first n bytes of text, without invalid UTF-8 such as a character
// that was cut, and without control characters but tabs and line breaks.
func truncate(text string, n int) string {
	return strings.Map(func(c rune) rune {
		if c == utf8.RuneError || c < ' ' && c != '\t' && c != '\n' {
			return -1
		}
		return c
	}, text[:min(n, len(text))])
}

// serveMetrics writes Prometheus' text format. It reads counters of the process and runs no query.
func (s *server) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	pool := s.db.pool.Stat()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	var text bytes.Buffer
	for _, m := range []struct {
		kind, name, help string
		value            any // a number
	}{
		{"counter", "todo_db_statements_total", "Statements that have ended.", s.db.statements.Load()},
		{"counter", "todo_db_statement_seconds_total", "Time that statements took.",
			time.Duration(s.db.statementTime.Load()).Seconds()},
		{"gauge", "todo_db_connections_acquired", "Connections in use.", pool.AcquiredConns()},
		{"gauge", "todo_db_connections_idle", "Connections not in use.", pool.IdleConns()},
		{"gauge", "todo_db_connections_open", "Connections of the pool.", pool.TotalConns()},
		{"gauge", "todo_db_connections_max", "Maximum size of the pool.", pool.MaxConns()},
		{"counter", "todo_db_acquires_total", "Connections acquired.", pool.AcquireCount()},
		{"counter", "todo_db_acquire_waits_total", "Acquires that waited.", pool.EmptyAcquireCount()},
		{"counter", "todo_db_acquire_wait_seconds_total", "Time that acquires waited.",
			pool.EmptyAcquireWaitTime().Seconds()},
		{"counter", "todo_db_acquires_canceled_total", "Acquires that timed out or were canceled.",
			pool.CanceledAcquireCount()},
		{"gauge", "go_goroutines", "Number of goroutines.", runtime.NumGoroutine()},
		{"gauge", "go_memstats_heap_alloc_bytes", "Bytes of allocated heap objects.", memory.HeapAlloc},
		{"gauge", "go_memstats_sys_bytes", "Bytes obtained from the system.", memory.Sys},
	} {
		fmt.Fprintf(&text, "# HELP %[2]s %[3]s\n# TYPE %[2]s %[1]s\n%[2]s %[4]v\n",
			m.kind, m.name, m.help, m.value)
	}
	text.WriteString("# HELP todo_http_requests_total Requests by route, method and status.\n" +
		"# TYPE todo_http_requests_total counter\n")
	s.requestsMu.Lock()
	for l, n := range s.requests {
		fmt.Fprintf(&text, "todo_http_requests_total{route=%q,method=%q,status=\"%d\"} %d\n",
			l.route, l.method, l.status, n)
	}
	s.requestsMu.Unlock()
	writeBody(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", text.Bytes())
}

// listenAndServe serves until ctx is done or a part of the service fails. It listens before the
// database is ready, so that a suspended compute does not fail a deploy. Until then requests wait
// in query, up to their deadline.
func (s *server) listenAndServe(ctx context.Context) error {
	failed := make(chan error, 3) // two listeners and the start of the database
	listener, err := net.Listen("tcp", ":"+s.port)
	if err != nil {
		return fmt.Errorf("PORT: %w", err)
	}
	defer listener.Close()
	if s.metricsPort != "" {
		listener, err := net.Listen("tcp", ":"+s.metricsPort)
		if err != nil {
			return fmt.Errorf("METRICS_PORT: %w", err)
		}
		defer listener.Close()
		mux := http.NewServeMux()
		mux.HandleFunc("GET /metrics", s.serveMetrics)
		go func() { failed <- s.newHTTPServer(mux).Serve(listener) }()
	}
	public := s.newHTTPServer(s)
	go func() { failed <- public.Serve(listener) }()
	s.log.Info("listening", "port", s.port)
	go func() {
		if err := s.db.ensureSchema(ctx); err != nil && ctx.Err() == nil {
			failed <- err
		}
	}()
	select {
	case err = <-failed:
		s.db.cancel(err)
	case <-s.db.work.Done():
		err = context.Cause(s.db.work) // the schema is gone
	case <-ctx.Done():
	}
	s.log.Info("shutting down")
	s.shutDown(public, listener)
	s.log.Info("stopped")
	return err
}

const (
	// A request is answered within headerTimeout plus requestTimeout plus sendTimeout.
	headerTimeout = 4 * time.Second
	sendTimeout   = time.Second
	// readTimeout is for the header and the body. The body is read after the wait for a slot, so
	// readTimeout is longer than headerTimeout and slotTimeout.
	readTimeout = 10 * time.Second
	idleTimeout = 2 * time.Minute // between two requests of a connection

	maxHeader = 16<<10 - 4<<10 // bytes; net/http adds 4 KiB
)

func (s *server) newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return s.db.work },
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      requestTimeout + sendTimeout, // from the end of the header
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
}

// A shutdown. Cloud Run kills the process 10 s after the signal.
const (
	quietTime  = time.Second            // without a new request, until the listener is closed
	acceptTime = 6 * time.Second        // the longest that the listener stays open
	settleTime = 250 * time.Millisecond // to read the requests that have arrived

	cancelAfter = 7 * time.Second         // from the signal until running statements are canceled
	exitAfter   = 8500 * time.Millisecond // from the signal until the process exits
)

// shutDown answers requests until no more arrive, finishes those in progress and closes the
// connections.
func (s *server) shutDown(public *http.Server, listener net.Listener) {
	ctx, cancel := context.WithTimeout(context.Background(), exitAfter)
	defer cancel()
	time.AfterFunc(cancelAfter, func() { s.db.cancel(nil) })
	quiet := time.NewTimer(quietTime)
	s.quiet.Store(quiet)
	select {
	case <-quiet.C:
	case <-time.After(acceptTime):
	case <-s.db.work.Done(): // the service has failed
	}
	listener.Close()
	time.Sleep(settleTime) // Shutdown drops the first request of a connection if it was not read yet
	public.Shutdown(ctx)
	go func() {
		s.db.pool.Close() // waits until cancel requests were sent
		cancel()
	}()
	<-ctx.Done()
}
