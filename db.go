package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	defaultMaxConns = 15  // six instances use 90 of the 97 connections of Neon's smallest compute
	limitMaxConns   = 100 // the largest pool_max_conns

	acquireTimeout   = 10 * time.Second // to wait for a connection while all are busy
	dialTimeout      = 2 * time.Second  // TCP only; Neon's proxy accepts it while the compute resumes
	connectTimeout   = 10 * time.Second // TCP, TLS and authentication, for each address
	idleBeforePing   = time.Second      // a connection that was idle that long is pinged before use
	pingTimeout      = time.Second      // for that ping
	closeTimeout     = time.Second      // for an unresponsive server to close a connection
	statementTimeout = 30 * time.Second // on the server; the request's deadline ends earlier
	slowStatement    = time.Second      // a statement that takes longer is logged at WARNING

	outageAfter    = 15 * time.Second // attempts to connect have failed for so long: a long outage
	outageWait     = 3 * time.Second  // in a long outage, from the start of a request to its 503
	outageInterval = time.Second      // in a long outage, between two attempts to connect
	outageForget   = 5 * time.Minute  // failures older than this do not count
)

// A database is a pool of connections and the schema. It connects when a statement needs the first
// connection.
type database struct {
	pool   *pgxpool.Pool
	log    *slog.Logger
	steps  []step         // of schema.sql
	redact *regexp.Regexp // matches the parts of DATABASE_URL
	ready  chan struct{}  // closed once the schema is in place
	failed chan error     // receives an error if the schema disappears: the service must exit

	pooler     atomic.Bool // the host is a pooler, which rejects the options parameter
	unprepared atomic.Bool // statements are no longer prepared: see stopPreparing

	statements    atomic.Int64 // that have ended
	statementTime atomic.Int64 // their total duration in nanoseconds

	mu           sync.Mutex // guards the fields below, up to lastReset
	failures     int        // failed attempts to connect since the last success
	firstFailure time.Time  // end of the first of them
	lastFailure  time.Time  // end of the last of them
	lastAttempt  time.Time  // start of the last attempt to connect
	lastReset    time.Time  // of the pool, because of a read-only session

	checking   chan struct{} // a mutex with a timeout, which guards the fields below: see check
	checked    time.Time     // when check last ran its statement
	checkError error         // its result
}

func newDatabase(config *pgxpool.Config, log *slog.Logger) (*database, error) {
	steps, err := parseSteps(schema)
	if err != nil {
		return nil, err
	}
	d := &database{log: log, steps: steps, redact: urlParts(config.ConnConfig),
		ready: make(chan struct{}), failed: make(chan error, 1), checking: make(chan struct{}, 1)}
	label, _, _ := strings.Cut(config.ConnConfig.Host, ".")
	d.pooler.Store(strings.HasSuffix(label, "-pooler"))
	config.BeforeConnect = d.beforeConnect
	config.AfterConnect = d.afterConnect
	config.ShouldPing = d.shouldPing
	config.ConnConfig.Tracer = d
	d.pool, err = pgxpool.NewWithConfig(context.Background(), config)
	return d, err
}

// A retryPolicy tells whether a statement may be sent again after its connection broke. It is then
// unknown whether the statement ran.
type retryPolicy bool

const (
	retry   retryPolicy = true  // a read, or a create with an Idempotency-Key
	noRetry retryPolicy = false // any other change
)

// query runs one statement and returns its rows. That takes one round trip, or two if the
// connection has not prepared the statement yet.
//
// query returns errUnavailable if the database was not reached, had no capacity, canceled the
// statement or did not answer; the statement may have run. Any other error is a fault of the
// statement.
//
// The statement is sent again, within ctx, after an error that guarantees that nothing happened,
// and once, if policy allows it, after its connection broke. A connection counts as broken if pgx
// has closed it. Two obvious signals are unusable: pgconn.SafeToRetry is true for some statements
// that ran (pgx 5.9 to 5.12), and Neon's proxy reports its own failures as XX000.
func query[T any](
	ctx context.Context, d *database, policy retryPolicy,
	scan pgx.RowToFunc[T], sql string, args ...any,
) ([]T, error) {
	timing, start := timingOf(ctx), time.Now()
	defer addSince(&timing.total, start)
	readyCtx, cancel := d.limitInOutage(ctx)
	defer cancel()
	select {
	case <-d.ready:
	case <-readyCtx.Done():
		addSince(&timing.waiting, start)
		return nil, fmt.Errorf("%w: wait for the schema: %w", errUnavailable, context.Cause(readyCtx))
	}
	resent := false
	for attempt := 1; ; attempt++ {
		mode := pgx.QueryExecModeCacheStatement
		if d.unprepared.Load() {
			mode = pgx.QueryExecModeExec
		}
		rows, broken, err := tryQuery(ctx, d, mode, scan, sql, args...)
		if err == nil {
			return rows, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", errUnavailable, err)
		}
		again, code := false, sqlState(err)
		switch {
		case broken:
			d.pool.Reset() // after a restart the other connections are broken too
			again = policy == retry && !resent
			resent = true
		case mode == pgx.QueryExecModeCacheStatement && preparingFailed(code):
			d.stopPreparing(ctx, err)
			again = true
		case code == "40001" || code == "40P01": // serialization failure, deadlock: rolled back
			again = backoff(ctx, attempt)
		case code == "25006": // read-only, after a failover: rejected
			d.resetReadOnly()
			again = !resent
			resent = true
		case slices.Contains([]string{"42P01", "42703", "42P10", "3F000"}, code):
			// The table, a column, an index or the schema is undefined.
			if d.schemaLost(ctx) {
				return nil, fmt.Errorf("%w: %w", errUnavailable, err)
			}
		}
		if again {
			continue
		}
		if broken || transient(err) || ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", errUnavailable, err)
		}
		return nil, err
	}
}

