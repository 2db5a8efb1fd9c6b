package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	hs256       = `{"alg":"HS256"}`
	otherSecret = "another secret of the tests 9876543210 ä"
	alphabet    = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" // RFC 4648, 5
	invalid401  = `Bearer error="invalid_token"`
)

var base64url = base64.RawURLEncoding

// signed completes a header's and a claims' part with their HS256 signature,
// in whatever spelling they are: written out here, so that the product's JWT
// library is held to the RFC and not to itself.
func signed(secret, parts string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	io.WriteString(mac, parts)
	return parts + "." + base64url.EncodeToString(mac.Sum(nil))
}

// sealed makes a token of a header and claims as they are.
func sealed(secret, header, claims string) string {
	return signed(secret, base64url.EncodeToString([]byte(header))+"."+base64url.EncodeToString([]byte(claims)))
}

// loose respells a base64url part whose last character has spare bits: it
// sets one, which a lenient decoder drops.
func loose(part string) string {
	last := len(part) - 1
	return part[:last] + string(alphabet[strings.IndexByte(alphabet, part[last])+1])
}

// in is the JSON number of a time so far from now.
func in(d time.Duration) string { return fmt.Sprint(time.Now().Add(d).Unix()) }

// good are the claims of a user, good for a while, and more of them: `,"a":1`.
func good(user, more string) string {
	return fmt.Sprintf(`{"sub":%q,"exp":%s%s}`, user, in(time.Hour), more)
}

// words returns what of a text would be a leak: all that is as long as the
// part of a token, or of a secret.
func words(texts ...string) (long []string) {
	for _, text := range texts {
		for _, word := range strings.FieldsFunc(text, func(c rune) bool { return strings.ContainsRune(" .,:=\"", c) }) {
			if len(word) >= 12 {
				long = append(long, word)
			}
		}
	}
	return long
}

// get asks with just these headers.
func get(t testing.TB, target string, header http.Header) answer {
	t.Helper()
	r, err := http.NewRequest("GET", target, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = header
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header, string(body)}
}

func bearer(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }

func tasksOf(service, user string) string { return service + "/api/" + url.PathEscape(user) + "/tasks" }

func TestAcceptedTokens(t *testing.T) {
	t.Parallel()
	user := "test-" + rand.Text()
	wide := strings.Repeat("ä", 256-len(user)) + user + user // 512 bytes
	for _, row := range []struct{ name, user, scheme, header, claims string }{
		{"the least", user, "Bearer", hs256, good(user, ``)},
		{"typ and kid", user, "Bearer", `{"typ":"JWT","alg":"HS256","kid":"k1"}`, good(user, ``)},
		{"odd typ", user, "Bearer", `{"alg":"HS256","typ":"at+jwt","x5t":1}`, good(user, ``)},
		{"extra claims", user, "Bearer", hs256, good(user, `,"id":"x","email":"x@example.com","Sub":"x","user":{"id":[1]},"roles":[null]`)},
		{"aud string", user, "Bearer", hs256, good(user, `,"aud":"web","iss":"https://example.com"`)},
		{"aud array", user, "Bearer", hs256, good(user, `,"aud":["a","b"]`)},
		{"iat ahead", user, "Bearer", hs256, good(user, `,"iat":`+in(24*time.Hour))},
		{"iat in milliseconds", user, "Bearer", hs256, good(user, `,"iat":`+in(0)+`000`)},
		{"iat a string", user, "Bearer", hs256, good(user, `,"iat":"soon"`)},
		{"iat null", user, "Bearer", hs256, good(user, `,"iat":null`)},
		{"fractional times", user, "Bearer", hs256, fmt.Sprintf(`{"sub":%q,"exp":%s.75,"nbf":%s.25}`, user, in(time.Hour), in(-time.Hour))},
		{"exponent", user, "Bearer", hs256, fmt.Sprintf(`{"sub":%q,"exp":2.5e11}`, user)},
		{"last second of 9999", user, "Bearer", hs256, fmt.Sprintf(`{"sub":%q,"exp":253402300799}`, user)},
		{"nbf in 1970", user, "Bearer", hs256, good(user, `,"nbf":0`)},
		{"lower case", user, "bearer", hs256, good(user, ``)},
		{"mixed case", user, "bEARER", hs256, good(user, ``)},
		{"512 bytes", wide, "Bearer", hs256, good(wide, ``)},
		{"JSON escapes and space", user, "Bearer", "{ \"\\u0061lg\":\n\"HS256\" }", "\t" +
			fmt.Sprintf(`{"s\u0075b" : "\u0074%s", "exp": %s }`, user[1:], in(time.Hour))},
	} {
		token := sealed(testSecret, row.header, row.claims)
		a := get(t, tasksOf(sharedURL, row.user), http.Header{"Authorization": {row.scheme + " " + token}})
		if a.status != 200 || strings.TrimSpace(a.body) != "[]" {
			t.Errorf("%s: list with %s = %d %s, want 200 []", row.name, row.claims, a.status, a.body)
		}
	}
}

