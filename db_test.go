package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// hostsOf tells how each host of a connection string would be spoken to, in
// the order of trying: in plaintext, with any certificate, with one whose
// chain holds, or fully checked against the system's roots.
func hostsOf(config *pgxpool.Config) string {
	conn, hosts := config.ConnConfig, []string{}
	for _, h := range append([]*pgconn.FallbackConfig{{Host: conn.Host, TLSConfig: conn.TLSConfig}}, conn.Fallbacks...) {
		c, mode := h.TLSConfig, "odd"
		switch {
		case c == nil:
			mode = "plain"
		case c.InsecureSkipVerify && c.VerifyPeerCertificate == nil:
			mode = "any"
		case c.InsecureSkipVerify:
			mode = "chain"
		case c.ServerName == h.Host && c.RootCAs == nil && c.VerifyPeerCertificate == nil:
			mode = "full"
		}
		hosts = append(hosts, h.Host+" "+mode)
	}
	return strings.Join(hosts, ", ")
}

// No settings of libpq's may count: t.Setenv, and so not parallel.
func TestDatabaseURL(t *testing.T) {
	const neon, other = "ep-a-1.c-2.eu-central-1.aws.neon.tech", "db.example.com"
	const pooler = "ep-a-1-pooler.c-2.eu-central-1.aws.neon.tech"
	refused := "" // the empty want
	for _, mode := range []string{"", "disable", "prefer", "verify-full"} {
		t.Setenv("PGSSLMODE", mode)
		for _, row := range []struct{ url, want string }{
			{"postgres://u:p@" + other + "/d", other + " any"},
			{" postgres://u:p@" + other + "/d\n", other + " any"},
			{"postgresql://u:p@" + other + ":6543/d?application_name=x", other + " any"},
			{"postgres://u:p@" + other + "/d?sslmode=require", other + " any"},
			{"postgres://u:p@" + other + "/d?sslmode=verify-ca", other + " chain"},
			{"postgres://u:p@" + other + "/d?sslmode=verify-full", other + " full"},
			{"postgres://u:sslmode=x@" + other + "/d", other + " any"}, // a password, not a mode
			{"postgres://u:p@" + neon + ".example.com/d", neon + ".example.com any"},
			{"postgres://u:p@evilneon.tech/d", "evilneon.tech any"},

			{"postgresql://u:p@" + neon + "/d?sslmode=require&channel_binding=require", neon + " full"},
			{"postgresql://u:p@" + pooler + "/d?sslmode=require&channel_binding=require", pooler + " full"},
			{"postgres://u:p@" + neon + "/d", neon + " full"},
			{"postgres://u:p@" + neon + "/d?sslmode=verify-ca", neon + " full"},
			{"postgres://u:p@" + neon + "/d?sslmode=require&sslsni=0", neon + " full"},
			{"postgres://u:p@" + neon + "/d?sslmode=require&sslnegotiation=direct", neon + " full"},
			{"postgres://u:p@EP-A-1.AWS.NEON.TECH/d?sslmode=require", "EP-A-1.AWS.NEON.TECH full"},
			{"postgres://u:p@" + neon + "./d?sslmode=require", neon + ". full"}, // the same host, spelled absolutely
			{"postgres://u:p@" + other + "/d?host=" + neon, neon + " full"},
			{"postgres://u:p@" + other + "," + neon + ":5433/d", other + " any, " + neon + " full"},
			{"postgres://u:p@" + neon + "," + other + "/d", neon + " full, " + other + " any"},

			{"postgres://u:p@localhost/d", "localhost any"},
			{"postgres://u:p@localhost/d?sslmode=disable", "localhost plain"},
			{"postgres://u:p@LOCALHOST/d?sslmode=allow", "LOCALHOST plain, LOCALHOST any"},
			{"postgres://u:p@127.0.0.2/d?sslmode=prefer", "127.0.0.2 any, 127.0.0.2 plain"},
			{"postgres://u:p@[::1]:5433/d?sslmode=disable", "::1 plain"},
			{"postgres://u:p@%2Ftmp/d", "/tmp plain"},
			{"postgres://u:p@localhost/d?host=/tmp&sslmode=disable", "/tmp plain"},
			{"postgres://u:p@localhost,127.0.0.1/d?sslmode=disable", "localhost plain, 127.0.0.1 plain"},

			{"postgres://u:p@" + other + "/d?sslmode=disable", refused},
			{"postgres://u:p@" + other + "/d?sslmode=allow", refused},
			{"postgres://u:p@" + other + "/d?sslmode=prefer", refused},
			{"postgres://u:p@" + neon + "/d?sslmode=disable", refused},
			{"postgres://u:p@" + neon + "/d?sslmode=prefer", refused},
			{"postgres://u:p@" + other + "/d?sslmode=require&sslmode=disable", refused},
			{"postgres://u:p@localhost," + other + "/d?sslmode=disable", refused},
			{"postgres://u:p@" + other + ",localhost/d?sslmode=prefer", refused},
			{"postgres://u:p@localhost/d?sslmode=disable&host=" + other, refused},
			{"postgres://u:p@localhost.example.com/d?sslmode=disable", refused},
			{"postgres://u:p@127.0.0.1.example.com/d?sslmode=disable", refused},
			{"postgres://u:p@0.0.0.0/d?sslmode=disable", refused},
			{"postgres://u:p@[2001:db8::1]/d?sslmode=disable", refused},
			{"postgres://u:p@10.0.0.1/d?sslmode=disable", refused},
			{"postgres://u:p@" + other + "/d?sslmode=verify_full", refused},
			{"postgres://", refused},
			{"postgresql:///d", refused},
			{"postgres://u:p@/d", refused},
		} {
			config, _, err := poolConfig(row.url)
			got := refused
			if err == nil {
				got = hostsOf(config)
			} else if !strings.HasPrefix(err.Error(), "DATABASE_URL ") && !strings.HasPrefix(err.Error(), "DATABASE_URL: ") {
				t.Errorf("poolConfig(%q) = %v, want an error that begins with the setting's name", row.url, err)
			}
			if got != row.want {
				t.Errorf("PGSSLMODE=%s: poolConfig(%q) = %q, %v, want %q", mode, row.url, got, err, row.want)
			}
		}
	}
}

