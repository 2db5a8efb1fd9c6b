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
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Tokens and secrets, and that every route requires its user's token.

const (
	hs256       = `{"alg":"HS256"}`
	otherSecret = "another secret of the tests 9876543210 ä"
	// RFC 4648, section 5
	alphabet   = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	invalid401 = `Bearer error="invalid_token"`
)

var base64url = base64.RawURLEncoding

// makeToken signs a header and claims as they are. It does not use the product's JWT library, so
// that the tests validate that library against the RFC.
func makeToken(secret, header, claims string) string {
	return signParts(secret, base64url.EncodeToString([]byte(header))+"."+
		base64url.EncodeToString([]byte(claims)))
}

// signParts appends the HS256 signature to the encoded header and claims.
func signParts(secret, parts string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	io.WriteString(mac, parts)
	return parts + "." + base64url.EncodeToString(mac.Sum(nil))
}

// setSpareBit returns another spelling of a base64url part whose last character has unused bits. A
// lenient decoder ignores them.
func setSpareBit(part string) string {
	last := len(part) - 1
	return part[:last] + string(alphabet[strings.IndexByte(alphabet, part[last])+1])
}

// unixTime returns the JSON number of a time relative to now.
func unixTime(fromNow time.Duration) string { return fmt.Sprint(time.Now().Add(fromNow).Unix()) }

// validClaims returns the claims of a user for an hour, and more such as `,"a":1`.
func validClaims(user, more string) string {
	return fmt.Sprintf(`{"sub":%q,"exp":%s%s}`, user, unixTime(time.Hour), more)
}

// longWords returns the parts of texts that must not be repeated anywhere: all that are as long as
// a part of a token or a secret.
func longWords(texts ...string) (long []string) {
	for _, text := range texts {
		for _, word := range strings.FieldsFunc(text,
			func(c rune) bool { return strings.ContainsRune(" .,:=\"", c) }) {
			if len(word) >= 12 {
				long = append(long, word)
			}
		}
	}
	return long
}

// newAuth returns an authenticator with these settings.
func newAuth(t testing.TB, secret, secrets, audience, issuer string) *authenticator {
	t.Helper()
	auth, err := newAuthenticator(secret, secrets, audience, issuer)
	if err != nil {
		t.Fatal(err)
	}
	return auth
}

// listWith lists the tasks of the client's user with another token.
func (c *client) listWith(token string, headers ...string) answer {
	c.t.Helper()
	return c.do("GET", "", "", append([]string{"Authorization", "Bearer " + token}, headers...)...)
}

func TestAcceptedTokens(t *testing.T) {
	t.Parallel()
	user := newUser()
	wide := strings.Repeat("ä", 256-len(user)) + user + user // 512 bytes
	for _, row := range []struct{ name, user, scheme, header, claims string }{
		{"the minimum", user, "Bearer", hs256, validClaims(user, ``)},
		{"typ and kid", user, "Bearer", `{"typ":"JWT","alg":"HS256","kid":"k1"}`, validClaims(user, ``)},
		{"odd typ", user, "Bearer", `{"alg":"HS256","typ":"at+jwt","x5t":1}`, validClaims(user, ``)},
		{"extra claims", user, "Bearer", hs256,
			validClaims(user, `,"id":"x","email":"x@example.com","Sub":"x","user":{"id":[1]},"roles":[null]`)},
		{"aud string", user, "Bearer", hs256, validClaims(user,
			`,"aud":"web","iss":"https://example.com"`)},
		{"aud array", user, "Bearer", hs256, validClaims(user, `,"aud":["a","b"]`)},
		{"iat in the future", user, "Bearer", hs256, validClaims(user, `,"iat":`+unixTime(24*time.Hour))},
		{"iat in milliseconds", user, "Bearer", hs256, validClaims(user, `,"iat":`+unixTime(0)+`000`)},
		{"iat a string", user, "Bearer", hs256, validClaims(user, `,"iat":"soon"`)},
		{"iat null", user, "Bearer", hs256, validClaims(user, `,"iat":null`)},
		{"fractional times", user, "Bearer", hs256,
			fmt.Sprintf(`{"sub":%q,"exp":%s.75,"nbf":%s.25}`, user, unixTime(time.Hour),
				unixTime(-time.Hour))},
		{"exponent", user, "Bearer", hs256, fmt.Sprintf(`{"sub":%q,"exp":2.5e11}`, user)},
		{"last second of 9999", user, "Bearer", hs256,
			fmt.Sprintf(`{"sub":%q,"exp":253402300799}`, user)},
		{"nbf in 1970", user, "Bearer", hs256, validClaims(user, `,"nbf":0`)},
		{"scheme in lower case", user, "bearer", hs256, validClaims(user, ``)},
		{"scheme in mixed case", user, "bEARER", hs256, validClaims(user, ``)},
		{"512 bytes", wide, "Bearer", hs256, validClaims(wide, ``)},
		{"JSON escapes and space", user, "Bearer", "{ \"\\u0061lg\":\n\"HS256\" }",
			"\t" + fmt.Sprintf(`{"s\u0075b" : "\u0074%s", "exp": %s }`, user[1:], unixTime(time.Hour))},
	} {
		c := newClientOf(t, sharedURL, row.user)
		c.authorization = row.scheme + " " + makeToken(testSecret, row.header, row.claims)
		if a := c.do("GET", "", ""); a.status != 200 {
			t.Errorf("%s: list with %s = %v, want 200", row.name, row.claims, a)
		}
	}
}

