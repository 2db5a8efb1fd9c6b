package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const (
	hs256             = `{"alg":"HS256"}`
	aliceClaims       = `{"sub":"alice","exp":9000000000}` // until 2255
	otherSecret       = "another secret of the tests, 9876543210 äöü"
	badQuery          = "?limit=0"                     // of a list: a 422 once the token is verified
	badTokenChallenge = `Bearer error="invalid_token"` // the WWW-Authenticate of an invalid token
	base64urlDigits   = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
)

var base64url = base64.RawURLEncoding

// makeToken signs a header and claims as they are. It does not use the product's JWT library, so
// that the tests validate that library against the RFC.
func makeToken(secret, header, claims string) string {
	return signParts(sha256.New, secret, base64url.EncodeToString([]byte(header))+"."+
		base64url.EncodeToString([]byte(claims)))
}

// signParts appends the HMAC of an encoded header and encoded claims.
func signParts(newHash func() hash.Hash, secret, parts string) string {
	mac := hmac.New(newHash, []byte(secret))
	io.WriteString(mac, parts)
	return parts + "." + base64url.EncodeToString(mac.Sum(nil))
}

// newAuth returns an authenticator with testSecret and other settings, such as "JWT_ISSUER=x".
func newAuth(t testing.TB, entries ...string) *authenticator {
	t.Helper()
	a, err := newAuthenticator(env(slices.Insert(entries, 0, "BETTER_AUTH_SECRET="+testSecret)...))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Every token that section 5 of the contract accepts.
func TestAcceptedTokens(t *testing.T) {
	t.Parallel()
	_, c := startDetached(t, settings{})
	token := makeToken(testSecret, hs256, aliceClaims)
	of := func(claims string) string { return "Bearer " + makeToken(testSecret, hs256, claims) }
	for _, row := range []struct{ name, authorization string }{
		{"the minimum", "Bearer " + token},
		{"scheme in another case", "bEARER " + token},
		{"typ and kid", "Bearer " + makeToken(testSecret, `{"typ":"JWT","alg":"HS256","kid":"1"}`,
			aliceClaims)},
		{"claims of the jwt plugin", of(`{"email":"a@example.com","emailVerified":true,"image":null,
			"id":"alice","sub":"alice","exp":9e9,"iss":"https://a.example","aud":"https://a.example"}`)},
		{"aud an array", of(`{"sub":"alice","exp":9e9,"aud":["a","b"]}`)},
		{"iat in the future", of(`{"sub":"alice","exp":9e9,"iat":8e9}`)},
		{"fractional exp", of(`{"sub":"alice","exp":9000000000.75}`)},
		{"last second of 9999", of(`{"sub":"alice","exp":253402300799}`)},
	} {
		if a := c.do("GET", badQuery, "", "Authorization", row.authorization); a.status != 422 {
			t.Errorf("%s: %v, want 422", row.name, a)
		}
	}
}

// rejected sends a request of c with headers that must lead to a 401 with that WWW-Authenticate. It
// returns the reason in the log, and fails the test if the response or the log repeats a token.
func (s *service) rejected(c *client, query, challenge string, headers ...string) (reason string) {
	c.t.Helper()
	id := newUser()
	a := c.do("GET", query, "", append(headers, "X-Request-Id", id)...)
	got := a.header["Www-Authenticate"]
	if a.status != 401 || !slices.Equal(got, []string{challenge}) {
		c.t.Errorf("GET %s with %q = %v, %q, want 401, %q", query, headers, a, got, challenge)
	}
	reason = fmt.Sprint(s.log.request(c.t, id)["error"])
	seen := fmt.Sprint(a.header, a.body, s.log.String())
	separator := func(c rune) bool { return strings.ContainsRune(" .=", c) }
	for part := range strings.FieldsFuncSeq(query+" "+strings.Join(headers, " "), separator) {
		if len(part) >= 16 && strings.Contains(seen, part) {
			c.t.Errorf("GET %s with %q: the response or the log has %s", query, headers, part)
		}
	}
	return reason
}

// Every token that section 5 of the contract rejects, and the reason in the log: golang-jwt's own
// text, and a hint if the cause is one of those that an integrator meets.
func TestRejectedTokens(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{logLevel: slog.LevelDebug})
	token := makeToken(testSecret, hs256, aliceClaims)
	part := strings.Split(token, ".")
	of := func(claims string) string { return makeToken(testSecret, hs256, claims) }
	const (
		plugin    = ": is this a token of the jwt plugin?"
		session   = "token contains an invalid number of segments: is this a session token?"
		signature = "token signature is invalid: signature is invalid: do the secrets differ?"
		years     = "exp is outside the years 1970 to 9999: is it in milliseconds?"
		noSub     = "sub is missing: is this a session cookie or the token of an e-mail link?"
		badSub    = "sub: a user id must be"
	)
	type row struct{ name, token, reason string }
	rows := []row{
		{"none, unsigned", base64url.EncodeToString([]byte(`{"alg":"none"}`)) + "." + part[1] + ".",
			"token signature is invalid: signing method none is invalid" + plugin},
		{"no alg", makeToken(testSecret, `{"ALG":"HS256"}`, aliceClaims), "(alg) is unspecified"},
		{"header null", makeToken(testSecret, `null`, aliceClaims), ""},
		{"claims null", of(`null`), ""},
		{"crit", makeToken(testSecret, `{"alg":"HS256","crit":["exp"]}`, aliceClaims), "crit"},
		{"another secret", makeToken(otherSecret, hs256, aliceClaims), signature},
		{"other claims", part[0] + "." + base64url.EncodeToString([]byte(`{"sub":"bob","exp":9e9}`)) +
			"." + part[2], signature},
		{"session token", "Vq3kPz0sYd7LwXn2RbTfGhJm5CuEa9Ki", session},
		{"five parts", part[0] + ".." + part[1] + "." + part[2] + ".x", session},
		{"claims not JSON", of(aliceClaims + "}"), "token is malformed"},
		{"no exp", of(`{"sub":"alice","iat":1700000000,"Exp":9e9}`), "exp claim is required"},
		{"expired", of(`{"sub":"alice","exp":1700000000}`), "token has invalid claims: token is expired"},
		{"exp in 10000", of(`{"sub":"alice","exp":253402300800}`), years},
		{"exp a string", of(`{"sub":"alice","exp":"9000000000"}`), "exp is invalid"},
		{"not yet valid", of(`{"sub":"alice","exp":9e9,"nbf":8e9}`), "token is not valid yet"},
		{"nbf beyond int64", of(`{"sub":"alice","exp":9e9,"nbf":1e300}`), ""},
		{"nbf a string", of(`{"sub":"alice","exp":9e9,"nbf":"0"}`), "nbf is invalid"},
		{"nbf null", of(`{"sub":"alice","exp":9e9,"nbf":null}`), "nbf is invalid"},
		{"no sub", of(`{"Sub":"alice","id":"alice","user_id":"alice","userId":"alice",
			"email":"alice","user":{"id":"alice","sub":"alice"},"exp":9e9}`), noSub},
		{"sub a number", of(`{"sub":1,"exp":9e9}`), "sub is not a string"},
		{"sub empty", of(`{"sub":"","exp":9e9}`), badSub},
		{"sub of 513 bytes", of(`{"sub":"` + strings.Repeat("ä", 256) + `x","exp":9e9}`), badSub},
		{"sub with U+0000", of(`{"sub":"alice\u0000","exp":9e9}`), badSub},
		{"sub with half a pair", of(`{"sub":"alice\ud800","exp":9e9}`), badSub},
	}
	for alg, newHash := range map[string]func() hash.Hash{"HS384": sha512.New384, "HS512": sha512.New,
		"none": sha256.New, "RS256": sha256.New, "PS256": sha256.New, "ES256": sha256.New,
		"EdDSA": sha256.New, "hs256": sha256.New, "unknown": sha256.New} {
		header := base64url.EncodeToString(fmt.Appendf(nil, `{"alg":%q}`, alg))
		rows = append(rows, row{alg, signParts(newHash, testSecret, header+"."+part[1]), plugin})
	}
	// Each part of odd contains - or _, and its last digit has bits that a lenient decoder ignores.
	var odd []string
	for claims := `{"sub":"alice","exp":9e9,"x":"?>?>?>"}`; len(odd) == 0 ||
		!strings.ContainsAny(odd[2], "-_"); claims += "   " {
		odd = strings.Split(makeToken(testSecret, `{"alg":"HS256","x":"??>>"}`, claims), ".")
	}
	for spelling, spell := range map[string]func(string) string{
		"padded":    func(p string) string { return p + "=" },
		"in base64": strings.NewReplacer("-", "+", "_", "/").Replace,
		"with spare bits": func(p string) string {
			last := strings.IndexByte(base64urlDigits, p[len(p)-1])
			return p[:len(p)-1] + base64urlDigits[last+1:last+2]
		},
	} {
		for i, name := range []string{"header", "claims", "signature"} {
			changed := slices.Clone(odd)
			changed[i] = spell(odd[i])
			token := strings.Join(changed, ".")
			if name != "signature" {
				token = signParts(sha256.New, testSecret, changed[0]+"."+changed[1])
			}
			rows = append(rows, row{name + " " + spelling, token, "illegal base64 data"})
		}
	}
	for _, row := range rows {
		reason := s.rejected(c, badQuery, badTokenChallenge, "Authorization", "Bearer "+row.token)
		if !strings.Contains(reason, row.reason) {
			t.Errorf("%s: the log says %q, want %q", row.name, reason, row.reason)
		}
	}
}

