package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
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

// An instant is a time in UTC that spares encoding/json the second parse that
// it gives to what time.Time's MarshalJSON returns, most of what encoding a
// task takes.
type instant time.Time

func (i instant) MarshalText() ([]byte, error) {
	return time.Time(i).AppendFormat(nil, time.RFC3339Nano), nil
}

// etag is the task's version: no two updates of a task share a microsecond.
func (t task) etag() string { return fmt.Sprintf(`"%d"`, time.Time(t.UpdatedAt).UnixMicro()) }

// ifMatch returns the versions under which a change may be made, nil for any.
// What is no tag of ours, a weak one included, matches none.
func ifMatch(r *http.Request) []time.Time {
	header := r.Header["If-Match"]
	if header == nil || slices.Contains(tags(header), "*") {
		return nil
	}
	versions := []time.Time{}
	for _, tag := range tags(header) {
		micro, _ := strconv.ParseInt(strings.Trim(tag, `"`), 10, 64)
		version := time.UnixMicro(micro)
		if (task{UpdatedAt: instant(version)}).etag() == tag && version.Year() < 10000 {
			versions = append(versions, version)
		}
	}
	return versions
}

// columns are those of a task, in the order of its fields.
const columns = `id, user_id, title, description, completed, created_at, updated_at`

func (t *task) fields() []any {
	return []any{&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, (*time.Time)(&t.CreatedAt), (*time.Time)(&t.UpdatedAt)}
}

func scanTask(row pgx.CollectableRow) (t task, err error) {
	return t, row.Scan(t.fields()...)
}

// one returns the only row of a statement that finds one task or none: somebody
// else's is none.
func one[T any](found []T, err error) (T, error) {
	if err == nil && len(found) == 0 {
		err = errNoTask
	}
	if err != nil {
		var none T
		return none, err
	}
	return found[0], nil
}

func writeTask(w http.ResponseWriter, status int, t task) error {
	w.Header().Set("ETag", t.etag())
	return writeJSON(w, status, t)
}

// taskID returns the id in the path. One that no task can have is no task.
func taskID(r *http.Request) (int64, error) {
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 63)
	if err != nil || id == 0 {
		return 0, errNoTask
	}
	return int64(id), nil
}

// A change is what a request body asks for. What is nil stays as it is.
type change struct {
	title       *string
	describe    bool // description is given: nil clears it
	description *string
	completed   *bool
	toggle      bool // completed is turned over
}

// readChange reads a change from a request's body.
func readChange(w http.ResponseWriter, r *http.Request) (change, error) {
	body, err := readBody(w, r)
	if err != nil {
		return change{}, err
	}
	members, err := parseObject(body)
	if err != nil {
		return change{}, err
	}
	return parseChange(members)
}

