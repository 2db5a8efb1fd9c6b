package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
)

const (
	minSecret     = 32               // bytes; RFC 7518, 3.2: a key no shorter than the hash
	maxSubject    = 512              // bytes; schema.sql holds user_id to the same
	clockLeeway   = 30 * time.Second // between the front end's clock and ours
	tokenLifetime = time.Hour        // of the tokens that `todo-app token` makes
	year10000     = 253402300800     // seconds since 1970
	maxKnown      = 1000             // tokens that are remembered
	maxKnownSize  = 1000             // bytes; a longer token is not
)

// An authenticator verifies the HS256 tokens (RFC 7519) that the front end
// signs with Better Auth's secret. It knows no user but the one in a token's sub.
type authenticator struct {
	keys             jwt.VerificationKeySet // the first one signs
	parser           *jwt.Parser
	validator        *jwt.Validator // of the claims alone
	audience, issuer string         // required of a token unless ""

	mu    sync.Mutex
	known map[string]jwt.MapClaims // by token; its signature was verified before
}

// newAuthenticator takes the settings BETTER_AUTH_SECRET, BETTER_AUTH_SECRETS
// (Better Auth's "2:new,1:old"), JWT_AUDIENCE and JWT_ISSUER, "" where unset.
// Its errors name the setting and show no secret.
func newAuthenticator(secret, secrets, audience, issuer string) (*authenticator, error) {
	a := &authenticator{audience: audience, issuer: issuer, known: map[string]jwt.MapClaims{}}
	if secret == "" && secrets == "" {
		return nil, errors.New("BETTER_AUTH_SECRET is not set: it takes the secret that the Next.js side has under the same name")
	}
	if secret != "" {
		if err := a.addKey(secret); err != nil { // as it is: not decoded, not trimmed
			return nil, fmt.Errorf("BETTER_AUTH_SECRET %w", err)
		}
	}
	if secrets != "" {
		if err := a.addKeys(secrets); err != nil {
			return nil, fmt.Errorf("BETTER_AUTH_SECRETS %w", err)
		}
	}
	options := []jwt.ParserOption{
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Name}), // or HS512 would pass with the same secret
		jwt.WithExpirationRequired(),
		jwt.WithLeeway(clockLeeway),
		jwt.WithStrictDecoding(),
	}
	if audience != "" {
		options = append(options, jwt.WithAudience(audience))
	}
	if issuer != "" {
		options = append(options, jwt.WithIssuer(issuer))
	}
	a.parser, a.validator = jwt.NewParser(options...), jwt.NewValidator(options...)
	return a, nil
}

// addKeys takes a rotation list, the current secret first. It is as strict as
// Better Auth, and takes digits alone for a version.
func (a *authenticator) addKeys(list string) error {
	seen := map[uint64]bool{}
	for i, entry := range strings.Split(list, ",") {
		version, secret, _ := strings.Cut(entry, ":")
		n, err := strconv.ParseUint(strings.TrimSpace(version), 10, 64)
		if err != nil || seen[n] {
			return fmt.Errorf("must be a list like 2:new,1:old; entry %d has no version, or that of another", i+1)
		}
		seen[n] = true
		if err := a.addKey(strings.TrimSpace(secret)); err != nil {
			return fmt.Errorf("entry %d %w", i+1, err)
		}
	}
	return nil
}

// addKey refuses what anybody could guess. golang-jwt would verify with an empty key.
func (a *authenticator) addKey(secret string) error {
	// What Better Auth falls back to where no secret is set: up to 1.3, and since.
	defaults := []string{"better-auth-secret-123456789", "better-auth-secret-12345678901234567890"}
	switch {
	case slices.Contains(defaults, secret):
		return errors.New("is Better Auth's public default: set one of your own, `openssl rand -base64 32` makes it")
	case len(secret) < minSecret:
		return fmt.Errorf("has fewer than %d bytes: `openssl rand -base64 32` makes a good one", minSecret)
	}
	a.keys.Keys = append(a.keys.Keys, []byte(secret))
	return nil
}