func TestRejectedTokens(t *testing.T) {
	t.Parallel()
	user := newUser()
	valid := validClaims(user, ``)
	token := makeToken(testSecret, hs256, valid)
	part := strings.Split(token, ".")
	of := func(claims string) string { return makeToken(testSecret, hs256, claims) }

	// Lengths that leave spare bits, and bytes that need the alphabet's last two characters.
	oddHeader := base64url.EncodeToString([]byte(`{"alg":"HS256" }`))
	oddClaims := validClaims(user, `,"x":"~~~???>>>"`)
	for len(oddClaims)%3 != 1 {
		oddClaims += " "
	}
	odd := base64url.EncodeToString([]byte(oddClaims))
	oddToken := signParts(testSecret, oddHeader+"."+odd)
	for claims := oddClaims; !strings.ContainsAny(oddToken[len(oddToken)-43:], "-_"); {
		claims += "   "
		oddToken = signParts(testSecret, oddHeader+"."+base64url.EncodeToString([]byte(claims)))
	}
	std := strings.NewReplacer("-", "+", "_", "/")
	dot := strings.LastIndex(oddToken, ".") + 1

	sign := func(method jwt.SigningMethod, key any) string {
		t.Helper()
		claims := jwt.MapClaims{"sub": user, "exp": time.Now().Add(time.Hour).Unix()}
		made, err := jwt.NewWithClaims(method, claims).SignedString(key)
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
		missing   = "Send an access token"
		twice     = "more than one Authorization header"
		algorithm = "not HS256: is this a token of the jwt plugin?"
		parts     = "not three parts: is this a session token?"
		signature = "bad signature: do the secrets differ?"
		encoding  = "base64url"
		kind      = "wrong type"
		years     = "1970 to 9999"
		subject   = "sub is"
	)
	const name = "Authorization"
	type request struct {
		name      string
		headers   []string
		query     string
		challenge string
		reason    string // in the log
	}
	requests := []request{
		{"nothing", nil, "", "Bearer", missing},
		{"empty header", []string{name, ""}, "", "Bearer", missing},
		{"empty Bearer", []string{name, "Bearer"}, "", "Bearer", missing},
		{"Basic", []string{name, "Basic " + token}, "", "Bearer", missing},
		{"no scheme", []string{name, token}, "", "Bearer", missing},
		{"query", nil, "?access_token=" + token + "&token=" + token, "Bearer", missing},
		{"cookies", []string{"Cookie", "better-auth.session_token=" + token + "; token=" + token}, "",
			"Bearer", missing},
		{"other headers", []string{"X-Auth-Token", token, "Proxy-Authorization", "Bearer " + token}, "",
			"Bearer", missing},
		{"two headers", []string{name, "Bearer " + token, name, "Bearer " + token}, "", invalid401,
			twice},
		{"two schemes", []string{name, "Basic eDp5", name, "Bearer " + token}, "", invalid401, twice},
	}
	for _, row := range []struct{ name, token, reason string }{
		{"none", sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType), algorithm},
		{"none with our signature", makeToken(testSecret, `{"alg":"none"}`, valid), algorithm},
		{"HS384", sign(jwt.SigningMethodHS384, []byte(testSecret)), algorithm},
		{"HS512", sign(jwt.SigningMethodHS512, []byte(testSecret)), algorithm},
		{"RS256", sign(jwt.SigningMethodRS256, rsaKey), algorithm},
		{"PS256", sign(jwt.SigningMethodPS256, rsaKey), algorithm},
		{"ES256", sign(jwt.SigningMethodES256, ecKey), algorithm},
		{"EdDSA", sign(jwt.SigningMethodEdDSA, edKey), algorithm},
		{"RS256 with our signature", makeToken(testSecret, `{"alg":"RS256"}`, valid), algorithm},
		{"unknown alg", makeToken(testSecret, `{"alg":"ES256K"}`, valid), algorithm},
		{"alg in lower case", makeToken(testSecret, `{"alg":"hs256"}`, valid), algorithm},
		{"alg under another name", makeToken(testSecret, `{"ALG":"HS256"}`, valid), algorithm},
		{"alg no string", makeToken(testSecret, `{"alg":["HS256"]}`, valid), algorithm},
		{"crit", makeToken(testSecret, `{"alg":"HS256","crit":["exp"]}`, valid), "crit"},
		{"empty crit", makeToken(testSecret, `{"alg":"HS256","crit":[]}`, valid), "crit"},
		{"crit null", makeToken(testSecret, `{"alg":"HS256","crit":null}`, valid), "crit"},

		{"another secret", makeToken("a third secret, which this service does not have", hs256, valid),
			signature},
		{"empty secret", makeToken("", hs256, valid), signature},
		{"no signature", part[0] + "." + part[1] + ".", signature},
		{"cut signature", token[:len(token)-3], signature},
		{"other claims", part[0] + "." + base64url.EncodeToString([]byte(validClaims("u", ``))) + "." +
			part[2], signature},

		{"opaque", rand.Text() + rand.Text(), parts},
		{"session cookie", rand.Text() + "." + part[2], parts},
		{"JWE", base64url.EncodeToString([]byte(`{"alg":"dir","enc":"A256GCM"}`)) + ".." + part[1] +
			".a.b", parts},
		{"four parts", token + "." + part[2], parts},
		{"dot after", token + ".", parts},
		{"dot before", "." + token, parts},
		{"two tokens", token + ", Bearer " + token, parts},

		{"empty parts", "..", encoding},
		{"quoted", `"` + token + `"`, encoding},
		{"scheme twice", "Bearer " + token, encoding},
		{"header padded", signParts(testSecret, oddHeader+"==."+odd), encoding},
		{"claims padded", signParts(testSecret, oddHeader+"."+odd+"=="), encoding},
		{"signature padded", token + "=", encoding},
		{"header with spare bits", signParts(testSecret, setSpareBit(oddHeader)+"."+odd), encoding},
		{"claims with spare bits", signParts(testSecret, oddHeader+"."+setSpareBit(odd)), encoding},
		{"signature with spare bits", setSpareBit(token), encoding},
		{"claims in base64", signParts(testSecret, oddHeader+"."+std.Replace(odd)), encoding},
		{"signature in base64", oddToken[:dot] + std.Replace(oddToken[dot:]), encoding},
		{"space in header", signParts(testSecret, part[0][:4]+" "+part[0][4:]+"."+part[1]), encoding},
		{"space after header", signParts(testSecret, part[0]+" ."+part[1]), encoding},
		{"tab in claims", signParts(testSecret, part[0]+"."+part[1][:4]+"\t"+part[1][4:]), encoding},
		{"space in signature", token[:len(token)-4] + " " + token[len(token)-4:], encoding},
		{"header no JSON", makeToken(testSecret, `{"alg":"HS256"`, valid), encoding},
		{"header with more", makeToken(testSecret, hs256+`{}`, valid), encoding},
		{"claims no JSON", of(valid[1:]), encoding},
		{"claims with more", of(valid + "x"), encoding},
		{"claims an array", of(`[` + valid + `]`), encoding},
		{"claims null", of(`null`), "has no exp"},
		{"header null", makeToken(testSecret, `null`, valid), algorithm},

		{"no exp", of(fmt.Sprintf(`{"sub":%q,"iat":%s}`, user, unixTime(0))), "has no exp"},
		{"exp under another name", of(fmt.Sprintf(`{"sub":%q,"Exp":%s}`, user, unixTime(time.Hour))),
			"has no exp"},
		{"expired", of(fmt.Sprintf(`{"sub":%q,"exp":%s}`, user, unixTime(-time.Minute))), ": expired"},
		{"exp 0", of(fmt.Sprintf(`{"sub":%q,"exp":0}`, user)), ""},
		{"exp before 1970", of(fmt.Sprintf(`{"sub":%q,"exp":-1}`, user)), ""},
		{"exp in milliseconds", of(fmt.Sprintf(`{"sub":%q,"exp":%s000}`, user, unixTime(time.Hour))),
			years},
		{"exp in 10000", of(fmt.Sprintf(`{"sub":%q,"exp":253402300800}`, user)), years},
		{"exp beyond int64", of(fmt.Sprintf(`{"sub":%q,"exp":1e300}`, user)), ""},
		{"exp beyond float64", of(fmt.Sprintf(`{"sub":%q,"exp":1e400}`, user)), ""},
		{"exp a string", of(fmt.Sprintf(`{"sub":%q,"exp":"%s"}`, user, unixTime(time.Hour))), kind},
		{"exp null", of(fmt.Sprintf(`{"sub":%q,"exp":null}`, user)), kind},
		{"exp true", of(fmt.Sprintf(`{"sub":%q,"exp":true}`, user)), kind},
		{"exp an array", of(fmt.Sprintf(`{"sub":%q,"exp":[%s]}`, user, unixTime(time.Hour))), kind},
		{"not yet valid", of(validClaims(user, `,"nbf":`+unixTime(5*time.Minute))), "not yet valid"},
		{"nbf before 1970", of(validClaims(user, `,"nbf":-1`)), years},
		{"nbf long before 1970", of(validClaims(user, `,"nbf":-1e300`)), ""},
		{"nbf in milliseconds", of(validClaims(user, `,"nbf":`+unixTime(-time.Hour)+`000`)), ""},
		{"nbf a string", of(validClaims(user, `,"nbf":"0"`)), kind},
		{"nbf null", of(validClaims(user, `,"nbf":null`)), kind},
		{"nbf false", of(validClaims(user, `,"nbf":false`)), kind},

		{"no sub", of(`{"exp":` + unixTime(time.Hour) + `}`), subject},
		{"sub empty", of(validClaims("", ``)), subject},
		{"sub a number", of(`{"sub":1,"exp":` + unixTime(time.Hour) + `}`), "sub is not a string"},
		{"sub null", of(fmt.Sprintf(`{"sub":null,"id":%q,"exp":%s}`, user, unixTime(time.Hour))),
			subject},
		{"sub an array", of(fmt.Sprintf(`{"sub":[%q],"exp":%s}`, user, unixTime(time.Hour))), subject},
		{"sub of 513 bytes", of(validClaims(strings.Repeat("ä", 256)+"x", ``)), subject},
		{"sub with U+0000", of(`{"sub":"a\u0000","exp":` + unixTime(time.Hour) + `}`), subject},
		{"sub with half a pair", of(`{"sub":"a\ud800","exp":` + unixTime(time.Hour) + `}`), subject},
		{"sub not UTF-8", of(`{"sub":"a` + "\xff" + `","exp":` + unixTime(time.Hour) + `}`), subject},
		{"Sub", of(fmt.Sprintf(`{"Sub":%q,"SUB":%q,"exp":%s}`, user, user, unixTime(time.Hour))),
			subject},
		{"id", of(fmt.Sprintf(`{"id":%q,"exp":%s}`, user, unixTime(time.Hour))), subject},
		{"userId", of(fmt.Sprintf(`{"userId":%q,"exp":%s}`, user, unixTime(time.Hour))), subject},
		{"user_id", of(fmt.Sprintf(`{"user_id":%q,"exp":%s}`, user, unixTime(time.Hour))), subject},
		{"e-mail link", of(fmt.Sprintf(`{"email":%q,"exp":%s}`, user, unixTime(time.Hour))), subject},
		{"session cache", of(fmt.Sprintf(`{"session":{"userId":%q},"user":{"id":%q,"sub":%q},"exp":%s}`,
			user, user, user, unixTime(time.Hour))), subject},
	} {
		requests = append(requests, request{row.name, []string{name, "Bearer " + row.token}, "",
			invalid401, row.reason})
	}

	service := startService(t, sharedDB, settings{auth: newAuth(t, testSecret, "2:"+otherSecret, "",
		"")})
	c := newClientOf(t, service.url, user)
	c.authorization = ""
	secrets := []string{testSecret, otherSecret} // what the log must not contain
	for i, row := range requests {
		sent := longWords(row.query)
		for i := 1; i < len(row.headers); i += 2 {
			sent = append(sent, longWords(row.headers[i])...)
		}
		secrets = append(secrets, sent...)
		id := fmt.Sprint("row", i)
		a := c.do("GET", row.query, "", append(row.headers, "X-Request-Id", id)...)
		if got := a.header["Www-Authenticate"]; a.status != 401 ||
			!slices.Equal(got, []string{row.challenge}) {
			t.Errorf("%s: %v, WWW-Authenticate %q, want 401, %q", row.name, a, got, row.challenge)
		}
		for _, word := range sent {
			if all := fmt.Sprint(a.header, a.body); strings.Contains(all, word) {
				t.Errorf("%s: the response repeats %s of the token: %s", row.name, word, all)
			}
		}
		if reason := fmt.Sprint(service.log.request(t, id)["error"]); !strings.Contains(reason,
			row.reason) {
			t.Errorf("%s: the log says %q, want %q", row.name, reason, row.reason)
		}
	}
	for _, word := range secrets {
		if strings.Contains(service.log.String(), word) {
			t.Errorf("the log contains %s", word)
		}
	}
}

