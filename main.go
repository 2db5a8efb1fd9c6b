// Todo-app is a small multi-user task API on serverless Postgres. A Next.js front end with Better
// Auth signs users in and sends HS256 tokens. This service verifies the tokens and stores each
// user's tasks in Neon.
//
// A request takes this path:
//
//	server.ServeHTTP  headers of every response, CORS         main.go
//	server.handle     deadline, panics, errors, log, metrics  main.go
//	server.forUser    token, user, task id, the user's turn   main.go, auth.go
//	createTask etc.   reads the body or query, writes a task  tasks.go
//	database.insert   SQL                                     tasks.go
//	query             connection, retries                     db.go
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
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// A response begins at most 19 s after the first byte of its request: headerTimeout plus
	// requestTimeout. writeTimeout also starts at the end of the header; the extra second is for
	// sending the response.
	headerTimeout  = 4 * time.Second
	requestTimeout = 15 * time.Second
	writeTimeout   = 16 * time.Second
	readTimeout    = 10 * time.Second       // to read the header and the body
	idleTimeout    = 2 * time.Minute        // between two requests of a connection
	readyTimeout   = 3 * time.Second        // for /health/ready
	discardTimeout = 100 * time.Millisecond // to receive the rest of a body that is not read
	turnTimeout    = 5 * time.Second        // to wait for a turn while the database answers

	maxHeader = 16<<10 - 4<<10 // bytes; net/http adds 4 KiB
	maxBody   = 64 << 10       // bytes; four times the largest task, all its characters escaped
	maxLogged = 4 << 10        // bytes of an error or a statement in the log

	// Shutdown. Cloud Run kills the process 10 s after SIGTERM.
	graceTime   = time.Second             // requests are still accepted
	queueTime   = 200 * time.Millisecond  // connections wait in the kernel's queue
	settleTime  = 2 * time.Second         // at most, for the requests of the last connections
	cancelAfter = 7 * time.Second         // from the signal until database work is canceled
	closeAfter  = 8 * time.Second         // from the signal until connections are closed
	exitAfter   = 8500 * time.Millisecond // from the signal until the process exits

	// The defaults of GOGC and GOMEMLIMIT. With a live heap of about 4 MB, GOGC=300 saves a quarter
	// of the CPU time of a list. Fly.io's smallest machine has 256 MB.
	gcPercent   = 300
	memoryLimit = 100 << 20 // bytes
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
		if len(os.Args) > 1 && os.Args[1] == "token" {
			out = os.Stderr // stdout is for the token
		}
		newLogger(out, slog.LevelInfo).Error(err.Error())
		os.Exit(1)
	}
}

// run executes a command: without arguments it serves until ctx is done or a signal arrives. The
// error for a missing or invalid setting names it.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	switch {
	case len(args) == 0:
		return serve(ctx, getenv, stdout)
	case len(args) == 1 && args[0] == "migrate":
		return migrate(ctx, getenv, stdout)
	case len(args) >= 2 && args[0] == "token":
		return printToken(args[1], args[2:], getenv, stdout)
	}
	return errors.New("usage: todo-app | todo-app migrate | todo-app token USER_ID [CLAIM=VALUE ...]")
}

// printToken prints a token for user that is valid for tokenLifetime. Each claim is NAME=VALUE. A
// VALUE that is not JSON is a string. Claims that the service itself sets, such as sub, have no
// effect.
func printToken(
	user string, claims []string, getenv func(string) string, stdout io.Writer,
) error {
	auth, err := readAuthSettings(getenv)
	if err != nil {
		return err
	}
	extra := map[string]any{}
	for _, claim := range claims {
		name, text, ok := strings.Cut(claim, "=")
		if !ok || name == "" {
			return errors.New("a claim must be NAME=VALUE, for example role=admin")
		}
		var value any
		if json.Unmarshal([]byte(text), &value) != nil {
			value = text
		}
		extra[name] = value
	}
	token, err := auth.sign(user, extra)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, token)
	return err
}

// migrate applies the schema and returns nil once the database is up to date. It reads the settings
// DATABASE_URL and LOG_LEVEL alone.
func migrate(ctx context.Context, getenv func(string) string, stdout io.Writer) error {
	level, err := readLogLevel(getenv)
	if err != nil {
		return err
	}
	db, err := openDatabase(getenv("DATABASE_URL"), newLogger(stdout, level))
	if err != nil {
		return err
	}
	defer db.pool.Close()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return db.ensureSchema(ctx)
}