// user returns the verified user of a request: errNoToken without a bearer
// token in its Authorization header, errBadToken with one that will not do or
// more than one such header. A cookie or a query string is never looked at.
func (a *authenticator) user(r *http.Request) (string, error) {
	headers := r.Header["Authorization"]
	if len(headers) > 1 {
		return "", refuseToken("more than one Authorization header")
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimLeft(token, " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", errNoToken
	}
	return a.verify(token)
}

// refuseToken makes an errBadToken. The reason is for the log alone, and is
// never made of anything that the token says.
func refuseToken(reason string) error { return fmt.Errorf("%w: %s", errBadToken, reason) }

// verify returns the user whom a token speaks for. A front end sends the same
// token for minutes: its signature is verified once, its claims each time.
func (a *authenticator) verify(token string) (string, error) {
	a.mu.Lock()
	claims, known := a.known[token]
	a.mu.Unlock()
	if !known || a.validator.Validate(claims) != nil {
		var err error
		if claims, err = a.parse(token); err != nil {
			return "", err
		}
		a.remember(token, claims)
	}
	return claims["sub"].(string), nil
}

// remember keeps the claims of a token, unless it is unusually long.
func (a *authenticator) remember(token string, claims jwt.MapClaims) {
	if len(token) > maxKnownSize {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxKnown {
		clear(a.known)
	}
	a.known[token] = claims
}

// parse returns the claims of a good token, of which sub is a user's id.
func (a *authenticator) parse(raw string) (jwt.MapClaims, error) {
	claims := jwt.MapClaims{} // and not RegisteredClaims, which would take "SUB" for "sub"
	token, err := a.parser.ParseWithClaims(raw, claims, func(t *jwt.Token) (any, error) {
		if _, ok := t.Header["crit"]; ok { // RFC 7515, 4.1.11: extensions that we would have to understand
			return nil, errors.New("crit")
		}
		return a.keys, nil
	})
	if err != nil {
		return nil, refuseToken(refusalReason(token, err))
	}
	for _, name := range []string{"exp", "nbf"} {
		if t, ok := claims[name].(float64); ok && (t < 0 || t >= year10000) {
			return nil, refuseToken(name + " is outside the years 1970 to 9999: is it in milliseconds?")
		}
	}
	// No other claim stands in for sub: Better Auth signs e-mail links and session
	// cookies with the same secret, and those carry an id and an e-mail address.
	if user, ok := claims["sub"].(string); !ok || checkUser(user) != nil {
		return nil, refuseToken("sub is missing or no usable user id: is this a session cookie or an e-mail link's token?")
	}
	return claims, nil
}

// refusalReason puts the parser's error in words that lead to its cause.
func refusalReason(token *jwt.Token, err error) string {
	switch {
	case token == nil:
		return "not three parts: is this a session token?"
	case errors.Is(err, jwt.ErrTokenMalformed):
		return "its parts are not JSON in unpadded base64url"
	case token.Header["alg"] != jwt.SigningMethodHS256.Name:
		return "not HS256: is this a jwt-plugin token?"
	case errors.Is(err, jwt.ErrTokenUnverifiable): // no key was given
		return "it has a crit header"
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return "bad signature: do the secrets differ?"
	case errors.Is(err, jwt.ErrTokenExpired):
		return "expired"
	case errors.Is(err, jwt.ErrTokenNotValidYet):
		return "not yet valid: do the clocks differ?"
	case errors.Is(err, jwt.ErrTokenInvalidAudience):
		return "aud is not JWT_AUDIENCE"
	case errors.Is(err, jwt.ErrTokenInvalidIssuer):
		return "iss is not JWT_ISSUER"
	case errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return "it lacks exp, or the aud or iss that JWT_AUDIENCE and JWT_ISSUER ask for"
	}
	return "exp, nbf, aud or iss is of a wrong type"
}

// checkUser holds a user id to what the database can keep. U+FFFD is what
// encoding/json makes of malformed text: two ids must never become one.
func checkUser(id string) error {
	if id == "" || len(id) > maxSubject || !utf8.ValidString(id) || strings.ContainsAny(id, "\x00\uFFFD") {
		return fmt.Errorf("a user id is 1 to %d bytes of UTF-8 without U+0000 and U+FFFD", maxSubject)
	}
	return nil
}

// sign makes a token for user as the front end would, good for an hour.
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
