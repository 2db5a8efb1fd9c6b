package main

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"

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
	keys     jwt.VerificationKeySet // the first one signs
	parser   *jwt.Parser
	claims   jwt.MapClaims // aud and iss of the tokens that sign makes, if they are required
	warnings []string      // about the secrets, without any part of them
}

// newAuthenticator reads BETTER_AUTH_SECRET, BETTER_AUTH_SECRETS, JWT_AUDIENCE and JWT_ISSUER. Its
// errors name the setting and contain no part of a secret.
func newAuthenticator(getenv func(string) string) (*authenticator, error) {
	a := &authenticator{claims: jwt.MapClaims{}}
	if secret := getenv("BETTER_AUTH_SECRET"); secret != "" {
		// Neither decoded nor trimmed, as in Better Auth.
		if err := a.addKey("BETTER_AUTH_SECRET", secret); err != nil {
			return nil, err
		}
	}
	if list := getenv("BETTER_AUTH_SECRETS"); list != "" {
		if err := a.addKeys(list); err != nil {
			return nil, err
		}
	}
	if a.keys.Keys == nil {
		return nil, errors.New("BETTER_AUTH_SECRET is not set: " +
			"set it to the secret of the same name in the Next.js application")
	}
	options := []jwt.ParserOption{
		// Without this, a token with HS384 or HS512 and the same secret would be valid.
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Name}),
		jwt.WithExpirationRequired(),
		jwt.WithLeeway(clockLeeway),
		jwt.WithStrictDecoding(),
	}
	if audience := strings.TrimSpace(getenv("JWT_AUDIENCE")); audience != "" {
		options = append(options, jwt.WithAudience(audience))
		a.claims["aud"] = audience
	}
	if issuer := strings.TrimSpace(getenv("JWT_ISSUER")); issuer != "" {
		options = append(options, jwt.WithIssuer(issuer))
		a.claims["iss"] = issuer
	}
	a.parser = jwt.NewParser(options...)
	return a, nil
}

// addKeys adds the secrets of a rotation list (2:new,1:old), whose first entry is the current one.
// Like Better Auth, it trims white space around versions and secrets. A version must be digits.
func (a *authenticator) addKeys(list string) error {
	for i, entry := range strings.Split(list, ",") {
		version, secret, _ := strings.Cut(entry, ":")
		if _, err := strconv.ParseUint(strings.TrimSpace(version), 10, 64); err != nil {
			return fmt.Errorf("BETTER_AUTH_SECRETS must be a list like 2:new,1:old; "+
				"entry %d has no version", i+1)
		}
		name := fmt.Sprintf("BETTER_AUTH_SECRETS entry %d", i+1)
		if err := a.addKey(name, strings.TrimSpace(secret)); err != nil {
			return err
		}
	}
	return nil
}

// addKey adds a secret. It rejects one that is public or too short; golang-jwt itself accepts even
// an empty key. A secret that was probably copied wrong gets a warning.
func (a *authenticator) addKey(setting, secret string) error {
	const public = "better-auth-secret-12345678901234567890" // Better Auth's default
	const remedy = "make one with `openssl rand -base64 32`"
	switch {
	case strings.TrimSpace(secret) == public:
		return fmt.Errorf("%s is a published default: %s", setting, remedy)
	case len(secret) < minSecret:
		return fmt.Errorf("%s has fewer than %d bytes: %s", setting, minSecret, remedy)
	}
	const marks = "\ufeff\"'`\u201c\u201d\u2018\u2019" // a byte order mark, quotation marks
	if secret != strings.Trim(strings.TrimSpace(secret), marks) {
		a.warnings = append(a.warnings, setting+" begins or ends with white space, a quotation mark or "+
			"a byte order mark, and is used unchanged: is it the same in the Next.js application?")
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

// verify returns the user that a valid token was signed for, or errBadToken.
func (a *authenticator) verify(raw string) (string, error) {
	claims := jwt.MapClaims{} // and not RegisteredClaims, which would read "SUB" as "sub"
	token, err := a.parser.ParseWithClaims(raw, claims, func(t *jwt.Token) (any, error) {
		if _, ok := t.Header["crit"]; ok { // RFC 7515, 4.1.11: no extension is known
			return nil, errors.New("crit is not supported")
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
	switch err := checkUser(user); {
	case claims["sub"] == nil:
		return "", badToken("sub is missing: is this a session cookie or the token of an e-mail link?")
	case !isString:
		return "", badToken("sub is not a string")
	case err != nil:
		return "", badToken("sub: " + err.Error())
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

// checkUser validates a user id against what the database can store. It rejects U+FFFD, which
// encoding/json substitutes for malformed text, because two ids could become equal.
// ContainsAny finds invalid UTF-8 as U+FFFD.
func checkUser(id string) error {
	if id == "" || len(id) > maxSubject || strings.ContainsAny(id, "\x00\uFFFD") {
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
	claims := maps.Clone(a.claims)
	claims["sub"], claims["iat"], claims["exp"] = user, now.Unix(), now.Add(tokenLifetime).Unix()
	return jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(a.keys.Keys[0])
}