// In the bubble the clock stands still, so the leeway is exact. No request may wait for the
// database there, so the path is another user's: a 403 tells that the token was accepted.
func TestLeeway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		service := newServer(sharedAuth, sharedDB, newLogger(io.Discard, 0), nil, "")
		for _, row := range []struct {
			exp, nbf string
			status   int
		}{
			{unixTime(-29 * time.Second), unixTime(0), 403},
			{unixTime(-30 * time.Second), unixTime(0), 401},
			{unixTime(-29*time.Second) + ".9", unixTime(0), 403},
			{unixTime(time.Hour), unixTime(30 * time.Second), 403},
			{unixTime(time.Hour), unixTime(31 * time.Second), 401},
		} {
			claims := fmt.Sprintf(`{"sub":"a","exp":%s,"nbf":%s}`, row.exp, row.nbf)
			r := httptest.NewRequest("GET", "/api/b/tasks", nil)
			r.Header.Set("Authorization", "Bearer "+makeToken(testSecret, hs256, claims))
			w := httptest.NewRecorder()
			service.ServeHTTP(w, r)
			if w.Code != row.status {
				t.Errorf("at %s, exp %s, nbf %s = %d, want %d",
					unixTime(0), row.exp, row.nbf, w.Code, row.status)
			}
		}
	})
}

