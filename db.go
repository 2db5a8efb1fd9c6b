package main

import (
	"cmp"
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
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	maxConns         = 15               // Neon's smallest compute takes 97 clients: six instances
	poolPatience     = 5 * time.Second  // for one of them to be free: overload is answered soon
	dialTimeout      = 2 * time.Second  // for TCP alone, which Neon's proxy accepts even while the compute sleeps
	connectTimeout   = 10 * time.Second // for each address; a sleeping compute is awake in less
	idleBeforePing   = time.Second      // a connection that idled as long is pinged before it is used
	pingTimeout      = time.Second      // for that ping
	hangUpTimeout    = time.Second      // for the other side to take note of a connection's end
	statementTimeout = 30 * time.Second // on the server; the last line behind the request's own deadline
	schemaPatience   = 30 * time.Second // for the database to come up, at start
	schemaLock       = 7_236_045        // advisory lock that instances starting together queue for
)

//go:embed schema.sql
var schema string

// poolConfig reads a Neon connection string, pooled or direct, into a pool
// configuration. Its errors name DATABASE_URL and show no part of it.
func poolConfig(databaseURL string) (*pgxpool.Config, error) {
	if databaseURL == "" {
		return nil, errors.New("DATABASE_URL is not set: it takes a postgres:// connection string, as the Neon console shows it")
	}
	// In a password with @, / or ? pgx would guess where it ends, and its errors show the rest.
	wellFormed := regexp.MustCompile(`^postgres(ql)?://([^@/?\s]*@)?[^@/?\s]+(/[^@/?\s]*)?(\?[^@\s]*)?$`)
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
	if err := secure(conn); err != nil {
		return nil, err
	}
	// Exec sends each statement in one round trip and leaves nothing on the
	// server: the cached modes break behind a pooler after a schema change.
	conn.DefaultQueryExecMode = pgx.QueryExecModeExec
	conn.ConnectTimeout = connectTimeout
	conn.RuntimeParams["application_name"] = "todo-app"
	dialer := net.Dialer{Timeout: dialTimeout}
	conn.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		// A new session has connectTimeout at most: with more, this is pgx's request to cancel a statement.
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) > connectTimeout {
			c.SetDeadline(time.Now().Add(hangUpTimeout))
		}
		return hastyConn{c}, nil
	}
	// No connection is kept by force and none is renewed while idle: each new
	// session would restart the five minutes after which Neon goes to sleep.
	config.MaxConns, config.MinConns, config.MinIdleConns = maxConns, 0, 0
	config.MaxConnLifetime, config.MaxConnLifetimeJitter = 5*time.Minute, 30*time.Second
	config.MaxConnIdleTime, config.HealthCheckPeriod = 2*time.Minute, time.Minute
	config.PingTimeout = pingTimeout
	return config, nil
}

// secure makes TLS compulsory but on this machine. On Neon the certificate is
// checked even where the string, as Neon hands it out, says only "require":
// that word alone makes pgx, like libpq, accept any certificate.
func secure(conn *pgx.ConnConfig) error {
	hosts := append([]*pgconn.FallbackConfig{{Host: conn.Host, Port: conn.Port, TLSConfig: conn.TLSConfig}}, conn.Fallbacks...)
	for _, h := range hosts {
		network, _ := pgconn.NetworkAddress(h.Host, h.Port)
		local := network == "unix" || strings.EqualFold(h.Host, "localhost") || net.ParseIP(h.Host).IsLoopback()
		switch {
		case h.TLSConfig == nil && !local:
			return errors.New("DATABASE_URL: its sslmode allows an unencrypted connection over the network; use sslmode=require or verify-full")
		case h.TLSConfig != nil && h.TLSConfig.InsecureSkipVerify && strings.HasSuffix(strings.ToLower(strings.TrimSuffix(h.Host, ".")), ".neon.tech"):
			h.TLSConfig.InsecureSkipVerify = false
			h.TLSConfig.VerifyPeerCertificate = nil
			h.TLSConfig.ServerName = h.Host
		}
	}
	return nil
}

