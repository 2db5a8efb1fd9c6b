package main

import (
	"strings"
	"testing"
)

// Browsers: CORS_ORIGINS and the headers that it causes.

func TestCORS(t *testing.T) {
	t.Parallel()
	const app, local = "https://app.example.com", "http://localhost:3000"
	c := startService(t, sharedDB, settings{origins: []string{app, local}}).newClient()
	stranger := *c
	stranger.authorization = ""
	list := c.path("")

	for _, row := range []struct {
		c            *client
		method, path string
		status       int
	}{
		{c, "GET", list, 200},
		{&stranger, "GET", list, 401},
		{c, "GET", "/api/x/tasks", 403},
		{c, "GET", list + "/9", 404},
		{c, "GET", "/nothing", 404},
		{c, "PUT", list, 405},
		{c, "POST", list, 400},
		{c, "GET", list + "?limit=0", 422},
		{c, "GET", "/health/live", 200},
	} {
		for origin, listed := range map[string]bool{
			app: true, local: true, "https://evil.example.com": false, "null": false, "": false,
			app + ".evil.com": false, "https://APP.example.com": false,
		} {
			a := row.c.send(row.method, row.path, "", "Origin", origin)
			if a.status != row.status {
				t.Errorf("%s %s from %q = %v, want %d", row.method, row.path, origin, a, row.status)
			}
			want := map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "",
				"Access-Control-Allow-Credentials": "", "Access-Control-Expose-Headers": ""}
			if listed {
				want["Access-Control-Allow-Origin"] = origin
				want["Access-Control-Allow-Credentials"] = "true"
				want["Access-Control-Expose-Headers"] = "ETag, Link, Location, X-Total-Count, X-Request-Id, " +
					"Retry-After, Idempotency-Replayed, WWW-Authenticate"
			}
			for name, value := range want {
				if got := a.header.Get(name); got != value {
					t.Errorf("%s %s from %q: %s = %q, want %q", row.method, row.path, origin, name, got, value)
				}
			}
		}
	}

	for _, path := range []string{list, list + "/7", "/nothing"} {
		a := stranger.send("OPTIONS", path, "", "Origin", app, "Access-Control-Request-Method", "PATCH",
			"Access-Control-Request-Headers", "authorization,content-type,if-match")
		if a.status != 204 {
			t.Errorf("preflight of %s = %v, want 204", path, a)
		}
		for name, want := range map[string]string{
			"Vary": "Origin", "Access-Control-Allow-Origin": app, "Access-Control-Max-Age": "7200",
			"Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
			"Access-Control-Allow-Headers": "Authorization, Content-Type, If-Match, If-None-Match, " +
				"Idempotency-Key, X-Request-Id",
		} {
			if got := a.header.Get(name); got != want {
				t.Errorf("preflight of %s: %s = %q, want %q", path, name, got, want)
			}
		}
	}
	a := stranger.send("OPTIONS", list, "", "Origin", "https://evil.example.com")
	if origin := a.header.Get("Access-Control-Allow-Origin"); origin != "" {
		t.Errorf("a preflight from another origin allows %s", origin)
	}

	c.service = sharedURL // without CORS_ORIGINS
	for method, status := range map[string]int{"GET": 200, "OPTIONS": 405} {
		a := c.send(method, list, "", "Origin", app)
		if a.status != status {
			t.Errorf("%s without CORS_ORIGINS = %v, want %d", method, a, status)
		}
		for name := range a.header {
			if strings.HasPrefix(name, "Access-Control-") || name == "Vary" {
				t.Errorf("%s without CORS_ORIGINS has %s", method, name)
			}
		}
	}
}

func TestCORSOrigins(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{
		"*", "https://*", "https://*.example.com", "example.com", "https://app.example.com/",
		"https://app.example.com/x", "https://App.example.com", "https://user@app.example.com", "null",
		"https://a.example,", ",", "https://a.example:443", "http://a.example:80", "https://",
		"https://a.example?x", "https://a.example https://b.example", "https://a.example#",
	} {
		if got, err := corsOrigins(bad); err == nil || !strings.Contains(err.Error(), "CORS_ORIGINS") {
			t.Errorf("corsOrigins(%q) = %q, %v, want an error that names the setting", bad, got, err)
		}
	}
	got, err := corsOrigins("https://app.example.com, http://localhost:3000,capacitor://localhost,http://[::1]:5173")
	if err != nil || len(got) != 4 || got[1] != "http://localhost:3000" {
		t.Errorf("corsOrigins of four = %q, %v", got, err)
	}
}