func serve(ctx context.Context, getenv func(string) string, stdout io.Writer) error {
	settings, err := readSettings(getenv)
	if err != nil {
		return err
	}
	log := newLogger(stdout, settings.logLevel)
	for _, warning := range settings.auth.warnings {
		log.Warn(warning)
	}
	db, err := openDatabase(settings.databaseURL, log)
	if err != nil {
		return err
	}
	s := newServer(settings.auth, db, log, settings.origins, settings.project)
	return s.serve(ctx, settings.port, settings.metricsPort)
}

// openDatabase returns the database of a connection string and logs the parameters it ignores.
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

// settings are the environment variables of the service. poolConfig validates databaseURL, and
// listen validates the ports.
type settings struct {
	auth        *authenticator // BETTER_AUTH_SECRET, BETTER_AUTH_SECRETS, JWT_AUDIENCE, JWT_ISSUER
	databaseURL string         // DATABASE_URL; required
	origins     []string       // CORS_ORIGINS; optional
	port        string         // PORT; default 8080
	metricsPort string         // METRICS_PORT; optional: a second listener with /metrics
	logLevel    slog.Level     // LOG_LEVEL; default info
	project     string         // GOOGLE_CLOUD_PROJECT; optional
}

// readSettings returns an error that names the first variable that is missing or invalid.
func readSettings(getenv func(string) string) (s settings, err error) {
	if s.auth, err = readAuthSettings(getenv); err != nil {
		return s, err
	}
	if s.logLevel, err = readLogLevel(getenv); err != nil {
		return s, err
	}
	if s.origins, err = corsOrigins(getenv("CORS_ORIGINS")); err != nil {
		return s, err
	}
	s.databaseURL = getenv("DATABASE_URL")
	s.port = cmp.Or(strings.TrimSpace(getenv("PORT")), "8080")
	s.metricsPort = strings.TrimSpace(getenv("METRICS_PORT"))
	s.project = strings.TrimSpace(getenv("GOOGLE_CLOUD_PROJECT"))
	return s, nil
}

// readAuthSettings leaves the secrets as they are: every byte counts.
func readAuthSettings(getenv func(string) string) (*authenticator, error) {
	return newAuthenticator(getenv("BETTER_AUTH_SECRET"), getenv("BETTER_AUTH_SECRETS"),
		strings.TrimSpace(getenv("JWT_AUDIENCE")), strings.TrimSpace(getenv("JWT_ISSUER")))
}