// A hastyConn does not wait long for its peer to hang up. Where pgx gives up a
// connection (asyncClose), it grants 15 s to a cancel request, on a connection of
// its own, and to that: so long would one gone silent keep its place in the pool.
type hastyConn struct{ net.Conn }

func (c hastyConn) SetDeadline(t time.Time) error {
	if limit := time.Now().Add(hangUpTimeout); t.After(limit) {
		t = limit
	}
	return c.Conn.SetDeadline(t)
}

// A database is the pool of connections to Neon. It opens the first one when
// it is first needed.
type database struct {
	pool     *pgxpool.Pool
	ready    chan struct{} // closed once the schema is in place
	pooler   atomic.Bool   // a pooler answers, which refuses the options parameter
	failures atomic.Int32  // to connect, since the last success
}

func newDatabase(config *pgxpool.Config) (*database, error) {
	d := &database{ready: make(chan struct{})}
	label, _, _ := strings.Cut(config.ConnConfig.Host, ".")
	d.pooler.Store(strings.HasSuffix(label, "-pooler"))
	config.BeforeConnect = func(ctx context.Context, conn *pgx.ConnConfig) error {
		if !d.pooler.Load() {
			// As options, for Neon's proxy drops a plain statement_timeout without a word.
			conn.RuntimeParams["options"] += fmt.Sprintf(" -c statement_timeout=%d", statementTimeout.Milliseconds())
		}
		// This holds a place in the pool: at most maxConns try to connect, however many requests wait.
		pause(ctx, int(d.failures.Load()))
		return nil
	}
	config.AfterConnect = func(context.Context, *pgx.Conn) error {
		d.failures.Store(0)
		return nil
	}
	config.ShouldPing = d.isDead
	var err error
	d.pool, err = pgxpool.NewWithConfig(context.Background(), config)
	return d, err
}

// isDead pings a connection that idled. To a yes pgxpool pings it once more, in
// vain, and takes another. What ended one has ended the rest: the pool closes
// those that idle, lest a request spend a second on each, and those in use when
// they come back.
func (d *database) isDead(ctx context.Context, p pgxpool.ShouldPingParams) bool {
	if p.IdleDuration < idleBeforePing {
		return false
	}
	patience, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	if p.Conn.Ping(patience) == nil {
		return false
	}
	if ctx.Err() == nil {
		d.pool.Reset()
	}
	return true
}

// prepare applies the schema and lets the waiting queries go. A database that
// cannot be reached is tried again for 30 s.
func (d *database) prepare(ctx context.Context, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, schemaPatience)
	defer cancel()
	for try := 1; ; try++ {
		err := d.migrate(ctx)
		_, answered := errors.AsType[*pgconn.PgError](err)
		switch {
		case err == nil:
			close(d.ready)
			log.Info("database ready")
			return nil
		case answered && !transient(err):
			return fmt.Errorf("apply schema.sql: %w", err)
		case !pause(ctx, try):
			return fmt.Errorf("DATABASE_URL: no usable connection in %v: %w", schemaPatience, err)
		}
	}
}

// migrate applies schema.sql unless the database has it, which it knows from
// the table's comment in one round trip and without a lock: even CREATE INDEX
// IF NOT EXISTS would wait for every writer, and hold up all that come after.
func (d *database) migrate(ctx context.Context) error {
	conn, err := d.acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	mark := fmt.Sprintf("todo-app schema %x", sha256.Sum256([]byte(schema)))
	current := func() (done bool, err error) {
		const look = `SELECT COALESCE(obj_description(to_regclass('tasks'), 'pg_class'), '') = $1`
		err = conn.QueryRow(ctx, look, mark).Scan(&done)
		return done, err
	}
	if done, err := current(); done || err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		// The lock belongs to the transaction: behind a pooler a session's lock would outlive it.
		lock := fmt.Sprintf(`SET LOCAL lock_timeout = '5s'; SELECT pg_advisory_xact_lock(%d)`, schemaLock)
		if _, err := tx.Exec(ctx, lock); err != nil {
			return err
		}
		if done, err := current(); done || err != nil {
			return err
		}
		_, err := tx.Exec(ctx, schema+fmt.Sprintf(`COMMENT ON TABLE tasks IS '%s'`, mark))
		return err
	})
}

