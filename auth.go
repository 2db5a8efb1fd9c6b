package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
)

const (
	minSecret     = 32               // bytes, the size of a SHA-256 hash; RFC 7518, section 3.2
	maxSubject    = 512              // bytes; also a CHECK in schema.sql
	clockLeeway   = 30 * time.Second // between the front end's clock and this one
	tokenLifetime = time.Hour        // of the tokens that `todo-app token` prints
	year10000     = 253402300800     // seconds from 1970 to the year 10000
)

// An authenticator verifies the HS256 tokens (RFC 7519) that the front end signs with Better
// Auth's secret. It has no list of users: the user of a request is the sub of its token.
type authenticator struct {
	keys             jwt.VerificationKeySet // the first one signs
	parser           *jwt.Parser
	audience, issuer string   // required in a token unless ""
	warnings         []string // about the secrets, without any part of them
}

// newAuthenticator reads BETTER_AUTH_SECRET, BETTER_AUTH_SECRETS, JWT_AUDIENCE and JWT_ISSUER. Its
// errors name the setting and contain no part of a secret.
func newAuthenticator(getenv func(string) string) (*authenticator, error) {
	a := &authenticator{audience: strings.TrimSpace(getenv("JWT_AUDIENCE")),
		issuer: strings.TrimSpace(getenv("JWT_ISSUER"))}
	secret, list := getenv("BETTER_AUTH_SECRET"), getenv("BETTER_AUTH_SECRETS")
	if secret == "" && list == "" {
		return nil, errors.New("BETTER_AUTH_SECRET is not set: " +
			"set it to the secret of the same name in the Next.js application")
	}
	if secret != "" { // neither decoded nor trimmed, as in Better Auth
		if err := a.addKey("BETTER_AUTH_SECRET", secret); err != nil {
			return nil, err
		}
	}
	if list != "" {
		if err := a.addKeys("BETTER_AUTH_SECRETS", list); err != nil {
			return nil, err
		}
	}
	options := []jwt.ParserOption{
		// Without this, a token with HS384 or HS512 and the same secret would be valid.
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Name}),
		jwt.WithExpirationRequired(),
		jwt.WithLeeway(clockLeeway),
		jwt.WithStrictDecoding(),
	}
	if a.audience != "" {
		options = append(options, jwt.WithAudience(a.audience))
	}
	if a.issuer != "" {
		options = append(options, jwt.WithIssuer(a.issuer))
	}
	a.parser = jwt.NewParser(options...)
	return a, nil
}

// addKeys adds the secrets of a rotation list (2:new,1:old), the current one first. Like Better
// Auth, it trims white space around versions and secrets. A version must be digits.
func (a *authenticator) addKeys(setting, list string) error {
	seen := map[uint64]bool{}
	for i, entry := range strings.Split(list, ",") {
		version, secret, _ := strings.Cut(entry, ":")
		n, err := strconv.ParseUint(strings.TrimSpace(version), 10, 64)
		if err != nil || seen[n] {
			return fmt.Errorf("%s must be a list like 2:new,1:old; "+
				"entry %d has no version, or the version of another entry", setting, i+1)
		}
		seen[n] = true
		name := fmt.Sprintf("%s entry %d", setting, i+1)
		if err := a.addKey(name, strings.TrimSpace(secret)); err != nil {
			return err
		}
	}
	return nil
}

// addKey adds a secret. It rejects one that is public or too short; golang-jwt itself accepts even
// an empty key. A secret that was probably copied wrong gets a warning.
func (a *authenticator) addKey(setting, secret string) error {
	public := []string{ // Better Auth's defaults, up to 1.3 and since
		"better-auth-secret-123456789", "better-auth-secret-12345678901234567890"}
	const remedy = "make one with `openssl rand -base64 32`"
	switch {
	case slices.Contains(public, strings.TrimSpace(secret)):
		return fmt.Errorf("%s is a published default: %s", setting, remedy)
	case len(secret) < minSecret:
		return fmt.Errorf("%s has fewer than %d bytes: %s", setting, minSecret, remedy)
	}
	const marks = "\ufeff\"'`\u201c\u201d\u2018\u2019" // a byte order mark, quotation marks
	if secret != strings.TrimSpace(secret) || secret != strings.Trim(secret, marks) {
		a.warnings = append(a.warnings, setting+" begins or ends with white space, a quotation mark or "+
			"a byte order mark. It is used unchanged: tokens are valid only if the Next.js application "+
			"has the same value")
	}
	a.keys.Keys = append(a.keys.Keys, []byte(secret))
	return nil
}