func TestAudienceAndIssuer(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		audience, issuer, claims string
		reason                   string // in the log of a 401; "" for a 200
	}{
		{"api", "", `,"aud":"api"`, ""},
		{"api", "", `,"aud":["web","api"]`, ""},
		{"api", "", `,"aud":"web"`, "aud is not JWT_AUDIENCE"},
		{"api", "", `,"aud":"API"`, "aud is not JWT_AUDIENCE"},
		{"api", "", `,"aud":["web","api2"]`, "aud is not JWT_AUDIENCE"},
		{"api", "", `,"aud":[]`, "JWT_AUDIENCE"},
		{"api", "", `,"aud":[["api"]]`, "aud"},
		{"api", "", `,"aud":{"api":"api"}`, "aud"},
		{"api", "", `,"Aud":"api"`, "JWT_AUDIENCE"},
		{"", "https://a.example", `,"iss":"https://a.example","aud":"any"`, ""},
		{"", "https://a.example", `,"iss":"https://a.example/"`, "iss is not JWT_ISSUER"},
		{"", "https://a.example", `,"iss":["https://a.example"]`, "iss"},
		{"", "https://a.example", ``, "JWT_ISSUER"},
		{"api", "us", `,"aud":"api","iss":"us"`, ""},
		{"api", "us", `,"aud":"us","iss":"us"`, "aud is not JWT_AUDIENCE"},
		{"api", "us", `,"aud":"api","iss":"them"`, "iss is not JWT_ISSUER"},
	} {
		service := startService(t, sharedDB, settings{auth: newAuth(t, testSecret, "", row.audience,
			row.issuer)})
		c := service.newClient()
		a := c.listWith(makeToken(testSecret, hs256, validClaims(c.user, row.claims)), "X-Request-Id",
			"x")
		where := fmt.Sprintf("JWT_AUDIENCE=%s JWT_ISSUER=%s and %s", row.audience, row.issuer, row.claims)
		if row.reason == "" {
			if a.status != 200 {
				t.Errorf("%s: %v, want 200", where, a)
			}
			continue
		}
		if challenge := a.header.Get("WWW-Authenticate"); a.status != 401 || challenge != invalid401 {
			t.Errorf("%s: %v, WWW-Authenticate %s, want 401, %s", where, a, challenge, invalid401)
		}
		if reason := fmt.Sprint(service.log.request(t, "x")["error"]); !strings.Contains(reason,
			row.reason) {
			t.Errorf("%s: the log says %q, want %q", where, reason, row.reason)
		}
	}
}

