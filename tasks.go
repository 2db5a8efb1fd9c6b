package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

const (
	maxTitle       = 200  // characters; also a CHECK in schema.sql
	maxDescription = 1000 // characters; also a CHECK in schema.sql
	defaultLimit   = 50   // tasks on a page
	maxLimit       = 100
	maxTags        = 100 // entity-tags in If-Match and If-None-Match

	minIdempotencyKey = 16  // bytes; a UUID has 36
	maxIdempotencyKey = 255 // bytes; also a CHECK in schema.sql
)

// A taskKey is the primary key of a task: its owner and its id. The id is 0 on routes without {id}.
type taskKey struct {
	user string // verified
	id   int64
}

// A task is what clients get. The fields are in the order of columns.
type task struct {
	ID          int64     `json:"id"`
	UserID      string    `json:"user_id"`
	Title       string    `json:"title"`
	Description *string   `json:"description"`
	Completed   bool      `json:"completed"`
	CreatedAt   timestamp `json:"created_at"`
	UpdatedAt   timestamp `json:"updated_at"` // increases with every change: it is the version
}

const columns = `id, user_id, title, description, completed, created_at, updated_at`

// A timestamp is a time whose text is in UTC and always has six fractional digits, PostgreSQL's
// precision, so that sorting the texts sorts the times.
type timestamp time.Time

const timestampFormat = "2006-01-02T15:04:05.000000Z" // RFC 3339

// ScanTimestamptz reads a timestamp from a row.
func (t *timestamp) ScanTimestamptz(v pgtype.Timestamptz) error {
	if !v.Valid || v.InfinityModifier != pgtype.Finite {
		return errors.New("a timestamp is NULL or infinite")
	}
	*t = timestamp(v.Time)
	return nil
}

func (t timestamp) String() string { return time.Time(t).UTC().Format(timestampFormat) }

// MarshalText makes a timestamp a JSON string.
func (t timestamp) MarshalText() ([]byte, error) {
	return time.Time(t).UTC().AppendFormat(nil, timestampFormat), nil
}

// etag returns the task's entity-tag: its version in quotes. No two versions of a task have the
// same updated_at.
func (t task) etag() string { return `"` + t.UpdatedAt.String() + `"` }

// entityTag matches the first element of a list of entity-tags (RFC 9110, section 8.8.3). A comma
// may stand inside the quotes.
var entityTag = regexp.MustCompile(`^(?:W/)?"([^"\x00-\x20\x7f]*)"[ \t]*(?:,|$)`)

// A tagList is the value of If-Match or If-None-Match.
type tagList struct {
	wildcard bool        // the value is *
	versions []time.Time // of the tags of this service; another tag matches no version
}

// tags parses a header, and returns nil if the request does not have it. A proxy that compresses
// responses rewrites their tags as W/"…" or "…-gzip". Such a tag still names the same version, so
// it matches in If-Match too, although RFC 9110 does not let weak tags match there.
func tags(r *http.Request, header string) (*tagList, error) {
	values := r.Header[header]
	if values == nil {
		return nil, nil
	}
	text := strings.Trim(strings.Join(values, ","), ", \t")
	if text == "*" {
		return &tagList{wildcard: true}, nil
	}
	list := &tagList{}
	for range maxTags {
		match := entityTag.FindStringSubmatch(text)
		if match == nil {
			break
		}
		if version, ok := parseVersion(match[1]); ok {
			list.versions = append(list.versions, version)
		}
		if text = strings.TrimLeft(text[len(match[0]):], ", \t"); text == "" {
			return list, nil
		}
	}
	return nil, invalid("%s must be * or a list of up to %d entity-tags such as %s, "+
		"in double quotes", header, maxTags, task{}.etag())
}

