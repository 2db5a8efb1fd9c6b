package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

const (
	maxTitle       = 200  // characters; schema.sql holds to the same
	maxDescription = 1000 // characters
	defaultLimit   = 50   // tasks on a page
	maxLimit       = 100
	maxKey         = 255 // bytes of an Idempotency-Key
)

// A target is what the path of a request names: the user, and one of the user's
// tasks, or 0 for them all. Together they are the primary key.
type target struct {
	user string // verified
	id   int64
}

// A task as the client sees it.
type task struct {
	ID          int64   `json:"id"`
	UserID      string  `json:"user_id"`
	Title       string  `json:"title"`
	Description *string `json:"description"`
	Completed   bool    `json:"completed"`
	CreatedAt   instant `json:"created_at"`
	UpdatedAt   instant `json:"updated_at"`
}

// An instant is a time that spares encoding/json the second parse that it
// gives to what time.Time's MarshalJSON returns, most of what encoding a task
// takes.
type instant time.Time

func (i instant) MarshalText() ([]byte, error) {
	text := make([]byte, 0, len(time.RFC3339Nano))
	return time.Time(i).UTC().AppendFormat(text, time.RFC3339Nano), nil
}

// columns are those of a task, in the order of its fields.
const columns = `id, user_id, title, description, completed, created_at, updated_at`

func (t *task) fields() []any {
	return []any{&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, (*time.Time)(&t.CreatedAt), (*time.Time)(&t.UpdatedAt)}
}

func scanTask(row pgx.CollectableRow) (t task, err error) {
	err = row.Scan(t.fields()...)
	return t, err
}

// etag is the task's version: no two updates of a task share a microsecond.
func (t task) etag() string {
	return `"` + strconv.FormatInt(time.Time(t.UpdatedAt).UnixMicro(), 10) + `"`
}

// ifMatch returns the tags under which a change may be made, nil for any.
func ifMatch(r *http.Request) []string {
	given := tags(r, "If-Match")
	if slices.Equal(given, []string{"*"}) {
		return nil
	}
	return given
}

// ifNoneMatch reports whether the client has this version.
func ifNoneMatch(r *http.Request, etag string) bool {
	return slices.ContainsFunc(tags(r, "If-None-Match"), func(tag string) bool {
		return tag == "*" || strings.TrimPrefix(tag, "W/") == etag // RFC 9110, 13.1.2: the comparison is weak
	})
}

// tags splits the entity tags of a header, nil if there is none.
func tags(r *http.Request, header string) []string {
	if r.Header[header] == nil {
		return nil
	}
	value := strings.ToValidUTF8(strings.Join(r.Header[header], ","), "?") // it may go to the database
	list := strings.Split(value, ",")                                      // no tag of ours has a comma in it
	for i := range list {
		list[i] = strings.TrimSpace(list[i])
	}
	return list
}

func writeTask(w http.ResponseWriter, status int, t task) error {
	w.Header().Set("ETag", t.etag())
	return writeJSON(w, status, t)
}

// A change is what a request body asks for. What is nil stays as it is.
type change struct {
	title       *string
	describe    bool // description is given: nil clears it
	description *string
	completed   *bool
	toggle      bool // completed is turned over
}

// readChange reads the members of a body that a client may set, and holds them
// to their rules. All others are ignored: clients post whole tasks back.
func readChange(ctx context.Context, w http.ResponseWriter, r *http.Request) (c change, err error) {
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
		c.describe = true
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
	if raw, ok := members["completed"]; ok && (json.Unmarshal(raw, &completed) != nil || completed == nil) {
		err = invalid("completed must be true or false")
	}
	return completed, err
}