func TestSecrets(t *testing.T) {
	t.Parallel()
	// as `openssl rand -base64 32` prints it
	encoded := base64.StdEncoding.EncodeToString([]byte(testSecret))
	const (
		a = "secret a of the tests; 0123456789 äöü"
		b = "secret b of the tests: 0123456789 =+/"
		c = "secret c of the tests. 0123456789 \"'"
	)
	for _, row := range []struct {
		secret, secrets    string
		signs              string // `todo-app token`
		accepted, rejected []string
	}{
		{a, "", a, []string{a}, []string{b, "", a[:len(a)-1]}},
		{encoded, "", encoded, []string{encoded}, []string{testSecret}},
		{"  " + a + "\n", "", "  " + a + "\n", []string{"  " + a + "\n"},
			[]string{a, a + "\n", "  " + a}},
		{"", "1:" + a, a, []string{a}, []string{b, "1:" + a}},
		{"", "2:" + b + ",1:" + a, b, []string{a, b}, []string{c, ""}},
		// the first one signs, not the highest
		{"", "1:" + b + ",2:" + a, b, []string{a, b}, []string{c}},
		{"", " 2 : " + b + " ,\t1:" + a + "\n", b, []string{a, b},
			[]string{" " + b, " " + b + " ", a + "\n"}},
		{c, "2:" + b + ",1:" + a, c, []string{a, b, c}, []string{testSecret}},
		{c, "7:" + c + ",0:" + a, c, []string{a, c}, []string{b}},
	} {
		where := fmt.Sprintf("BETTER_AUTH_SECRET=%q BETTER_AUTH_SECRETS=%q", row.secret, row.secrets)
		client := startService(t, sharedDB, settings{auth: newAuth(t, row.secret, row.secrets, "",
			"")}).newClient()
		for status, secrets := range map[int][]string{200: row.accepted, 401: row.rejected} {
			for _, secret := range secrets {
				got := client.listWith(makeToken(secret, hs256, validClaims(client.user, ``)))
				if got.status != status {
					t.Errorf("%s: a token signed with %q = %v, want %d", where, secret, got, status)
				}
			}
		}
		env := environment{"BETTER_AUTH_SECRET": row.secret, "BETTER_AUTH_SECRETS": row.secrets}
		out, err := env.run(t.Context(), "token", "u")
		token := strings.TrimSuffix(out, "\n")
		parts := token[:max(0, strings.LastIndex(token, "."))]
		if err != nil || signParts(row.signs, parts) != token {
			t.Errorf("%s: token = %q, %v, want one signed with %q", where, token, err, row.signs)
		}
	}
}

// An environment is what run reads its settings from.
type environment map[string]string

// run runs a command and returns its output.
func (e environment) run(ctx context.Context, args ...string) (string, error) {
	var out bytes.Buffer
	err := run(ctx, args, func(name string) string { return e[name] }, &out)
	return out.String(), err
}

