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
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Settings, above all DATABASE_URL. The secrets are in auth_test.go, the origins in cors_test.go.

// validEnvironment has every required setting. Its database does not exist.
func validEnvironment() environment {
	return environment{"DATABASE_URL": "postgres://localhost/none", "BETTER_AUTH_SECRET": testSecret}
}

func TestInvalidSettings(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, takenPort, _ := net.SplitHostPort(taken.Addr().String())
	freePort := freePort(t)

	for name, values := range map[string][]string{
		"DATABASE_URL":        {"", " \n", "postgres://todo:hunter2@db.example.com/todo?sslmode=disable"},
		"BETTER_AUTH_SECRET":  {"", "hunter2"},
		"BETTER_AUTH_SECRETS": {"1:hunter2"},
		"CORS_ORIGINS":        {"*"},
		"PORT":                {"http", "0", "-1", "65536", "80 80", takenPort},
		"METRICS_PORT":        {"x", "0", takenPort},
		"LOG_LEVEL":           {"verbose", "0", "info+2", "warning"},
	} {
		for _, value := range values {
			env := validEnvironment()
			env["PORT"], env[name] = freePort, value
			// done, so that a service that starts exits at once
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err := env.run(ctx)
			if message := fmt.Sprint(err); !strings.HasPrefix(message, name+" ") &&
				!strings.HasPrefix(message, name+":") {
				t.Errorf("%s=%s: %v, want an error that names the setting first", name, value, err)
			} else if strings.Contains(message, "hunter2") || strings.Contains(message, "\n") {
				t.Errorf("%s=%s: %q, want one line without the value", name, value, message)
			}
		}
	}

	// What the operator sees.
	for _, setting := range []string{"DATABASE_URL=", "BETTER_AUTH_SECRET=hunter2", "PORT=" +
		takenPort} {
		p := startProcess(t, setting)
		status, lines := p.wait(10*time.Second), p.output.lines(t)
		if status != 1 || len(lines) != 1 || strings.Count(p.output.String(), "\n") != 1 {
			t.Fatalf("%s: exit status %d with %s, want 1 with one line", setting, status, p.output.String())
		}
		name, _, _ := strings.Cut(setting, "=")
		if message := fmt.Sprint(lines[0]["message"]); lines[0]["severity"] != "ERROR" ||
			!strings.HasPrefix(message, name) {
			t.Errorf("%s: %v, want an ERROR that names the setting first", setting, lines[0])
		}
	}
}

// hostsOf describes how pgx would connect to each host of a connection string, in order: in plain
// text, accepting any certificate, verifying its chain, or verifying it fully against the system's
// roots.
func hostsOf(config *pgxpool.Config) string {
	conn, hosts := config.ConnConfig, []string{}
	first := &pgconn.FallbackConfig{Host: conn.Host, TLSConfig: conn.TLSConfig}
	for _, h := range append([]*pgconn.FallbackConfig{first}, conn.Fallbacks...) {
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

// libpq's environment variables must not weaken TLS. t.Setenv excludes t.Parallel.
func TestDatabaseURLRequiresTLS(t *testing.T) {
	const neon, other = "ep-a-1.c-2.eu-central-1.aws.neon.tech", "db.example.com"
	const pooler = "ep-a-1-pooler.c-2.eu-central-1.aws.neon.tech"
	rejected := "" // the empty want
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
			{"postgres://u:p@" + neon + "./d?sslmode=require", neon + ". full"}, // the same host
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

			{"postgres://u:p@" + other + "/d?sslmode=disable", rejected},
			{"postgres://u:p@" + other + "/d?sslmode=allow", rejected},
			{"postgres://u:p@" + other + "/d?sslmode=prefer", rejected},
			{"postgres://u:p@" + neon + "/d?sslmode=disable", rejected},
			{"postgres://u:p@" + neon + "/d?sslmode=prefer", rejected},
			{"postgres://u:p@" + other + "/d?sslmode=require&sslmode=disable", rejected},
			{"postgres://u:p@localhost," + other + "/d?sslmode=disable", rejected},
			{"postgres://u:p@" + other + ",localhost/d?sslmode=prefer", rejected},
			{"postgres://u:p@localhost/d?sslmode=disable&host=" + other, rejected},
			{"postgres://u:p@localhost.example.com/d?sslmode=disable", rejected},
			{"postgres://u:p@127.0.0.1.example.com/d?sslmode=disable", rejected},
			{"postgres://u:p@0.0.0.0/d?sslmode=disable", rejected},
			{"postgres://u:p@[2001:db8::1]/d?sslmode=disable", rejected},
			{"postgres://u:p@10.0.0.1/d?sslmode=disable", rejected},
			{"postgres://u:p@" + other + "/d?sslmode=verify_full", rejected},
		} {
			config, _, err := poolConfig(row.url)
			got := rejected
			if err == nil {
				got = hostsOf(config)
			}
			if got != row.want {
				t.Errorf("PGSSLMODE=%s: poolConfig(%q) = %q, %v, want %q", mode, row.url, got, err, row.want)
			}
		}
	}
}