// user returns the verified user of a request. It returns errNoToken if there is no bearer token in
// the Authorization header, and errBadToken if the token is invalid or there is more than one such
// header. Cookies and the query string are ignored.
func (a *authenticator) user(r *http.Request) (string, error) {
	if len(r.Header["Authorization"]) > 1 {
		return "", badToken("more than one Authorization header")
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimLeft(token, " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", errNoToken
	}
	return a.verify(token)
}

// badToken returns an errBadToken. The reason is for the log and must contain no part of the token.
func badToken(reason string) error { return fmt.Errorf("%w: %s", errBadToken, reason) }

// verify returns the user that a valid token was signed for.
func (a *authenticator) verify(raw string) (string, error) {
	claims := jwt.MapClaims{} // and not RegisteredClaims, which would read "SUB" as "sub"
	token, err := a.parser.ParseWithClaims(raw, claims, func(t *jwt.Token) (any, error) {
		if _, ok := t.Header["crit"]; ok { // extensions, none of which is known; RFC 7515, 4.1.11
			return nil, errors.New("crit")
		}
		return a.keys, nil
	})
	if err != nil {
		return "", badToken(err.Error() + hint(token, err))
	}
	// golang-jwt accepts any time, such as one in milliseconds or one that overflows its int64.
	for _, name := range []string{"exp", "nbf"} {
		if t, ok := claims[name].(float64); ok && t >= year10000 {
			return "", badToken(name + " is outside the years 1970 to 9999: is it in milliseconds?")
		}
	}
	// No other claim replaces sub. Better Auth signs e-mail links and session cookies with the
	// same secret, and those contain an id and an e-mail address.
	user, isString := claims["sub"].(string)
	switch {
	case claims["sub"] == nil:
		return "", badToken("sub is missing: is this a session cookie or the token of an e-mail link?")
	case !isString:
		return "", badToken("sub is not a string")
	case checkUser(user) != nil:
		return "", badToken("sub is not a user id: it is empty, too long or contains U+0000 or U+FFFD")
	}
	return user, nil
}

// hint returns the probable cause of an error of the parser, for the log. token is nil if there are
// not three parts.
func hint(token *jwt.Token, err error) string {
	switch {
	case token == nil:
		return ": is this a session token?"
	case token.Header["alg"] != nil && token.Header["alg"] != jwt.SigningMethodHS256.Name:
		return ": is this a token of the jwt plugin?"
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return ": do the secrets differ?"
	}
	return ""
}

// checkUser validates a user id against what the database can store. encoding/json decodes
// malformed text to U+FFFD, which could make two ids equal.
func checkUser(id string) error {
	inRange := len(id) >= 1 && len(id) <= maxSubject
	if !inRange || !utf8.ValidString(id) || strings.ContainsAny(id, "\x00\uFFFD") {
		return fmt.Errorf("a user id must be 1 to %d bytes of UTF-8 without U+0000 and U+FFFD",
			maxSubject)
	}
	return nil
}

// sign returns a token for user as the front end would sign it. It is valid for tokenLifetime.
func (a *authenticator) sign(user string) (string, error) {
	if err := checkUser(user); err != nil {
		return "", err
	}
	now := time.Now()
	claims := jwt.MapClaims{"sub": user, "iat": now.Unix(), "exp": now.Add(tokenLifetime).Unix()}
	if a.audience != "" {
		claims["aud"] = a.audience
	}
	if a.issuer != "" {
		claims["iss"] = a.issuer
	}
	return jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(a.keys.Keys[0])
}
