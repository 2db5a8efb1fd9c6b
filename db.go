package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	maxConns         = 15               // Neon's smallest compute takes 97 clients: six instances
	connectTimeout   = 10 * time.Second // for each address; a sleeping compute is awake in less
	dialTimeout      = 2 * time.Second  // for TCP alone, which Neon's proxy accepts even while the compute sleeps
	pingTimeout      = time.Second      // for a connection that idled over 1 s, before it is used
	statementTimeout = 30 * time.Second // on the server; the last line behind the request's own deadline
	poolPatience     = 5 * time.Second  // for one of the connections to be free
	schemaPatience   = 30 * time.Second // for the database to come up, at start
	schemaLock       = 7_236_045        // advisory lock that instances starting together queue for
)

//go:embed schema.sql
var schema string

// poolConfig reads a Neon connection string, pooled or direct, into a pool
// configuration. Its errors name DATABASE_URL and show no part of it.
//
// TLS is never optional except on this machine, and on Neon the certificate is
// checked even where the string, as Neon hands it out, says only "require":
// that word alone makes pgx, like libpq, accept any certificate.
func poolConfig(databaseURL string) (*pgxpool.Config, error) {
	if databaseURL == "" {
		return nil, errors.New("DATABASE_URL is not set: it takes a postgres:// connection string, as the Neon console shows it")
	}
	// pgx would guess where a password with these characters ends, and its errors show the rest.
	wellFormed := regexp.MustCompile(`^postgres(ql)?://([^@/?]*@)?[^@/?]*(/[^@/?]*)?(\?[^@]*)?$`)
	if !wellFormed.MatchString(databaseURL) {
		return nil, errors.New("DATABASE_URL must be like postgresql://user:password@host/database?sslmode=require, with any @, / or ? in the password percent-encoded")
	}
	// Unless a later sslmode says otherwise: pgx's default is "prefer", which allows plaintext.
	base, query, _ := strings.Cut(databaseURL, "?")
	config, err := pgxpool.ParseConfig(strings.TrimSuffix(base+"?sslmode=require&"+query, "&"))
	if err != nil {
		text := err.Error() // "cannot parse `postgres://...`: reason"
		return nil, errors.New("DATABASE_URL cannot be parsed: " + text[strings.LastIndex(text, "`: ")+len("`: "):])
	}
	conn := config.ConnConfig
	hosts := append([]*pgconn.FallbackConfig{{Host: conn.Host, Port: conn.Port, TLSConfig: conn.TLSConfig}}, conn.Fallbacks...)
	for _, h := range hosts {
		switch {
		case h.TLSConfig == nil && !local(h.Host, h.Port):
			return nil, errors.New("DATABASE_URL: its sslmode allows an unencrypted connection over the network; use sslmode=require or verify-full")
		case h.TLSConfig != nil && h.TLSConfig.InsecureSkipVerify && strings.HasSuffix(strings.ToLower(strings.TrimSuffix(h.Host, ".")), ".neon.tech"):
			h.TLSConfig.InsecureSkipVerify = false
			h.TLSConfig.VerifyPeerCertificate = nil
			h.TLSConfig.ServerName = h.Host
		}
	}

	// Exec sends each statement in one round trip and leaves nothing on the
	// server: the cached modes break behind a pooler after a schema change.
	conn.DefaultQueryExecMode = pgx.QueryExecModeExec
	conn.ConnectTimeout = connectTimeout
	conn.RuntimeParams["application_name"] = "todo-app"
	dial := conn.DialFunc
	conn.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return hastyConn{c}, nil
	}
	config.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
		conn.TypeMap().RegisterType(&pgtype.Type{
			Name: "timestamptz", OID: pgtype.TimestamptzOID, Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC},
		})
		return nil
	}

	// No connection is kept by force and none is renewed while idle: each new
	// session would restart the five minutes after which Neon goes to sleep.
	config.MaxConns = maxConns
	config.MinConns, config.MinIdleConns = 0, 0
	config.MaxConnLifetime, config.MaxConnLifetimeJitter = 5*time.Minute, 30*time.Second
	config.MaxConnIdleTime, config.HealthCheckPeriod = 2*time.Minute, time.Minute
	config.PingTimeout = pingTimeout
	return config, nil
}

// local reports whether host is this machine: the name localhost, a loopback
// address or the directory of a Unix socket.
func local(host string, port uint16) bool {
	network, _ := pgconn.NetworkAddress(host, port)
	return network == "unix" || strings.EqualFold(host, "localhost") || net.ParseIP(host).IsLoopback()
}

// A hastyConn waits at most a second for its peer to hang up. pgx grants 15 s
// to that (asyncClose), and to asking for the statement's end on a connection
// of its own before, in which a connection that has gone silent keeps its place
// in the pool: dialTimeout cuts that short where its host is gone.
type hastyConn struct{ net.Conn }