func TestRefusedTokens(t *testing.T) {
	t.Parallel()
	user := "test-" + rand.Text()
	service, log := serviceOf(t, testSecret, "2:"+otherSecret, "", "")
	fine := good(user, ``)
	token := sealed(testSecret, hs256, fine)
	part := strings.Split(token, ".")
	of := func(claims string) string { return sealed(testSecret, hs256, claims) }

	// Lengths that leave spare bits, and bytes that need the alphabet's last two characters.
	oddHeader, oddClaims := base64url.EncodeToString([]byte(`{"alg":"HS256" }`)), good(user, `,"x":"~~~???>>>"`)
	for len(oddClaims)%3 != 1 {
		oddClaims += " "
	}
	odd := base64url.EncodeToString([]byte(oddClaims))
	oddToken := signed(testSecret, oddHeader+"."+odd)
	for claims := oddClaims; !strings.ContainsAny(oddToken[len(oddToken)-43:], "-_"); {
		claims += "   "
		oddToken = signed(testSecret, oddHeader+"."+base64url.EncodeToString([]byte(claims)))
	}
	std := strings.NewReplacer("-", "+", "_", "/")
	dot := strings.LastIndex(oddToken, ".") + 1

	sign := func(method jwt.SigningMethod, key any) string {
		t.Helper()
		made, err := jwt.NewWithClaims(method, jwt.MapClaims{"sub": user, "exp": time.Now().Add(time.Hour).Unix()}).SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	const (
		algorithm = "not HS256: is this a token of the jwt plugin?"
		parts     = "not three parts: is this a session token?"
		signature = "bad signature: do the secrets differ?"
		encoding  = "base64url"
		kind      = "wrong type"
		years     = "1970 to 9999"
		subject   = "sub is"
	)
	type request struct {
		name      string
		header    http.Header
		query     string
		challenge string
		reason    string // that the log gives
	}
	requests := []request{
		{"nothing", nil, "", "Bearer", "Send an access token"},
		{"empty header", http.Header{"Authorization": {""}}, "", "Bearer", "Send an access token"},
		{"empty Bearer", http.Header{"Authorization": {"Bearer"}}, "", "Bearer", "Send an access token"},
		{"Basic", http.Header{"Authorization": {"Basic " + token}}, "", "Bearer", "Send an access token"},
		{"no scheme", http.Header{"Authorization": {token}}, "", "Bearer", "Send an access token"},
		{"query", nil, "?access_token=" + token + "&token=" + token, "Bearer", "Send an access token"},
		{"cookies", http.Header{"Cookie": {"better-auth.session_token=" + token + "; token=" + token}}, "", "Bearer", "Send an access token"},
		{"other headers", http.Header{"X-Auth-Token": {token}, "Proxy-Authorization": {"Bearer " + token}}, "", "Bearer", "Send an access token"},
		{"two headers", http.Header{"Authorization": {"Bearer " + token, "Bearer " + token}}, "", invalid401, "more than one Authorization header"},
		{"two schemes", http.Header{"Authorization": {"Basic eDp5", "Bearer " + token}}, "", invalid401, "more than one Authorization header"},
	}
	for _, row := range []struct{ name, token, reason string }{
		{"none", sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType), algorithm},
		{"none with our signature", sealed(testSecret, `{"alg":"none"}`, fine), algorithm},
		{"HS384", sign(jwt.SigningMethodHS384, []byte(testSecret)), algorithm},
		{"HS512", sign(jwt.SigningMethodHS512, []byte(testSecret)), algorithm},
		{"RS256", sign(jwt.SigningMethodRS256, rsaKey), algorithm},
		{"PS256", sign(jwt.SigningMethodPS256, rsaKey), algorithm},
		{"ES256", sign(jwt.SigningMethodES256, ecKey), algorithm},
		{"EdDSA", sign(jwt.SigningMethodEdDSA, edKey), algorithm},
		{"RS256 with our signature", sealed(testSecret, `{"alg":"RS256"}`, fine), algorithm},
		{"unknown alg", sealed(testSecret, `{"alg":"ES256K"}`, fine), algorithm},
		{"alg in lower case", sealed(testSecret, `{"alg":"hs256"}`, fine), algorithm},
		{"alg under another name", sealed(testSecret, `{"ALG":"HS256"}`, fine), algorithm},
		{"alg no string", sealed(testSecret, `{"alg":["HS256"]}`, fine), algorithm},
		{"crit", sealed(testSecret, `{"alg":"HS256","crit":["exp"]}`, fine), "crit"},
		{"empty crit", sealed(testSecret, `{"alg":"HS256","crit":[]}`, fine), "crit"},
		{"crit null", sealed(testSecret, `{"alg":"HS256","crit":null}`, fine), "crit"},

		{"another secret", sealed("a third secret, which this service has not", hs256, fine), signature},
		{"empty secret", sealed("", hs256, fine), signature},
		{"no signature", part[0] + "." + part[1] + ".", signature},
		{"cut signature", token[:len(token)-3], signature},
		{"other claims", part[0] + "." + base64url.EncodeToString([]byte(good("test-somebody", ``))) + "." + part[2], signature},

		{"opaque", rand.Text() + rand.Text(), parts},
		{"session cookie", rand.Text() + "." + part[2], parts},
		{"JWE", base64url.EncodeToString([]byte(`{"alg":"dir","enc":"A256GCM"}`)) + ".." + rand.Text() + "." + rand.Text() + "." + rand.Text(), parts},
		{"four parts", token + "." + part[2], parts},
		{"dot behind", token + ".", parts},
		{"dot in front", "." + token, parts},
		{"two tokens", token + ", Bearer " + token, parts},

		{"empty parts", "..", encoding},
		{"quoted", `"` + token + `"`, encoding},
		{"scheme twice", "Bearer " + token, encoding},
		{"header padded", signed(testSecret, oddHeader+"==."+odd), encoding},
		{"claims padded", signed(testSecret, oddHeader+"."+odd+"=="), encoding},
		{"signature padded", token + "=", encoding},
		{"header with spare bits", signed(testSecret, loose(oddHeader)+"."+odd), encoding},
		{"claims with spare bits", signed(testSecret, oddHeader+"."+loose(odd)), encoding},
		{"signature with spare bits", loose(token), encoding},
		{"claims in base64", signed(testSecret, oddHeader+"."+std.Replace(odd)), encoding},
		{"signature in base64", oddToken[:dot] + std.Replace(oddToken[dot:]), encoding},
		{"space in header", signed(testSecret, part[0][:4]+" "+part[0][4:]+"."+part[1]), encoding},
		{"space behind header", signed(testSecret, part[0]+" ."+part[1]), encoding},
		{"tab in claims", signed(testSecret, part[0]+"."+part[1][:4]+"\t"+part[1][4:]), encoding},
		{"space in signature", token[:len(token)-4] + " " + token[len(token)-4:], encoding},
		{"header no JSON", sealed(testSecret, `{"alg":"HS256"`, fine), encoding},
		{"header followed", sealed(testSecret, hs256+`{}`, fine), encoding},
		{"claims no JSON", of(fine[1:]), encoding},
		{"claims followed", of(fine + "x"), encoding},
		{"claims an array", of(`[` + fine + `]`), encoding},
		{"claims null", of(`null`), "has no exp"},
		{"header null", sealed(testSecret, `null`, fine), algorithm},

		{"no exp", of(fmt.Sprintf(`{"sub":%q,"iat":%s}`, user, in(0))), "has no exp"},
		{"exp under another name", of(fmt.Sprintf(`{"sub":%q,"Exp":%s}`, user, in(time.Hour))), "has no exp"},
		{"expired", of(fmt.Sprintf(`{"sub":%q,"exp":%s}`, user, in(-time.Minute))), ": expired"},
		{"exp 0", of(fmt.Sprintf(`{"sub":%q,"exp":0}`, user)), ""},
		{"exp before 1970", of(fmt.Sprintf(`{"sub":%q,"exp":-1}`, user)), ""},
		{"exp in milliseconds", of(fmt.Sprintf(`{"sub":%q,"exp":%s000}`, user, in(time.Hour))), years},
		{"exp in 10000", of(fmt.Sprintf(`{"sub":%q,"exp":253402300800}`, user)), years},
		{"exp beyond int64", of(fmt.Sprintf(`{"sub":%q,"exp":1e300}`, user)), ""},
		{"exp beyond float64", of(fmt.Sprintf(`{"sub":%q,"exp":1e400}`, user)), ""},
		{"exp a string", of(fmt.Sprintf(`{"sub":%q,"exp":"%s"}`, user, in(time.Hour))), kind},
		{"exp null", of(fmt.Sprintf(`{"sub":%q,"exp":null}`, user)), kind},
		{"exp true", of(fmt.Sprintf(`{"sub":%q,"exp":true}`, user)), kind},
		{"exp an array", of(fmt.Sprintf(`{"sub":%q,"exp":[%s]}`, user, in(time.Hour))), kind},
		{"not yet", of(good(user, `,"nbf":`+in(5*time.Minute))), "not yet valid"},
		{"nbf before 1970", of(good(user, `,"nbf":-1`)), years},
		{"nbf long before 1970", of(good(user, `,"nbf":-1e300`)), ""},
		{"nbf in milliseconds", of(good(user, `,"nbf":`+in(-time.Hour)+`000`)), ""},
		{"nbf a string", of(good(user, `,"nbf":"0"`)), kind},
		{"nbf null", of(good(user, `,"nbf":null`)), kind},
		{"nbf false", of(good(user, `,"nbf":false`)), kind},

		{"no sub", of(`{"exp":` + in(time.Hour) + `}`), subject},
		{"sub empty", of(good("", ``)), subject},
		{"sub a number", of(`{"sub":1,"exp":` + in(time.Hour) + `}`), "sub is not a string"},
		{"sub null", of(fmt.Sprintf(`{"sub":null,"id":%q,"exp":%s}`, user, in(time.Hour))), subject},
		{"sub an array", of(fmt.Sprintf(`{"sub":[%q],"exp":%s}`, user, in(time.Hour))), subject},
		{"sub of 513 bytes", of(good(strings.Repeat("ä", 256)+"x", ``)), subject},
		{"sub with U+0000", of(`{"sub":"a\u0000","exp":` + in(time.Hour) + `}`), subject},
		{"sub with half a pair", of(`{"sub":"a\ud800","exp":` + in(time.Hour) + `}`), subject},
		{"sub not UTF-8", of(`{"sub":"a` + "\xff" + `","exp":` + in(time.Hour) + `}`), subject},
		{"Sub", of(fmt.Sprintf(`{"Sub":%q,"SUB":%q,"exp":%s}`, user, user, in(time.Hour))), subject},
		{"id", of(fmt.Sprintf(`{"id":%q,"exp":%s}`, user, in(time.Hour))), subject},
		{"userId", of(fmt.Sprintf(`{"userId":%q,"exp":%s}`, user, in(time.Hour))), subject},
		{"user_id", of(fmt.Sprintf(`{"user_id":%q,"exp":%s}`, user, in(time.Hour))), subject},
		{"e-mail link", of(fmt.Sprintf(`{"email":%q,"exp":%s}`, user, in(time.Hour))), subject},
		{"session cache", of(fmt.Sprintf(`{"session":{"userId":%q},"user":{"id":%q,"sub":%q},"exp":%s}`, user, user, user, in(time.Hour))), subject},
	} {
		requests = append(requests, request{row.name, bearer(row.token), "", invalid401, row.reason})
	}

	var secrets []string // whatever no log may hold
	for i, row := range requests {
		var sent []string
		for _, values := range row.header {
			sent = append(sent, words(values...)...)
		}
		sent = append(sent, words(row.query)...)
		secrets = append(secrets, sent...)
		header := row.header.Clone()
		if header == nil {
			header = http.Header{}
		}
		header.Set("X-Request-Id", fmt.Sprint("row", i))
		a := get(t, tasksOf(service.URL, user)+row.query, header)
		if got := a.header["Www-Authenticate"]; a.status != 401 || !slices.Equal(got, []string{row.challenge}) || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d, WWW-Authenticate %q, %s, want 401, %q, JSON", row.name, a.status, got, a.header.Get("Content-Type"), row.challenge)
		}
		if detail(t, a) == "" {
			t.Errorf("%s: no detail", row.name)
		}
		all := fmt.Sprint(a.header, a.body)
		if i := slices.IndexFunc(sent, func(word string) bool { return strings.Contains(all, word) }); i >= 0 {
			t.Errorf("%s: the answer repeats %s of the token: %s", row.name, sent[i], all)
		}
	}

	service.Close() // and so the log is whole
	lines := map[string]string{}
	for line := range strings.Lines(log.String()) {
		entry := decode[map[string]any](t, line)
		lines[fmt.Sprint(entry["request_id"])] = fmt.Sprint(entry["error"])
	}
	for i, row := range requests {
		if line := lines[fmt.Sprint("row", i)]; line == "" || !strings.Contains(line, row.reason) {
			t.Errorf("%s: the log says %q, want %q", row.name, line, row.reason)
		}
	}
	for _, word := range append(secrets, testSecret, otherSecret) {
		if strings.Contains(log.String(), word) {
			t.Errorf("the log holds %s", word)
		}
	}
}