// readLogLevel reads LOG_LEVEL. slog would also accept a level such as INFO+2.
func readLogLevel(getenv func(string) string) (slog.Level, error) {
	switch strings.ToLower(strings.TrimSpace(getenv("LOG_LEVEL"))) {
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, errors.New("LOG_LEVEL must be debug, info, warn or error")
}

// corsOrigins splits CORS_ORIGINS into origins as browsers send them.
func corsOrigins(list string) ([]string, error) {
	list = strings.ReplaceAll(strings.TrimSpace(list), " ", "")
	if list == "" {
		return nil, nil
	}
	form := regexp.MustCompile(`^([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?$`)
	origins := strings.Split(list, ",")
	for _, origin := range origins {
		parts := form.FindStringSubmatch(origin)
		switch {
		case parts == nil:
			return nil, errors.New("CORS_ORIGINS must list origins such as " +
				"https://app.example.com, separated by commas: lower case, no *, no path, " +
				"no slash at the end")
		case parts[1] == "https" && parts[3] == ":443" || parts[1] == "http" && parts[3] == ":80":
			return nil, fmt.Errorf("CORS_ORIGINS: browsers send an origin without the default "+
				"port, so %s never matches: remove %s", origin, parts[3])
		}
	}
	return origins, nil
}

// A server is the API over one database.
type server struct {
	auth    *authenticator
	db      *database
	log     *slog.Logger
	origins []string // whose pages may call: CORS_ORIGINS
	project string   // GOOGLE_CLOUD_PROJECT
	mux     *http.ServeMux
	turns   turns
	metrics metrics

	work     context.Context // parent of every request's context
	cancel   func()          // ends work
	stopping atomic.Bool     // responses close their connections
}

func newServer(
	auth *authenticator, db *database, log *slog.Logger, origins []string, project string,
) *server {
	s := &server{auth: auth, db: db, log: log, origins: origins, project: project}
	s.mux = http.NewServeMux()
	s.turns.limit = max(1, int(db.pool.Config().MaxConns)/3) // a user may occupy a third of the pool
	s.work, s.cancel = context.WithCancel(context.Background())
	for pattern, e := range s.routes() {
		s.mux.HandleFunc(pattern, s.handle(e))
	}
	s.mux.HandleFunc("/", s.handle(s.noRoute))
	return s
}

// routes returns every route of the service.
func (s *server) routes() map[string]endpoint {
	return map[string]endpoint{
		"GET /api/{user_id}/tasks":                 s.forUser(s.listTasks),
		"POST /api/{user_id}/tasks":                s.forUser(s.createTask),
		"GET /api/{user_id}/tasks/{id}":            s.forUser(s.getTask),
		"PUT /api/{user_id}/tasks/{id}":            s.forUser(s.updateTask), // as PATCH: see change
		"PATCH /api/{user_id}/tasks/{id}":          s.forUser(s.updateTask),
		"PATCH /api/{user_id}/tasks/{id}/complete": s.forUser(s.completeTask),
		"DELETE /api/{user_id}/tasks/{id}":         s.forUser(s.deleteTask),
		"GET /health/live":                         s.live,
		"GET /health/ready":                        s.ready,
		"GET /openapi.json":                        document("application/json", openAPI),
		"GET /docs":                                s.docs,
	}
}

// usedHeaders are the request headers that the service reads.
var usedHeaders = []string{
	"Access-Control-Request-Headers", "Authorization", "Content-Encoding", "Content-Type",
	"Idempotency-Key", "If-Match", "If-None-Match", "Origin", "Traceparent",
	"X-Cloud-Trace-Context", "X-Request-Id",
}

// ServeHTTP sets the headers of every response. It drops all request headers but usedHeaders,
// because thousands of short ones would occupy a megabyte while the request waits. It changes r
// itself, because net/http keeps r and so would keep the headers.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	used := http.Header{}
	for _, name := range usedHeaders {
		if values, ok := r.Header[name]; ok {
			used[name] = values
		}
	}
	r.Header = used
	id := r.Header.Get("X-Request-Id")
	if !saneID.MatchString(id) {
		id = rand.Text()
	}
	w.Header().Set("X-Request-Id", id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if strings.HasPrefix(r.URL.Path, "/api/") {
		w.Header().Set("Cache-Control", "no-store")
	}
	if s.stopping.Load() {
		w.Header().Set("Connection", "close")
	}
	s.setCORS(w, r)
	s.mux.ServeHTTP(w, r)
}

// saneID matches an X-Request-Id that is safe to log and to send back.
var saneID = regexp.MustCompile(`^[0-9A-Za-z._:/+=-]{1,128}$`)

// An endpoint either writes the response or returns an error, never both.
//
// ctx ends at the request's deadline, or when a shutdown cancels the database work. It does not end
// when the client disconnects: the statement may commit anyway, and canceling it closes its
// database connection. pgx's CancelRequestContextWatcherHandler would keep the connection, but a
// cancel request that arrives late can cancel the next statement.
type endpoint func(ctx context.Context, w http.ResponseWriter, r *http.Request) error

// handle makes an endpoint the handler of a route. It does what all routes have in common: the
// deadline, the response to an error or a panic, the log line and the metrics.
func (s *server) handle(e endpoint) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		ctx, used := withTiming(s.work)
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		w := &response{ResponseWriter: rw}
		err := recovered(e)(ctx, w, r)
		if r.Body != http.NoBody {
			// net/http would wait up to readTimeout for the rest of the body. Closing the connection
			// at once could reset it before the client has read the response. Data that was already
			// sent arrives within discardTimeout.
			http.NewResponseController(rw).SetReadDeadline(time.Now().Add(discardTimeout))
		}
		if err != nil && w.status == 0 {
			writeError(w, err)
		}
		s.record(w, r, used, err)
	}
}

// recovered returns an endpoint that calls e and returns a panic of e as an error.
func recovered(e endpoint) endpoint {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request) (err error) {
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
		}()
		return e(ctx, w, r)
	}
}