// A password with any character in it, at its place or misplaced by one that
// should have been encoded, never gets into an error, nor into a host or a
// database name, which later errors would show.
func TestDatabaseURLShowsNoPassword(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"",
		"hunter2",
		"mysql://u:hunter2@db.example.com/d",
		`"postgres://u:hunter2@db.example.com/d"`,
		"postgres://u:hunter2@db.example.com/d'",
		"host=db.example.com password=hunter2",
		"postgres://u:hunter2@db.example.com/d?sslmode=disable",
		"postgres://u:hunter2@db.example.com/d?sslmode=hunter",
		"postgres://u:hunter2%zz@db.example.com/d",
		"postgres://u:hunter2 @db.example.com:x/d",
		"postgres://u:hunter2@db.example.com:port/d",
		"postgres://u:hunter2@[::1/d",
		"postgres://u:`: hunter2@db.example.com:port/d",
		"postgres://u:hunter2/x@db.example.com/d",
		"postgres://u:x/hunter2@db.example.com/d",
		"postgres://u:x?hunter2/y@db.example.com/d",
		"postgres://u:x@hunter2@db.example.com/d",
		"postgres://u:hunter2\x00@db.example.com/d",
		"postgres://u:hunter2@db.example.com/d?pool_max_conns=many",
		"postgres://u@db.example.com/d?password=hunter2&sslmode=disable",
		"postgres://u@db.example.com/d?password=hunter2%zz",
		"postgres://u@db.example.com/d?password=hunter2&connect_timeout=x",
	} {
		switch config, _, err := poolConfig(text); {
		case err == nil:
			t.Errorf("poolConfig(%q) took host %q, database %q, want an error", text, config.ConnConfig.Host, config.ConnConfig.Database)
		case !strings.HasPrefix(err.Error(), "DATABASE_URL") || strings.Contains(err.Error(), "hunter2"):
			t.Errorf("poolConfig(%q) = %v, want an error that names the setting and shows nothing of it", text, err)
		}
	}
	config, _, err := poolConfig("postgres://u:p%40s%2Fw%3F%25#&=é@db.example.com/d")
	if err != nil || config.ConnConfig.Password != "p@s/w?%#&=é" {
		t.Errorf("poolConfig = %v, %v, want the password as encoded", config, err)
	}
}