func TestInvalidSecrets(t *testing.T) {
	t.Parallel()
	// 32 bytes each
	const a, b = "secret-a-of-the-tests-0123456789", "secret-b-of-the-tests-0123456789"
	const default1, default2 = "better-auth-secret-123456789",
		"better-auth-secret-12345678901234567890"
	const one, list = "BETTER_AUTH_SECRET", "BETTER_AUTH_SECRETS"
	for _, row := range []struct{ secret, secrets, names string }{
		{"", "", one},
		{a[1:], "", one},
		{default1, "", one},
		{default2, "", one},
		{default2, "1:" + a, one},
		{a[1:], "1:" + a, one},
		{"", a, list},
		{b, a, list},
		{"", "2:" + a + "," + b, list},
		{"", "2:" + a + ",", list},
		{"", "," + "2:" + a, list},
		{"", "2:" + a + ",,1:" + b, list},
		{"", "2:" + a + ",1:", list},
		{"", "2:" + a + ",1:  ", list},
		{"", "2:" + a + ",1:" + b[1:], list},
		{"", "2:" + a + ",1:" + b[1:] + " ", list}, // 32 bytes before it is trimmed
		{"", "2:" + a + ",2:" + b, list},
		{"", "2:" + a + ",02:" + b, list},
		{"", "2:" + default2, list},
		{"", "2: " + default2 + " ,1:" + a, list},
		{"", "2:" + a + ",1:" + default1, list},
		{"", "-1:" + a, list},
		{"", ":" + a, list},
		{"", "v1:" + a, list},
		{"", a + ":1", list},
		{"", "1.5:" + a, list},
		{"", " ", list},
	} {
		env := environment{one: row.secret, list: row.secrets,
			"DATABASE_URL": "postgres://localhost/none"}
		for _, args := range [][]string{nil, {"token", "user"}} {
			where := fmt.Sprintf("run(%q) with %q and %q", args, row.secret, row.secrets)
			// done, so that a service that starts exits at once
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			out, err := env.run(ctx, args...)
			if err == nil || out != "" {
				t.Errorf("%s = %v, output %q, want an error", where, err, out)
				continue
			}
			if !slices.Contains(strings.Fields(err.Error()), row.names) ||
				strings.Contains(err.Error(), "\n") {
				t.Errorf("%s = %q, want one line that names %s", where, err, row.names)
			}
			for _, word := range longWords(row.secret, row.secrets) {
				if strings.Contains(err.Error(), word) {
					t.Errorf("%s = %q contains %s", where, err, word)
				}
			}
		}
	}
}

func TestTokenCommand(t *testing.T) {
	t.Parallel()
	user := newUser()
	for _, row := range []struct {
		user, audience, issuer string
		args                   []string
		extra                  map[string]any
	}{
		{user, "", "", nil, nil},
		{user, "api", "", nil, nil},
		{user, "api", "https://a.example", nil, nil},
		{"ä/b c@example.com " + user, "", "", nil, nil},
		{strings.Repeat("x", 512-len(user)) + user, "", "", nil, nil},
		{user, "api", "", []string{"role=admin", "n=1", `list=["a", "b"]`, "empty=", "equation=a=b"},
			map[string]any{"role": "admin", "n": 1, "list": []any{"a", "b"}, "empty": "",
				"equation": "a=b"}},
		{user, "", "", []string{"sub=other", "exp=1", "iat=x"}, nil},
	} {
		// Without DATABASE_URL: the command needs no database.
		env := environment{"BETTER_AUTH_SECRET": testSecret, "JWT_AUDIENCE": row.audience,
			"JWT_ISSUER": row.issuer}
		before := time.Now().Unix()
		out, err := env.run(t.Context(), append([]string{"token", row.user}, row.args...)...)
		token, isLine := strings.CutSuffix(out, "\n")
		part := strings.Split(token, ".")
		if err != nil || len(part) != 3 || !isLine {
			t.Errorf("token %q with %v = %q, %v, want a token in a line", row.user, env, out, err)
			continue
		}
		text, _ := base64url.DecodeString(part[1])
		claims := decode[map[string]any](t, string(text))
		iat, _ := claims["iat"].(float64)
		want := map[string]any{"sub": row.user, "iat": iat, "exp": iat + 3600}
		maps.Copy(want, row.extra)
		if row.audience != "" {
			want["aud"] = row.audience
		}
		if row.issuer != "" {
			want["iss"] = row.issuer
		}
		if fmt.Sprint(claims) != fmt.Sprint(want) {
			t.Errorf("token %q with %v = %v, want %v", row.user, env, claims, want)
		}
		if now := time.Now().Unix(); int64(iat) < before || int64(iat) > now {
			t.Errorf("token %q has iat %v, want %d to %d", row.user, iat, before, now)
		}
		service := startService(t, sharedDB, settings{auth: newAuth(t, testSecret, "", row.audience,
			row.issuer)})
		if a := newClientOf(t, service.url, row.user).listWith(token); a.status != 200 {
			t.Errorf("list with the token of %q and %v = %v, want 200", row.user, env, a)
		}
	}

	for _, args := range [][]string{
		{"token", ""}, {"token", "a\x00b"}, {"token", strings.Repeat("ä", 256) + "x"},
		{"token", "a\xff"}, {"token"}, {"token", user, user}, {"token", user, "=admin"},
		{"tokens", user}, {user},
	} {
		out, err := environment{"BETTER_AUTH_SECRET": testSecret}.run(t.Context(), args...)
		if err == nil || out != "" {
			t.Errorf("run(%q) = %v, prints %q, want an error alone", args, err, out)
		}
	}
}