// parseVersion reads the quoted part of an entity-tag, which may have a suffix such as -gzip.
func parseVersion(text string) (time.Time, bool) {
	if len(text) < len(timestampFormat) {
		return time.Time{}, false
	}
	text, suffix := text[:len(timestampFormat)], text[len(timestampFormat):]
	version, err := time.Parse(timestampFormat, text)
	if err != nil || timestamp(version).String() != text {
		return time.Time{}, false
	}
	next, _ := utf8.DecodeRuneInString(suffix)
	return version, !unicode.IsLetter(next) && !unicode.IsDigit(next)
}

// contains reports whether the list matches a version. A nil list matches none.
func (l *tagList) contains(version timestamp) bool {
	return l != nil && (l.wildcard || slices.ContainsFunc(l.versions, time.Time(version).Equal))
}

func writeTask(w http.ResponseWriter, status int, t task) error {
	w.Header().Set("ETag", t.etag())
	return writeJSON(w, status, t)
}

// A change is what a request body sets. In an update, a field that is nil keeps its value, with PUT
// too: a client that does not know a field must not clear it.
type change struct {
	title          *string
	description    *string
	setDescription bool // the body has a description; null clears it
	completed      *bool
	toggle         bool // toggle completed; then completed is nil
}

// readChange reads and validates the members of a body that clients may set. It ignores all others,
// because clients send whole tasks back.
func readChange(
	ctx context.Context, w http.ResponseWriter, r *http.Request,
) (c change, err error) {
	members, err := readObject(ctx, w, r)
	if err != nil {
		return c, err
	}
	if members == nil {
		return c, errBadJSON
	}
	if raw, ok := members["title"]; ok {
		if c.title, err = parseText("title", raw, maxTitle); err != nil {
			return c, err
		}
		if strings.TrimSpace(*c.title) == "" {
			return c, invalid("title must not be blank")
		}
	}
	if raw, ok := members["description"]; ok {
		c.setDescription = true
		if string(raw) != "null" {
			if c.description, err = parseText("description", raw, maxDescription); err != nil {
				return c, err
			}
		}
	}
	c.completed, err = parseCompleted(members)
	return c, err
}

// parseText reads a JSON string of at most limit characters.
func parseText(name string, raw json.RawMessage, limit int) (*string, error) {
	var text *string
	switch {
	case json.Unmarshal(raw, &text) != nil || text == nil:
		return nil, invalid("%s must be a string", name)
	case strings.ContainsRune(*text, 0):
		return nil, invalid("%s must not contain U+0000", name)
	case utf8.RuneCountInString(*text) > limit:
		return nil, invalid("%s must not exceed %d characters", name, limit)
	}
	return text, nil
}

// parseCompleted reads the member completed, nil if there is none.
func parseCompleted(members map[string]json.RawMessage) (completed *bool, err error) {
	raw, ok := members["completed"]
	if ok && (json.Unmarshal(raw, &completed) != nil || completed == nil) {
		err = invalid("completed must be true or false")
	}
	return completed, err
}

func (s *server) createTask(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey,
) error {
	c, err := readChange(ctx, w, r)
	if err != nil {
		return err
	}
	if c.title == nil {
		return invalid("title is required")
	}
	idempotencyKey, err := readIdempotencyKey(r)
	if err != nil {
		return err
	}
	t, replayed, err := s.db.insert(ctx, key.user, c, idempotencyKey)
	if err != nil {
		return err
	}
	if replayed {
		w.Header().Set("Idempotency-Replayed", "true")
	}
	w.Header().Set("Location", fmt.Sprintf("%s/%d", r.URL.EscapedPath(), t.ID))
	return writeTask(w, http.StatusCreated, t)
}