// queryRow is query for a statement that returns at most one row. If there is none it returns
// errNotFound: the id does not exist or belongs to another user.
func queryRow[T any](
	ctx context.Context, d *database, policy retryPolicy,
	scan pgx.RowToFunc[T], sql string, args ...any,
) (row T, err error) {
	rows, err := query(ctx, d, policy, scan, sql, args...)
	switch {
	case err != nil:
		return row, err
	case len(rows) == 0:
		return row, errNotFound
	}
	return rows[0], nil
}

// tryQuery runs a statement once and releases its connection, even if scan panics. It reports
// whether the connection broke.
//
// The text begins with the number of the schema's last step, because a pooler shares the prepared
// statements of equal text. A release that changes a column's type must not get the old plan.
func tryQuery[T any](
	ctx context.Context, d *database, mode pgx.QueryExecMode,
	scan pgx.RowToFunc[T], sql string, args ...any,
) (rows []T, broken bool, err error) {
	conn, err := d.acquire(ctx)
	if err != nil {
		return nil, false, err
	}
	defer conn.Release()
	sql = "/* schema step " + strconv.Itoa(len(d.steps)) + " */" + sql
	found, err := conn.Query(ctx, sql, append([]any{mode}, args...)...)
	if err == nil {
		rows, err = pgx.CollectRows(found, scan)
	}
	return rows, conn.Conn().IsClosed(), err
}

// preparingFailed reports whether an error comes from preparing. The prepared statement exists
// already (42P05) or does not exist (26000), because the pooler does not support it, or the type of
// its result has changed (0A000). The statement did not run.
func preparingFailed(code string) bool {
	return slices.Contains([]string{"42P05", "26000", "0A000"}, code)
}

// stopPreparing makes the service send its statements unprepared from now on. The database then
// parses and plans each of them again.
func (d *database) stopPreparing(ctx context.Context, err error) {
	if !d.unprepared.Swap(true) {
		d.log.WarnContext(ctx, "prepared statements failed; statements are sent unprepared from now on",
			"sqlstate", sqlState(err), "error", truncate(err.Error(), maxLogged))
	}
}

// errConnection means that there is no connection to the database.
var errConnection = errors.New("no connection")

// acquire returns a connection of the pool, or errConnection. After a failed attempt to connect it
// tries again until ctx is done, because no statement has been sent and the compute may be
// resuming. It gives up after acquireTimeout if all connections are busy at that time, and after
// outageWait in a long outage.
func (d *database) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	defer addSince(&timingOf(ctx).waiting, time.Now())
	ctx, stop := d.limitInOutage(ctx)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ctx = context.WithValue(ctx, acquireEnded{}, ctx.Done()) // for beforeConnect
	busy := time.AfterFunc(acquireTimeout, func() {
		if s := d.pool.Stat(); s.AcquiredConns() == s.MaxConns() {
			cancel(fmt.Errorf("all connections were busy for %v", acquireTimeout))
		}
	})
	defer busy.Stop()
	var failure string
	for {
		conn, err := d.pool.Acquire(ctx)
		if err == nil {
			return conn, nil
		}
		if _, ok := errors.AsType[*pgconn.ConnectError](err); ok && ctx.Err() == nil {
			failure = ": " + d.reason(err)
			continue // beforeConnect delays the next attempt
		}
		if _, permanent := errors.AsType[permanentError](err); !permanent {
			err = cmp.Or(context.Cause(ctx), err) // the cause tells which limit was reached
		}
		return nil, fmt.Errorf("%w: %w%s", errConnection, err, failure)
	}
}

// acquireEnded is the key of the Done channel of acquire. The pool replaces the context's own, so
// that an attempt to connect goes on after its request has ended.
type acquireEnded struct{}

// A permanentError is a state of the database that this process cannot change. Its text is one line
// for the operator.
type permanentError string

func (e permanentError) Error() string { return string(e) }

// sqlState returns the SQLSTATE of an error that the server reported, or "".
func sqlState(err error) string {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pg.Code
	}
	return ""
}

// transient reports whether err describes the state of the database rather than a fault in a
// statement or its arguments.
func transient(err error) bool {
	if errors.Is(err, errConnection) {
		return true
	}
	// The classes of SQLSTATE (PostgreSQL's Appendix A): connection, invalid transaction state
	// (read-only), rollback, resources, object not in prerequisite state (lock timeout), operator
	// intervention (statement timeout), system error, internal error.
	classes := []string{"08", "25", "40", "53", "55", "57", "58", "XX"}
	code := sqlState(err)
	return len(code) == 5 && slices.Contains(classes, code[:2])
}