// A response keeps the status and counts the bytes of a response, for the log and the metrics.
type response struct {
	http.ResponseWriter
	status int // 0 until the header is written
	bytes  int // of the body
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

// A userEndpoint is an endpoint that serves the verified user of the path.
type userEndpoint func(context.Context, http.ResponseWriter, *http.Request, taskKey) error

// forUser makes an endpoint that verifies the user, waits for the user's turn and calls e.
func (s *server) forUser(e userEndpoint) endpoint {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		user, err := s.auth.user(r)
		if err != nil {
			return err
		}
		if r.PathValue("user_id") != user {
			return errOtherUser
		}
		key := taskKey{user: user}
		if text := r.PathValue("id"); text != "" {
			id, err := strconv.ParseUint(text, 10, 63)
			if err != nil || id == 0 {
				return errNotFound
			}
			key.id = int64(id)
		}
		done, err := s.turns.take(ctx, s.db, user)
		if err != nil {
			return err
		}
		defer done()
		return e(ctx, w, r, key)
	}
}

// turns is a semaphore per user. It limits how many requests of a user are in progress, so that no
// user occupies all connections.
type turns struct {
	limit int // requests in progress per user
	mu    sync.Mutex
	users map[string]*userTurns // of users with requests in progress or waiting
}

type userTurns struct {
	progress chan struct{} // holds a value for each request in progress
	requests int           // in progress or waiting
}

// take waits until fewer than limit requests of the user are in progress. The caller must call
// done at the end of the request.
//
// take returns errTooMany after turnTimeout, and errUnavailable when ctx is done. Time in which the
// database does not answer does not count toward turnTimeout.
func (t *turns) take(ctx context.Context, db *database, user string) (done func(), err error) {
	t.mu.Lock()
	u := t.users[user]
	if u == nil {
		u = &userTurns{progress: make(chan struct{}, t.limit)}
		if t.users == nil {
			t.users = map[string]*userTurns{}
		}
		t.users[user] = u
	}
	u.requests++
	t.mu.Unlock()
	end := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if u.requests--; u.requests == 0 {
			delete(t.users, user)
		}
	}
	defer func() {
		if err != nil {
			end()
		}
	}()
	ctx, cancel := db.limitInOutage(ctx)
	defer cancel()
	const tick = 50 * time.Millisecond // it polls whether the database answers
	for waited := time.Duration(0); waited < turnTimeout; {
		select {
		case u.progress <- struct{}{}:
			return func() { <-u.progress; end() }, nil
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: wait for a turn: %w", errUnavailable, context.Cause(ctx))
		case <-time.After(tick):
			if db.answers() {
				waited += tick
			}
		}
	}
	return nil, errTooMany
}

