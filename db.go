package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A database is a pool of connections to PostgreSQL, and the schema. It connects when a statement
// needs the first connection.
type database struct {
	pool      *pgxpool.Pool
	connector connector
	log       *slog.Logger
	steps     []string                // of schema.sql; the first one is step 1
	ready     chan struct{}           // closed once the schema is in place
	work      context.Context         // ends when running statements are canceled
	cancel    context.CancelCauseFunc // ends work; a cause ends the process
	resetting atomic.Bool             // for resetInterval after resetReadOnly has reset the pool

	statements    atomic.Int64 // that have ended
	statementTime atomic.Int64 // their total duration in nanoseconds
}

// openDatabase returns the database of a connection string. The error for an invalid string
// contains no part of it.
func openDatabase(databaseURL string, log *slog.Logger) (*database, error) {
	config, err := poolConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	return newDatabase(config, log)
}

func newDatabase(config *pgxpool.Config, log *slog.Logger) (*database, error) {
	d := &database{log: log, steps: schemaSteps(schema), ready: make(chan struct{}),
		connector: connector{log: log}}
	d.work, d.cancel = context.WithCancelCause(context.Background())
	config.BeforeConnect = d.connector.beforeConnect
	config.ConnConfig.Tracer = &d.connector
	// The pool closes a broken connection after a failed ping. Then the other idle connections are
	// probably broken too, and each would cost a request another ping.
	config.BeforeClose = func(conn *pgx.Conn) {
		if !conn.IsClosed() {
			return
		}
		conn.PgConn().Conn().Close()       // a silent server would occupy the slot for 15 s
		if d.pool.Stat().IdleConns() > 0 { // otherwise Reset would only discard new connections
			d.pool.Reset()
		}
	}
	var err error
	d.pool, err = pgxpool.NewWithConfig(context.Background(), config)
	return d, err
}

const (
	// The defaults of DATABASE_URL's parameters. connect_timeout: Neon's proxy holds a connection
	// while the compute resumes. pool_max_conns: six instances use 90 of the 97 connections of Neon's
	// smallest compute. The pool has no minimum size, because each new session restarts the five
	// minutes of idle time after which Neon suspends the compute.
	defaultParams = "sslmode=require&connect_timeout=10&application_name=todo-app" +
		"&pool_max_conns=15&pool_ping_timeout=1s&pool_max_conn_idle_time=2m" +
		"&pool_max_conn_lifetime=5m&pool_max_conn_lifetime_jitter=30s"

	dialTimeout = 5 * time.Second // TCP only, for all addresses of the host
)