func (s *server) createTask(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error {
	c, err := readChange(ctx, w, r)
	if err != nil {
		return err
	}
	if c.title == nil {
		return invalid("title is required")
	}
	key, err := idempotencyKey(r)
	if err != nil {
		return err
	}
	t, replayed, err := s.db.insert(ctx, at.user, c, key)
	if err != nil {
		return err
	}
	if replayed {
		w.Header().Set("Idempotency-Replayed", "true")
	}
	w.Header().Set("Location", fmt.Sprintf("%s/%d", r.URL.EscapedPath(), t.ID))
	return writeTask(w, http.StatusCreated, t)
}

// idempotencyKey returns the key under which a create is repeated, or nil.
func idempotencyKey(r *http.Request) (*string, error) {
	keys := r.Header["Idempotency-Key"]
	if keys == nil {
		return nil, nil
	}
	notVisible := func(c rune) bool { return c <= ' ' || c > '~' }
	if len(keys) > 1 || keys[0] == "" || len(keys[0]) > maxKey || strings.ContainsFunc(keys[0], notVisible) {
		return nil, invalid("Idempotency-Key must be 1 to %d visible ASCII characters", maxKey)
	}
	return &keys[0], nil
}

// insert creates a task, once for a key. It returns the task that the key
// already made, as it is now, with true, and errKeyReused if that came of
// another request.
func (d *database) insert(ctx context.Context, user string, c change, key *string) (t task, replayed bool, err error) {
	if c.completed == nil {
		c.completed = new(false)
	}
	var hash []byte
	if key != nil {
		request, err := json.Marshal([]any{c.title, c.description, c.completed})
		if err != nil {
			return t, false, err
		}
		sum := sha256.Sum256(request)
		hash = sum[:]
	}
	var same bool
	scan := func(row pgx.CollectableRow) (t task, err error) {
		err = row.Scan(append(t.fields(), &replayed, &same)...)
		return t, err
	}
	// DO UPDATE, though it changes nothing: DO NOTHING would return no row, and the statement's snapshot lacks the
	// row of a request that ran beside it. Only a row that was there before has an xmax.
	t, err = queryRow(ctx, d, retryPolicy(key != nil), scan, `
		INSERT INTO public.tasks (user_id, title, description, completed, idempotency_key, request_hash)
		VALUES (@user, @title, @description, @completed, @key, @hash)
		ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
		DO UPDATE SET idempotency_key = tasks.idempotency_key
		RETURNING `+columns+`, xmax <> 0, request_hash IS NOT DISTINCT FROM @hash`,
		pgx.StrictNamedArgs{"user": user, "title": c.title, "description": c.description,
			"completed": c.completed, "key": key, "hash": hash})
	if err == nil && !same {
		err = errKeyReused
	}
	return t, replayed, err
}

// A page is what the query string of a list asks for.
type page struct {
	completed             *bool
	limit, offset, before int64 // before: tasks of smaller ids, the cursor
	total                 bool
}

func parsePage(q url.Values) (p page, err error) {
	var errs [5]error
	var total *bool
	p.completed, errs[0] = boolean(q, "completed")
	p.limit, errs[1] = number(q, "limit", 1, maxLimit, defaultLimit)
	p.offset, errs[2] = number(q, "offset", 0, math.MaxInt64, 0)
	p.before, errs[3] = number(q, "before", 1, math.MaxInt64, math.MaxInt64)
	total, errs[4] = boolean(q, "total")
	p.total = total != nil && *total
	err = cmp.Or(errs[:]...)
	if err == nil && q.Has("before") && q.Has("offset") {
		err = invalid("before and offset exclude each other: a page begins at one of them")
	}
	return p, err
}

func number(q url.Values, name string, least, most, otherwise int64) (int64, error) {
	if !q.Has(name) {
		return otherwise, nil
	}
	n, err := strconv.ParseUint(q.Get(name), 10, 63) // which takes no sign
	if err != nil || int64(n) < least || int64(n) > most || len(q[name]) > 1 {
		return 0, invalid("%s must be one whole number from %d to %d", name, least, most)
	}
	return int64(n), nil
}

func boolean(q url.Values, name string) (*bool, error) {
	switch {
	case !q.Has(name):
		return nil, nil
	case len(q[name]) > 1 || q.Get(name) != "true" && q.Get(name) != "false":
		return nil, invalid("%s must be true or false", name)
	}
	return new(q.Get(name) == "true"), nil
}

func (s *server) listTasks(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("the query string is malformed: percent-encode what is not a letter or a digit")
	}
	p, err := parsePage(q)
	if err != nil {
		return err
	}
	tasks, err := s.db.list(ctx, at.user, p)
	if err != nil {
		return err
	}
	if p.total {
		total, err := s.db.count(ctx, at.user, p.completed)
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

// list returns the tasks of a page and, if there are more, the first of the
// next one. It reads one index, backwards, from the cursor on. The keys are
// compared as rows so that only this index has the order: with user_id = $1
// the planner would at times filter a user's whole history, or sort it.
func (d *database) list(ctx context.Context, user string, p page) ([]task, error) {
	if p.completed == nil {
		return query(ctx, d, retry, scanTask, `
			SELECT `+columns+`
			FROM public.tasks
			WHERE (user_id, id) BETWEEN ($1, 1) AND ($1, $2)
			ORDER BY user_id DESC, id DESC
			LIMIT $3 OFFSET $4`,
			user, p.before-1, p.limit+1, p.offset)
	}
	return query(ctx, d, retry, scanTask, `
		SELECT `+columns+`
		FROM public.tasks
		WHERE (user_id, completed, id) BETWEEN ($1, $5, 1) AND ($1, $5, $2)
		ORDER BY user_id DESC, completed DESC, id DESC
		LIMIT $3 OFFSET $4`,
		user, p.before-1, p.limit+1, p.offset, *p.completed)
}

// count returns the number of the user's tasks, or of those that are completed
// or not.
func (d *database) count(ctx context.Context, user string, completed *bool) (int64, error) {
	return queryRow(ctx, d, retry, pgx.RowTo[int64], `
		SELECT count(*)
		FROM public.tasks
		WHERE user_id = $1 AND ($2::boolean IS NULL OR completed = $2)`, user, completed)
}

func (s *server) getTask(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error {
	t, err := s.db.get(ctx, at)
	if err != nil {
		return err
	}
	etag := t.etag()
	w.Header().Set("ETag", etag)
	if ifNoneMatch(r, etag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeJSON(w, http.StatusOK, t)
}

func (d *database) get(ctx context.Context, at target) (task, error) {
	return queryRow(ctx, d, retry, scanTask, `
		SELECT `+columns+`
		FROM public.tasks
		WHERE user_id = $1 AND id = $2`, at.user, at.id)
}

func (s *server) updateTask(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error {
	c, err := readChange(ctx, w, r)
	if err != nil {
		return err
	}
	t, err := s.db.update(ctx, at, ifMatch(r), c)
	if err != nil {
		return err
	}
	return writeTask(w, http.StatusOK, t)
}

// completeTask sets completed as the body says, or turns it over where the
// body is empty or does not say.
func (s *server) completeTask(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error {
	members, err := readObject(ctx, w, r)
	if err != nil {
		return err
	}
	completed, err := parseCompleted(members)
	if err != nil {
		return err
	}
	t, err := s.db.update(ctx, at, ifMatch(r), change{completed: completed, toggle: completed == nil})
	if err != nil {
		return err
	}
	return writeTask(w, http.StatusOK, t)
}

// update makes the change in the statement itself, so that none of several at
// once is lost, and moves updated_at on even where the clock has not moved or
// goes back.
func (d *database) update(ctx context.Context, at target, match []string, c change) (task, error) {
	return d.apply(ctx, at, match, `
		UPDATE public.tasks
		SET title = COALESCE(@title, title),
		    description = CASE WHEN @describe::boolean THEN @description ELSE description END,
		    completed = COALESCE(@completed, completed <> @toggle),
		    updated_at = GREATEST(clock_timestamp(), updated_at + interval '1 microsecond')`,
		pgx.StrictNamedArgs{"title": c.title, "describe": c.describe, "description": c.description,
			"completed": c.completed, "toggle": c.toggle})
}

func (s *server) deleteTask(ctx context.Context, w http.ResponseWriter, r *http.Request, at target) error {
	if err := s.db.delete(ctx, at, ifMatch(r)); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (d *database) delete(ctx context.Context, at target, match []string) error {
	_, err := d.apply(ctx, at, match, `DELETE FROM public.tasks`, pgx.StrictNamedArgs{})
	return err
}

// apply runs an UPDATE or DELETE of a task if its tag is one of match, nil for
// any, and returns the task; errChanged if it has another.
func (d *database) apply(ctx context.Context, at target, match []string, statement string, args pgx.StrictNamedArgs) (task, error) {
	args["user"], args["id"], args["match"] = at.user, at.id, match
	t, err := queryRow(ctx, d, noRetry, scanTask, statement+`
		WHERE user_id = @user AND id = @id
		  AND (@match::text[] IS NULL OR '"' || (extract(epoch FROM updated_at) * 1000000)::bigint || '"' = ANY (@match))
		RETURNING `+columns, args)
	if errors.Is(err, errNoTask) && match != nil {
		if _, err = d.get(ctx, at); err == nil {
			err = errChanged
		}
	}
	return t, err
}