func TestPoolNumbersHold(t *testing.T) {
	t.Parallel()
	config, _, err := poolConfig("postgres://u:p@localhost/d?pool_max_conns=99&&pool_min_conns=5&pool_min_idle_conns=5" +
		"&pool_max_conn_lifetime=9h&pool_max_conn_lifetime_jitter=9h&pool_max_conn_idle_time=9h&pool_health_check_period=9h" +
		"&pool_ping_timeout=9h&connect_timeout=99&application_name=x&default_query_exec_mode=cache_statement&channel_binding=require")
	if err != nil {
		t.Fatal(err)
	}
	conn := config.ConnConfig
	got := fmt.Sprintln(config.MaxConns, config.MinConns, config.MinIdleConns, config.MaxConnLifetime, config.MaxConnLifetimeJitter,
		config.MaxConnIdleTime, config.PingTimeout, conn.ConnectTimeout, conn.RuntimeParams["application_name"], conn.DefaultQueryExecMode, conn.ChannelBinding)
	if want := fmt.Sprintln(99, 0, 0, "5m0s", "30s", "2m0s", "1s", "10s", "todo-app", pgx.QueryExecModeExec, "require"); got != want {
		t.Errorf("pool = %s, want %s", got, want)
	}
	if config.HealthCheckPeriod > time.Minute { // Neon sleeps after five: idle time and period must stay below
		t.Errorf("idle connections are looked for every %v, want a minute at most", config.HealthCheckPeriod)
	}
}

// A pooler would refuse the options parameter.
func TestTimeoutIsAskedOfDirectHosts(t *testing.T) {
	t.Parallel()
	const asked = "-c statement_timeout=30000 -c client_encoding=UTF8 -c datestyle=ISO"
	for _, row := range []struct{ url, want string }{
		{"postgres://u:p@ep-a-1.c-2.aws.neon.tech/d", asked},
		{"postgres://u:p@ep-a-1-pooler.c-2.aws.neon.tech/d", ""},
		{"postgres://u:p@ep-a-1.my-pooler.neon.tech/d", asked}, // it ends the first label
		{"postgres://u:p@ep-a-1.aws.neon.tech/d?options=-c%20jit%3Doff", "-c jit=off " + asked},
		{"postgres://u:p@my-pooler/d", ""},
	} {
		config, _, err := poolConfig(row.url)
		if err != nil {
			t.Fatal(err)
		}
		d, err := newTracedDatabase(config)
		if err != nil {
			t.Fatal(err)
		}
		defer d.pool.Close()
		for range 2 { // each connection gets a copy
			conn := config.ConnConfig.Copy()
			if err := config.BeforeConnect(t.Context(), conn); err != nil {
				t.Fatal(err)
			}
			if got := strings.TrimSpace(conn.RuntimeParams["options"]); got != row.want {
				t.Errorf("options for %s = %q, want %q", row.url, got, row.want)
			}
		}
	}
}

// A man in the middle has a certificate, only not one of Neon's: a connection
// string with Neon's own "require" must not fall for it.
func TestNeonMustProveItself(t *testing.T) {
	t.Parallel()
	const host, other = "ep-test-1-pooler.c-2.eu-central-1.aws.neon.tech", "ep-other-1.aws.neon.tech"
	for _, row := range []struct {
		name    string
		trusted bool
		passes  bool
	}{
		{host, false, false},
		{other, true, false},
		{host, true, true},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{row.name}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		listener := listenLocally(t)
		names := make(chan string, 1)
		go func() {
			raw, err := listener.Accept()
			if err != nil {
				return
			}
			defer raw.Close()
			io.ReadFull(raw, make([]byte, 8)) // SSLRequest
			raw.Write([]byte("S"))
			secure := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
			if secure.Handshake() == nil {
				io.ReadFull(secure, make([]byte, 8)) // the client speaks on: it accepted the certificate
			}
			names <- secure.ConnectionState().ServerName
		}()

		config, _, err := poolConfig("postgresql://u:p@" + host + "/d?sslmode=require&channel_binding=require")
		if err != nil {
			t.Fatal(err)
		}
		config.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"127.0.0.1"}, nil }
		config.ConnConfig.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", listener.Addr().String())
		}
		if row.trusted {
			config.ConnConfig.TLSConfig.RootCAs = x509.NewCertPool()
			config.ConnConfig.TLSConfig.RootCAs.AddCert(certificate)
		}
		_, err = pgx.ConnectConfig(t.Context(), config.ConnConfig) // fails in any case: nobody speaks PostgreSQL there
		_, doubted := errors.AsType[*tls.CertificateVerificationError](err)
		if name := <-names; err == nil || doubted == row.passes || row.passes && name != host {
			t.Errorf("certificate for %s, trusted %t: %v, server name %q; want it accepted: %t, and %s asked for",
				row.name, row.trusted, err, name, row.passes, host)
		}
	}
}