// Every route rejects a request without a token, with a forged one and with another user's, before
// it looks at anything else.
func TestEveryRouteRequiresTheUsersToken(t *testing.T) {
	t.Parallel()
	owner, other := newClient(t), newClient(t)
	task := owner.create("Milk")
	type request struct{ method, path, body string }
	requests := []request{
		{"HEAD", owner.path(""), ""}, {"HEAD", owner.path(task.path()), ""},
		{"GET", owner.path("?limit=x"), ""}, {"GET", owner.path("/0"), ""},
		{"POST", owner.path(""), `no JSON`}, {"PUT", owner.path("/x"), `[]`},
		{"PATCH", owner.path("/x/complete"), strings.Repeat(" ", maxBody+1)},
	}
	inPath := strings.NewReplacer("{user_id}", owner.user, "/{id}", task.path())
	for pattern := range (&server{}).routes() {
		method, path, _ := strings.Cut(pattern, " ")
		if strings.Contains(path, "{user_id}") {
			requests = append(requests, request{method, inPath.Replace(path), `{"title": "x"}`})
		}
	}
	for _, row := range requests {
		for _, by := range []struct {
			authorization string
			status        int
			challenge     string
		}{
			{"", 401, "Bearer"},
			{"Bearer " + makeToken(otherSecret, hs256, validClaims(owner.user, ``)), 401, invalid401},
			{other.authorization, 403, ""},
		} {
			c := *owner
			c.authorization = by.authorization
			a := c.send(row.method, row.path, row.body)
			if challenge := a.header.Get("WWW-Authenticate"); a.status != by.status ||
				challenge != by.challenge {
				t.Errorf("%s %s by %q = %v, WWW-Authenticate %q, want %d, %q", row.method, row.path,
					by.authorization, a, challenge, by.status, by.challenge)
			}
			if all := fmt.Sprint(a.header, a.body); strings.Contains(all, owner.user) ||
				strings.Contains(all, other.user) {
				t.Errorf("%s %s by %q repeats an id: %s", row.method, row.path, by.authorization, all)
			}
		}
	}
	if got := owner.list(""); !slices.EqualFunc(got, []wireTask{task}, equalTasks) {
		t.Errorf("afterwards the list is %v, want %v", got, task)
	}
}

// A user id is compared byte for byte, after the path was decoded.
func TestUserIDsAreBytes(t *testing.T) {
	t.Parallel()
	suffix := newUser()
	for _, row := range []struct {
		user              string // without the suffix
		allowed, rejected []string
	}{
		{"a/b", []string{"a%2Fb", "a%2fb", "%61%2F%62"}, []string{"a%252Fb", "a%5Cb", "A%2Fb"}},
		// composed
		{"ä@example.com", []string{"%C3%A4@example.com", "%c3%a4%40example.com", "ä@example.com"},
			[]string{"a%CC%88@example.com", "%E4@example.com", "%C3%84@example.com"}},
		// decomposed
		{"a\u0308@example.com", []string{"a%CC%88@example.com"}, []string{"%C3%A4@example.com"}},
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
		c := newClientOf(t, sharedURL, row.user+suffix)
		for _, spelling := range row.allowed {
			path := "/api/" + spelling + suffix + "/tasks"
			a := c.send("POST", path, `{"title": "x"}`)
			if a.status != 201 || decode[wireTask](t, a.body).UserID != c.user {
				t.Errorf("POST %s by %q = %v, want 201", path, c.user, a)
				continue
			}
			if got := c.send("GET", a.header.Get("Location"), ""); got.status != 200 || got.body != a.body {
				t.Errorf("GET %s by %q = %v, want %v", a.header.Get("Location"), c.user, got, a)
			}
		}
		if got := c.list(""); len(got) != len(row.allowed) {
			t.Errorf("list of %q = %v, want %d tasks, one for each spelling", c.user, got, len(row.allowed))
		}
		for _, spelling := range row.rejected {
			path := "/api/" + spelling + suffix + "/tasks"
			if a := c.send("GET", path, ""); a.status != 403 || strings.Contains(a.detail(), suffix) {
				t.Errorf("GET %s by %q = %v, want 403", path, c.user, a)
			}
		}
	}
	// These users may exist in the tests' database, so their tasks are only read.
	for user, segment := range map[string]string{"..": "%2E%2E", ".": "%2E", "1": "1", " ": "%20",
		"tasks": "tasks"} {
		c := &client{t: t, http: http.DefaultClient, service: sharedURL,
			authorization: "Bearer " + makeToken(testSecret, hs256, validClaims(user, ``))}
		if a := c.send("GET", "/api/"+segment+"/tasks", ""); a.status != 200 {
			t.Errorf("GET of %s by %q = %v, want 200", segment, user, a)
		}
	}
}