// readIdempotencyKey returns the key of a create, nil if it has none. The minimum length rejects
// what buggy clients send for every task, such as undefined.
func readIdempotencyKey(r *http.Request) (*string, error) {
	keys := r.Header["Idempotency-Key"]
	if keys == nil {
		return nil, nil
	}
	key := keys[0]
	notVisible := func(c rune) bool { return c <= ' ' || c > '~' }
	wrongLength := len(key) < minIdempotencyKey || len(key) > maxIdempotencyKey
	if len(keys) > 1 || wrongLength || strings.ContainsFunc(key, notVisible) {
		return nil, invalid("Idempotency-Key must be one value of %d to %d visible ASCII characters, "+
			"for example a UUID", minIdempotencyKey, maxIdempotencyKey)
	}
	return &key, nil
}

// fingerprints returns two hashes of a create's body; c.completed must not be nil. current covers
// only the fields that differ from their defaults, so that a field added in a later release does
// not change it. former is the hash that earlier builds stored.
func (c change) fingerprints() (current, former []byte, err error) {
	fields := map[string]any{"title": c.title} // a map's JSON has sorted keys
	if c.description != nil {
		fields["description"] = c.description
	}
	if *c.completed {
		fields["completed"] = true
	}
	if current, err = hashJSON(fields); err != nil {
		return nil, nil, err
	}
	former, err = hashJSON([]any{c.title, c.description, c.completed})
	return current, former, err
}

func hashJSON(v any) ([]byte, error) {
	text, err := json.Marshal(v)
	sum := sha256.Sum256(text)
	return sum[:], err
}

// An insertedTask is the row that insert reads.
type insertedTask struct {
	task
	Replayed bool // an earlier request with the key created the task
	SameBody bool
}

// insert creates a task. If the key was used before, it returns that request's task in its current
// state, and true, or errKeyReused if the body was different.
func (d *database) insert(
	ctx context.Context, user string, c change, key *string,
) (t task, replayed bool, err error) {
	if c.completed == nil {
		c.completed = new(false)
	}
	var hash, formerHash []byte
	if key != nil {
		if hash, formerHash, err = c.fingerprints(); err != nil {
			return t, false, err
		}
	}
	// DO UPDATE sets the key to itself, so that RETURNING returns the existing row. DO NOTHING would
	// not, and a SELECT in the same statement would not see the row of a concurrent request, which is
	// not in its snapshot. xmax is 0 only in a new row.
	row, err := queryRow(ctx, d, retryPolicy(key != nil), pgx.RowToStructByPos[insertedTask], `
		INSERT INTO public.tasks (user_id, title, description, completed, idempotency_key, request_hash)
		VALUES (@user_id, @title, @description, @completed, @key, @hash)
		ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
		DO UPDATE SET idempotency_key = tasks.idempotency_key
		RETURNING `+columns+`, xmax <> 0,
		          request_hash IS NOT DISTINCT FROM @hash OR request_hash = @former_hash`,
		pgx.StrictNamedArgs{"user_id": user, "title": c.title, "description": c.description,
			"completed": c.completed, "key": key, "hash": hash, "former_hash": formerHash})
	if err == nil && !row.SameBody {
		err = errKeyReused
	}
	return row.task, row.Replayed, err
}

// A page is what the query string of a list requests.
type page struct {
	completed     *bool
	limit, offset int64
	before        int64 // the keyset cursor: only tasks with smaller ids
	total         bool
}

// readPage reads the query string of a list.
func readPage(q url.Values) (page, error) {
	params := queryParams{values: q}
	p := page{
		completed: params.boolean("completed"),
		limit:     params.number("limit", 1, maxLimit, defaultLimit),
		offset:    params.number("offset", 0, math.MaxInt64, 0),
		before:    params.number("before", 1, math.MaxInt64, math.MaxInt64),
	}
	total := params.boolean("total")
	p.total = total != nil && *total
	if q.Has("before") && q.Has("offset") {
		params.fail("before and offset must not be used together")
	}
	return p, params.err
}

// queryParams reads the values of a query string. err is the first error.
type queryParams struct {
	values url.Values
	err    error
}

func (p *queryParams) fail(format string, args ...any) {
	if p.err == nil {
		p.err = invalid(format, args...)
	}
}