func (c hastyConn) SetDeadline(t time.Time) error {
	if limit := time.Now().Add(time.Second); t.After(limit) {
		t = limit
	}
	return c.Conn.SetDeadline(t)
}

// A database is the pool of connections to Neon. It opens the first one when
// it is first needed.
type database struct {
	pool   *pgxpool.Pool
	slots  chan struct{} // holds an element for each statement under way: the queue for the pool
	ready  chan struct{} // closed once the schema is in place
	pooler atomic.Bool   // a pooler answers, which refuses the options parameter

	lastLoss                atomic.Int64 // of a connection, in nanoseconds since 1970
	waits, canceled, waited atomic.Int64 // in the queue: how often, how often in vain, nanoseconds
}

func newDatabase(config *pgxpool.Config) (*database, error) {
	d := &database{slots: make(chan struct{}, maxConns), ready: make(chan struct{})}
	label, _, _ := strings.Cut(config.ConnConfig.Host, ".")
	d.pooler.Store(strings.HasSuffix(label, "-pooler"))
	config.BeforeConnect = func(_ context.Context, conn *pgx.ConnConfig) error {
		if !d.pooler.Load() {
			// As options, for Neon's proxy drops a plain statement_timeout without a word.
			conn.RuntimeParams["options"] += fmt.Sprintf(" -c statement_timeout=%d", statementTimeout.Milliseconds())
		}
		return nil
	}
	config.ShouldPing = d.isDead
	var err error
	d.pool, err = pgxpool.NewWithConfig(context.Background(), config)
	return d, err
}

// isDead pings a connection that idled for a second, and each for a second
// after one was lost. To a yes pgxpool pings it once more, in vain, and takes
// another. What silenced one has silenced the rest: all that idle are dropped,
// or a request could spend a second on each.
func (d *database) isDead(ctx context.Context, p pgxpool.ShouldPingParams) bool {
	sinceLoss := time.Since(time.Unix(0, d.lastLoss.Load()))
	if p.IdleDuration < time.Second && sinceLoss > time.Second {
		return false
	}
	patience, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	if p.Conn.Ping(patience) == nil {
		return false
	}
	d.lose()
	if patience.Err() != nil && ctx.Err() == nil {
		d.pool.Reset()
	}
	return true
}

// lose takes down the time at which a connection was found lost.
func (d *database) lose() { d.lastLoss.Store(time.Now().UnixNano()) }

// prepare applies the schema and lets the waiting queries go. A database that
// cannot be reached is tried again for 30 s.
func (d *database) prepare(ctx context.Context, log *slog.Logger) error {
	patience, cancel := context.WithTimeout(ctx, schemaPatience)
	defer cancel()
	for try := 0; ; try++ {
		err := d.migrate(patience)
		_, answered := errors.AsType[*pgconn.PgError](err)
		switch {
		case err == nil:
			close(d.ready)
			log.Info("database ready")
			return nil
		case strings.Contains(err.Error(), "unsupported startup parameter") && !d.pooler.Swap(true):
			try--
			continue // a pooler without -pooler in its name
		case errors.Is(err, errForeignTable), answered && !transient(err):
			return fmt.Errorf("apply schema.sql: %w", err)
		}
		if try == 0 {
			log.Warn("database not ready, trying again", "for", schemaPatience.String(), "error", err.Error())
		}
		if !pause(patience, try) {
			return fmt.Errorf("DATABASE_URL: no usable connection in %v: %w", schemaPatience, err)
		}
	}
}

// migrate applies schema.sql unless the database has it, which it knows from
// the table's comment in one round trip and without a lock: even CREATE INDEX
// IF NOT EXISTS would wait for every writer, and hold up all that come after.
func (d *database) migrate(ctx context.Context) error {
	const prefix = "todo-app schema "
	mark := fmt.Sprintf("%s%x", prefix, sha256.Sum256([]byte(schema)))
	current := func(row pgx.Row) (bool, error) {
		var table, comment *string
		if err := row.Scan(&table, &comment); err != nil {
			return false, err
		}
		if table != nil && (comment == nil || !strings.HasPrefix(*comment, prefix)) {
			return false, errForeignTable
		}
		return comment != nil && *comment == mark, nil
	}
	// Both from the statement's snapshot: to_regclass alone would see a table that another instance has just
	// committed, without its comment.
	const look = `SELECT (SELECT relname::text FROM pg_class WHERE oid = to_regclass('tasks')),
		obj_description(to_regclass('tasks'), 'pg_class')`
	if done, err := current(d.pool.QueryRow(ctx, look)); done || err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, d.pool, func(tx pgx.Tx) error {
		// The lock belongs to the transaction: behind a pooler a session's lock would outlive it.
		lock := fmt.Sprintf(`SET LOCAL lock_timeout = '5s'; SELECT pg_advisory_xact_lock(%d)`, schemaLock)
		if _, err := tx.Exec(ctx, lock); err != nil {
			return err
		}
		if done, err := current(tx.QueryRow(ctx, look)); done || err != nil {
			return err
		}
		_, err := tx.Exec(ctx, schema+fmt.Sprintf(`COMMENT ON TABLE tasks IS '%s'`, mark))
		return err
	})
}