// backoff sleeps before the next try, for backoffDelay or up to half of it less: the jitter keeps
// clients of the same database from trying again at the same time. backoff returns false if ctx
// ended first.
func backoff(ctx context.Context, tries int) bool {
	delay := backoffDelay(tries)
	return sleep(ctx, delay/2+rand.N(delay/2))
}

// backoffDelay is 25 ms after the first try and doubles with each, up to half a second.
func backoffDelay(tries int) time.Duration {
	return min(25*time.Millisecond<<min(max(tries-1, 0), 5), 500*time.Millisecond)
}

// sleep waits for t and returns true, or returns false if ctx ended first.
func sleep(ctx context.Context, t time.Duration) bool {
	select {
	case <-time.After(t):
		return true
	case <-ctx.Done():
		return false
	}
}

// A timing measures a request's use of the database, for the log. Only the goroutine of the request
// uses it.
type timing struct {
	start   time.Time     // of the request
	total   time.Duration // spent on the database
	waiting time.Duration // the part of total that was spent waiting for a connection
}

type timingKey struct{}

// withTiming returns a context for a request that starts now.
func withTiming(ctx context.Context) (context.Context, *timing) {
	t := &timing{start: time.Now()}
	return context.WithValue(ctx, timingKey{}, t), t
}

// timingOf returns the timing of the request of ctx, or a new one if ctx belongs to no request.
func timingOf(ctx context.Context) *timing {
	if t, ok := ctx.Value(timingKey{}).(*timing); ok {
		return t
	}
	return &timing{start: time.Now()}
}

// addSince adds the time since start to sum.
func addSince(sum *time.Duration, start time.Time) { *sum += time.Since(start) }

type queryTraceKey struct{}

// A queryTrace is a running statement.
type queryTrace struct {
	sql   string
	start time.Time
}

// TraceQueryStart records when a statement began.
func (d *database) TraceQueryStart(
	ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData,
) context.Context {
	return context.WithValue(ctx, queryTraceKey{}, queryTrace{data.SQL, time.Now()})
}

// TraceQueryEnd logs a statement at DEBUG, and at WARNING if it was slow: with its SQL, never with
// its arguments.
func (d *database) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryEndData) {
	q := ctx.Value(queryTraceKey{}).(queryTrace)
	took, level, message := time.Since(q.start), slog.LevelDebug, "statement"
	d.statements.Add(1)
	d.statementTime.Add(int64(took))
	if took > slowStatement {
		level, message = slog.LevelWarn, "slow statement"
	}
	if !d.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("sql", truncate(strings.Join(strings.Fields(q.sql), " "), maxLogged)),
		slog.Int64("duration_us", took.Microseconds()),
		slog.Int64("rows", data.CommandTag.RowsAffected()),
	}
	if data.Err != nil {
		attrs = append(attrs, slog.String("sqlstate", sqlState(data.Err)))
	}
	d.log.LogAttrs(ctx, level, message, attrs...)
}

// beforeConnect delays an attempt to connect after a failure, and sets the session's parameters.
// The delay is not in acquire, so that the size of the pool limits the number of attempts, and not
// the number of waiting requests. It polls, because the success of another attempt ends the delay.
// A delayed attempt ends with its request: otherwise the attempts of an outage would all start at
// once after it, and slow down the only one that a request waits for.
func (d *database) beforeConnect(ctx context.Context, conn *pgx.ConnConfig) error {
	ended, _ := ctx.Value(acquireEnded{}).(<-chan struct{})
	for !d.mayConnect() {
		select {
		case <-time.After(10*time.Millisecond + rand.N(20*time.Millisecond)):
		case <-ended:
			return errors.New("the request has ended")
		case <-ctx.Done(): // the pool is closed
			return ctx.Err()
		}
	}
	// A pooler rejects options. PgBouncer accepts the encoding and the date style as parameters.
	// Neon's proxy drops those parameters on all hosts, and passes options on.
	if d.pooler.Load() {
		conn.RuntimeParams["client_encoding"], conn.RuntimeParams["datestyle"] = "UTF8", "ISO"
	} else {
		conn.RuntimeParams["options"] += fmt.Sprintf(
			" -c statement_timeout=%d -c client_encoding=UTF8 -c datestyle=ISO",
			statementTimeout.Milliseconds())
	}
	return nil
}

// mayConnect reports whether an attempt to connect may start now, and if so records its start.
func (d *database) mayConnect() bool {
	outage := d.outage()
	d.mu.Lock()
	defer d.mu.Unlock()
	interval := backoffDelay(d.failures)
	if outage {
		interval = outageInterval
	}
	if d.failures > 0 && time.Since(d.lastAttempt) < interval {
		return false
	}
	d.lastAttempt = time.Now()
	return true
}

// TraceConnectStart does nothing. pgx.ConnectTracer requires it.
func (d *database) TraceConnectStart(
	ctx context.Context, _ pgx.TraceConnectStartData,
) context.Context {
	return ctx
}