// number returns a parameter from lowest to highest, or fallback if it is absent.
func (p *queryParams) number(name string, lowest, highest, fallback int64) int64 {
	if !p.values.Has(name) {
		return fallback
	}
	n, err := strconv.ParseUint(p.values.Get(name), 10, 63) // accepts no sign
	if err != nil || int64(n) < lowest || int64(n) > highest || len(p.values[name]) > 1 {
		p.fail("%s must be a single whole number from %d to %d", name, lowest, highest)
	}
	return int64(n)
}

// boolean returns a parameter that is true or false, nil if it is absent.
func (p *queryParams) boolean(name string) *bool {
	if !p.values.Has(name) {
		return nil
	}
	value := p.values.Get(name)
	if len(p.values[name]) > 1 || value != "true" && value != "false" {
		p.fail("%s must be true or false", name)
	}
	return new(value == "true")
}

func (s *server) listTasks(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey,
) error {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("the query string is malformed: percent-encode reserved characters")
	}
	p, err := readPage(q)
	if err != nil {
		return err
	}
	tasks, err := s.db.list(ctx, key.user, p)
	if err != nil {
		return err
	}
	if p.total {
		total, err := s.db.count(ctx, key.user, p)
		if err != nil {
			return err
		}
		w.Header().Set("X-Total-Count", strconv.FormatInt(total, 10))
	}
	if len(tasks) > int(p.limit) {
		tasks = tasks[:p.limit]
		q.Del("offset")
		q.Set("before", strconv.FormatInt(tasks[p.limit-1].ID, 10))
		w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.EscapedPath(), q.Encode()))
	}
	return writeJSON(w, http.StatusOK, tasks)
}

// filter returns the columns that have the same value in all tasks of a list, these values in SQL,
// and the arguments. An index of the table must begin with the columns in this order.
func (p page) filter(user string) (names, values string, args pgx.StrictNamedArgs) {
	names, values = "user_id", "(SELECT @user_id)"
	args = pgx.StrictNamedArgs{"user_id": user}
	if p.completed != nil {
		names, values = names+", completed", values+", (SELECT @completed::boolean)"
		args["completed"] = *p.completed
	}
	return names, values, args
}

// list returns a page of tasks and, if there are more, the first task of the next page.
//
// The planner must scan one index backward from the cursor, whatever its statistics say. With
// user_id = $1 AND id < $2 it sometimes filters or sorts all tasks of a user. A row comparison fits
// only one index, which returns the rows in order. The planner does not see the values of
// sub-selects, so it makes no estimate from them, and plans a prepared statement only once.
// TestListsReadOneIndex fails without any of this.
func (d *database) list(ctx context.Context, user string, p page) ([]task, error) {
	names, values, args := p.filter(user)
	args["last"], args["limit"], args["offset"] = p.before-1, p.limit+1, p.offset
	redundant := ""
	if names != "user_id" { // with a filter, the planner may otherwise scan the primary key and sort
		redundant = `AND user_id BETWEEN (SELECT @user_id) AND (SELECT @user_id)`
	}
	return query(ctx, d, retry, pgx.RowToStructByPos[task], `
		SELECT `+columns+`
		FROM public.tasks
		WHERE (`+names+`, id) BETWEEN (`+values+`, 1) AND (`+values+`, @last)
		`+redundant+`
		ORDER BY `+strings.ReplaceAll(names, ",", " DESC,")+` DESC, id DESC
		LIMIT (SELECT @limit::bigint) OFFSET (SELECT @offset::bigint)`, args)
}

// count returns the number of tasks on all pages.
func (d *database) count(ctx context.Context, user string, p page) (int64, error) {
	names, values, args := p.filter(user)
	return queryRow(ctx, d, retry, pgx.RowTo[int64], `
		SELECT count(*)
		FROM public.tasks
		WHERE (`+names+`) = (`+values+`)`, args)
}