// FuzzVerify verifies any text as a token, and any header and claims under a valid signature.
// verify never panics. It accepts only users that the database can store, from claims that a second
// decoder reads in the same way, and no character of an accepted token can be changed.
func FuzzVerify(f *testing.F) {
	valid := validClaims("a", ``)
	token := makeToken(testSecret, hs256, valid)
	for _, raw := range []string{
		token, token + "=", setSpareBit(token), token[:len(token)-1], "." + token, strings.ToUpper(token),
		strings.ReplaceAll(token, ".", ".."), makeToken(otherSecret, hs256, valid),
		makeToken("", hs256, valid),
		"", "..", "...", "a.b.c", "e30.e30.", "bnVsbA.bnVsbA.", "\x00.\xff.\ufffd",
	} {
		f.Add(raw, hs256, valid)
	}
	for _, header := range []string{`{"alg":"HS256","typ":"JWT","kid":"1"}`, `{"alg":"none"}`,
		`{"alg":1}`,
		`{"alg":"HS256","crit":[]}`, `null`, `[]`, ``, "{\"alg\":\"HS256\"}\n"} {
		f.Add("", header, valid)
	}
	for _, claims := range []string{
		validClaims(strings.Repeat("x", 512), ``), validClaims(strings.Repeat("x", 513), ``), `null`,
		`{}`, ``,
		validClaims("ä/b", `,"aud":["a"],"nbf":1.5,"iat":"x"`),
		`{"sub":"\u0000","exp":9e9}`, `{"sub":"\ud800","exp":9e9}`, `{"sub":"\ud83d\ude00","exp":9e9}`,
		`{"sub":"a","sub":"b","exp":9e9}`, `{"sub":"a","exp":9e99}`, `{"sub":"a","exp":-9e99}`,
		`{"sub":"a","exp":9e9,"nbf":-0.5}`, `{"sub":"a","exp":"9e9"}`, `{"Sub":"a","exp":9e9}`,
		`{"sub":{"sub":"a"},"exp":[9e9]}`,
	} {
		f.Add("", hs256, claims)
	}
	auth := newAuth(f, testSecret, "", "", "")
	f.Fuzz(func(t *testing.T, raw, header, claims string) {
		for _, token := range []string{raw, makeToken(testSecret, header, claims)} {
			if strings.ContainsAny(token, "\r\n") {
				continue // no header contains them, and encoding/base64 ignores them
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
			if len(part) != 3 || signParts(testSecret, part[0]+"."+part[1]) != token {
				t.Fatalf("verify(%q) = %q, but it is not signed", token, user)
			}
			var head, said map[string]any
			for i, into := range []*map[string]any{&head, &said} {
				if text, err := base64url.DecodeString(part[i]); err != nil ||
					json.Unmarshal(text, into) != nil {
					t.Errorf("verify(%q) = %q, but part %d is not JSON", token, user, i+1)
				}
			}
			if _, critical := head["crit"]; critical || head["alg"] != "HS256" {
				t.Errorf("verify(%q) = %q with the header %v", token, user, head)
			}
			now := float64(time.Now().Unix())
			if exp, ok := said["exp"].(float64); !ok || exp < now-31 || exp >= 253402300800 {
				t.Errorf("verify(%q) = %q with the claims %v", token, user, said)
			}
			claim, limited := said["nbf"]
			nbf, isNumber := claim.(float64)
			if limited != isNumber || nbf < 0 || nbf > now+31 {
				t.Errorf("verify(%q) = %q with the claims %v", token, user, said)
			}
			if said["sub"] != user {
				t.Errorf("verify(%q) = %q with the claims %v", token, user, said)
			}
			for at := range len(token) {
				next := alphabet[(strings.IndexByte(alphabet, token[at])+1)%64]
				for _, c := range []byte{'A', 'Q', '_', '.', '=', ' ', 0, token[at] ^ 1, token[at] ^ 32, next} {
					changed := token[:at] + string(c) + token[at+1:]
					if got, err := auth.verify(changed); err == nil && changed != token {
						t.Fatalf("verify(%q) = %q, as %q with another character at %d", changed, got, token, at)
					}
				}
			}
		}
	})
}

// A secret that is probably not what the operator meant is used as it is, with one WARNING.
func TestSecretWarnings(t *testing.T) {
	t.Parallel()
	const good = "secret;of;the;tests;0123456789;abcdef"
	const setting = "BETTER_AUTH_SECRET"
	for _, row := range []struct{ secret, secrets, want string }{
		{good, "", ""},
		{good[:20] + " \"' \ufeff" + good[20:], "", ""},
		{"", "2:" + good + "2, 1: " + good + " ", ""}, // white space around an entry is removed
		{good + "\n", "", setting + " begins or ends with white space"},
		{"\u00a0" + good, "", setting + " begins or ends with white space"},
		{`"` + good + `"`, "", setting + " begins or ends with a quotation mark"},
		{good + "'", "", setting + " begins or ends with a quotation mark"},
		{"\u201c" + good, "", setting + " begins or ends with a quotation mark"},
		{"\ufeff" + good, "", setting + " begins or ends with a byte order mark"},
		{strings.Repeat("#", 40), "", setting + " is one repeated character"},
		{strings.Repeat("é", 16), "", setting + " is one repeated character"},
		{"", "2:" + good + ",1:`" + good, setting + "S entry 2 begins or ends with a quotation mark"},
		{"", "2:" + strings.Repeat("#", 32), setting + "S entry 1 is one repeated character"},
	} {
		var log lockedBuffer
		env := environment{"BETTER_AUTH_SECRET": row.secret, "BETTER_AUTH_SECRETS": row.secrets,
			"DATABASE_URL": "postgres://localhost/none", "PORT": "none"} // PORT ends the start
		err := run(t.Context(), nil, func(name string) string { return env[name] }, &log)
		if err == nil || !strings.Contains(err.Error(), "PORT") {
			t.Fatalf("run = %v, want an error that names PORT", err)
		}
		var got []string
		for _, line := range log.lines(t) {
			got = append(got, fmt.Sprint(line["severity"], " ", line["message"]))
		}
		switch {
		case row.want == "" && got == nil:
		case row.want == "" || len(got) != 1 || !strings.HasPrefix(got[0], "WARNING "+row.want):
			t.Errorf("%q, %q: the log has %q, want one WARNING: %s", row.secret, row.secrets, got, row.want)
		}
		separator := func(c rune) bool { return strings.ContainsRune(":,;\"'` ", c) }
		for part := range strings.FieldsFuncSeq(row.secret+row.secrets, separator) {
			if len(part) > 3 && strings.Contains(log.String(), part) {
				t.Errorf("the log contains %q of the secret: %s", part, log.String())
			}
		}
	}
}