// parseChange reads the members of a body that a client may set, and holds
// them to their rules. All others are ignored: clients post whole tasks back.
func parseChange(members map[string]json.RawMessage) (change, error) {
	var c change
	var err error
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
	if raw, ok := members["completed"]; ok {
		if json.Unmarshal(raw, &c.completed) != nil || c.completed == nil {
			return c, invalid("completed must be true or false")
		}
	}
	return c, nil
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

func (s *server) createTask(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error {
	c, err := readChange(w, r)
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
	t, replayed, err := s.db.insertTask(ctx, user, c, key)
	if err != nil {
		return fmt.Errorf("create task: %w", err)
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

// insertTask creates a task, once for a key. It returns the task that the key
// already made, as it is now, with true, and errKeyReused if that came of
// another request.
func (d *database) insertTask(ctx context.Context, user string, c change, key *string) (task, bool, error) {
	type created struct {
		task
		replayed, same bool
	}
	if c.completed == nil {
		c.completed = new(false)
	}
	var hash []byte
	if key != nil {
		request, err := json.Marshal([]any{c.title, c.description, c.completed})
		if err != nil {
			return task{}, false, err
		}
		sum := sha256.Sum256(request)
		hash = sum[:]
	}
	// DO UPDATE, though it changes nothing: DO NOTHING would return no row, and the statement's snapshot lacks the
	// row of a request that ran beside it. Only a row that was there before has an xmax.
	made, err := one(query(ctx, d, key != nil, func(row pgx.CollectableRow) (made created, err error) {
		return made, row.Scan(append(made.fields(), &made.replayed, &made.same)...)
	}, `
		INSERT INTO tasks (user_id, title, description, completed, idempotency_key, request_hash)
		VALUES (@user, @title, @description, @completed, @key, @hash)
		ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
		DO UPDATE SET idempotency_key = tasks.idempotency_key
		RETURNING `+columns+`, xmax <> 0, request_hash IS NOT DISTINCT FROM @hash`,
		pgx.StrictNamedArgs{"user": user, "title": c.title, "description": c.description,
			"completed": c.completed, "key": key, "hash": hash}))
	if err == nil && !made.same {
		err = errKeyReused
	}
	return made.task, made.replayed, err
}

// A page is what the query string of a list asks for.
type page struct {
	completed             *bool
	limit, offset, before int64 // before: tasks of smaller ids, the cursor
	total                 bool
}

func parsePage(q url.Values) (page, error) {
	p := page{limit: defaultLimit, before: math.MaxInt64}
	for _, number := range []struct {
		name     string
		min, max uint64
		value    *int64
	}{
		{"limit", 1, maxLimit, &p.limit},
		{"offset", 0, math.MaxInt64, &p.offset},
		{"before", 1, math.MaxInt64, &p.before},
	} {
		if !q.Has(number.name) {
			continue
		}
		n, err := strconv.ParseUint(q.Get(number.name), 10, 63)
		if err != nil || n < number.min || n > number.max || len(q[number.name]) > 1 {
			return p, invalid("%s must be one whole number from %d to %d", number.name, number.min, number.max)
		}
		*number.value = int64(n)
	}
	for _, name := range []string{"completed", "total"} {
		if !q.Has(name) {
			continue
		}
		yes := q.Get(name) == "true"
		if !yes && q.Get(name) != "false" || len(q[name]) > 1 {
			return p, invalid("%s must be true or false", name)
		}
		if name == "total" {
			p.total = yes
		} else {
			p.completed = &yes
		}
	}
	if q.Has("before") && q.Has("offset") {
		return p, invalid("before and offset exclude each other: a page begins at one of them")
	}
	return p, nil
}

func (s *server) listTasks(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("the query string is malformed: percent-encode what is not a letter or a digit")
	}
	p, err := parsePage(q)
	if err != nil {
		return err
	}
	tasks, total, err := s.db.listTasks(ctx, user, p)
	if err != nil {
		return fmt.Errorf("list tasks: %w", err)
	}
	if p.total {
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

// Each list reads one index, backwards, from the cursor on. The keys are
// compared as rows so that only this index has the order: with user_id = @user
// the planner would at times filter a user's whole history, or sort it.
const (
	listSQL = `
		SELECT ` + columns + `
		FROM tasks
		WHERE (user_id, id) BETWEEN (@user, 1) AND (@user, @last)
		ORDER BY user_id DESC, id DESC
		LIMIT @limit OFFSET @offset`

	listCompletedSQL = `
		SELECT ` + columns + `
		FROM tasks
		WHERE (user_id, completed, id) BETWEEN (@user, @completed, 1) AND (@user, @completed, @last)
		ORDER BY user_id DESC, completed DESC, id DESC
		LIMIT @limit OFFSET @offset`

	countSQL          = `SELECT count(*) AS total FROM tasks WHERE user_id = @user`
	countCompletedSQL = `SELECT count(*) AS total FROM tasks WHERE user_id = @user AND completed = @completed`
)

// withTotal makes one statement of a count and a list. The count keeps its row
// where the page is empty, and a nested loop, the only join there is without a
// condition, keeps the page's order.
func withTotal(count, list string) string {
	return `SELECT ` + columns + `, total FROM (` + count + `) AS counted LEFT JOIN (` + list + `) AS page ON TRUE`
}

// listTasks returns the tasks of a page and, if there are more, the first of
// the next one. The total is 0 unless the page asks for it.
func (d *database) listTasks(ctx context.Context, user string, p page) (tasks []task, total int64, err error) {
	list, count := listSQL, countSQL
	args := pgx.StrictNamedArgs{"user": user, "last": p.before - 1, "limit": p.limit + 1, "offset": p.offset}
	if p.completed != nil {
		list, count = listCompletedSQL, countCompletedSQL
		args["completed"] = *p.completed
	}
	if !p.total {
		tasks, err = query(ctx, d, true, scanTask, list, args)
		return tasks, 0, err
	}
	tasks, err = query(ctx, d, true, func(row pgx.CollectableRow) (t task, err error) {
		fields := t.fields()
		if row.RawValues()[0] == nil { // no task on the page: the total alone
			clear(fields)
		}
		return t, row.Scan(append(fields, &total)...)
	}, withTotal(count, list), args)
	if len(tasks) == 1 && tasks[0].ID == 0 {
		tasks = tasks[:0]
	}
	return tasks, total, err
}

func (s *server) getTask(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	t, err := s.db.getTask(ctx, user, id)
	if err != nil {
		return fmt.Errorf("get task: %w", err)
	}
	if notModified(w, r, t.etag()) {
		return nil
	}
	return writeJSON(w, http.StatusOK, t)
}

func (d *database) getTask(ctx context.Context, user string, id int64) (task, error) {
	return one(query(ctx, d, true, scanTask, `
		SELECT `+columns+`
		FROM tasks
		WHERE user_id = @user AND id = @id`,
		pgx.StrictNamedArgs{"user": user, "id": id}))
}

func (s *server) updateTask(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	c, err := readChange(w, r)
	if err != nil {
		return err
	}
	t, err := s.db.updateTask(ctx, user, id, ifMatch(r), c)
	if err != nil {
		return fmt.Errorf("update task: %w", err)
	}
	return writeTask(w, http.StatusOK, t)
}

// updateTask makes the change in the statement itself, so that none of several
// at once is lost, and moves updated_at on even where the clock has not moved
// or goes back.
func (d *database) updateTask(ctx context.Context, user string, id int64, match []time.Time, c change) (task, error) {
	return d.changeTask(ctx, user, id, match, `
		UPDATE tasks
		SET title = COALESCE(@title, title),
		    description = CASE WHEN @describe::boolean THEN @description ELSE description END,
		    completed = COALESCE(@completed, completed <> @toggle),
		    updated_at = GREATEST(clock_timestamp(), updated_at + interval '1 microsecond')`,
		pgx.StrictNamedArgs{"title": c.title, "describe": c.describe, "description": c.description,
			"completed": c.completed, "toggle": c.toggle})
}

// changeTask runs an UPDATE or DELETE of the user's task if it is of one of
// the versions in match, nil for any, and returns the task. In the same
// statement it learns why nothing was changed: errNoTask or errChanged.
func (d *database) changeTask(ctx context.Context, user string, id int64, match []time.Time, statement string, args pgx.StrictNamedArgs) (task, error) {
	args["user"], args["id"], args["match"] = user, id, match
	type outcome struct {
		task
		done bool
	}
	found, err := one(query(ctx, d, false, func(row pgx.CollectableRow) (o outcome, err error) {
		return o, row.Scan(append(o.fields(), &o.done)...)
	}, `
		WITH changed AS (`+statement+`
			WHERE user_id = @user AND id = @id AND (@match::timestamptz[] IS NULL OR updated_at = ANY (@match))
			RETURNING `+columns+`
		), kept AS (
			SELECT `+columns+` FROM tasks
			WHERE user_id = @user AND id = @id
			FOR KEY SHARE -- not of the statement's snapshot: a task that was deleted meanwhile is gone
		)
		SELECT `+columns+`, true FROM changed
		UNION ALL
		SELECT `+columns+`, false FROM kept WHERE NOT EXISTS (SELECT FROM changed)`, args))
	if err == nil && !found.done {
		err = errChanged
	}
	return found.task, err
}

// completeTask sets completed as the body says, or turns it over where the
// body is empty or does not say.
func (s *server) completeTask(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var members map[string]json.RawMessage
	if len(body) > 0 {
		if members, err = parseObject(body); err != nil {
			return err
		}
	}
	delete(members, "title")
	delete(members, "description")
	c, err := parseChange(members)
	if err != nil {
		return err
	}
	c.toggle = c.completed == nil
	t, err := s.db.updateTask(ctx, user, id, ifMatch(r), c)
	if err != nil {
		return fmt.Errorf("complete task: %w", err)
	}
	return writeTask(w, http.StatusOK, t)
}

func (s *server) deleteTask(ctx context.Context, w http.ResponseWriter, r *http.Request, user string) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	if err := s.db.deleteTask(ctx, user, id, ifMatch(r)); err != nil {
		return fmt.Errorf("delete task: %w", err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (d *database) deleteTask(ctx context.Context, user string, id int64, match []time.Time) error {
	_, err := d.changeTask(ctx, user, id, match, `DELETE FROM tasks`, pgx.StrictNamedArgs{})
	return err
}