// poolConfig reads DATABASE_URL, a connection string of Neon's pooled or direct host. Its
// parameters are those of pgx, pgxpool and PostgreSQL.
func poolConfig(databaseURL string) (*pgxpool.Config, error) {
	databaseURL = strings.TrimSpace(databaseURL)
	if databaseURL == "" {
		return nil, errors.New("DATABASE_URL is not set: " +
			"set it to the postgres:// connection string that the Neon console shows")
	}
	// If a password is not percent-encoded, pgx can take a part of it for the host or the database,
	// which its errors show. So the string must have the form that it seems to have.
	wellFormed := regexp.MustCompile(
		`^postgres(ql)?://([^@/?\s]*@)?[^@/?\s]+(/[^@/?\s]*)?(\?[^@\s]*)?$`)
	base, params, _ := strings.Cut(databaseURL, "?")
	config, err := pgxpool.ParseConfig(base + "?" + defaultParams + "&" + params) // the last one wins
	if err != nil || !wellFormed.MatchString(databaseURL) {
		return nil, errors.New("DATABASE_URL is invalid. It must be like " +
			"postgresql://user:password@host/database?sslmode=require, without quotes, and any " +
			"@, /, ?, % or space in the password percent-encoded. Its parameters, the PG... " +
			"variables and the files that they name must be valid for pgx")
	}
	conn := config.ConnConfig
	if conn.DefaultQueryExecMode == pgx.QueryExecModeDescribeExec {
		return nil, errors.New("DATABASE_URL: default_query_exec_mode=describe_exec is rejected, " +
			"because behind a pooler it can return the rows of another user")
	}
	// pgx would give each address of a name connect_timeout. net.Dialer tries IPv6 and IPv4 side by
	// side (RFC 6555), and divides dialTimeout among the addresses.
	conn.LookupFunc = func(_ context.Context, host string) ([]string, error) {
		return []string{host}, nil
	}
	conn.DialFunc = (&net.Dialer{Timeout: dialTimeout}).DialContext
	return config, secure(conn)
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

// A connector limits the attempts to connect while they fail. It is a pgx.ConnectTracer, because
// the pool does not report a failed attempt whose request has ended.
type connector struct {
	multitracer.Tracer // the other methods of pgx's tracers, which do nothing

	log     *slog.Logger
	mu      sync.Mutex
	failure error     // of the last attempt that ended; nil if it succeeded
	tried   time.Time // the start of the last attempt
}

// connectInterval is the time between two attempts to connect after one has failed.
const connectInterval = time.Second

// beforeConnect rejects an attempt within connectInterval of a failed one, with its error. It does
// not wait, so that the request can use a connection that becomes idle in the meantime.
func (c *connector) beforeConnect(context.Context, *pgx.ConnConfig) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil && time.Since(c.tried) < connectInterval {
		return c.failure
	}
	c.tried = time.Now()
	return nil
}

// TraceConnectEnd records the result of an attempt, and logs the first failure after a success.
func (c *connector) TraceConnectEnd(_ context.Context, data pgx.TraceConnectEndData) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if data.Err != nil && c.failure == nil {
		c.log.Warn("cannot connect to the database: trying again", "error", data.Err.Error())
	}
	c.failure = data.Err
}

// acquire returns a connection of the pool once the schema is in place.
func (d *database) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	select {
	case <-d.ready:
		return d.connect(ctx)
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the schema: %w", ctx.Err())
	}
}

// connect returns a connection of the pool. It waits for one until ctx is done, and tries again
// when an attempt to connect has failed, because nothing has been sent.
func (d *database) connect(ctx context.Context) (*pgxpool.Conn, error) {
	defer addSince(&entryOf(ctx).waiting, time.Now())
	var failure error
	for {
		conn, err := d.pool.Acquire(ctx)
		if !errors.As(err, new(*pgconn.ConnectError)) {
			if err != nil && failure != nil {
				err = fmt.Errorf("%w: %w", err, failure)
			}
			return conn, err
		}
		failure = err
		backoff(ctx)
	}
}

const maxBackoff = 100 * time.Millisecond

// backoff waits for half of maxBackoff to all of it, or until ctx is done. The jitter keeps clients
// of the same database from trying again at the same time.
func backoff(ctx context.Context) { sleep(ctx, maxBackoff/2+rand.N(maxBackoff/2)) }

// sleep waits for t, or until ctx is done.
func sleep(ctx context.Context, t time.Duration) {
	select {
	case <-time.After(t):
	case <-ctx.Done():
	}
}

// withoutClient returns a copy of a request's context that goes on when the client disconnects,
// until the deadline or a shutdown. A statement that was sent has this context, because it may be
// committed anyway, and pgx would close the connection. pgx's CancelRequestContextWatcherHandler
// would keep the connection, but its cancel request can cancel the next statement.
func (d *database) withoutClient(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, _ := ctx.Deadline()
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	stop := context.AfterFunc(d.work, cancel)
	return ctx, func() { stop(); cancel() }
}

// A retryPolicy tells whether a statement may be sent again after its connection broke. It is then
// unknown whether the statement ran.
type retryPolicy bool

const (
	retry   retryPolicy = true  // a read, or a create with an Idempotency-Key
	noRetry retryPolicy = false // any other change
)