// TraceConnectEnd counts failed attempts to connect. pgx calls it also for an attempt whose request
// has ended in the meantime.
func (d *database) TraceConnectEnd(_ context.Context, data pgx.TraceConnectEndData) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if data.Err == nil {
		d.failures = 0
		return
	}
	rejected := strings.Contains(data.Err.Error(), "unsupported startup parameter")
	if rejected && d.pooler.CompareAndSwap(false, true) {
		return // a pooler without -pooler in its name; the next attempt omits options
	}
	now := time.Now()
	if d.failures == 0 || now.Sub(d.lastFailure) > outageForget {
		d.failures, d.firstFailure = 0, now
	}
	d.failures++
	d.lastFailure = now
}

// afterConnect rejects a session whose formats would corrupt values. pgx reads and writes text in
// UTF-8, and times in ISO style.
func (d *database) afterConnect(_ context.Context, conn *pgx.Conn) error {
	for _, p := range []struct{ name, want, remedy string }{
		{"server_encoding", "UTF8", "create the database with ENCODING 'UTF8'"},
		{"client_encoding", "UTF8", "ALTER ROLE … RESET client_encoding"},
		{"DateStyle", "ISO", "ALTER ROLE … RESET datestyle, and the same for the database"},
	} {
		if got := conn.PgConn().ParameterStatus(p.name); got != "" && !strings.HasPrefix(got, p.want) {
			return permanentError(fmt.Sprintf("DATABASE_URL: the database has %s %q, "+
				"but the service requires %s: %s", p.name, got, p.want, p.remedy))
		}
	}
	return nil
}

// shouldPing pings an idle connection itself. If that fails, it closes the other idle connections,
// because they are probably broken too: a request would wait pingTimeout for each of them. It then
// returns true: pgxpool pings the closed connection, which fails at once, and tries another one.
func (d *database) shouldPing(ctx context.Context, p pgxpool.ShouldPingParams) bool {
	if p.IdleDuration < idleBeforePing {
		return false
	}
	pingCtx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	if p.Conn.Ping(pingCtx) == nil {
		return false
	}
	if ctx.Err() == nil {
		d.pool.Reset()
	}
	return true
}

// resetReadOnly closes the pool's connections so that the next ones reach the primary, at most once
// a second.
func (d *database) resetReadOnly() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.lastReset) > time.Second {
		d.lastReset = time.Now()
		d.pool.Reset()
	}
}

// outage reports whether there is a long outage: all attempts to connect have failed for
// outageAfter.
func (d *database) outage() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	long := d.failures > 0 && time.Since(d.firstFailure) >= outageAfter
	return long && time.Since(d.lastFailure) <= outageForget
}

// answers reports whether the database answers: the pool has a connection, and the last attempt to
// connect has not failed.
func (d *database) answers() bool {
	d.mu.Lock()
	failing := d.failures > 0
	d.mu.Unlock()
	pool := d.pool.Stat()
	return !failing && pool.AcquiredConns()+pool.IdleConns() > 0
}

// limitInOutage returns a context that, in a long outage, ends outageWait after the request's
// start.
func (d *database) limitInOutage(ctx context.Context) (context.Context, context.CancelFunc) {
	if !d.outage() {
		return ctx, func() {}
	}
	deadline := timingOf(ctx).start.Add(outageWait)
	return context.WithDeadlineCause(ctx, deadline, errors.New("long outage"))
}

// reason describes a failed attempt to connect, in one line and without any part of DATABASE_URL.
func (d *database) reason(err error) string {
	if e, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		err = e.Unwrap()
	}
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	for range 2 { // two matches may share the character between them
		text = d.redact.ReplaceAllString(text, "$1…$3")
	}
	return text
}

// urlParts returns a regular expression for the parts of DATABASE_URL that an error of pgx or of
// the server may contain.
func urlParts(conn *pgx.ConnConfig) *regexp.Regexp {
	values := []string{conn.Password, conn.User, conn.Database, conn.Host}
	for _, f := range conn.Fallbacks {
		values = append(values, f.Host)
	}
	var patterns []string
	for _, v := range values {
		if v != "" {
			patterns = append(patterns, regexp.QuoteMeta(v))
		}
	}
	return regexp.MustCompile(`(^|\W)(` + strings.Join(patterns, "|") + `)(\W|$)`)
}