// A token is read from the one Authorization header alone.
func TestWhereTheTokenIs(t *testing.T) {
	t.Parallel()
	s, c := startDetached(t, settings{logLevel: slog.LevelDebug})
	c.authorization = ""
	token := makeToken(testSecret, hs256, aliceClaims)
	const name = "Authorization"
	for _, row := range []struct {
		query, challenge string
		headers          []string
	}{
		{"", "Bearer", nil},
		{"", "Bearer", []string{name, "Bearer "}},
		{"", "Bearer", []string{name, "Basic " + token}},
		{"", "Bearer", []string{name, token}},
		{"", "Bearer", []string{"Cookie", "token=" + token + "; better-auth.session_token=" + token}},
		{"", "Bearer", []string{"Proxy-Authorization", "Bearer " + token}},
		{"?access_token=" + token + "&token=" + token, "Bearer", nil},
		{"", badTokenChallenge, []string{name, "Bearer " + token, name, "Bearer " + token}},
	} {
		s.rejected(c, row.query, row.challenge, row.headers...)
	}
}

// The leeway is 30 s at both ends of a token's life. The same token is verified on every request:
// that it was rejected or accepted before changes nothing. In the bubble the clock stands still.
func TestLeeway(t *testing.T) {
	t.Parallel()
	d := openDB(t, noDatabase)
	synctest.Test(t, func(t *testing.T) {
		s := newServer(settings{auth: sharedAuth}, d, slog.New(slog.DiscardHandler))
		start := time.Now()
		token := makeToken(testSecret, hs256, fmt.Sprintf(`{"sub":"alice","nbf":%d,"exp":%d}`,
			start.Unix()+60, start.Unix()+120))
		for i, after := range []time.Duration{30*time.Second - 1, 30 * time.Second,
			150*time.Second - 1, 150 * time.Second} {
			time.Sleep(after - time.Since(start))
			r := httptest.NewRequest("GET", "/api/alice/tasks"+badQuery, nil)
			r.Header.Set("Authorization", "Bearer "+token)
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if want := []int{401, 422, 422, 401}[i]; w.Code != want {
				t.Errorf("valid from 60 s to 120 s, after %v: %d, want %d", after, w.Code, want)
			}
		}
	})
}