// query runs one statement, in one round trip, and returns its rows. Its error
// is errUnavailable where the database was not reached, had no capacity, gave up
// or did not answer; then the statement may have run. Any other is a fault of the
// statement itself.
//
// A repeatable statement is sent once more when the connection is lost. Which
// errors mean "lost" is not read from their kind: pgconn.SafeToRetry says yes
// to statements that ran, and Neon's proxy reports its own failures as XX000.
// What counts is that pgx has closed the connection.
func query[T any](ctx context.Context, d *database, repeatable bool, scan pgx.RowToFunc[T], sql string, args ...any) ([]T, error) {
	select {
	case <-d.ready:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: wait for the schema: %w", errUnavailable, ctx.Err())
	}
	for attempt := 1; ; attempt++ {
		conn, err := d.acquire(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errUnavailable, err)
		}
		found, lost, err := once(ctx, conn, scan, sql, args...)
		if err == nil {
			return found, nil
		}
		if lost && ctx.Err() == nil {
			d.pool.Reset() // a restart ends the other connections too, one by one
			if repeatable && attempt == 1 {
				continue
			}
		}
		if lost || transient(err) || ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", errUnavailable, err)
		}
		return nil, err
	}
}

// once runs a statement and gives its connection back, even where scan panics.
// It reports whether the connection was lost.
func once[T any](ctx context.Context, conn *pgxpool.Conn, scan pgx.RowToFunc[T], sql string, args ...any) (found []T, lost bool, err error) {
	defer conn.Release()
	rows, err := conn.Query(ctx, sql, args...)
	if err == nil {
		found, err = pgx.CollectRows(rows, scan)
	}
	return found, conn.Conn().IsClosed(), err
}

// acquire gets a connection for one statement. Connecting is tried again until
// ctx is done, for nothing has been sent yet, and Neon may be waking up. Where
// the database is there, the wait for one of its connections is shorter.
func (d *database) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	defer time.AfterFunc(poolPatience, func() {
		if d.pool.Stat().AcquiredConns() > 0 {
			giveUp(fmt.Errorf("all were busy for %v", poolPatience))
		}
	}).Stop()
	var failure error
	for {
		conn, err := d.pool.Acquire(ctx)
		_, refused := errors.AsType[*pgconn.ConnectError](err)
		switch {
		case err == nil:
			return conn, nil
		case !refused && failure != nil:
			return nil, failure
		case !refused:
			return nil, fmt.Errorf("wait for a connection: %w", cmp.Or(context.Cause(ctx), err))
		case strings.Contains(err.Error(), "unsupported startup parameter") && !d.pooler.Swap(true):
			continue // a pooler without -pooler in its name
		}
		failure = err
		d.failures.Add(1)
	}
}

// ping makes one round trip.
func (d *database) ping(ctx context.Context) error {
	_, err := query(ctx, d, true, pgx.RowTo[int], `SELECT 1`)
	return err
}

// pause waits after so many failures, whoever had them: not at all after none,
// 25 ms after one, twice as long after the next, up to half a second; half of it
// by chance, so that many who lost the same database do not come back as one.
// It reports whether ctx still runs.
func pause(ctx context.Context, failures int) bool {
	if failures == 0 {
		return true
	}
	longest := min(25*time.Millisecond<<min(failures-1, 5), 500*time.Millisecond)
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
	// object not in prerequisite state (lock timeout), operator intervention (statement timeout), system and internal error.
	classes := []string{"08", "25", "40", "53", "55", "57", "58", "XX"}
	return ok && slices.ContainsFunc(classes, func(class string) bool { return strings.HasPrefix(pg.Code, class) })
}