// The clock stands still in the bubble, so the leeway is exact. Nothing
// there may wait for the database, so the path is somebody else's: a 403 says that the
// token was accepted.
func TestLeeway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		service := newServer(sharedAuth, sharedDB, slog.New(slog.DiscardHandler), nil, "")
		for _, row := range []struct {
			exp, nbf string
			status   int
		}{
			{in(-29 * time.Second), in(0), 403},
			{in(-30 * time.Second), in(0), 401},
			{in(-29*time.Second) + ".9", in(0), 403},
			{in(time.Hour), in(30 * time.Second), 403},
			{in(time.Hour), in(31 * time.Second), 401},
		} {
			r := httptest.NewRequest("GET", "/api/somebody/tasks", nil)
			r.Header = bearer(sealed(testSecret, hs256, fmt.Sprintf(`{"sub":"a","exp":%s,"nbf":%s}`, row.exp, row.nbf)))
			w := httptest.NewRecorder()
			service.ServeHTTP(w, r)
			if w.Code != row.status {
				t.Errorf("at %s, exp %s, nbf %s = %d, want %d", in(0), row.exp, row.nbf, w.Code, row.status)
			}
		}
	})
}

func TestAudienceAndIssuer(t *testing.T) {
	t.Parallel()
	user := "test-" + rand.Text()
	for _, row := range []struct {
		audience, issuer, claims string
		status                   int
		reason                   string
	}{
		{"api", "", `,"aud":"api"`, 200, ""},
		{"api", "", `,"aud":["web","api"]`, 200, ""},
		{"api", "", `,"aud":"web"`, 401, "aud is not JWT_AUDIENCE"},
		{"api", "", `,"aud":"API"`, 401, "aud is not JWT_AUDIENCE"},
		{"api", "", `,"aud":["web","api2"]`, 401, "aud is not JWT_AUDIENCE"},
		{"api", "", `,"aud":[]`, 401, "JWT_AUDIENCE"},
		{"api", "", `,"aud":[["api"]]`, 401, "aud"},
		{"api", "", `,"aud":{"api":"api"}`, 401, "aud"},
		{"api", "", `,"Aud":"api"`, 401, "JWT_AUDIENCE"},
		{"", "https://a.example", `,"iss":"https://a.example","aud":"any"`, 200, ""},
		{"", "https://a.example", `,"iss":"https://a.example/"`, 401, "iss is not JWT_ISSUER"},
		{"", "https://a.example", `,"iss":["https://a.example"]`, 401, "iss"},
		{"", "https://a.example", ``, 401, "JWT_ISSUER"},
		{"api", "us", `,"aud":"api","iss":"us"`, 200, ""},
		{"api", "us", `,"aud":"us","iss":"us"`, 401, "aud is not JWT_AUDIENCE"},
		{"api", "us", `,"aud":"api","iss":"them"`, 401, "iss is not JWT_ISSUER"},
	} {
		service, log := serviceOf(t, testSecret, "", row.audience, row.issuer)
		a := get(t, tasksOf(service.URL, user), bearer(sealed(testSecret, hs256, good(user, row.claims))))
		service.Close()
		if a.status != row.status || a.status == 401 && a.header.Get("WWW-Authenticate") != invalid401 {
			t.Errorf("JWT_AUDIENCE=%s JWT_ISSUER=%s: a token with %s = %d %v, want %d", row.audience, row.issuer, row.claims, a.status, a.header, row.status)
		}
		if !strings.Contains(log.String(), row.reason) {
			t.Errorf("JWT_AUDIENCE=%s JWT_ISSUER=%s: the log of %s says %s, want %q", row.audience, row.issuer, row.claims, log, row.reason)
		}
	}
}