// JWT_AUDIENCE and JWT_ISSUER, if set, must match.
func TestAudienceAndIssuer(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ audience, issuer, claims, reason string }{
		{" api\n", "", `"aud":"api"`, ""}, // white space around the setting is removed
		{"api", "", `"aud":["web","api"]`, ""},
		{"api", "", `"aud":["web","API"]`, "token has invalid audience"},
		{"api", "", `"Aud":"api"`, "aud claim is required"},
		{"", " https://a.example ", `"iss":"https://a.example","aud":"any"`, ""},
		{"", "https://a.example", `"iss":"https://a.example/"`, "token has invalid issuer"},
		{"", "https://a.example", `"Iss":"https://a.example"`, "iss claim is required"},
		{"api", "us", `"aud":"api","iss":"us"`, ""},
		{"api", "us", `"aud":"api","iss":"them"`, "token has invalid issuer"},
	} {
		a := newAuth(t, "JWT_AUDIENCE="+row.audience, "JWT_ISSUER="+row.issuer)
		token := makeToken(testSecret, hs256, `{"sub":"alice","exp":9000000000,`+row.claims+`}`)
		_, err := a.verify(token)
		if text := fmt.Sprint(err); (err == nil) != (row.reason == "") ||
			!strings.Contains(text, row.reason) {
			t.Errorf("JWT_AUDIENCE=%q JWT_ISSUER=%q and %s: %v, want %q", row.audience, row.issuer,
				row.claims, err, row.reason)
		}
	}
}