var errForeignTable = errors.New("the database has a table tasks that todo-app did not make; it is left alone: rename it, or give todo-app a database of its own")

// query runs one statement, in one round trip, and returns its rows. Its error
// is errUnavailable where nothing has changed, for the database was not
// reached, had no capacity or gave up; errNoAnswer where the statement was sent
// and no answer came, so that it may have run; or else its own fault.
//
// A repeatable statement is sent once more when the connection is lost, after
// a pause, for a restart takes the other connections one by one. Which errors
// mean "lost" is not read from their kind: pgconn.SafeToRetry says yes to
// statements that ran, and Neon's proxy reports its own failures as XX000. What
// counts is that pgx has closed the connection.
func query[T any](ctx context.Context, d *database, repeatable bool, scan pgx.RowToFunc[T], sql string, args ...any) ([]T, error) {
	failure := errUnavailable
	for attempt := 1; ; attempt++ {
		conn, err := d.acquire(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", failure, err)
		}
		found, lost, err := once(ctx, d, conn, scan, sql, args...)
		if lost {
			failure = errNoAnswer
		}
		switch {
		case err == nil:
			return found, nil
		case lost && repeatable && attempt == 1 && pause(ctx, 0):
			continue
		case lost, transient(err), ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %w", failure, err)
		default:
			return nil, err
		}
	}
}

// once runs a statement and gives its connection back, even where scan panics.
// It reports whether the connection was lost.
func once[T any](ctx context.Context, d *database, conn *pgxpool.Conn, scan pgx.RowToFunc[T], sql string, args ...any) (found []T, lost bool, err error) {
	defer d.release(conn)
	rows, err := conn.Query(ctx, sql, args...)
	if err == nil {
		found, err = pgx.CollectRows(rows, scan)
	}
	if lost = conn.Conn().IsClosed(); lost {
		d.lose()
	}
	return found, lost, err
}

// acquire gets a connection for one statement. Connecting is tried again until
// the request's deadline, for nothing has been sent yet, and Neon may be waking
// up; the wait for a place before it is shorter, so that overload is answered soon.
func (d *database) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	select {
	case <-d.ready:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the schema: %w", ctx.Err())
	}
	if err := d.queue(ctx); err != nil {
		return nil, err
	}
	for try := 0; ; try++ {
		conn, err := d.pool.Acquire(ctx)
		if err == nil {
			return conn, nil
		}
		if !pause(ctx, try) {
			<-d.slots
			return nil, err
		}
	}
}

// queue waits for a place among the statements under way.
func (d *database) queue(ctx context.Context) error {
	select {
	case d.slots <- struct{}{}:
		return nil
	default:
	}
	d.waits.Add(1)
	defer func(start time.Time) { d.waited.Add(int64(time.Since(start))) }(time.Now())
	select {
	case d.slots <- struct{}{}:
		return nil
	case <-time.After(poolPatience):
		d.canceled.Add(1)
		return fmt.Errorf("all %d connections were busy for %v", maxConns, poolPatience)
	case <-ctx.Done():
		d.canceled.Add(1)
		return fmt.Errorf("wait for a connection: %w", ctx.Err())
	}
}

func (d *database) release(conn *pgxpool.Conn) {
	conn.Release()
	<-d.slots
}

// ping makes one round trip.
func (d *database) ping(ctx context.Context) error {
	_, err := query(ctx, d, true, pgx.RowTo[int], `SELECT 1`)
	return err
}

// close ends the connections, and returns when they are gone or ctx is done.
func (d *database) close(ctx context.Context) {
	closed := make(chan struct{})
	go func() {
		d.pool.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-ctx.Done():
	}
}

// pause waits before another try, counted from 0: twice as long each time, up
// to half a second, and half of it by chance, so that many who lost the same
// database do not come back as one. It reports whether ctx still runs.
func pause(ctx context.Context, try int) bool {
	longest := min(25*time.Millisecond<<min(try, 5), 500*time.Millisecond)
	select {
	case <-time.After(longest/2 + rand.N(longest/2)):
		return true
	case <-ctx.Done():
		return false
	}
}

// transient reports whether err tells of the state of the database and not of
// a fault in a statement or its arguments.
func transient(err error) bool {
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true // whatever its SQLSTATE: Neon's proxy says XX000 to everything
	}
	pg, ok := errors.AsType[*pgconn.PgError](err)
	// Appendix A of the PostgreSQL manual: connection, invalid transaction state (read-only), rollback, resources,
	// object not in prerequisite state (lock timeout), operator intervention (statement timeout), system error.
	return ok && slices.Contains([]string{"08", "25", "40", "53", "55", "57", "58"}, pg.Code[:2])
}