func TestSecrets(t *testing.T) {
	t.Parallel()
	user := "test-" + rand.Text()
	raw := base64.StdEncoding.EncodeToString([]byte(testSecret)) // as `openssl rand -base64 32` looks
	const a, b, c = "secret a of the tests; 0123456789 äöü", "secret b of the tests: 0123456789 =+/", "secret c of the tests. 0123456789 \"'"
	for _, row := range []struct {
		secret, secrets   string
		signs             string // the token that `todo-app token` prints
		accepted, refused []string
	}{
		{a, "", a, []string{a}, []string{b, "", a[:len(a)-1]}},
		{raw, "", raw, []string{raw}, []string{testSecret}},
		{"  " + a + "\n", "", "  " + a + "\n", []string{"  " + a + "\n"}, []string{a, a + "\n", "  " + a}},
		{"", "1:" + a, a, []string{a}, []string{b, "1:" + a}},
		{"", "2:" + b + ",1:" + a, b, []string{a, b}, []string{c, ""}},
		{"", "1:" + b + ",2:" + a, b, []string{a, b}, []string{c}}, // the first signs, not the highest
		{"", " 2 : " + b + " ,\t1:" + a + "\n", b, []string{a, b}, []string{" " + b, " " + b + " ", a + "\n"}},
		{c, "2:" + b + ",1:" + a, c, []string{a, b, c}, []string{testSecret}},
		{c, "7:" + c + ",0:" + a, c, []string{a, c}, []string{b}},
	} {
		service, log := serviceOf(t, row.secret, row.secrets, "", "")
		for status, secrets := range map[int][]string{200: row.accepted, 401: row.refused} {
			for _, secret := range secrets {
				if got := get(t, tasksOf(service.URL, user), bearer(sealed(secret, hs256, good(user, ``)))); got.status != status {
					t.Errorf("with %q and %q a token signed with %q = %d %s, want %d", row.secret, row.secrets, secret, got.status, got.body, status)
				}
			}
		}
		service.Close()
		if n := strings.Count(log.String(), "bad signature: do the secrets differ?"); n != len(row.refused) {
			t.Errorf("with %q and %q the log has %d bad signatures, want %d", row.secret, row.secrets, n, len(row.refused))
		}
		var out bytes.Buffer
		err := run(t.Context(), []string{"token", user}, environment{"BETTER_AUTH_SECRET": row.secret, "BETTER_AUTH_SECRETS": row.secrets}.get, &out)
		token := strings.TrimSuffix(out.String(), "\n")
		if parts := token[:strings.LastIndex("."+token, ".")]; err != nil || signed(row.signs, strings.TrimSuffix(parts, ".")) != token {
			t.Errorf("with %q and %q, token = %q, %v, want one signed with %q", row.secret, row.secrets, token, err, row.signs)
		}
	}
}