// query runs one statement and returns its rows. ctx must have a deadline. The statement is sent
// again after some failures:
//
//	no connection                                  until the deadline
//	rolled back (40001, 40P01)                     until the deadline
//	not prepared (0A000, 26000, 42P05)             once, unprepared
//	a read-only session after a failover (25006)   once, on another connection
//	the connection broke                           once, if policy is retry
//
// query returns errNotSent if no statement was sent, and errMayHaveRun if the database is
// unavailable or did not answer: the statement may have run. Any other error is a fault of the
// statement.
//
// A connection is broken if pgx has closed it before the deadline. pgconn.SafeToRetry is not used,
// because in pgx 5.9 to 5.12 it is true for some statements that ran. SQLSTATE XX000 does not tell
// either, because Neon's proxy also reports its own failures as XX000.
func query[T any](
	ctx context.Context, d *database, policy retryPolicy,
	scan pgx.RowToFunc[T], sql string, args ...any,
) ([]T, error) {
	e := entryOf(ctx)
	defer addSince(&e.database, time.Now())
	run, cancel := d.withoutClient(ctx)
	defer cancel()
	unavailable := errNotSent
	var broke, readOnly, unprepared bool
	for {
		if e.sent {
			ctx, unavailable = run, errMayHaveRun
		}
		conn, err := d.acquire(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", unavailable, err)
		}
		e.sent = true
		rows, broken, err := tryQuery(run, d, conn, scan, sql, args...)
		again := false
		switch code := sqlState(err); {
		case err == nil:
			return rows, nil
		case broken:
			d.pool.Reset() // after a restart the other connections are broken too
			again = policy == retry && !broke
			broke = true
		case code == "40001" || code == "40P01": // serialization failure, deadlock
			backoff(run)
			again = run.Err() == nil
		case code == "0A000" || code == "26000" || code == "42P05":
			// The type of a result has changed, or the pooler does not support prepared statements.
			again = !unprepared
			unprepared = true
			args = append([]any{pgx.QueryExecModeExec}, args...)
		case code == "25006":
			d.resetReadOnly()
			again = !readOnly
			readOnly = true
		}
		if again {
			continue
		}
		unanswered := broken || run.Err() != nil
		if unanswered || transient(err) || d.endIfSchemaGone(err) {
			err = fmt.Errorf("%w: %w", errMayHaveRun, err)
		}
		return nil, err
	}
}

// one returns the row of a statement that returns at most one. If there is none it returns
// errNotFound: the id does not exist or belongs to another user.
func one[T any](rows []T, err error) (row T, _ error) {
	switch {
	case err != nil:
		return row, err
	case len(rows) == 0:
		return row, errNotFound
	}
	return rows[0], nil
}

// tryQuery runs a statement once and releases the connection. It reports whether the connection
// broke.
func tryQuery[T any](
	ctx context.Context, d *database, conn *pgxpool.Conn,
	scan pgx.RowToFunc[T], sql string, args ...any,
) (rows []T, broken bool, err error) {
	defer func() {
		if conn.Conn().IsClosed() {
			go discard(conn)
		} else {
			conn.Release()
		}
	}()
	start := time.Now()
	found, err := conn.Query(ctx, sql, args...)
	if err == nil {
		rows, err = pgx.CollectRows(found, scan)
	}
	d.observe(ctx, sql, start, len(rows), err)
	// After a timeout pgx has closed the connection too, which does not mean a restart.
	return rows, conn.Conn().IsClosed() && ctx.Err() == nil, err
}

// closeTimeout limits how long a broken connection occupies its slot in the pool.
const closeTimeout = time.Second

// discard frees the slot of a broken connection. pgx sends a cancel request and closes the
// connection in the background, for up to 15 s if the server is silent. Before the request was
// sent, the socket must not be closed, because a pooler would then ignore the request. Hijack,
// unlike Release, does not call BeforeClose.
func discard(conn *pgxpool.Conn) {
	c := conn.Conn().PgConn()
	select {
	case <-c.CleanupDone():
	case <-time.After(closeTimeout):
		c.Conn().Close()
	}
	conn.Hijack()
}