func (s *server) getTask(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey,
) error {
	known, err := tags(r, "If-None-Match")
	if err != nil {
		return err
	}
	t, err := s.db.get(ctx, key)
	if err != nil {
		return err
	}
	if known.contains(t.UpdatedAt) {
		w.Header().Set("ETag", t.etag())
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeTask(w, http.StatusOK, t)
}

func (d *database) get(ctx context.Context, key taskKey) (task, error) {
	return queryRow(ctx, d, retry, pgx.RowToStructByPos[task], `
		SELECT `+columns+`
		FROM public.tasks
		WHERE user_id = $1 AND id = $2`, key.user, key.id)
}

func (s *server) updateTask(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey,
) error {
	c, err := readChange(ctx, w, r)
	if err != nil {
		return err
	}
	return s.applyChange(ctx, w, r, key, c)
}

// completeTask sets completed to the body's value, or toggles it if the body has none.
func (s *server) completeTask(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey,
) error {
	members, err := readObject(ctx, w, r)
	if err != nil {
		return err
	}
	completed, err := parseCompleted(members)
	if err != nil {
		return err
	}
	c := change{completed: completed, toggle: completed == nil}
	return s.applyChange(ctx, w, r, key, c)
}

// applyChange changes a task if its version is in If-Match.
func (s *server) applyChange(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey, c change,
) error {
	match, err := tags(r, "If-Match")
	if err != nil {
		return err
	}
	t, err := s.db.update(ctx, key, match, c)
	if err != nil {
		return err
	}
	return writeTask(w, http.StatusOK, t)
}

// update changes a task. The statement itself computes the new values, so that concurrent changes
// of different fields are all kept. updated_at increases even if the clock has not advanced or was
// set back.
func (d *database) update(
	ctx context.Context, key taskKey, match *tagList, c change,
) (task, error) {
	return d.modify(ctx, key, match, `
		UPDATE public.tasks
		SET title = COALESCE(@title, title),
		    description = CASE WHEN @set_description::boolean THEN @description ELSE description END,
		    completed = CASE WHEN @toggle THEN NOT completed ELSE COALESCE(@completed, completed) END,
		    updated_at = GREATEST(clock_timestamp(), updated_at + interval '1 microsecond')`,
		pgx.StrictNamedArgs{"title": c.title, "set_description": c.setDescription,
			"description": c.description, "completed": c.completed, "toggle": c.toggle})
}

func (s *server) deleteTask(
	ctx context.Context, w http.ResponseWriter, r *http.Request, key taskKey,
) error {
	match, err := tags(r, "If-Match")
	if err != nil {
		return err
	}
	if err := s.db.delete(ctx, key, match); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (d *database) delete(ctx context.Context, key taskKey, match *tagList) error {
	_, err := d.modify(ctx, key, match, `DELETE FROM public.tasks`, pgx.StrictNamedArgs{})
	return err
}

// modify runs an UPDATE or DELETE, to which it adds the WHERE and RETURNING clauses and their
// arguments. It returns the task, or errChanged if match does not contain the task's version.
func (d *database) modify(
	ctx context.Context, key taskKey, match *tagList, statement string, args pgx.StrictNamedArgs,
) (task, error) {
	statement += `
		WHERE user_id = @user_id AND id = @id`
	args["user_id"], args["id"] = key.user, key.id
	conditional := match != nil && !match.wildcard
	if conditional {
		statement += ` AND updated_at = ANY (@match::timestamptz[])`
		args["match"] = match.versions
	}
	t, err := queryRow(ctx, d, noRetry, pgx.RowToStructByPos[task], statement+`
		RETURNING `+columns, args)
	if errors.Is(err, errNotFound) && conditional {
		if _, err := d.get(ctx, key); err != nil {
			return t, err
		}
		return t, errChanged
	}
	return t, err
}