// An environment is what run reads its settings from.
type environment map[string]string

func (s environment) get(name string) string { return s[name] }

func TestBadSecretsStopTheStart(t *testing.T) {
	t.Parallel()
	const a, b = "secret-a-of-the-tests-0123456789", "secret-b-of-the-tests-0123456789" // 32 bytes each
	const old, since = "better-auth-secret-123456789", "better-auth-secret-12345678901234567890"
	for _, row := range []struct{ secret, secrets, names string }{
		{"", "", "BETTER_AUTH_SECRET"},
		{a[1:], "", "BETTER_AUTH_SECRET"},
		{old, "", "BETTER_AUTH_SECRET"},
		{since, "", "BETTER_AUTH_SECRET"},
		{since, "1:" + a, "BETTER_AUTH_SECRET"},
		{a[1:], "1:" + a, "BETTER_AUTH_SECRET"},
		{"", a, "BETTER_AUTH_SECRETS"},
		{b, a, "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + "," + b, "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",", "BETTER_AUTH_SECRETS"},
		{"", "," + "2:" + a, "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",,1:" + b, "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",1:", "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",1:  ", "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",1:" + b[1:], "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",1:" + b[1:] + " ", "BETTER_AUTH_SECRETS"}, // 32 bytes, until trimmed
		{"", "2:" + a + ",2:" + b, "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",02:" + b, "BETTER_AUTH_SECRETS"},
		{"", "2:" + since, "BETTER_AUTH_SECRETS"},
		{"", "2: " + since + " ,1:" + a, "BETTER_AUTH_SECRETS"},
		{"", "2:" + a + ",1:" + old, "BETTER_AUTH_SECRETS"},
		{"", "-1:" + a, "BETTER_AUTH_SECRETS"},
		{"", ":" + a, "BETTER_AUTH_SECRETS"},
		{"", "v1:" + a, "BETTER_AUTH_SECRETS"},
		{"", a + ":1", "BETTER_AUTH_SECRETS"},
		{"", "1.5:" + a, "BETTER_AUTH_SECRETS"},
		{"", " ", "BETTER_AUTH_SECRETS"},
	} {
		env := environment{"BETTER_AUTH_SECRET": row.secret, "BETTER_AUTH_SECRETS": row.secrets, "DATABASE_URL": "postgres://localhost/none"}
		for _, args := range [][]string{nil, {"token", "user"}} {
			var out bytes.Buffer
			// A context that is done: what starts all the same, stops at once.
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			err := run(ctx, args, env.get, &out)
			if err == nil {
				t.Errorf("run(%q) with %q and %q = nil, want an error", args, row.secret, row.secrets)
				continue
			}
			if !slices.Contains(strings.Fields(err.Error()), row.names) || strings.Contains(err.Error(), "\n") || out.Len() > 0 {
				t.Errorf("run(%q) with %q and %q: %q, output %q, want one line that names %s", args, row.secret, row.secrets, err, &out, row.names)
			}
			for _, word := range words(row.secret, row.secrets) {
				if strings.Contains(err.Error(), word) {
					t.Errorf("run(%q) shows the secret %s: %v", args, word, err)
				}
			}
		}
	}
}

func TestTokenCommand(t *testing.T) {
	t.Parallel()
	user := "test-" + rand.Text()
	for _, row := range []struct{ user, audience, issuer string }{
		{user, "", ""},
		{user, "api", ""},
		{user, "api", "https://a.example"},
		{"ä/b c@example.com " + user, "", ""},
		{strings.Repeat("x", 512-len(user)) + user, "", ""},
	} {
		// Without DATABASE_URL: it asks no database.
		env := environment{"BETTER_AUTH_SECRET": testSecret, "JWT_AUDIENCE": row.audience, "JWT_ISSUER": row.issuer}
		var out bytes.Buffer
		before := time.Now().Unix()
		if err := run(t.Context(), []string{"token", row.user}, env.get, &out); err != nil {
			t.Errorf("token %q with %v: %v", row.user, env, err)
			continue
		}
		token, ended := strings.CutSuffix(out.String(), "\n")
		part := strings.Split(token, ".")
		if len(part) != 3 || !ended {
			t.Errorf("token %q prints %q, want a token on a line", row.user, &out)
			continue
		}
		text, _ := base64url.DecodeString(part[1])
		claims := decode[struct {
			Sub, Aud, Iss string
			Iat, Exp      int64
		}](t, string(text))
		if claims.Sub != row.user || claims.Aud != row.audience || claims.Iss != row.issuer {
			t.Errorf("token %q with %v says %+v", row.user, env, claims)
		}
		if row.audience == "" && strings.Contains(string(text), `"aud"`) || row.issuer == "" && strings.Contains(string(text), `"iss"`) {
			t.Errorf("token %q with %v says %s, with what is not set", row.user, env, text)
		}
		if claims.Exp != claims.Iat+3600 || claims.Iat < before || claims.Iat > time.Now().Unix() {
			t.Errorf("token %q is for %d to %d, want an hour from %d", row.user, claims.Iat, claims.Exp, before)
		}
		service, _ := serviceOf(t, testSecret, "", row.audience, row.issuer)
		if a := get(t, tasksOf(service.URL, row.user), bearer(token)); a.status != 200 {
			t.Errorf("list with the token of %q and %v = %d %s, want 200", row.user, env, a.status, a.body)
		}
	}

	for _, args := range [][]string{
		{"token", ""}, {"token", "a\x00b"}, {"token", strings.Repeat("ä", 256) + "x"}, {"token", "a\xff"},
		{"token"}, {"token", user, user}, {"tokens", user}, {user},
	} {
		var out bytes.Buffer
		if err := run(t.Context(), args, environment{"BETTER_AUTH_SECRET": testSecret}.get, &out); err == nil || out.Len() > 0 {
			t.Errorf("run(%q) = %v, prints %q, want an error and nothing", args, err, &out)
		}
	}
}

// Every route, asked by nobody, by a forger and by somebody else, before anything
// else of the request is looked at.
func TestTasksAreTheirUsersAlone(t *testing.T) {
	t.Parallel()
	owner, other := newClient(t), newClient(t)
	task := owner.create("Milk")
	path := fmt.Sprintf("/%d", task.ID)
	for _, row := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"HEAD", "", ""}, {"POST", "", `{"title": "x"}`}, {"POST", "", `no JSON`}, {"GET", "?limit=x", ""},
		{"GET", path, ""}, {"HEAD", path, ""}, {"PUT", path, `{"title": "x"}`}, {"PATCH", path, `{"completed": true}`},
		{"PATCH", path + "/complete", ""}, {"DELETE", path, ""},
		{"GET", "/0", ""}, {"PUT", "/x", `[]`}, {"DELETE", "/x", ""}, {"PATCH", "/x/complete", strings.Repeat(" ", 65<<10)},
	} {
		for _, by := range []struct {
			authorization string
			status        int
			challenge     string
		}{
			{"", 401, "Bearer"},
			{"Bearer " + sealed(otherSecret, hs256, good(owner.user, ``)), 401, invalid401},
			{other.authorization, 403, ""},
		} {
			c := *owner
			c.authorization = by.authorization
			a := c.do(row.method, row.path, row.body)
			if a.status != by.status || a.header.Get("WWW-Authenticate") != by.challenge {
				t.Errorf("%s %s by %q = %d %q %s, want %d %q", row.method, row.path, by.authorization, a.status,
					a.header.Get("WWW-Authenticate"), a.body, by.status, by.challenge)
			}
			if row.method != "HEAD" && detail(t, a) == "" {
				t.Errorf("%s %s by %q: no detail", row.method, row.path, by.authorization)
			}
			if all := fmt.Sprint(a.header, a.body); strings.Contains(all, owner.user) || strings.Contains(all, other.user) {
				t.Errorf("%s %s by %q repeats an id: %s", row.method, row.path, by.authorization, all)
			}
		}
	}
	if got := decode[[]wireTask](t, owner.do("GET", "", "").body); len(got) != 1 || !equalTasks(got[0], task) {
		t.Errorf("then the list = %+v, want %+v alone and as it was", got, task)
	}
}