// methods are those that the Allow header, the log and the metrics name.
var methods = []string{"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}

// noRoute answers requests that match no route: a preflight of a listed origin, or a 404 or 405 in
// JSON. A mux with a "/" pattern does not send 405 by itself, so noRoute asks it which methods the
// path accepts.
func (s *server) noRoute(_ context.Context, w http.ResponseWriter, r *http.Request) error {
	if r.Method == http.MethodOptions && w.Header().Get("Access-Control-Allow-Origin") != "" {
		preflight(w, r)
		return nil
	}
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
	errInternal    = apiError{500, "Internal error. Report it with the X-Request-Id of this response."}
	errUnavailable = apiError{503, "The database is unavailable or did not answer in time. " +
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
	case errCutBody, errSlowBody, errLargeBody:
		w.Header().Set("Connection", "close") // the rest of the body is not read
	case errTooMany, errUnavailable:
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
	write(w, status, "application/json", body.Bytes())
	return nil
}

// write writes a whole response. A failed Write is ignored: the client has disconnected.
func write(w http.ResponseWriter, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

// readObject returns the members of the JSON object in a request's body, nil if the body is empty.
// It stops waiting for the body when ctx is done.
func readObject(
	ctx context.Context, w http.ResponseWriter, r *http.Request,
) (map[string]json.RawMessage, error) {
	unsupported := checkMediaType(r)
	switch { // 413 comes before 415, and both before the body is read
	case r.ContentLength > maxBody:
		return nil, errLargeBody
	case r.ContentLength > 0 && unsupported != nil:
		return nil, unsupported
	}
	stopReading := func() { http.NewResponseController(w).SetReadDeadline(time.Now()) }
	stop := context.AfterFunc(ctx, stopReading)
	defer stop()
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, maxBody)) // writeError closes
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	switch { // a chunked body has no Content-Length, so the first two checks are repeated
	case tooLarge:
		return nil, errLargeBody
	case len(body) > 0 && unsupported != nil:
		return nil, unsupported
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%w: %w", errSlowBody, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errCutBody, err)
	}
	r.Body = http.NoBody // tells handle that the whole body was read
	if len(body) == 0 {
		return nil, nil
	}
	return parseObject(bytes.TrimPrefix(body, []byte("\ufeff"))) // RFC 8259, section 8.1
}

// checkMediaType returns the error for a body that is not JSON or is compressed.
func checkMediaType(r *http.Request) error {
	encoding := cmp.Or(strings.TrimSpace(r.Header.Get("Content-Encoding")), "identity")
	switch {
	case !isJSON(r.Header.Get("Content-Type")):
		return errNotJSON
	case !strings.EqualFold(encoding, "identity"):
		return errEncoded
	}
	return nil
}

// isJSON reports whether a Content-Type is absent or a JSON type.
func isJSON(contentType string) bool {
	if contentType == "" {
		return true
	}
	media, _, _ := mime.ParseMediaType(contentType)
	kind, subtype, _ := strings.Cut(media, "/")
	return media == "application/json" || kind != "" && strings.HasSuffix(subtype, "+json")
}

// parseObject returns the members of a JSON object under their exact names. It rejects text that
// encoding/json would replace with U+FFFD.
func parseObject(body []byte) (map[string]json.RawMessage, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadJSON, err)
	}
	if members == nil || !utf8.Valid(body) || hasLoneSurrogate(body) { // nil: the body is null
		return nil, errBadJSON
	}
	return members, nil
}

// hasLoneSurrogate reports whether a \u escape is half of a surrogate pair, which is not a
// character (RFC 8259, section 8.2). The text must be valid JSON.
func hasLoneSurrogate(text []byte) bool {
	codeUnit := func(hex []byte) rune {
		n, _ := strconv.ParseUint(string(hex), 16, 16)
		return rune(n)
	}
	for {
		i := bytes.IndexByte(text, '\\')
		if i < 0 {
			return false
		}
		if text[i+1] != 'u' {
			text = text[i+2:]
			continue
		}
		first := codeUnit(text[i+2 : i+6])
		text = text[i+6:]
		if !utf16.IsSurrogate(first) {
			continue
		}
		if !bytes.HasPrefix(text, []byte(`\u`)) ||
			utf16.DecodeRune(first, codeUnit(text[2:6])) == utf8.RuneError {
			return true
		}
		text = text[6:]
	}
}

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docsPage []byte

// document returns an endpoint that serves content from memory.
func document(contentType string, content []byte) endpoint {
	return func(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
		write(w, http.StatusOK, contentType, content)
		return nil
	}
}

// docsPolicy lets docs.html load the script and style sheet of Swagger UI, run its own script,
// which the hash names, and call this API.
const docsPolicy = "default-src 'none'; " +
	"script-src https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/ " +
	"'sha256-yXh1OrGy64wi+FamPYbkEUpk/8ci6RvuqFDyHak2/Ms='; " +
	"style-src https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/; " +
	"img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// docs serves Swagger UI.
func (s *server) docs(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Security-Policy", docsPolicy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	write(w, http.StatusOK, "text/html; charset=utf-8", docsPage)
	return nil
}

// live reports that the process is running. It does not use the database, because platforms poll it
// every few seconds, which would keep Neon from suspending the compute.
func (s *server) live(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "alive"})
}

// ready reports whether the database can serve requests. It is for people and smoke tests.
func (s *server) ready(ctx context.Context, w http.ResponseWriter, _ *http.Request) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.db.check(ctx); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
}