// BETTER_AUTH_SECRET is used exactly as given. BETTER_AUTH_SECRETS may be set instead or as well,
// and its entries are trimmed.
func TestSecrets(t *testing.T) {
	t.Parallel()
	const (
		a = "secret a of the tests; 0123456789 äöü"
		b = "secret b of the tests: 0123456789 =+/"
		c = "secret c of the tests. 0123456789 \"'"
	)
	encoded := base64.StdEncoding.EncodeToString([]byte(a)) // as `openssl rand -base64` prints it
	for _, row := range []struct {
		secret, secrets    string
		accepted, rejected []string // secrets of tokens; `todo-app token` uses the first one
	}{
		{a, "", []string{a}, []string{b, "", a[:len(a)-1]}},
		{encoded, "", []string{encoded}, []string{a}},
		{"  " + a + "\n", "", []string{"  " + a + "\n"}, []string{a, a + "\n", "  " + a}},
		{"", "1:" + b + ",2:" + a, []string{b, a}, []string{c, ""}},
		{"", " 2 : " + b + " ,\t1:" + a + "\n", []string{b, a}, []string{" " + b, a + "\n"}},
		{c, "2:" + b + ",1:" + a, []string{c, b, a}, []string{testSecret}},
	} {
		where := fmt.Sprintf("BETTER_AUTH_SECRET=%q BETTER_AUTH_SECRETS=%q", row.secret, row.secrets)
		auth := newAuth(t, "BETTER_AUTH_SECRET="+row.secret, "BETTER_AUTH_SECRETS="+row.secrets)
		for want, secrets := range map[string][]string{"alice": row.accepted, "": row.rejected} {
			for _, secret := range secrets {
				user, err := auth.verify(makeToken(secret, hs256, aliceClaims))
				if user != want {
					t.Errorf("%s: a token signed with %q = %q, %v, want %q", where, secret, user, err, want)
				}
			}
		}
		token, err := auth.sign("alice")
		parts := token[:max(0, strings.LastIndex(token, "."))]
		if err != nil || signParts(sha256.New, row.accepted[0], parts) != token {
			t.Errorf("%s: sign = %q, %v, want it signed with %q", where, token, err, row.accepted[0])
		}
	}
}

// A missing or weak secret ends the start with one line that names the setting. One that was
// probably copied wrong gets one WARNING. Neither shows anything of the secret.
func TestSecretsAtStart(t *testing.T) {
	t.Parallel()
	const ( // 32 bytes each
		a = "Q7xK2mPz9LwR4tYv8NcB5jHd3GfS6aEu"
		b = "hT5rV0qWn8XyZk3JmDpF7gLsC2bAe9Uo"
	)
	const valid, warned = "PORT", " begins or ends with white space.*\nPORT" // PORT ends the start
	const public, listForm = " is a published default", " must be a list like 2:new,1:old"
	for _, row := range []struct{ secret, secrets, want string }{
		{a, "", valid},
		{"", "2:" + a + ", 1: " + b + " ", valid},
		{strings.Repeat("é", 16), "", valid}, // 32 bytes
		{a + "\n", "", "BETTER_AUTH_SECRET" + warned},
		{a + "'", "", "BETTER_AUTH_SECRET" + warned},
		{"\u201c" + a, "", "BETTER_AUTH_SECRET" + warned},
		{"\ufeff" + a, "", "BETTER_AUTH_SECRET" + warned},
		{"", "2:" + a + ",1:`" + b, "BETTER_AUTH_SECRETS entry 2" + warned},

		{"", "", "BETTER_AUTH_SECRET is not set"},
		{a[1:], "", "BETTER_AUTH_SECRET has fewer than 32 bytes"},
		{"better-auth-secret-12345678901234567890\n", "", "BETTER_AUTH_SECRET" + public},
		{a, "2:" + a + ",1:" + b[1:] + " ", "BETTER_AUTH_SECRETS entry 2 has fewer"}, // trimmed
		{a, b, "BETTER_AUTH_SECRETS" + listForm},
		{"", "2:" + a + "," + b, "BETTER_AUTH_SECRETS" + listForm},
	} {
		var log lockedBuffer
		err := run(t.Context(), nil, env("BETTER_AUTH_SECRET="+row.secret,
			"BETTER_AUTH_SECRETS="+row.secrets, "DATABASE_URL="+noDatabase, "PORT=none"), &log)
		shown := strings.Join(append(log.messages(t, "WARNING"), fmt.Sprint(err)), "\n")
		if !regexp.MustCompile("^" + row.want + ".*$").MatchString(shown) {
			t.Errorf("%q, %q: the start says %q, want %q", row.secret, row.secrets, shown, row.want)
		}
		shown += log.String()
		for i := range len(a) - 3 {
			if strings.Contains(shown, a[i:i+4]) || strings.Contains(shown, b[i:i+4]) {
				t.Fatalf("%q, %q: the start shows a part of it: %s", row.secret, row.secrets, shown)
			}
		}
	}
}