func TestUserIDsAreBytes(t *testing.T) {
	t.Parallel()
	id := rand.Text()
	for _, row := range []struct {
		user             string // and the id
		allowed, refused []string
	}{
		{"a/b", []string{"a%2Fb", "a%2fb", "%61%2F%62"}, []string{"a%252Fb", "a%5Cb", "A%2Fb"}},
		{"ä@example.com", []string{"%C3%A4@example.com", "%c3%a4%40example.com", "ä@example.com"}, // composed
			[]string{"a%CC%88@example.com", "%E4@example.com", "%C3%84@example.com"}},
		{"a\u0308@example.com", []string{"a%CC%88@example.com"}, []string{"%C3%A4@example.com"}}, // decomposed
		{"..", []string{"%2E%2E", "%2e."}, []string{"%252E%252E", "%2E"}},
		{"../x/", []string{"%2E%2E%2Fx%2F"}, []string{"x"}},
		{`"1"`, []string{"%221%22"}, []string{"1", "%271%27"}},
		{"a b", []string{"a%20b"}, []string{"a+b", "a%2520b", "ab", "a%C2%A0b"}},
		{"a+b", []string{"a+b", "a%2Bb"}, []string{"a%20b"}},
		{"%41", []string{"%2541", "%25%34%31"}, []string{"%41", "A"}},
		{"A", []string{"A", "%41"}, []string{"%2541", "a", "%61"}},
		{"a?b#c;d&e", []string{"a%3Fb%23c;d&e"}, []string{"a", "a%253Fb%2523c;d&e"}},
		{"\u200b\u202e\ufeff", []string{"%E2%80%8B%E2%80%AE%EF%BB%BF"}, []string{"%E2%80%8B", ""}},
		{"a%00", []string{"a%2500"}, []string{"a%00"}},
		{"{user_id}", []string{"%7Buser_id%7D"}, []string{"user_id"}},
	} {
		c := newClientOf(t, sharedURL, row.user+id)
		for _, spelling := range row.allowed {
			path := "/api/" + spelling + id + "/tasks"
			a := c.send("POST", path, `{"title": "x"}`)
			if a.status != 201 {
				t.Errorf("POST %s by %q = %d %s, want 201", path, c.user, a.status, a.body)
				continue
			}
			if got := decode[wireTask](t, a.body).UserID; got != c.user {
				t.Errorf("POST %s by %q: user_id %q", path, c.user, got)
			}
			if got := c.send("GET", a.header.Get("Location"), ""); got.status != 200 || got.body != a.body {
				t.Errorf("GET %s by %q = %d %s, want 200 %s", a.header.Get("Location"), c.user, got.status, got.body, a.body)
			}
		}
		if got := decode[[]wireTask](t, c.send("GET", "/api/"+row.allowed[0]+id+"/tasks", "").body); len(got) != len(row.allowed) {
			t.Errorf("list of %q = %+v, want %d tasks, one for each spelling", c.user, got, len(row.allowed))
		}
		for _, spelling := range row.refused {
			if a := c.send("GET", "/api/"+spelling+id+"/tasks", ""); a.status != 403 || strings.Contains(detail(t, a), id) {
				t.Errorf("GET of %s by %q = %d %s, want 403", spelling, c.user, a.status, a.body)
			}
		}
	}
	// Whole ids, which tests elsewhere may have too: no more than read.
	for user, segment := range map[string]string{"..": "%2E%2E", ".": "%2E", "1": "1", " ": "%20", "tasks": "tasks"} {
		if a := newReader(t, user).send("GET", "/api/"+segment+"/tasks", ""); a.status != 200 {
			t.Errorf("GET of %s by %q = %d %s, want 200", segment, user, a.status, a.body)
		}
	}
}