// setCORS allows a listed origin to read the response. It logs an origin that is not listed,
// because the page shows only "Failed to fetch". A page of this host, such as /docs, needs no
// permission.
func (s *server) setCORS(w http.ResponseWriter, r *http.Request) {
	if len(s.origins) == 0 {
		return
	}
	h := w.Header()
	h.Set("Vary", "Origin")
	origin := r.Header.Get("Origin")
	if !slices.Contains(s.origins, origin) {
		if origin != "" && !strings.HasSuffix(origin, "://"+r.Host) {
			s.log.Warn(fmt.Sprintf("the origin %q is not in CORS_ORIGINS", truncate(origin, 200)),
				"request_id", h.Get("X-Request-Id"))
		}
		return
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Allow-Credentials", "true")
	h.Set("Access-Control-Expose-Headers", "ETag, Link, Location, X-Total-Count, X-Request-Id, "+
		"Retry-After, Idempotency-Replayed, WWW-Authenticate")
}

// preflight answers an OPTIONS request of a listed origin. It allows every header that the page
// requests, because tracing libraries add their own, and always those that the API reads, because
// the browser reuses the answer for later requests.
func preflight(w http.ResponseWriter, r *http.Request) {
	allowed := []string{"Authorization", "Content-Type", "If-Match", "If-None-Match",
		"Idempotency-Key", "X-Request-Id"}
	requested := strings.Join(r.Header["Access-Control-Request-Headers"], ",")
	for name := range strings.SplitSeq(requested, ",") {
		name = strings.TrimSpace(name)
		known := func(a string) bool { return strings.EqualFold(a, name) }
		if headerName.MatchString(name) && !slices.ContainsFunc(allowed, known) {
			allowed = append(allowed, name)
		}
	}
	w.Header().Set("Access-Control-Allow-Headers", strings.Join(allowed, ", "))
	w.Header().Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
	w.Header().Set("Access-Control-Max-Age", "7200") // seconds; Chromium's maximum
	w.WriteHeader(http.StatusNoContent)
}

// headerName matches a header name (RFC 9110, section 5.6.2) of at most 64 characters.
var headerName = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$")

// newLogger writes one JSON object per line, with the field names and severities of Google Cloud's
// logs.
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
			return a
		},
	}))
}

// record logs a request in one line and counts it.
func (s *server) record(w *response, r *http.Request, used *timing, err error) {
	took := time.Since(used.start)
	method, route := r.Method, r.Pattern
	if _, path, ok := strings.Cut(r.Pattern, " "); ok {
		route = path
	}
	if !slices.Contains(methods, method) {
		method = "other" // clients can invent any number of methods, of any length
	}
	s.metrics.observe(route, method, w.status, took)
	level := slog.LevelInfo
	switch {
	case w.status == http.StatusServiceUnavailable:
		level = slog.LevelWarn
	case w.status >= 500 || err != nil && w.status < 400: // an error after the header was written
		level = slog.LevelError
	}
	attrs := []slog.Attr{
		slog.String("request_id", w.Header().Get("X-Request-Id")),
		slog.String("method", method),
		slog.String("route", route),
		slog.Int("status", w.status),
		slog.Int64("duration_us", took.Microseconds()),
		slog.Int("bytes", w.bytes),
		slog.Int64("db_us", used.total.Microseconds()),
		slog.Int64("db_wait_us", used.waiting.Microseconds()),
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", truncate(err.Error(), maxLogged)))
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
// that was cut.
func truncate(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "")
}

// buckets are the upper bounds of the histogram, in seconds. A round trip to the database takes 1
// to 100 ms, or longer if the compute is suspended. A request ends after requestTimeout.
var buckets = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 16}

// metrics counts requests. There are few series, because the label route is the pattern of a path.
type metrics struct {
	mu       sync.Mutex
	requests map[requestSeries]int
	times    map[timeSeries]*histogram
}

type requestSeries struct {
	route, method string
	status        int
}

type timeSeries struct{ route, method string }

type histogram struct {
	counts [len(buckets) + 1]int // by bucket, the last one without a bound
	sum    time.Duration
}

func (m *metrics) observe(route, method string, status int, took time.Duration) {
	bucket, _ := slices.BinarySearch(buckets[:], took.Seconds())
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.requests == nil {
		m.requests, m.times = map[requestSeries]int{}, map[timeSeries]*histogram{}
	}
	m.requests[requestSeries{route, method, status}]++
	h := m.times[timeSeries{route, method}]
	if h == nil {
		h = &histogram{}
		m.times[timeSeries{route, method}] = h
	}
	h.counts[bucket]++
	h.sum += took
}