// `todo-app token USER_ID` needs the settings of tokens alone, and prints a token that they accept.
// In the bubble the clock stands still.
func TestTokenCommand(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, row := range []struct{ user, audience, issuer string }{
			{" ä/b c@example.com", "api", "https://a.example"},
			{strings.Repeat("ä", 256), "", ""}, // 512 bytes
		} {
			settings := []string{"BETTER_AUTH_SECRET=" + testSecret, "JWT_AUDIENCE=" + row.audience,
				"JWT_ISSUER=" + row.issuer}
			var out bytes.Buffer
			err := run(t.Context(), []string{"token", row.user}, env(settings...), &out)
			token := strings.TrimSuffix(out.String(), "\n")
			if user, _ := newAuth(t, settings...).verify(token); err != nil || user != row.user {
				t.Fatalf("token %q = %q, %v, want its token", row.user, out.String(), err)
			}
			text, _ := base64url.DecodeString(strings.Split(token, ".")[1])
			now := float64(time.Now().Unix())
			want := map[string]any{"sub": row.user, "iat": now, "exp": now + 3600}
			if row.audience != "" {
				want["aud"], want["iss"] = row.audience, row.issuer
			}
			got := decode[map[string]any](t, string(text))
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("token %q has the claims %v, want %v", row.user, got, want)
			}
		}
	})
	for _, user := range []string{"", "a\x00", "a\xff", strings.Repeat("ä", 256) + "x"} {
		var out bytes.Buffer
		err := run(t.Context(), []string{"token", user}, env("BETTER_AUTH_SECRET="+testSecret), &out)
		if err == nil || out.Len() != 0 {
			t.Errorf("token %q = %v, prints %q, want an error alone", user, err, out.String())
		}
	}
}

// Every route but the public ones rejects a valid request without a token, with a forged one and
// with another user's. It changes nothing then, and repeats no id.
func TestEveryRouteRequiresTheUsersToken(t *testing.T) {
	t.Parallel()
	owner, other := newClient(t), newClient(t)
	task := owner.create("Milk")
	forged := makeToken(otherSecret, hs256, fmt.Sprintf(`{"sub":%q,"exp":9e9}`, owner.user))
	type request struct{ method, path string }
	requests := []request{{"HEAD", owner.path("")}, {"HEAD", owner.path(task.path())}}
	public := []string{"GET /health/live", "GET /health/ready", "GET /openapi.json", "GET /docs"}
	inPath := strings.NewReplacer("{user_id}", owner.user, "/{id}", task.path())
	for pattern := range (&server{}).routes() {
		method, path, _ := strings.Cut(pattern, " ")
		if !slices.Contains(public, pattern) {
			requests = append(requests, request{method, inPath.Replace(path)})
		}
	}
	for _, row := range requests {
		for _, by := range []struct {
			authorization, challenge string
			status                   int
		}{
			{"", "Bearer", 401},
			{"Bearer " + forged, badTokenChallenge, 401},
			{other.authorization, "", 403},
		} {
			c := *owner
			c.authorization = by.authorization
			a := c.send(row.method, row.path, `{"title": "x"}`)
			if got := a.header.Get("WWW-Authenticate"); a.status != by.status || got != by.challenge {
				t.Errorf("%s %s by %q = %v, WWW-Authenticate %q, want %d, %q", row.method, row.path,
					by.authorization, a, got, by.status, by.challenge)
			}
			all := fmt.Sprint(a.header, a.body)
			if strings.Contains(all, owner.user) || strings.Contains(all, other.user) {
				t.Errorf("%s %s by %q repeats an id: %s", row.method, row.path, by.authorization, all)
			}
		}
	}
	if got := owner.list(""); fmt.Sprint(got) != fmt.Sprint([]wireTask{task}) {
		t.Errorf("afterwards the list is %v, want %v", got, task)
	}
}