// newReader is newClientOf for a user who is not the test's own: nothing of theirs is removed.
func newReader(t testing.TB, user string) *client {
	t.Helper()
	return &client{t: t, http: http.DefaultClient, service: sharedURL, user: user, authorization: "Bearer " + sealed(testSecret, hs256, good(user, ``))}
}

// FuzzVerify takes any text for a token, and any header and claims under a
// true signature. Nothing makes verify panic; whom it accepts is a user that
// the database can keep, from claims that a second reading agrees with; and no
// character of an accepted token can be another.
func FuzzVerify(f *testing.F) {
	fine := good("a", ``)
	token := sealed(testSecret, hs256, fine)
	for _, raw := range []string{
		token, token + "=", loose(token), token[:len(token)-1], "." + token, strings.ToUpper(token), strings.ReplaceAll(token, ".", ".."),
		sealed(otherSecret, hs256, fine), sealed("", hs256, fine), "", "..", "...", "a.b.c", "e30.e30.", "bnVsbA.bnVsbA.", "\x00.\xff.\ufffd",
	} {
		f.Add(raw, hs256, fine)
	}
	for _, header := range []string{`{"alg":"HS256","typ":"JWT","kid":"1"}`, `{"alg":"none"}`, `{"alg":1}`, `{"alg":"HS256","crit":[]}`, `null`, `[]`, ``, "{\"alg\":\"HS256\"}\n"} {
		f.Add("", header, fine)
	}
	for _, claims := range []string{
		good(strings.Repeat("x", 512), ``), good(strings.Repeat("x", 513), ``), good("ä/b", `,"aud":["a"],"nbf":1.5,"iat":"x"`), `null`, `{}`, ``,
		`{"sub":"\u0000","exp":9e9}`, `{"sub":"\ud800","exp":9e9}`, `{"sub":"\ud83d\ude00","exp":9e9}`, `{"sub":"a","sub":"b","exp":9e9}`,
		`{"sub":"a","exp":9e99}`, `{"sub":"a","exp":-9e99}`, `{"sub":"a","exp":9e9,"nbf":-0.5}`, `{"sub":"a","exp":"9e9"}`, `{"Sub":"a","exp":9e9}`, `{"sub":{"sub":"a"},"exp":[9e9]}`,
	} {
		f.Add("", hs256, claims)
	}
	auth, err := newAuthenticator(testSecret, "", "", "")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw, header, claims string) {
		for _, token := range []string{raw, sealed(testSecret, header, claims)} {
			if strings.ContainsAny(token, "\r\n") {
				continue // no header has them, and encoding/base64 passes over them
			}
			user, err := auth.verify(token)
			if err != nil {
				if user != "" {
					t.Errorf("verify(%q) = %q with %v", token, user, err)
				}
				continue
			}
			if user == "" || len(user) > 512 || strings.Contains(user, "\x00") {
				t.Errorf("verify(%q) = %q, which is no user id", token, user)
			}
			part := strings.Split(token, ".")
			if len(part) != 3 || signed(testSecret, part[0]+"."+part[1]) != token {
				t.Fatalf("verify(%q) = %q, and it is not signed", token, user)
			}
			var head, said map[string]any
			for i, into := range []*map[string]any{&head, &said} {
				if text, err := base64url.DecodeString(part[i]); err != nil || json.Unmarshal(text, into) != nil {
					t.Errorf("verify(%q) = %q, and part %d is not JSON", token, user, i+1)
				}
			}
			if _, critical := head["crit"]; critical || head["alg"] != "HS256" {
				t.Errorf("verify(%q) = %q of the header %v", token, user, head)
			}
			now := float64(time.Now().Unix())
			if exp, ok := said["exp"].(float64); !ok || exp < now-31 || exp >= 253402300800 || said["sub"] != user {
				t.Errorf("verify(%q) = %q of the claims %v", token, user, said)
			}
			if nbf, ok := said["nbf"]; ok {
				if nbf, ok := nbf.(float64); !ok || nbf < 0 || nbf > now+31 {
					t.Errorf("verify(%q) = %q of the claims %v", token, user, said)
				}
			}
			for at := range len(token) {
				for _, c := range []byte{'A', 'Q', '_', '.', '=', ' ', 0, token[at] ^ 1, token[at] ^ 32, alphabet[(strings.IndexByte(alphabet, token[at])+1)%64]} {
					changed := token[:at] + string(c) + token[at+1:]
					if got, err := auth.verify(changed); err == nil && changed != token {
						t.Fatalf("verify(%q) = %q, though it is %q with another character at %d", changed, got, token, at)
					}
				}
			}
		}
	})
}