// poolConfig reads DATABASE_URL, a connection string of Neon's pooled or direct host. Other
// programs may use the same string: ignored is a sentence that names the parameters this service
// does not use, "" for none. No error contains any part of the string.
func poolConfig(databaseURL string) (config *pgxpool.Config, ignored string, err error) {
	databaseURL = strings.TrimSpace(databaseURL)
	if databaseURL == "" {
		return nil, "", errors.New("DATABASE_URL is not set: " +
			"set it to the postgres:// connection string that the Neon console shows")
	}
	if strings.ContainsAny(databaseURL[:1]+databaseURL[len(databaseURL)-1:], "\"'`") {
		return nil, "", errors.New("DATABASE_URL begins or ends with a quotation mark: " +
			"remove the quotes")
	}
	malformed := errors.New("DATABASE_URL must be like " +
		"postgresql://user:password@host/database?sslmode=require, " +
		"with any @, /, ?, % or space in the password percent-encoded")
	// In a password that is not percent-encoded, pgx could take a part for the host or the database
	// name. Later errors contain those names.
	wellFormed := regexp.MustCompile(
		`^postgres(ql)?://([^@/?\s]*@)?[^@/?\s]+(/[^@/?\s]*)?(\?[^@\s]*)?$`)
	if !wellFormed.MatchString(databaseURL) {
		return nil, "", malformed
	}
	base, query, _ := strings.Cut(databaseURL, "?")
	params, maxConns, ignored, err := readParams(query)
	if err != nil {
		return nil, "", err
	}
	// pgx uses the last sslmode. Its default is "prefer", which allows plaintext.
	params = append([]string{"sslmode=require"}, params...)
	if config, err = pgxpool.ParseConfig(base + "?" + strings.Join(params, "&")); err != nil {
		return nil, "", malformed // pgx's error may contain parts of the string
	}
	if err := secure(config.ConnConfig); err != nil {
		return nil, "", err
	}
	configure(config, maxConns)
	return config, ignored, nil
}

// The parameters of connection strings.
var (
	// These are passed to pgx. beforeConnect appends to options.
	keptParams = strings.Fields(`host port database dbname user password passfile service servicefile
		connect_timeout sslmode sslkey sslcert sslcertmode sslrootcert sslpassword sslsni sslnegotiation
		channel_binding require_auth target_session_attrs krbspn krbsrvname min_protocol_version
		max_protocol_version options`)
	// Other programs use these, or the service sets them itself. Only these names are safe to log,
	// because any other name may be a part of a password.
	foreignParams = strings.Fields(`application_name default_query_exec_mode statement_cache_capacity
		description_cache_capacity pool_min_conns pool_min_idle_conns pool_max_conn_lifetime
		pool_max_conn_lifetime_jitter pool_max_conn_idle_time pool_health_check_period pool_ping_timeout
		uselibpqcompat ssl encoding binary keepAlive query_timeout connectionTimeoutMillis
		idleTimeoutMillis max min pgbouncer connection_limit pool_timeout socket_timeout schema sslaccept
		sslidentity statement_cache_size single_use_connections fallback_application_name client_encoding
		gssencmode gsslib gssdelegation hostaddr keepalives keepalives_idle keepalives_interval
		keepalives_count load_balance_hosts replication requiressl requirepeer requireauth
		scram_client_key scram_server_key sslcompression sslcrl sslcrldir sslkeylogfile
		ssl_min_protocol_version ssl_max_protocol_version tcp_user_timeout datestyle DateStyle
		extra_float_digits idle_in_transaction_session_timeout intervalstyle jit lock_timeout role
		search_path statement_timeout timezone TimeZone transaction_timeout work_mem`)
)

// readParams reads the query of a connection string. It returns the parameters for pgx, as they are
// written, and the size of the pool. It drops all others, which PostgreSQL would reject and Neon's
// proxy would drop. ignored names the known ones and counts the others.
func readParams(query string) (kept []string, maxConns int32, ignored string, err error) {
	maxConns = defaultMaxConns
	var dropped []string
	unknown := 0
	for param := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(param, "=")
		name, _ = url.PathUnescape(name)
		switch {
		case param == "":
		case name == "pool_max_conns":
			n, err := strconv.ParseUint(value, 10, 31)
			if err != nil || n < 1 || n > limitMaxConns {
				return nil, 0, "", fmt.Errorf(
					"DATABASE_URL: pool_max_conns must be a number from 1 to %d", limitMaxConns)
			}
			maxConns = int32(n)
		case slices.Contains(keptParams, name):
			kept = append(kept, param)
		case slices.Contains(foreignParams, name):
			dropped = append(dropped, name)
		default:
			unknown++
		}
	}
	if unknown > 0 {
		dropped = append(dropped, fmt.Sprintf("%d unknown", unknown))
	}
	if dropped != nil {
		ignored = "DATABASE_URL: parameters that this service does not use are ignored: " +
			strings.Join(dropped, ", ")
	}
	return kept, maxConns, ignored, nil
}

// secure requires TLS for all hosts but the local one. For Neon's hosts it also verifies the
// certificate: the console's strings contain sslmode=require, which accepts any certificate.
func secure(conn *pgx.ConnConfig) error {
	first := &pgconn.FallbackConfig{Host: conn.Host, Port: conn.Port, TLSConfig: conn.TLSConfig}
	for _, h := range append([]*pgconn.FallbackConfig{first}, conn.Fallbacks...) {
		network, _ := pgconn.NetworkAddress(h.Host, h.Port)
		host := strings.ToLower(strings.TrimSuffix(h.Host, "."))
		local := network == "unix" || host == "localhost" || net.ParseIP(host).IsLoopback()
		neon := strings.HasSuffix(host, ".neon.tech")
		switch {
		case h.TLSConfig == nil && !local:
			return errors.New("DATABASE_URL: its sslmode allows an unencrypted connection over " +
				"the network; use sslmode=require or verify-full")
		case h.TLSConfig != nil && h.TLSConfig.InsecureSkipVerify && neon:
			h.TLSConfig.InsecureSkipVerify = false
			h.TLSConfig.VerifyPeerCertificate = nil
			h.TLSConfig.ServerName = h.Host
		}
	}
	return nil
}