// write writes the request metrics in Prometheus' text format.
func (m *metrics) write(w io.Writer) {
	const total, duration = "todo_http_requests_total", "todo_http_request_duration_seconds"
	m.mu.Lock()
	defer m.mu.Unlock()
	writeMetricHeader(w, total, "counter", "Requests by route, method and status.")
	for series, n := range m.requests {
		fmt.Fprintf(w, "%s{route=%q,method=%q,status=\"%d\"} %d\n",
			total, series.route, series.method, series.status, n)
	}
	writeMetricHeader(w, duration, "histogram",
		"Time from the end of the request header to the end of the handler.")
	for series, h := range m.times {
		labels := fmt.Sprintf("route=%q,method=%q", series.route, series.method)
		count := 0
		for i, n := range h.counts {
			count += n
			bound := "+Inf"
			if i < len(buckets) {
				bound = strconv.FormatFloat(buckets[i], 'g', -1, 64)
			}
			fmt.Fprintf(w, "%s_bucket{%s,le=%q} %d\n", duration, labels, bound, count)
		}
		fmt.Fprintf(w, "%s_sum{%s} %g\n", duration, labels, h.sum.Seconds())
		fmt.Fprintf(w, "%s_count{%s} %d\n", duration, labels, count)
	}
}

// writeMetricHeader writes the lines that introduce a metric.
func writeMetricHeader(w io.Writer, name, kind, help string) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// serveMetrics writes Prometheus' text format. It reads counters of the process and runs no query.
func (s *server) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	var text bytes.Buffer
	s.metrics.write(&text)
	db, pool := s.db, s.db.pool.Stat()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	for _, m := range []struct {
		name, kind, help string
		value            any // a number
	}{
		{"todo_db_statements_total", "counter", "Statements that have ended, including failed ones.",
			db.statements.Load()},
		{"todo_db_statement_seconds_total", "counter", "Time that statements took, preparation included.",
			time.Duration(db.statementTime.Load()).Seconds()},
		{"todo_db_connections_acquired", "gauge", "Connections in use.", pool.AcquiredConns()},
		{"todo_db_connections_idle", "gauge", "Connections not in use.", pool.IdleConns()},
		{"todo_db_connections_open", "gauge", "Connections, including those being established.",
			pool.TotalConns()},
		{"todo_db_connections_max", "gauge", "Maximum size of the pool.", pool.MaxConns()},
		{"todo_db_connections_new_total", "counter", "Attempts to connect.", pool.NewConnsCount()},
		{"todo_db_acquires_total", "counter", "Acquires that returned a connection.",
			pool.AcquireCount()},
		{"todo_db_acquire_waits_total", "counter",
			"Acquires that waited for a connection to be released or established.",
			pool.EmptyAcquireCount()},
		{"todo_db_acquire_wait_seconds_total", "counter", "Time that acquires waited for a connection.",
			pool.EmptyAcquireWaitTime().Seconds()},
		{"todo_db_acquires_canceled_total", "counter",
			"Acquires canceled before a connection was available.", pool.CanceledAcquireCount()},
		{"go_goroutines", "gauge", "Number of goroutines that currently exist.",
			runtime.NumGoroutine()},
		{"go_memstats_heap_alloc_bytes", "gauge", "Number of heap bytes allocated and still in use.",
			memory.HeapAlloc},
		{"go_memstats_sys_bytes", "gauge", "Number of bytes obtained from system.", memory.Sys},
	} {
		writeMetricHeader(&text, m.name, m.kind, m.help)
		fmt.Fprintln(&text, m.name, m.value)
	}
	write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", text.Bytes())
}

// serve runs the service until ctx is done, a signal arrives or it fails. It listens before the
// database is ready, so that a suspended compute does not fail a deploy. Until then requests wait
// in query, up to their deadline.
func (s *server) serve(ctx context.Context, port, metricsPort string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	failed := make(chan error, 3) // two listeners and the start of the database
	public, listener, err := s.listen("PORT", port, s, failed)
	if err != nil {
		return err
	}
	defer listener.Close()
	if metricsPort != "" {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /metrics", s.serveMetrics)
		mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { writeError(w, errNoPath) })
		private, _, err := s.listen("METRICS_PORT", metricsPort, mux, failed)
		if err != nil {
			return err
		}
		defer private.Close()
	}
	s.log.Info("listening", "port", port)
	go func() {
		if err := s.db.ensureSchema(ctx); err != nil && ctx.Err() == nil {
			failed <- err
		}
	}()

	select {
	case err = <-failed:
	case err = <-s.db.failed:
	case <-ctx.Done():
	}
	stop() // a second signal ends the process at once
	s.log.Info("shutting down")
	s.drain(public, listener, err == nil)
	s.log.Info("stopped")
	return err
}