func TestServerSettings(t *testing.T) {
	t.Parallel()
	conn, err := pgx.ParseConfig(sharedDatabaseURL())
	if err != nil {
		t.Fatal(err)
	}
	conn.RuntimeParams["options"] = "-c statement_timeout=12345" // how the host takes it, asked without the service
	timeout, pooler := "30s", false
	switch plain, err := pgx.ConnectConfig(t.Context(), conn); {
	case err == nil:
		plain.Close(t.Context())
	case strings.Contains(err.Error(), "unsupported startup parameter"):
		pooler, timeout = true, sqlValue[string](t, sharedDB.pool, `SHOW statement_timeout`) // whatever the role has
	default:
		t.Fatal(err)
	}
	if got := sharedDB.pooler.Load(); got != pooler {
		t.Errorf("the host is known as a pooler: %t, want %t", got, pooler)
	}
	d := openPrepared(t, sharedDatabaseURL())
	for setting, want := range map[string]string{"application_name": "todo-app", "statement_timeout": timeout} {
		if got := sqlValue[string](t, d.pool, `SHOW `+setting); got != want {
			t.Errorf("SHOW %s = %q, want %q", setting, got, want)
		}
	}
}

// A host whose name says nothing is found to be a pooler by its refusal, and
// only then: openDatabase, unlike open, tells nothing.
func TestPoolerIsFoundOut(t *testing.T) {
	t.Parallel()
	d, err := openDatabase(sharedDatabaseURL(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer d.pool.Close()
	if n := d.pool.Stat().TotalConns(); n != 0 || d.pool.Stat().NewConnsCount() != 0 {
		t.Errorf("a new database has %d connections, want none before it is needed", n)
	}
	prepare(t, d)
	if err := d.check(t.Context()); err != nil {
		t.Errorf("ping = %v", err)
	}
	if got, want := d.pooler.Load(), sharedDB.pooler.Load(); got != want {
		t.Errorf("found out a pooler: %t, want %t", got, want)
	}
}

func TestOneRoundTripARequest(t *testing.T) {
	t.Parallel()
	d, r := openOver(t)
	c := newClientOf(t, newService(t, d), "test-"+rand.Text())
	runStatements(t, d, c.service, 1)
	task := fmt.Sprintf("/%d", c.create("Milk").ID)
	api := "/api/" + c.user + "/tasks"
	for _, row := range []struct {
		method, path, body string
		status             int
		trips              int64
		header             []string
	}{
		{"GET", api, "", 200, 1, nil},
		{"GET", api + "?completed=false&limit=1&offset=1", "", 200, 1, nil},
		{"GET", api + "?total=true&before=9999999", "", 200, 2, nil}, // a count is a statement of its own
		{"GET", api + "?total=true&completed=true&offset=7", "", 200, 2, nil},
		{"GET", api + task, "", 200, 1, nil},
		{"POST", api, `{"title": "Eggs"}`, 201, 1, nil},
		{"POST", api, `{"title": "Tea"}`, 201, 1, []string{"Idempotency-Key", "one-key-for-both"}},
		{"POST", api, `{"title": "Tea"}`, 201, 1, []string{"Idempotency-Key", "one-key-for-both"}},
		{"PUT", api + task, `{}`, 412, 2, []string{"If-Match", `"1"`}}, // and so is the look whether there is no task or another version
		{"PUT", api + task, `{"title": "Oat milk", "description": null}`, 200, 1, nil},
		{"PATCH", api + task, `{}`, 200, 1, nil},
		{"PATCH", api + task + "/complete", ``, 200, 1, nil},
		{"PATCH", api + task + "/complete", `{"completed": false}`, 200, 1, nil},
		{"DELETE", api + task, "", 204, 1, nil},
		{"GET", api + task, "", 404, 1, nil},
		{"PATCH", api + task, `{}`, 404, 1, nil},
		{"DELETE", api + task, "", 404, 1, nil},

		{"GET", "/health/live", "", 200, 0, nil},
		{"GET", "/api/somebody-else/tasks", "", 403, 0, nil},
		{"GET", "/api/tasks", "", 404, 0, nil},
		{"GET", api + "/", "", 404, 0, nil},
		{"GET", api + "/0", "", 404, 0, nil},
		{"PATCH", api + "/x", `{}`, 404, 0, nil},
		{"POST", api + task, `{}`, 405, 0, nil},
		{"POST", api, `[]`, 400, 0, nil},
		{"POST", api, `{}`, 422, 0, nil},
		{"PUT", api + task, `{"title": null}`, 422, 0, nil},
		{"POST", api, `"` + strings.Repeat("a", maxBody) + `"`, 413, 0, nil},
		{"GET", api + "?limit=0", "", 422, 0, nil},
	} {
		c.send("GET", "/health/ready", "") // or a pre-ping would be counted where the machine paused for a second
		before := r.trips.Load()
		if a := c.send(row.method, row.path, row.body, row.header...); a.status != row.status || r.trips.Load()-before != row.trips {
			t.Errorf("%s %s = %d %s after %d round trips, want %d after %d",
				row.method, row.path, a.status, a.body, r.trips.Load()-before, row.status, row.trips)
		}
	}
	c.authorization = "Bearer e30.e30.e30"
	before := r.trips.Load()
	if a := c.do("GET", "", ""); a.status != 401 || r.trips.Load() != before {
		t.Errorf("a bad token = %d after %d round trips, want 401 after none", a.status, r.trips.Load()-before)
	}
	if n := d.pool.Stat().NewConnsCount(); n > 2 { // a pooler was found out by one more
		t.Errorf("one request after the other opened %d connections", n)
	}
}

// All connections break at once, as when Neon goes to sleep, or the machine.
// A write finds out in time, for the connections idled or a read had the loss.
func TestBrokenConnectionsAreNoticed(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	for _, row := range []struct {
		name   string
		silent bool
		idle   time.Duration
		first  []bool // statements before many writes at once: repeatable or not
	}{
		{"cut, used at once", false, 0, []bool{true}},
		{"cut after idling", false, 1100 * time.Millisecond, nil},
		{"silent after idling, used by one", true, 1100 * time.Millisecond, []bool{false}},
		{"silent after idling, used by all", true, 1100 * time.Millisecond, nil},
	} {
		d, r := openOver(t)
		connect(t, d, defaultMaxConns)
		start := time.Now()
		if row.silent {
			r.silence()
		} else {
			r.cut()
		}
		eventually(t, "idle time", func() bool { return time.Since(start) > row.idle })
		start = time.Now()
		use := func(repeatable bool) {
			if _, err := query(t.Context(), d, retryPolicy(repeatable), pgx.RowTo[int], `SELECT 1`); err != nil {
				t.Errorf("%s: %v, want the loss unnoticed", row.name, err)
			}
		}
		for _, repeatable := range row.first {
			use(repeatable)
		}
		var writes sync.WaitGroup
		for range defaultMaxConns {
			writes.Go(func() { use(false) })
		}
		writes.Wait()
		if took := time.Since(start); took > 8*time.Second { // a ping and a close of a second each
			t.Errorf("%s: %d lost connections took %v, want the time of one", row.name, defaultMaxConns, took)
		}
	}
}

func TestDeadlineBeforeAStatement(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	d := open(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) {
			cancel()
			return true, nil
		}
	})
	close(d.ready)
	if _, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT 1`); !errors.Is(err, errUnavailable) {
		t.Errorf("query that was not sent = %v, want %v", err, errUnavailable)
	}
}

// pgx asks for a lost statement's end where its connection led: where nobody is
// any more, that must not keep the place in the pool.
func TestUnansweredDialEndsSoon(t *testing.T) {
	t.Parallel()
	nobody := listenLocally(t)
	socket, err := nobody.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	socket.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) }) // the kernel accepts no more than one or two
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		var conn net.Conn
		if conn, err = net.DialTimeout("tcp", nobody.Addr().String(), 100*time.Millisecond); err == nil {
			defer conn.Close()
		}
	}
	config, _, err := poolConfig("postgres://u:p@localhost/d")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	conn, err := config.ConnConfig.DialFunc(t.Context(), "tcp", nobody.Addr().String())
	if took := time.Since(start); err == nil || took < time.Second || took > 4*time.Second {
		t.Errorf("dial = %v, %v after %v, want it given up after 2 s", conn, err, took)
	}
}

// What a request gives up is not left running on the server, where it would
// hold its locks.
func TestDeadlineEndsTheStatement(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	id := c.create("Milk").ID
	tx := begin(t, sharedDB)
	sqlExec(t, tx, `SELECT FROM tasks WHERE user_id = $1 FOR UPDATE`, c.user)
	for _, row := range []struct {
		repeatable bool
		sql        string
	}{
		{false, `UPDATE tasks SET title = 'x' WHERE user_id = $1 AND id = $2 RETURNING id`},
		{true, `SELECT id FROM tasks WHERE user_id = $1 AND id = $2 FOR UPDATE`},
	} {
		marker := "/* " + rand.Text() + " */"
		running := func() int {
			return sqlValue[int](t, sharedDB.pool, `SELECT count(*) FROM pg_stat_activity WHERE starts_with(query, $1) AND state = 'active'`, marker)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		failed := make(chan error)
		go func() {
			_, err := query(ctx, sharedDB, retryPolicy(row.repeatable), pgx.RowTo[int64], marker+row.sql, c.user, id)
			failed <- err
		}()
		eventually(t, "statement that is blocked", func() bool { return running() == 1 || ctx.Err() != nil })
		if err := <-failed; !errors.Is(err, errUnavailable) || ctx.Err() == nil {
			t.Errorf("query(%q) = %v, want %v at the deadline", row.sql, err, errUnavailable)
		} else if strings.Contains(err.Error(), "wait for a connection") {
			t.Errorf("query(%q) = %v, but it had a connection", row.sql, err)
		}
		eventually(t, "end of the statement on the server", func() bool { return running() == 0 })
	}
	tx.Rollback(t.Context())
	if a := c.do("GET", fmt.Sprintf("/%d", id), ""); decode[wireTask](t, a.body).Title != "Milk" {
		t.Errorf("after the cancelled change: %s, want it undone", a.body)
	}
}

func TestRequestsHaveADeadline(t *testing.T) {
	t.Parallel()
	s := newServer(sharedAuth, sharedDB, slog.New(slog.DiscardHandler), nil, "")
	s.handle(func(ctx context.Context, _ http.ResponseWriter, _ *http.Request) error {
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > 15*time.Second || time.Until(deadline) < 10*time.Second {
			t.Errorf("a request's work ends in %v, want 15 s", time.Until(deadline))
		}
		return nil
	})(&response{ResponseWriter: httptest.NewRecorder()}, httptest.NewRequest("GET", "/", nil))
}

// Ten clients go away while their changes wait for a lock: the changes are
// made all the same, and no connection is lost to it.
func TestAbandonedRequestsKeepTheirConnections(t *testing.T) {
	t.Parallel()
	takeTurns(t)
	const each = 5 // as many as one user may have in progress
	d := openPrepared(t, sharedDatabaseURL())
	var gone atomic.Int64
	api := newServer(sharedAuth, d, slog.New(slog.DiscardHandler), nil, "")
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		context.AfterFunc(r.Context(), func() { gone.Add(1) })
		api.ServeHTTP(w, r)
	}))
	defer service.Close()
	c := newClientOf(t, service.URL, "test-"+rand.Text())
	for range each {
		c.create("Milk")
	}
	var opened int64
	for _, completed := range []bool{true, false} {
		tasks := decode[[]wireTask](t, c.do("GET", "", "").body)
		tx := begin(t, sharedDB)
		sqlExec(t, tx, `SELECT FROM tasks WHERE user_id = $1 FOR UPDATE`, c.user)
		ctx, abort := context.WithCancel(t.Context())
		defer abort()
		var clients sync.WaitGroup
		for _, task := range tasks {
			path := fmt.Sprintf("%s/api/%s/tasks/%d", service.URL, c.user, task.ID)
			r, err := http.NewRequestWithContext(ctx, "PATCH", path, strings.NewReader(fmt.Sprintf(`{"completed": %t}`, completed)))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", c.authorization)
			clients.Go(func() {
				if res, err := http.DefaultClient.Do(r); err == nil {
					res.Body.Close()
					t.Errorf("a blocked change = %d, want no answer before the lock is released", res.StatusCode)
				}
			})
		}
		eventually(t, "request for each client", func() bool { return d.pool.Stat().AcquiredConns() == each })
		if opened == 0 {
			opened = d.pool.Stat().NewConnsCount()
		}
		before := gone.Load()
		abort()
		clients.Wait()
		eventually(t, "sight of the clients gone", func() bool { return gone.Load() >= before+each })
		tx.Rollback(t.Context())
		eventually(t, "end of the abandoned changes", func() bool { return d.pool.Stat().AcquiredConns() == 0 })
		for _, task := range decode[[]wireTask](t, c.do("GET", "", "").body) {
			if task.Completed != completed {
				t.Errorf("task %d: completed = %t after its client went away, want the change made", task.ID, task.Completed)
			}
		}
	}
	if n := d.pool.Stat().NewConnsCount(); n != opened {
		t.Errorf("%d connections were opened instead of those of abandoned requests", n-opened)
	}
}

// What the database does to a statement, told apart: each error, and how often
// the statement was sent, which a sequence counts even where it is rolled back.
func TestErrorsOfAStatement(t *testing.T) {
	t.Parallel()
	d := openPrepared(t, ownDatabase(t))
	sqlExec(t, d.pool, `CREATE SEQUENCE sent; CREATE FUNCTION fault() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE 'XX000'; END $$`)
	const die, cancel = `pg_terminate_backend(pg_backend_pid())`, `pg_cancel_backend(pg_backend_pid())`
	for _, row := range []struct {
		name, sql  string
		repeatable bool
		want       error // nil: the statement's own
		code       string
		sent       int
	}{
		{"read that loses its connection once", `SELECT CASE nextval('sent') WHEN 1 THEN ` + die + `::int + length(pg_sleep(9)::text) ELSE 1 END`, true, nil, "", 2},
		{"read that always does", `SELECT nextval('sent')::int, ` + die + `, pg_sleep(9)`, true, errUnavailable, "", 2},
		{"write that does", `SELECT nextval('sent')::int, ` + die + `, pg_sleep(9)`, false, errUnavailable, "", 1},
		{"read out of time", `SELECT nextval('sent')::int, ` + cancel + `, pg_sleep(9)`, true, errUnavailable, "57014", 1},
		{"write out of time", `SELECT nextval('sent')::int, ` + cancel + `, pg_sleep(9)`, false, errUnavailable, "57014", 1},
		{"fault of a read", `SELECT nextval('sent')::int / 0`, true, nil, "22012", 1},
		{"fault of a write", `SELECT nextval('sent')::int / 0`, false, nil, "22012", 1},
		{"internal error, as Neon's proxy has them", `SELECT nextval('sent')::int, fault()`, true, errUnavailable, "XX000", 1},
		{"value of another type", `SELECT nextval('sent')::text || 'x'`, true, nil, "scan", 1},
	} {
		sqlExec(t, d.pool, `ALTER SEQUENCE sent RESTART`)
		found, err := query(t.Context(), d, retryPolicy(row.repeatable), func(r pgx.CollectableRow) (n int, err error) {
			return n, r.Scan(append([]any{&n}, make([]any, len(r.FieldDescriptions())-1)...)...)
		}, row.sql)
		code := ""
		if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
			code = pg.Code
		} else if _, ok := errors.AsType[pgx.ScanArgError](err); ok {
			code = "scan"
		}
		refused, _ := errors.AsType[apiError](err)
		want, _ := row.want.(apiError)
		if refused != want || row.code != "" && code != row.code || row.code == "" && want.status == 0 && (err != nil || len(found) != 1) {
			t.Errorf("%s: %v, %v (code %q), want %v, code %q", row.name, found, err, code, row.want, row.code)
		}
		if n := sqlValue[int](t, d.pool, `SELECT last_value FROM sent`); n != row.sent {
			t.Errorf("%s was sent %d times, want %d", row.name, n, row.sent)
		}
	}
}

// Nothing was sent yet: even a write may be tried again.
func TestErrorsBeforeAStatement(t *testing.T) {
	t.Parallel()
	var failures atomic.Int64
	d := open(t, sharedDatabaseURL(), func(config *pgxpool.Config) {
		config.MaxConns = 1
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			if failures.Add(-1) >= 0 {
				return nil, errors.New("no way to the database")
			}
			return dial(ctx, network, address)
		}
	})
	write := func(patience time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := query(ctx, d, noRetry, pgx.RowTo[int], `SELECT 1`)
		return err
	}
	if err := write(100 * time.Millisecond); !errors.Is(err, errUnavailable) || d.pool.Stat().NewConnsCount() != 0 {
		t.Errorf("before the schema is there: %v, want %v and no connection", err, errUnavailable)
	}
	close(d.ready)
	failures.Store(1 << 30)
	if err := write(300 * time.Millisecond); !errors.Is(err, errUnavailable) || failures.Load() > 1<<30-2 {
		t.Errorf("no connection: %v after %d tries, want %v after several", err, 1<<30-failures.Load(), errUnavailable)
	}
	failures.Store(3)
	if err := write(15 * time.Second); err != nil {
		t.Errorf("a connection at the fourth try: %v, want none", err)
	}
	if n := d.failures; n != 0 {
		t.Errorf("%d failures are remembered beyond a success: the next connection would wait for them", n)
	}
	conn, err := d.acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	if err := write(100 * time.Millisecond); !errors.Is(err, errUnavailable) {
		t.Errorf("all connections busy: %v, want %v", err, errUnavailable)
	}
	if err := write(15 * time.Second); !errors.Is(err, errUnavailable) || !strings.Contains(err.Error(), "busy for 10s") {
		t.Errorf("all connections busy: %v, want %v, and the log to say so", err, errUnavailable)
	}
}

func TestInstancesStartTogether(t *testing.T) {
	t.Parallel()
	for range 4 {
		u := ownDatabase(t)
		var instances sync.WaitGroup
		start := make(chan struct{})
		for range 8 {
			d, err := openDatabase(u, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer d.pool.Close()
			instances.Go(func() {
				<-start
				// migrate, so that no second try hides a race; the first finds out a pooler.
				d.pooler.Store(sharedDB.pooler.Load())
				err := errLocked
				for errors.Is(err, errLocked) { // by another instance, whose database is far away
					err = d.migrate(t.Context(), time.Now().Add(startupTimeout))
				}
				if err != nil {
					t.Errorf("one of eight instances: %v", err)
				}
			})
		}
		close(start)
		instances.Wait()
	}
}

// A database that has the schema is not touched: not even locks that exclude
// everything keep an instance from starting.
func TestCurrentSchemaTakesOneRoundTrip(t *testing.T) {
	t.Parallel()
	u := ownDatabase(t)
	tx := begin(t, openPrepared(t, u))
	sqlExec(t, tx, `LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE`)
	sqlExec(t, tx, `SELECT pg_advisory_xact_lock($1)`, schemaLock)

	d, r := openDatabaseOver(t, u)
	sqlExec(t, d.pool, `SELECT 1`)
	before := r.trips.Load()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err := d.start(ctx)
	if n, sessions := r.trips.Load()-before, r.dials.Load(); err != nil || n != 1 || sessions != 1 {
		t.Errorf("prepare a current database = %v after %d round trips in %d sessions, want 1 in 1", err, n, sessions)
	}
}