// configure sets the pool's limits and timeouts.
func configure(config *pgxpool.Config, maxConns int32) {
	conn := config.ConnConfig
	conn.DefaultQueryExecMode = pgx.QueryExecModeExec // tryQuery prepares the statements of requests
	if conn.ConnectTimeout == 0 || conn.ConnectTimeout > connectTimeout {
		conn.ConnectTimeout = connectTimeout
	}
	conn.RuntimeParams["application_name"] = "todo-app"
	dialer := net.Dialer{Timeout: dialTimeout}
	conn.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		// A cancel request gets closeTimeout in all, because the statement's connection occupies a
		// slot of the pool until then. pgx dials for it with a deadline of 15 s (asyncClose); a dial
		// for a new connection has at most connectTimeout left. TestSilentPeerFreesItsSlots fails if
		// pgx changes this.
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) > connectTimeout {
			c.SetDeadline(time.Now().Add(closeTimeout))
		}
		return fastCloseConn{c}, nil
	}
	// MinConns is 0, because each new session restarts the five minutes of idle time after which Neon
	// suspends the compute.
	config.MaxConns, config.MinConns, config.MinIdleConns = maxConns, 0, 0
	config.MaxConnLifetime, config.MaxConnLifetimeJitter = 5*time.Minute, 30*time.Second
	config.MaxConnIdleTime, config.HealthCheckPeriod = 2*time.Minute, time.Minute
	config.PingTimeout = pingTimeout // of pgxpool's own ping, after the one of shouldPing
}

// A fastCloseConn limits how long pgx waits for an unresponsive server. When pgx abandons a
// connection, it sends a cancel request and sets a deadline of 15 s for the server to close; until
// then the connection occupies a slot of the pool. A fastCloseConn shortens that deadline to
// closeTimeout. TestSilentPeerFreesItsSlots fails without it.
type fastCloseConn struct{ net.Conn }

func (c fastCloseConn) SetDeadline(t time.Time) error {
	if limit := time.Now().Add(closeTimeout); t.After(limit) {
		t = limit
	}
	return c.Conn.SetDeadline(t)
}

const (
	schemaLock      = 7_236_045              // arbitrary; the advisory lock around a step
	lockTimeout     = 200 * time.Millisecond // for a step; statements queue behind it while it waits
	lockInterval    = 2 * time.Second        // between two tries to get a lock
	startupTimeout  = 30 * time.Second       // to reach the database at start
	inspectTimeout  = 10 * time.Second       // to read the catalog
	readinessMaxAge = time.Second            // of the result that /health/ready reports
)

// schema is a list of steps. The table's comment contains how many of them a database has.
//
//go:embed schema.sql
var schema string

// A step is one change of the schema. It is applied once to a database.
type step struct {
	title, sql string
}

// parseSteps splits schema.sql at its lines "-- step N: title", where N counts from 1.
func parseSteps(text string) ([]step, error) {
	var steps []step
	heading := regexp.MustCompile(`(?m)^-- step ([0-9]+): *(.*?)\s*$`)
	texts := heading.Split(text, -1)
	for i, match := range heading.FindAllStringSubmatch(text, -1) {
		if match[1] != strconv.Itoa(i+1) {
			return nil, fmt.Errorf("schema.sql: step %s is number %d in the file", match[1], i+1)
		}
		steps = append(steps, step{title: match[2], sql: texts[i+1]})
	}
	if steps == nil {
		return nil, errors.New("schema.sql has no steps")
	}
	return steps, nil
}

// ensureSchema brings the schema up to date and then lets the waiting statements run. It returns an
// error if the database is unreachable for startupTimeout or rejects a step, and a permanentError
// if an operator must act.
func (d *database) ensureSchema(ctx context.Context) error {
	deadline, tries := time.Now().Add(startupTimeout), 0
	for {
		err := d.applySteps(ctx, deadline)
		if permanent, ok := errors.AsType[permanentError](err); ok {
			return permanent
		}
		switch {
		case err == nil:
			close(d.ready)
			d.log.Info("database ready", "schema_step", len(d.steps))
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("shutdown before the schema was in place: %w", err)
		case errors.Is(err, errLocked):
			d.log.Warn("waiting for a lock", "reason", err.Error())
			deadline, tries = time.Now().Add(startupTimeout), 0 // the database is reachable
			sleep(ctx, lockInterval)
		case !transient(err) || time.Now().After(deadline):
			return err
		default:
			tries++
			backoff(ctx, tries)
		}
	}
}

// errLocked means that a step waits for a lock that another session holds.
var errLocked = errors.New("wait for a lock")