// listen listens on the port, on all addresses, and serves h in a goroutine, which sends the error
// of Serve to failed. Errors name the setting.
func (s *server) listen(
	setting, port string, h http.Handler, failed chan<- error,
) (*http.Server, *publicListener, error) {
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, nil, fmt.Errorf("%s must be a port number from 1 to 65535", setting)
	}
	socket, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", setting, err)
	}
	listener := &publicListener{
		TCPListener: socket.(*net.TCPListener), stopped: make(chan struct{}), unused: map[net.Conn]bool{},
	}
	hs := &http.Server{
		Handler:           h,
		ConnState:         listener.connState,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	go func() { failed <- hs.Serve(listener) }()
	return hs, listener, nil
}

// drain waits for the requests in progress, until closeAfter at the latest, and closes the
// connections. Unless graceful, it cancels the requests at once.
func (s *server) drain(public *http.Server, listener *publicListener, graceful bool) {
	time.AfterFunc(cancelAfter, s.cancel)
	exit := time.After(exitAfter)
	ctx, cancel := context.WithTimeout(context.Background(), closeAfter)
	defer cancel()
	s.stopping.Store(true)
	if graceful {
		listener.stop()
	} else {
		s.cancel()
	}
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
	case <-exit:
	}
}

// A publicListener can stop accepting connections without dropping a request.
type publicListener struct {
	*net.TCPListener
	stopped chan struct{} // closed once the socket is closed and queue is complete
	queue   []net.Conn    // for Accept to return after the socket was closed

	mu     sync.Mutex
	unused map[net.Conn]bool // connections of which no request has been read
}

// stop closes the listener after graceTime. During graceTime, responses ask clients to close their
// connections, because a request that is sent while the server closes its connection is dropped.
//
// Closing a socket resets the connections that the kernel has established and Accept has not
// returned. So stop suspends Accept for queueTime, in which clients that reconnect wait in the
// kernel's queue. It then accepts the whole queue and closes the socket. At last it waits for the
// first request of each connection, because net/http drops a request that it reads after Shutdown
// was called. Without these steps TestShutdownLosesNothing or TestRequestAfterTheSocketClosed fails.
func (l *publicListener) stop() {
	time.Sleep(graceTime)
	l.SetDeadline(time.Now())
	time.Sleep(queueTime)
	var queue []int
	if raw, err := l.SyscallConn(); err == nil {
		raw.Control(func(socket uintptr) {
			for {
				fd, _, err := syscall.Accept(int(socket))
				switch err {
				case nil:
					queue = append(queue, fd)
				case syscall.EINTR, syscall.ECONNABORTED: // try again
				default: // EAGAIN: the queue is empty
					return
				}
			}
		})
	}
	l.Close()
	for _, fd := range queue {
		file := os.NewFile(uintptr(fd), "")
		if conn, err := net.FileConn(file); err == nil {
			l.queue = append(l.queue, conn)
		}
		file.Close()
	}
	close(l.stopped)
	for start := time.Now(); time.Since(start) < settleTime; {
		time.Sleep(50 * time.Millisecond) // first for Accept to return the queue
		l.mu.Lock()
		n := len(l.unused)
		l.mu.Unlock()
		if n == 0 {
			break
		}
	}
	time.Sleep(50 * time.Millisecond) // a connection has its new state before its request is served
}

// connState is the hook of the server: a connection is new until its first request has been read.
func (l *publicListener) connState(conn net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if state == http.StateNew {
		l.unused[conn] = true
	} else {
		delete(l.unused, conn)
	}
}

// Accept returns net.ErrClosed after the last connection.
func (l *publicListener) Accept() (net.Conn, error) {
	conn, err := l.TCPListener.Accept()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		<-l.stopped
		err = net.ErrClosed
	}
	if errors.Is(err, net.ErrClosed) && len(l.queue) > 0 {
		conn, l.queue = l.queue[0], l.queue[1:]
		return conn, nil
	}
	return conn, err
}