func TestDatabaseURLParameters(t *testing.T) {
	t.Parallel()
	const base = "postgres://u:p@localhost/d"
	const size = "pool_max_conns must be a number from 1 to 100"
	for _, row := range []struct {
		url, want string // the size of the pool and the options, or a part of the error
	}{
		{base, "15 "},
		{base + "?", "15 "},
		{base + "?&&sslmode=disable&", "15 "},
		{base + "?pool_max_conns=1", "1 "},
		{base + "?pool_max_conns=100", "100 "},
		{base + "?pool_max_conns=2&pool_max_conns=3", "3 "},
		{base + "?pool_max_conns=0", size},
		{base + "?pool_max_conns=101", size},
		{base + "?pool_max_conns=x", size},
		{base + "?pool_max_conns=-1", size},
		{base + "?pool_max_conns=", size},
		{base + "?options=endpoint%3Dep-a-1", "15 endpoint=ep-a-1"},
		{base + "?options=-c%20jit%3Doff", "15 -c jit=off"},
		{base + "?options=-c%20jit%3Doff&options=-c%20jit%3Don", "15 -c jit=on"},
		{base + "?option%73=-c%20jit%3Doff", "15 -c jit=off"},
		// as libpq: + is no space
		{base + "?options=-c%20timezone%3DEtc/GMT+3", "15 -c timezone=Etc/GMT+3"},
		{base + "?sslmode=no-such-mode", "DATABASE_URL must be like"},
		{base + "?connect_timeout=x", "DATABASE_URL must be like"},
		{`"` + base + `"`, "remove the quotes"},
		{`'` + base + `'`, "remove the quotes"},
		{"\n`" + base + "`\n", "remove the quotes"},
		{base + `"`, "remove the quotes"},
		{"\"", "remove the quotes"},
		{" \n", "DATABASE_URL is not set"},
		{"postgres://", "DATABASE_URL must be like"},
		{"postgresql:///d", "DATABASE_URL must be like"},
		{"postgres://u:p@/d", "DATABASE_URL must be like"},
	} {
		config, _, err := poolConfig(row.url)
		got := fmt.Sprint(err)
		if err == nil {
			got = fmt.Sprint(config.MaxConns, " ", config.ConnConfig.RuntimeParams["options"])
		}
		if got != row.want && (err == nil || !strings.Contains(got, row.want)) {
			t.Errorf("poolConfig(%q) = %q, want %q", row.url, got, row.want)
		}
	}
	config, _, err := poolConfig("postgres://u:p%40s%2Fw%3F%25#&=é@db.example.com/d")
	if err != nil || config.ConnConfig.Password != "p@s/w?%#&=é" {
		t.Errorf("poolConfig = %v, %v, want the decoded password", config, err)
	}
}

// The connection string does not change what the service sets, except the size of the pool and what
// pgx reads for the connection.
func TestPoolConfig(t *testing.T) {
	t.Parallel()
	config, _, err := poolConfig("postgres://u:p@localhost/d?pool_max_conns=99&&pool_min_conns=5" +
		"&pool_min_idle_conns=5&pool_max_conn_lifetime=9h&pool_max_conn_lifetime_jitter=9h" +
		"&pool_max_conn_idle_time=9h&pool_health_check_period=9h&pool_ping_timeout=9h&connect_timeout=99" +
		"&application_name=x&default_query_exec_mode=simple_protocol&channel_binding=require")
	if err != nil {
		t.Fatal(err)
	}
	conn := config.ConnConfig
	got := fmt.Sprintln(config.MaxConns, config.MinConns, config.MinIdleConns, config.MaxConnLifetime,
		config.MaxConnLifetimeJitter, config.MaxConnIdleTime, config.PingTimeout, conn.ConnectTimeout,
		conn.RuntimeParams["application_name"], conn.DefaultQueryExecMode, conn.ChannelBinding)
	want := fmt.Sprintln(99, 0, 0, "5m0s", "30s", "2m0s", "1s", "10s", "todo-app",
		pgx.QueryExecModeExec, "require")
	if got != want {
		t.Errorf("pool = %s, want %s", got, want)
	}
	// Neon suspends after five idle minutes. Idle time and period together must be less.
	if config.HealthCheckPeriod > time.Minute {
		t.Errorf("idle connections are closed every %v, want every minute", config.HealthCheckPeriod)
	}
}