// applySteps applies the missing steps. A database that has them all costs one round trip and no
// lock.
func (d *database) applySteps(ctx context.Context, deadline time.Time) (err error) {
	connectCtx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	conn, err := d.acquire(connectCtx)
	if err != nil {
		return fmt.Errorf("DATABASE_URL: cannot connect: %w", err)
	}
	defer conn.Release()
	defer func() {
		if err != nil && conn.Conn().IsClosed() {
			err = fmt.Errorf("%w: %w", errConnection, err)
		}
	}()
	for last := 0; ; {
		state, err := inspect(ctx, conn)
		if err != nil {
			return err
		}
		n, err := state.next(len(d.steps))
		switch {
		case err != nil || n == 0:
			return err
		case n == last: // the step did not create a missing index, because its name is taken
			_, index := state.missingIndex()
			return permanentError("the table public.tasks has no index " + index +
				": create it, or rename the other index that has its name; see docs/moving.md")
		}
		if err := d.applyStep(ctx, conn, n); err != nil {
			return err
		}
		last = n
	}
}

// applyStep applies a step in a separate transaction, unless another instance has applied it.
func (d *database) applyStep(ctx context.Context, conn *pgxpool.Conn, n int) error {
	s := d.steps[n-1]
	name := fmt.Sprintf("schema.sql, step %d (%s)", n, s.title)
	applying := false // this instance has the advisory lock
	// A snapshot from before the lock, as other isolation levels have, would not contain the changes
	// of the lock's previous holder.
	options := pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}
	err := pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
		// Without arguments pgx sends several statements in one text. The lock belongs to the
		// transaction, because behind a pooler a session's lock would outlive the session.
		_, err := tx.Exec(ctx, fmt.Sprintf(`
			SET LOCAL lock_timeout = %d;
			SET LOCAL statement_timeout = 0;
			SET LOCAL search_path = public;
			SELECT pg_advisory_xact_lock(%d)`, lockTimeout.Milliseconds(), schemaLock))
		if err != nil {
			return err
		}
		state, err := inspect(ctx, tx)
		if err != nil {
			return err
		}
		if next, err := state.next(len(d.steps)); err != nil || next != n {
			return err
		}
		applying = true
		d.log.Info("applying "+name, "schema_step", n)
		// A step is also applied again, to create an index; the number must not go back.
		_, err = tx.Exec(ctx, fmt.Sprintf("%s\n;\n"+
			"COMMENT ON TABLE public.tasks IS 'todo-app schema step %d'", s.sql, max(n, state.applied())))
		return err
	})
	switch code := sqlState(err); {
	case code == "55P03" || code == "40P01": // lock timeout, deadlock
		holder := "another instance that applies the schema"
		if applying {
			holder = lockHolder(ctx, conn)
		}
		return fmt.Errorf("%s: %w held by %s", name, errLocked, holder)
	case strings.HasPrefix(code, "22"): // data exception; the server's message may contain a title
		return fmt.Errorf("%s: an existing row has an invalid value (SQLSTATE %s)", name, code)
	case err != nil:
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// lockHolder describes the session with the oldest transaction that locks the table.
func lockHolder(ctx context.Context, conn *pgxpool.Conn) (text string) {
	err := conn.QueryRow(ctx, `
		SELECT format('process %s (%s, %s, in a transaction for %s s)',
		           a.pid, COALESCE(a.application_name, '?'), COALESCE(a.state, '?'),
		           COALESCE(extract(epoch FROM clock_timestamp() - a.xact_start)::int, 0))
		FROM pg_catalog.pg_locks l
		JOIN pg_catalog.pg_stat_activity a USING (pid)
		JOIN pg_catalog.pg_class c ON c.oid = l.relation AND c.relname = 'tasks'
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'public'
		WHERE l.granted AND a.pid <> pg_backend_pid() AND a.datname = current_database()
		ORDER BY a.xact_start
		LIMIT 1`).Scan(&text)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return "a session that has ended"
	case err != nil:
		return "an unknown session"
	}
	return text
}

// A schemaState is what the catalog contains about public.tasks.
type schemaState struct {
	Kind     *string // pg_class.relkind, "r" for a table; nil if there is none
	Comment  *string
	Columns  []string
	Indexes  []string // valid ones, each as in neededIndexes
	ReadOnly bool     // the session rejects writes
}

// inspect reads the catalog's rows in one round trip and without a lock on the table. Functions
// such as to_regclass read a cache that can be stale, and pg_get_expr can wait for the table's
// lock.
func inspect(ctx context.Context, on interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}) (schemaState, error) {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	rows, err := on.Query(ctx, `
		SELECT c.relkind::text,
		       d.description,
		       ARRAY(SELECT a.attname::text
		             FROM pg_catalog.pg_attribute a
		             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
		       ARRAY(SELECT CASE WHEN i.indisunique THEN 'unique ' ELSE '' END
		                 || '('
		                 || string_agg(COALESCE(a.attname, 'expression'), ', ' ORDER BY k.position)
		                 || ')' || CASE WHEN i.indpred IS NULL THEN '' ELSE ' WHERE' END
		             FROM pg_catalog.pg_index i
		             CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
		             LEFT JOIN pg_catalog.pg_attribute a
		                    ON a.attrelid = i.indrelid AND a.attnum = k.attnum
		             WHERE i.indrelid = c.oid AND i.indisvalid AND k.position <= i.indnkeyatts
		             GROUP BY i.indexrelid, i.indisunique, i.indpred IS NULL),
		       current_setting('transaction_read_only')::boolean
		FROM (VALUES (true)) AS always -- one row, even if there is no table
		LEFT JOIN (pg_catalog.pg_namespace n
		           JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'tasks')
		       ON n.nspname = 'public'
		LEFT JOIN pg_catalog.pg_description d
		       ON d.objoid = c.oid AND d.objsubid = 0 AND d.classoid = 'pg_catalog.pg_class'::regclass`)
	var state schemaState
	if err == nil {
		state, err = pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[schemaState])
	}
	if err != nil {
		err = fmt.Errorf("read the catalog: %w", err)
	}
	return state, err
}

