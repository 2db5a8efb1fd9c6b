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
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

const (
	maxTitle       = 200  // characters; also a CHECK in schema.sql
	maxDescription = 1000 // characters; also a CHECK in schema.sql
	defaultLimit   = 50   // tasks on a page
	maxLimit       = 100

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

// MarshalText makes a timestamp a JSON string, with one allocation: a list has hundreds.
func (t timestamp) MarshalText() ([]byte, error) {
	return time.Time(t).UTC().AppendFormat(make([]byte, 0, 32), timestampFormat), nil
}

// etag returns the task's entity-tag: its version in quotes. No two versions of a task have the
// same updated_at.
func (t task) etag() string { return `"` + t.UpdatedAt.String() + `"` }

// A precondition is the value of If-Match or If-None-Match.
type precondition struct {
	any      bool        // the value is *
	versions []time.Time // that it names; tags of other services are ignored
}

// ourTag matches an entity-tag of this service. A proxy that compresses responses puts W/ in front
// or -gzip inside the quotes. Such a tag still names the same version, so it matches in If-Match
// too, although weak tags do not match there in RFC 9110, section 13.1.1.
var ourTag = regexp.MustCompile(
	`"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)([^0-9A-Za-z"][^"]*)?"`)

// readPrecondition parses a header. Without the header it returns ifAbsent.
func readPrecondition(
	r *http.Request, header string, ifAbsent precondition,
) (p precondition, err error) {
	if r.Header[header] == nil {
		return ifAbsent, nil
	}
	text := strings.Join(r.Header[header], ",")
	if strings.TrimSpace(text) == "*" {
		return precondition{any: true}, nil
	}
	if strings.Count(text, `"`) < 2 {
		return p, invalid("%s must be * or a list of entity-tags in double quotes, such as "+
			`"2026-01-31T09:15:02.114806Z"`, header)
	}
	for _, match := range ourTag.FindAllStringSubmatch(text, -1) {
		if version, err := time.Parse(timestampFormat, match[1]); err == nil {
			p.versions = append(p.versions, version)
		}
	}
	return p, nil
}

func writeTask(w http.ResponseWriter, status int, t task) error {
	w.Header().Set("ETag", t.etag())
	return writeJSON(w, status, t)
}

// A change is what a request body sets. In an update a field that is nil keeps the task's value, in
// a PUT too, because a client must not clear a field that it does not know.
type change struct {
	title          *string
	description    *string
	setDescription bool // the body has a description; null clears it
	completed      *bool
	toggle         bool // toggle completed; then completed is nil
}

// readChange reads and validates the members of a body that clients may set. It ignores all others,
// because clients send whole tasks back.
func readChange(r *http.Request) (c change, err error) {
	members, err := readObject(r)
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
	raw, ok := members["description"]
	c.setDescription = ok
	if ok && string(raw) != "null" {
		if c.description, err = parseText("description", raw, maxDescription); err != nil {
			return c, err
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

func (s *server) createTask(w http.ResponseWriter, r *http.Request, key taskKey) error {
	c, err := readChange(r)
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
	t, replayed, err := s.db.insert(r.Context(), key.user, c, idempotencyKey)
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
// what buggy clients send for every task, such as "undefined".
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

// fingerprint returns a hash of a create's body. It covers only the fields that differ from their
// defaults, so that a field added in a later release does not change it. U+0000 separates the
// fields, because no value contains it.
func (c change) fingerprint() []byte {
	fields := []string{"title", *c.title}
	if c.description != nil {
		fields = append(fields, "description", *c.description)
	}
	if c.completed != nil && *c.completed {
		fields = append(fields, "completed", "true")
	}
	hash := sha256.Sum256([]byte(strings.Join(fields, "\x00")))
	return hash[:]
}

// An insertedTask is the row that insert reads.
type insertedTask struct {
	task
	Replayed bool // an earlier request with the key created the task
	SameBody bool // the body is that of the earlier request, or there is no key
}

// insert creates a task. For a key that was used before it returns the existing task and true, or
// errKeyReused if the body was different.
func (d *database) insert(
	ctx context.Context, user string, c change, key *string,
) (t task, replayed bool, err error) {
	var hash []byte
	if key != nil {
		hash = c.fingerprint()
	}
	// DO UPDATE sets the key to itself, so that RETURNING returns the existing row. DO NOTHING would
	// not, and a SELECT in the same statement would not see the row of a concurrent request, which is
	// not in its snapshot. xmax is 0 only in a new row.
	row, err := one(query(ctx, d, retryPolicy(key != nil), pgx.RowToStructByPos[insertedTask], `
		INSERT INTO public.tasks (user_id, title, description, completed, idempotency_key, request_hash)
		VALUES (@user_id, @title, @description, COALESCE(@completed, false), @key, @hash)
		ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
		DO UPDATE SET idempotency_key = tasks.idempotency_key
		RETURNING `+columns+`, xmax <> 0, request_hash IS NOT DISTINCT FROM @hash`,
		pgx.StrictNamedArgs{"user_id": user, "title": c.title, "description": c.description,
			"completed": c.completed, "key": key, "hash": hash}))
	if err == nil && !row.SameBody {
		err = errKeyReused
	}
	return row.task, row.Replayed, err
}

// A page is what the query string of a list requests.
type page struct {
	completed     *bool // nil for all tasks
	limit, offset int64
	before        int64 // the keyset cursor: only tasks with smaller ids
	total         bool  // also count the tasks of all pages
}

// readPage reads the query string of a list.
func readPage(q url.Values) (p page, err error) {
	if p.completed, err = readBool(q, "completed"); err != nil {
		return p, err
	}
	if p.limit, err = readNumber(q, "limit", 1, maxLimit, defaultLimit); err != nil {
		return p, err
	}
	if p.offset, err = readNumber(q, "offset", 0, math.MaxInt64, 0); err != nil {
		return p, err
	}
	if p.before, err = readNumber(q, "before", 1, math.MaxInt64, math.MaxInt64); err != nil {
		return p, err
	}
	if q.Has("before") && q.Has("offset") {
		return p, invalid("before and offset must not be used together")
	}
	total, err := readBool(q, "total")
	p.total = total != nil && *total
	return p, err
}

// readNumber returns a parameter from lowest to highest, or absent if there is none.
func readNumber(q url.Values, name string, lowest, highest, absent int64) (int64, error) {
	if !q.Has(name) {
		return absent, nil
	}
	n, err := strconv.ParseUint(q.Get(name), 10, 63) // accepts no sign
	if err != nil || int64(n) < lowest || int64(n) > highest || len(q[name]) > 1 {
		return 0, invalid("%s must be a single whole number from %d to %d", name, lowest, highest)
	}
	return int64(n), nil
}

// readBool returns a parameter that is true or false, or nil if there is none.
func readBool(q url.Values, name string) (*bool, error) {
	if !q.Has(name) {
		return nil, nil
	}
	value := q.Get(name)
	if len(q[name]) > 1 || value != "true" && value != "false" {
		return nil, invalid("%s must be true or false", name)
	}
	return new(value == "true"), nil
}

func (s *server) listTasks(w http.ResponseWriter, r *http.Request, key taskKey) error {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("the query string is malformed: percent-encode reserved characters")
	}
	p, err := readPage(q)
	if err != nil {
		return err
	}
	tasks, err := s.db.list(r.Context(), key.user, p)
	if err != nil {
		return err
	}
	if p.total {
		total, err := s.db.count(r.Context(), key.user, p.completed)
		if err != nil {
			return err
		}
		w.Header().Set("X-Total-Count", strconv.FormatInt(total, 10))
	}
	if len(tasks) > int(p.limit) {
		tasks = tasks[:p.limit]
		next := r.URL.Query() // not q, which may be large, so that it is free during the statement
		next.Del("offset")
		next.Set("before", strconv.FormatInt(tasks[p.limit-1].ID, 10))
		w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.EscapedPath(), next.Encode()))
	}
	return writeJSON(w, http.StatusOK, tasks)
}

// list returns a page of tasks and, if there are more, the first task of the next page.
//
// With user_id = $1 AND id < $2 the planner may sort or filter all tasks of a user if its
// statistics are wrong, as after a restore. A row comparison fits one index only, and sub-selects
// hide their values from the planner's estimates. So it reads that index backward from the cursor.
// TestListsReadOneIndex has the cases.
func (d *database) list(ctx context.Context, user string, p page) ([]task, error) {
	where := `
		WHERE (user_id, id) BETWEEN ((SELECT @user_id), 1) AND ((SELECT @user_id), @last)
		ORDER BY user_id DESC, id DESC`
	args := pgx.StrictNamedArgs{"user_id": user, "last": p.before - 1, "limit": p.limit + 1,
		"offset": p.offset}
	if p.completed != nil { // without the second condition, the planner may sort by the primary key
		where = `
		WHERE (user_id, completed, id)
		          BETWEEN ((SELECT @user_id), (SELECT @completed::boolean), 1)
		              AND ((SELECT @user_id), (SELECT @completed::boolean), @last)
		  AND user_id BETWEEN (SELECT @user_id) AND (SELECT @user_id)
		ORDER BY user_id DESC, completed DESC, id DESC`
		args["completed"] = *p.completed
	}
	return query(ctx, d, retry, pgx.RowToStructByPos[task], `
		SELECT `+columns+`
		FROM public.tasks`+where+`
		LIMIT (SELECT @limit::bigint) OFFSET (SELECT @offset::bigint)`, args)
}

// count returns the number of tasks on all pages.
func (d *database) count(ctx context.Context, user string, completed *bool) (int64, error) {
	return one(query(ctx, d, retry, pgx.RowTo[int64], `
		SELECT count(*)
		FROM public.tasks
		WHERE user_id = $1 AND completed = COALESCE($2, completed)`, user, completed))
}

func (s *server) getTask(w http.ResponseWriter, r *http.Request, key taskKey) error {
	known, err := readPrecondition(r, "If-None-Match", precondition{})
	if err != nil {
		return err
	}
	t, err := s.db.get(r.Context(), key)
	if err != nil {
		return err
	}
	if known.any || slices.ContainsFunc(known.versions, time.Time(t.UpdatedAt).Equal) {
		w.Header().Set("ETag", t.etag())
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeTask(w, http.StatusOK, t)
}

func (d *database) get(ctx context.Context, key taskKey) (task, error) {
	return one(query(ctx, d, retry, pgx.RowToStructByPos[task], `
		SELECT `+columns+`
		FROM public.tasks
		WHERE user_id = $1 AND id = $2`, key.user, key.id))
}

func (s *server) updateTask(w http.ResponseWriter, r *http.Request, key taskKey) error {
	c, err := readChange(r)
	if err != nil {
		return err
	}
	return s.applyChange(w, r, key, c)
}

// completeTask sets completed to the body's value, or toggles it if the body has none.
func (s *server) completeTask(w http.ResponseWriter, r *http.Request, key taskKey) error {
	members, err := readObject(r)
	if err != nil {
		return err
	}
	completed, err := parseCompleted(members)
	if err != nil {
		return err
	}
	return s.applyChange(w, r, key, change{completed: completed, toggle: completed == nil})
}

// applyChange changes a task, unless If-Match names other versions.
func (s *server) applyChange(
	w http.ResponseWriter, r *http.Request, key taskKey, c change,
) error {
	match, err := readPrecondition(r, "If-Match", precondition{any: true})
	if err != nil {
		return err
	}
	t, err := s.db.update(r.Context(), key, match, c)
	if err != nil {
		return err
	}
	return writeTask(w, http.StatusOK, t)
}

// update changes a task. The statement itself computes the new values, so that concurrent changes
// of different fields are all kept. updated_at increases even if the clock has not advanced or was
// set back.
func (d *database) update(
	ctx context.Context, key taskKey, match precondition, c change,
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

func (s *server) deleteTask(w http.ResponseWriter, r *http.Request, key taskKey) error {
	match, err := readPrecondition(r, "If-Match", precondition{any: true})
	if err != nil {
		return err
	}
	if err := s.db.delete(r.Context(), key, match); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (d *database) delete(ctx context.Context, key taskKey, match precondition) error {
	_, err := d.modify(ctx, key, match, `DELETE FROM public.tasks`, pgx.StrictNamedArgs{})
	return err
}

// modify runs an UPDATE or DELETE, to which it adds the WHERE and RETURNING clauses and their
// arguments. It returns the task, or errChanged if match does not contain the task's version.
func (d *database) modify(
	ctx context.Context, key taskKey, match precondition, statement string, args pgx.StrictNamedArgs,
) (task, error) {
	args["user_id"], args["id"] = key.user, key.id
	args["any"], args["versions"] = match.any, match.versions
	t, err := one(query(ctx, d, noRetry, pgx.RowToStructByPos[task], statement+`
		WHERE user_id = @user_id AND id = @id
		  AND (@any::boolean OR updated_at = ANY (@versions::timestamptz[]))
		RETURNING `+columns, args))
	if errors.Is(err, errNotFound) && !match.any {
		if _, err = d.get(ctx, key); err == nil {
			err = errChanged
		}
	}
	return t, err
}