// A pooler would reject the options parameter.
func TestOptionsAreForDirectHosts(t *testing.T) {
	t.Parallel()
	const options = "-c statement_timeout=30000 -c client_encoding=UTF8 -c datestyle=ISO"
	for _, row := range []struct{ url, want string }{
		{"postgres://u:p@ep-a-1.c-2.aws.neon.tech/d", options},
		{"postgres://u:p@ep-a-1-pooler.c-2.aws.neon.tech/d", ""},
		{"postgres://u:p@ep-a-1.my-pooler.neon.tech/d", options}, // -pooler ends the first label only
		{"postgres://u:p@ep-a-1.aws.neon.tech/d?options=-c%20jit%3Doff", "-c jit=off " + options},
		{"postgres://u:p@my-pooler/d", ""},
	} {
		config, _, err := poolConfig(row.url)
		if err != nil {
			t.Fatal(err)
		}
		d, err := newDatabase(config, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer d.pool.Close()
		for range 2 { // every connection gets a copy
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

// Neon's own strings contain sslmode=require, which accepts any certificate. A man in the middle
// has one, but not one of Neon's.
func TestNeonMustProveItsIdentity(t *testing.T) {
	t.Parallel()
	const host, other = "ep-test-1-pooler.c-2.eu-central-1.aws.neon.tech", "ep-other-1.aws.neon.tech"
	for _, row := range []struct {
		name              string // in the certificate
		trusted, accepted bool
	}{
		{host, false, false},
		{other, true, false},
		{host, true, true},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
			DNSNames: []string{row.name}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		listener := listenLocally(t)
		serverNames := make(chan string, 1)
		go func() {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			io.ReadFull(conn, make([]byte, 8)) // SSLRequest
			conn.Write([]byte("S"))
			secure := tls.Server(conn, &tls.Config{
				Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
			if secure.Handshake() == nil {
				io.ReadFull(secure, make([]byte, 8)) // the client has accepted the certificate
			}
			serverNames <- secure.ConnectionState().ServerName
		}()

		config, _, err := poolConfig("postgresql://u:p@" + host +
			"/d?sslmode=require&channel_binding=require")
		if err != nil {
			t.Fatal(err)
		}
		conn := config.ConnConfig
		conn.LookupFunc = func(context.Context, string) ([]string, error) {
			return []string{"127.0.0.1"},
				nil
		}
		conn.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", listener.Addr().String())
		}
		if row.trusted {
			conn.TLSConfig.RootCAs = x509.NewCertPool()
			conn.TLSConfig.RootCAs.AddCert(certificate)
		}
		_, err = pgx.ConnectConfig(t.Context(), conn) // an error in any case: no PostgreSQL listens there
		_, rejected := errors.AsType[*tls.CertificateVerificationError](err)
		if err == nil || rejected == row.accepted {
			t.Errorf("certificate for %s, trusted: %t: %v, want it accepted: %t",
				row.name, row.trusted, err, row.accepted)
		}
		if name := <-serverNames; row.accepted && name != host {
			t.Errorf("the service requests the certificate of %q, want %s", name, host)
		}
	}
}

// Programs in other languages may use the same connection string.
func TestSharedConnectionString(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "DATABASE_URL= "+sharedDatabaseURL()+"&uselibpqcompat=true&pgbouncer=true"+
		"&connection_limit=5&schema=hunter2&pool_timeout=9&application_name=hunter2&hunter2=hunter2"+
		"&%68unter2&pool_max_conns=7\n")
	p.waitReady()
	warnings := p.output.messages(t, "WARNING")
	if len(warnings) != 1 {
		t.Fatalf("the WARNINGs are %q, want one", warnings)
	}
	for _, part := range []string{"DATABASE_URL", "uselibpqcompat", "pgbouncer", "connection_limit",
		"schema",
		"pool_timeout", "application_name", "2 unknown"} {
		if !strings.Contains(warnings[0], part) {
			t.Errorf("the WARNING is %q, want it to contain %q", warnings[0], part)
		}
	}
	if strings.Contains(p.output.String(), "hunter2") ||
		strings.Contains(warnings[0], "pool_max_conns") {
		t.Errorf("the log contains a value, or a parameter that is used: %s", p.output.String())
	}
}

// No error and no WARNING contains any part of the connection string. A password that is not
// percent-encoded must not end up in a host or database name either, which later errors contain.
func TestInvalidDatabaseURLShowsNothing(t *testing.T) {
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
		"postgres://u:hunter2%@db.example.com/d",
		"postgres://u:x%hunter2@db.example.com/d",
		"postgres://u:hunter2 @db.example.com:x/d",
		"postgres://u:hunter2@local host/d",
		"postgres://u:hunter2@db.example.com:port/d",
		"postgres://u:hunter2@db.example.com:99999/d",
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
		config, _, err := poolConfig(text)
		if err == nil {
			t.Errorf("poolConfig(%q) accepts host %q, database %q",
				text, config.ConnConfig.Host, config.ConnConfig.Database)
		} else if !strings.HasPrefix(err.Error(), "DATABASE_URL") ||
			strings.Contains(err.Error(), "hunter2") {
			t.Errorf("poolConfig(%q) = %v, want an error that names the setting alone", text, err)
		}
	}

	seed := mathrand.Uint64()
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	const marker = "hunter"
	pieces := []string{marker, "postgres://", "postgresql://", ":", "@", "/", "?", "&", "=", "%",
		"%20", "%zz", "#",
		" ", "\n", "\t", "[", "]", ",", ";", "+", "\\", "'", `"`, "`", "\x00", "é", "\xff", "sslmode",
		"host",
		"password", "options", "port", "pool_max_conns", "schema", "connect_timeout", "5432",
		"localhost", "require"}
	for range 10_000 {
		text := strings.ReplaceAll("postgres://x:x@x/x?x=x", "x", marker)
		for range 1 + random.IntN(4) {
			at := random.IntN(len(text) + 1)
			text = text[:at] + pieces[random.IntN(len(pieces))] + text[min(len(text), at+random.IntN(3)):]
		}
		_, ignored, err := poolConfig(text)
		// Parts of the marker count, because pieces are inserted into it.
		if shown := fmt.Sprint(ignored, err); strings.Contains(shown, "hunt") ||
			strings.Contains(shown, "nter") {
			t.Fatalf("seed %d: poolConfig(%q) = %q, %v contains a part of it", seed, text, ignored, err)
		}
	}
}

// Errors of the network and of the server contain users, databases and hosts.
func TestConnectionErrorsShowNothing(t *testing.T) {
	t.Parallel()
	for name, databaseURL := range map[string]string{
		"user": changeURL(t, func(u *url.URL) { u.User = url.UserPassword("hunteruser", "hunterpass") }),
		"odd user": changeURL(t, func(u *url.URL) {
			u.User = url.UserPassword(`$1 "hunter" user.*`, "$2hunter")
		}),
		"database":  changeURL(t, func(u *url.URL) { u.Path = "/hunterdb" }),
		"host":      changeURL(t, func(u *url.URL) { u.Host = "hunterhost.invalid:" + u.Port() }),
		"two hosts": changeURL(t, func(u *url.URL) { u.Host = "hunter1.invalid,hunter2.invalid" }),
		"socket":    "postgres://hunteruser:hunterpass@%2Ftmp%2Fhunterdir/hunterdb",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log lockedBuffer
			d, err := openDatabase(databaseURL, newLogger(&log, slog.LevelDebug))
			if err != nil {
				t.Fatal(err)
			}
			defer d.pool.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			err = d.ensureSchema(ctx)
			if err == nil || !strings.Contains(err.Error(), "DATABASE_URL") {
				t.Fatalf("start = %v, want an error that names DATABASE_URL", err)
			}
			if text := err.Error() + log.String(); strings.Contains(text, "hunter") ||
				strings.Contains(text, "\n") {
				t.Errorf("%q contains a part of the connection string", text)
			}
		})
	}
}