// resetInterval is the least time between two resets of the pool after a failover.
const resetInterval = time.Second

// resetReadOnly closes the pool's connections, so that new ones reach the primary.
func (d *database) resetReadOnly() {
	if !d.resetting.Swap(true) {
		d.pool.Reset()
		time.AfterFunc(resetInterval, func() { d.resetting.Store(false) })
	}
}

// sqlState returns the SQLSTATE of an error that the server reported, or "".
func sqlState(err error) string {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pg.Code
	}
	return ""
}

// transient reports whether the server's error describes the state of the database rather than a
// fault in a statement or its arguments.
func transient(err error) bool {
	// The classes of SQLSTATE (PostgreSQL's Appendix A): connection, invalid transaction state
	// (read-only), rollback, resources, object not in prerequisite state (lock timeout), operator
	// intervention (statement timeout), system error, internal error.
	classes := []string{"08", "25", "40", "53", "55", "57", "58", "XX"}
	code := sqlState(err)
	return len(code) == 5 && slices.Contains(classes, code[:2])
}

// slowStatement is the duration from which a statement is logged at WARNING.
const slowStatement = time.Second

// observe counts a statement and logs it at DEBUG, or at WARNING if it was slow: with its SQL,
// never with its arguments.
func (d *database) observe(
	ctx context.Context, sql string, start time.Time, rows int, err error,
) {
	took, level, message := time.Since(start), slog.LevelDebug, "statement"
	d.statements.Add(1)
	d.statementTime.Add(int64(took))
	if took > slowStatement {
		level, message = slog.LevelWarn, "slow statement"
	}
	if !d.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("request_id", entryOf(ctx).id),
		slog.String("sql", strings.Join(strings.Fields(sql), " ")),
		slog.Int64("duration_us", took.Microseconds()),
		slog.Int("rows", rows),
	}
	if err != nil {
		attrs = append(attrs, slog.String("sqlstate", sqlState(err)))
	}
	d.log.LogAttrs(ctx, level, message, attrs...)
}

// addSince adds the time since start to sum.
func addSince(sum *time.Duration, start time.Time) { *sum += time.Since(start) }

// schema is the text of schema.sql.
//
//go:embed schema.sql
var schema string

// stepComment is the table's comment without the number of the last applied step.
const stepComment = "todo-app schema step "

// schemaSteps splits the text of schema.sql at its lines "-- step N: title". A step begins with its
// title.
func schemaSteps(text string) []string {
	return regexp.MustCompile(`(?m)^-- step [0-9]+:`).Split(text, -1)[1:]
}

const (
	startTimeout   = 30 * time.Second       // to reach the database at start
	catalogTimeout = 10 * time.Second       // to read the table's comment
	lockTimeout    = 200 * time.Millisecond // for a step; statements queue behind it while it waits
	lockInterval   = 2 * time.Second        // between two tries to get a lock
	schemaLock     = 7_236_045              // arbitrary; the advisory lock around a step
)

// errForeignTable is permanent: the service never changes such a table.
var errForeignTable = errors.New("public.tasks exists but was not created by this service, which " +
	"leaves it untouched: move it into another schema, or rename it and its indexes; " +
	"after a restore without comments see docs/moving.md")

// ensureSchema brings the schema up to date and then lets the waiting statements run. It returns an
// error if the database is unreachable for startTimeout, rejects a step, or has another
// application's table.
func (d *database) ensureSchema(ctx context.Context) error {
	deadline := time.Now().Add(startTimeout)
	for {
		err := d.applySteps(ctx, deadline)
		code := sqlState(err)
		switch {
		case err == nil:
			close(d.ready)
			d.log.Info("database ready", "schema_step", len(d.steps))
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("shutdown before the schema was in place: %w", err)
		case code == "55P03": // lock timeout
			d.log.Warn("waiting for a lock", "error", err.Error())
			sleep(ctx, lockInterval)
			deadline = time.Now().Add(startTimeout) // the database is reachable
		case errors.Is(err, errForeignTable), code != "" && !transient(err),
			time.Until(deadline) < maxBackoff:
			return err
		default: // the connection failed
			backoff(ctx)
		}
	}
}