// The columns and indexes that the statements of this binary need. If an index is missing, its step
// is applied again, which creates it unless it belongs to CREATE TABLE.
var (
	neededColumns = strings.Split(columns+", idempotency_key, request_hash", ", ")
	neededIndexes = []struct {
		step int
		text string
	}{
		{1, "unique (user_id, id)"},
		{1, "(user_id, completed, id)"},
		{1, "unique (user_id, idempotency_key) WHERE"},
	}
)

// ourComment matches the comment on a table of this service. Builds without steps wrote a hash.
var ourComment = regexp.MustCompile(`^todo-app schema (?:step ([1-9][0-9]{0,5})|[0-9a-f]{64})$`)

// applied returns how many steps the table has, 0 if there is no table or it is not this service's.
func (s schemaState) applied() int {
	if s.Comment == nil {
		return 0
	}
	match := ourComment.FindStringSubmatch(*s.Comment)
	if match == nil {
		return 0
	}
	n, _ := strconv.Atoi(cmp.Or(match[1], "1")) // a hash stands for step 1
	return n
}

// next returns the number of the step that must be applied next, 0 if there is none. It returns a
// permanentError if the table is not this service's or lacks a column.
func (s schemaState) next(steps int) (int, error) {
	switch applied := s.applied(); {
	case s.Kind == nil:
		return 1, nil
	case applied == 0:
		return 0, permanentError("public.tasks exists but was not created by this service, " +
			"which leaves it untouched: rename it, or move its rows as docs/moving.md describes")
	case applied < steps:
		return applied + 1, nil
	}
	for _, column := range neededColumns {
		if !slices.Contains(s.Columns, column) {
			return 0, permanentError("the table public.tasks has no column " + column +
				": restore it, or start the release that matches the schema")
		}
	}
	step, _ := s.missingIndex()
	return step, nil
}

// missingIndex returns an index that the statements need and the table lacks, and its step, which
// is 0 if there is none.
func (s schemaState) missingIndex() (step int, text string) {
	for _, index := range neededIndexes {
		if !slices.Contains(s.Indexes, index.text) {
			return index.step, strings.Replace(index.text, "WHERE", "WHERE idempotency_key IS NOT NULL", 1)
		}
	}
	return 0, ""
}

// verify returns nil if the schema is in place. After the start, the error for a missing schema is a
// permanentError. verify takes one round trip.
func (d *database) verify(ctx context.Context) (state schemaState, err error) {
	conn, err := d.acquire(ctx)
	if err != nil {
		return state, err
	}
	defer conn.Release()
	if state, err = inspect(ctx, conn); err != nil {
		return state, err
	}
	n, err := state.next(len(d.steps))
	if err == nil && n != 0 {
		select {
		case <-d.ready:
			err = permanentError("the schema of the database is missing or incomplete: " +
				"was it dropped or restored? The next start applies what is missing")
		default:
			err = errors.New("the schema is not in place yet")
		}
	}
	return state, err
}

// schemaLost reports whether the schema is incomplete, after an error about an undefined object. If
// so, it also ends the service, because the next start repairs the schema or logs what an operator
// must do.
func (d *database) schemaLost(ctx context.Context) bool {
	_, err := d.verify(ctx)
	lost, ok := errors.AsType[permanentError](err)
	if ok {
		select {
		case d.failed <- lost:
		default: // another request has sent it
		}
	}
	return ok
}

// check returns nil if the schema is in place and the database accepts writes. It runs at most one
// statement per readinessMaxAge; all callers share its result.
func (d *database) check(ctx context.Context) error {
	select {
	case d.checking <- struct{}{}:
		defer func() { <-d.checking }()
	case <-ctx.Done():
		return fmt.Errorf("%w: wait for the check of another request: %w", errUnavailable, ctx.Err())
	}
	if time.Since(d.checked) > readinessMaxAge {
		defer addSince(&timingOf(ctx).total, time.Now())
		state, err := d.verify(ctx)
		if err == nil && state.ReadOnly {
			d.resetReadOnly()
			err = errors.New("the database is read-only")
		}
		d.checked, d.checkError = time.Now(), err
	}
	if d.checkError != nil {
		return fmt.Errorf("%w: %w", errUnavailable, d.checkError)
	}
	return nil
}