// applySteps applies the missing steps. A database that has them all costs one round trip and no
// lock.
func (d *database) applySteps(ctx context.Context, deadline time.Time) error {
	connectCtx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	conn, err := d.connect(connectCtx)
	if err != nil {
		return fmt.Errorf("DATABASE_URL: cannot connect: %w", err)
	}
	defer conn.Release()
	for {
		applied, err := appliedSteps(ctx, conn.Conn())
		if err != nil || applied >= len(d.steps) {
			return err
		}
		if err := d.applyStep(ctx, conn, applied+1); err != nil {
			return err
		}
	}
}

// applyStep applies a step in a separate transaction, unless another instance has applied it.
func (d *database) applyStep(ctx context.Context, conn *pgxpool.Conn, n int) error {
	title, sql, _ := strings.Cut(d.steps[n-1], "\n")
	name := fmt.Sprintf("schema.sql, step %d (%s)", n, strings.TrimSpace(title))
	// At other isolation levels the snapshot is older than the lock, and would not contain the
	// changes of the lock's previous holder.
	options := pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}
	err := pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
		// pgx sends a text without arguments by the simple protocol, which accepts several
		// statements. The lock belongs to the transaction, because behind a pooler a session's lock
		// would outlive the session.
		_, err := tx.Exec(ctx, fmt.Sprintf(`
			SET LOCAL lock_timeout = %d;
			SET LOCAL statement_timeout = 0;
			SET LOCAL search_path = public;
			SELECT pg_advisory_xact_lock(%d)`, lockTimeout.Milliseconds(), schemaLock))
		if err != nil {
			return err
		}
		applied, err := appliedSteps(ctx, tx.Conn())
		if err != nil || applied != n-1 {
			return err
		}
		d.log.Info("applying "+name, "schema_step", n)
		_, err = tx.Exec(ctx, fmt.Sprintf("%s\n;\n"+
			"COMMENT ON TABLE public.tasks IS '%s%d'", sql, stepComment, n))
		return err
	})
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && strings.HasPrefix(pg.Code, "22") {
		pg.Message = "an existing row has an invalid value" // the server's text may contain a title
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// appliedSteps returns how many steps the database has, 0 if there is no table public.tasks, or
// errForeignTable. It reads the catalog's rows, because functions such as to_regclass read a cache
// that can be stale.
func appliedSteps(ctx context.Context, conn *pgx.Conn) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	rows, err := conn.Query(ctx, `
		SELECT COALESCE(d.description, '')
		FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_catalog.pg_description d
		       ON d.objoid = c.oid AND d.objsubid = 0 AND d.classoid = 'pg_catalog.pg_class'::regclass
		WHERE n.nspname = 'public' AND c.relname = 'tasks'`, pgx.QueryExecModeExec)
	var comments []string
	if err == nil {
		comments, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	switch {
	case err != nil:
		return 0, fmt.Errorf("read the comment of public.tasks: %w", err)
	case len(comments) == 0:
		return 0, nil
	}
	text, ours := strings.CutPrefix(comments[0], stepComment)
	applied, err := strconv.Atoi(text)
	if !ours || err != nil || applied < 1 {
		return 0, errForeignTable
	}
	return applied, nil
}

// endIfSchemaGone ends the process if the table, a column or the schema of our own statement does
// not exist, and reports whether that is so. The platform starts the process again, and the start
// applies missing steps. An error out of a trigger's function has a context (Where) and is a fault
// of that function.
func (d *database) endIfSchemaGone(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	if !ok || pg.Where != "" || !slices.Contains([]string{"42P01", "42703", "3F000"}, pg.Code) {
		return false
	}
	d.cancel(fmt.Errorf("the schema of the database is missing or incomplete, was it dropped or "+
		"restored? The next start applies missing steps: %w", err))
	return true
}
