package main

import (
	"crypto/rand"
	"fmt"
	"math"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
)

// next returns the URL of the next page as the answer gives it, or "".
func next(t testing.TB, a answer) string {
	t.Helper()
	link := a.header.Get("Link")
	if link == "" {
		return ""
	}
	match := regexp.MustCompile(`^<(/api/[!-;=?-~]*)>; rel="next"$`).FindStringSubmatch(link) // a URL in ASCII, without < and >
	if match == nil {
		t.Fatalf("Link = %q, want one URL with rel=\"next\"", link)
	}
	return match[1]
}

func idsOf(tasks []wireTask) []int64 {
	ids := []int64{}
	for _, t := range tasks {
		ids = append(ids, t.ID)
	}
	return ids
}

func TestPagesShowEachTaskOnce(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"test-" + rand.Text(), `a b/ü>"<?#%41;,` + rand.Text()} {
		c := newClientOf(t, sharedURL, user)
		all := c.fill(250)
		var completed, open []int64
		for i, id := range all { // the newest is the 250th
			if (250-i)%3 == 0 {
				completed = append(completed, id)
			} else {
				open = append(open, id)
			}
		}
		for _, row := range []struct {
			query string
			want  []int64
			pages []int
			total string
		}{
			{"", all, []int{50, 50, 50, 50, 50}, ""}, // the last one is full, and yet the last
			{"?total=false", all, []int{50, 50, 50, 50, 50}, ""},
			{"?limit=100", all, []int{100, 100, 50}, ""},
			{"?limit=99&total=true", all, []int{99, 99, 52}, "250"},
			{"?completed=true&limit=41&total=true", completed, []int{41, 41, 1}, "83"},
			{"?completed=true&limit=83", completed, []int{83}, ""},
			{"?completed=false&limit=100&total=true", open, []int{100, 67}, "167"},
			{"?completed=false", open, []int{50, 50, 50, 17}, ""},
			{"?limit=100&offset=150", all[150:], []int{100}, ""},
			{"?limit=100&offset=149&total=true", all[149:], []int{100, 1}, "250"},
			{"?limit=30&offset=7&completed=true&total=true", completed[7:], []int{30, 30, 16}, "83"},
			{fmt.Sprintf("?limit=100&before=%d", all[9]), all[10:], []int{100, 100, 40}, ""},
			{fmt.Sprintf("?completed=true&total=true&before=%d", completed[9]), completed[10:], []int{50, 23}, "83"},
			{fmt.Sprintf("?before=%d&total=true", all[249]), []int64{}, []int{0}, "250"},
			{"?before=1", []int64{}, []int{0}, ""},
			{"?before=9223372036854775807&limit=0100", all, []int{100, 100, 50}, ""},
			{"?offset=0&limit=1&completed=true&offse=7", completed, slices.Repeat([]int{1}, 83), ""},
			{"?offset=250&total=true", []int64{}, []int{0}, "250"},
			{"?offset=83&completed=true", []int64{}, []int{0}, ""},
			{"?offset=9223372036854775807&limit=100&total=true&completed=false", []int64{}, []int{0}, "167"},
			{"?offset=9223372036854775807", []int64{}, []int{0}, ""},
		} {
			a := c.do("GET", row.query, "")
			got, pages := []int64{}, []int{}
			for {
				if a.status != 200 || a.header.Get("X-Total-Count") != row.total {
					t.Fatalf("list %s, page %d = %d %.200s of %q, want 200 of %q", row.query, len(pages)+1, a.status, a.body, a.header.Get("X-Total-Count"), row.total)
				}
				page := idsOf(decode[[]wireTask](t, a.body))
				got, pages = append(got, page...), append(pages, len(page))
				if len(page) == 0 && strings.TrimSpace(a.body) != "[]" {
					t.Errorf("list %s, page %d = %s, want []", row.query, len(pages), a.body)
				}
				following := next(t, a)
				if following == "" || len(got) > len(row.want) {
					break
				}
				a = c.send("GET", following, "")
			}
			if !slices.Equal(got, row.want) || !slices.Equal(pages, row.pages) {
				t.Errorf("list %s = pages of %v, ids %v, want pages of %v, ids %v", row.query, pages, got, row.pages, row.want)
			}
		}
	}
}

// Tasks that come and go while a client reads do not move those it has yet to see.
func TestPagesHoldStillWhileTasksChange(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	ids := c.fill(4)
	a := c.do("GET", "?limit=2", "")
	c.create("newer than the page")
	for _, id := range ids[:2] { // the cursor's own task too
		c.do("DELETE", fmt.Sprintf("/%d", id), "")
	}
	a = c.send("GET", next(t, a), "")
	if got := idsOf(decode[[]wireTask](t, a.body)); !slices.Equal(got, ids[2:]) || next(t, a) != "" {
		t.Errorf("page 2 = %v, Link %q, want %v and none", got, a.header.Get("Link"), ids[2:])
	}
}

func TestLinkKeepsParameters(t *testing.T) {
	t.Parallel()
	c := newClientOf(t, sharedURL, `ü/<`+rand.Text())
	ids := c.fill(7)
	for _, row := range []struct {
		query string
		want  url.Values // without before
		last  int64      // the id that before must have
	}{
		{"limit=2", url.Values{"limit": {"2"}}, ids[1]},
		{"offset=2&limit=2", url.Values{"limit": {"2"}}, ids[3]},
		{fmt.Sprintf("limit=2&before=%d&total=true", ids[1]), url.Values{"limit": {"2"}, "total": {"true"}}, ids[3]},
		{"completed=false&limit=1&total=false", url.Values{"completed": {"false"}, "limit": {"1"}, "total": {"false"}}, ids[0]},
		{"x=1&limit=1&x=2&Limit=0&%3E%22%3C=%26%3D+%3B%0A&empty&%C3%BC=%FF&Before=7&page=%3E%3B+rel%3D%22next",
			url.Values{"x": {"1", "2"}, "limit": {"1"}, "Limit": {"0"}, `>"<`: {"&= ;\n"}, "empty": {""}, "ü": {"\xff"}, "Before": {"7"}, "page": {`>; rel="next`}}, ids[0]},
	} {
		a := c.do("GET", "?"+row.query, "")
		link, err := url.Parse(next(t, a))
		if err != nil {
			t.Fatalf("Link of %s = %q: %v", row.query, a.header.Get("Link"), err)
		}
		row.want.Set("before", fmt.Sprint(row.last))
		if got, err := url.ParseQuery(link.RawQuery); err != nil || !reflect.DeepEqual(got, row.want) || link.Path != "/api/"+c.user+"/tasks" || link.IsAbs() || link.Host != "" {
			t.Errorf("Link of %s = %q (%v), want the path of the list with %v", row.query, a.header.Get("Link"), err, row.want)
		}
	}
}

func TestRefusedQueries(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	c.fill(3)
	type refusal struct{ query, detail string }
	refusals := []refusal{
		{"limit=0", `^limit .*1 to 100`}, {"limit=101", `^limit .*1 to 100`}, {"limit=5&limit=5", `^limit .*one`},
		{"offset=5&offset=", `^offset .*one`}, {"before=0", `^before .*from 1`}, {"before=7&before=8", `^before .*one`},
		{"before=7&offset=0", `before.*offset`}, {"offset=0&before=7&total=true", `before.*offset`},
		{"completed=true&completed=true", `^completed `}, {"completed=true&completed=", `^completed `}, {"total=true&total=false", `^total `},
		{"%zz", `query string`}, {"limit=%", `query string`}, {"x=%4", `query string`}, {"a;b", `query string`}, {"limit=5;total=true", `query string`},
	}
	for _, name := range []string{"limit", "offset", "before"} {
		for _, value := range []string{"-1", "+5", "%2B5", "1.5", "1.0", "abc", "", "1e1", "0x10", "1_0", "%D9%A1", "%EF%BC%95", "5%20", "%205", "5%00", "1,000",
			"9223372036854775808", "18446744073709551617", "99999999999999999999"} {
			refusals = append(refusals, refusal{name + "=" + value, "^" + name + " .*number"})
		}
		refusals = append(refusals, refusal{name, "^" + name + " .*number"})
	}
	for _, name := range []string{"completed", "total"} {
		for _, value := range []string{"True", "TRUE", "1", "0", "yes", "null", "", "true%20", "%22true%22"} {
			refusals = append(refusals, refusal{name + "=" + value, "^" + name + " .*true or false"})
		}
	}
	for _, r := range refusals {
		a := c.do("GET", "?"+r.query, "")
		if a.status != 422 || !regexp.MustCompile(r.detail).MatchString(detail(t, a)) || a.header.Get("Link")+a.header.Get("X-Total-Count") != "" {
			t.Errorf("list ?%s = %d %s, want 422 %s", r.query, a.status, a.body, r.detail)
		}
	}
	for _, query := range []string{"", "?", "?&&", "?Limit=0&TOTAL=7&x", "?limit=007", "?limit=%33", "?limit=100&offset=0&completed=false&total=true"} {
		if a := c.do("GET", query, ""); a.status != 200 {
			t.Errorf("list %s = %d %s, want 200", query, a.status, a.body)
		}
	}
}

// What the planner does depends on what is in the table: this one is the test's own. Nearly all its tasks are
// completed, but half of those of the user "many", and the ten oldest of a thousand of the user "hardly any".
func TestListsReadOneIndex(t *testing.T) {
	t.Parallel()
	var tracer statementTracer
	db := open(t, ownDatabase(t), func(config *pgxpool.Config) { config.ConnConfig.Tracer = &tracer })
	prepare(t, db)
	for _, sql := range []string{`
		INSERT INTO tasks (user_id, title, completed)
		SELECT CASE WHEN i % 60 = 0 THEN 'hardly any' WHEN i % 20 = 1 THEN 'many' ELSE 'user ' || i % 1009 END, 'task ' || i,
		       CASE WHEN i % 60 = 0 THEN i <= 600 WHEN i % 20 = 1 THEN i % 40 = 1 ELSE true END
		FROM generate_series(1, 60000) AS i`,
		`VACUUM ANALYZE tasks`, // as autovacuum does
	} {
		sqlExec(t, db.pool, sql)
	}
	oldest := sqlValue[int64](t, db.pool, `SELECT min(id) FROM tasks`)
	service := newService(t, db)

	// explained lists over HTTP and returns the plans of the very statements, with their arguments, that this came to.
	explained := func(user, query string) (plans []plan) {
		t.Helper()
		tracer.asked = nil
		if a := newClientOf(t, service, user).do("GET", query, ""); a.status != 200 {
			t.Fatalf("list %s = %d %s, want 200", query, a.status, a.body)
		}
		for _, asked := range tracer.asked {
			plans = append(plans, explain(t, db, asked))
		}
		return plans
	}

	middle := fmt.Sprintf("before=%d", oldest+30000)
	for _, filter := range []string{"", "&completed=true", "&completed=false"} {
		index := "tasks_pkey"
		if filter != "" {
			index = "tasks_user_id_completed_id_idx"
		}
		for _, start := range []string{"limit=50", "limit=100&" + middle, "limit=1&offset=30", "limit=1&" + middle} {
			for _, total := range []string{"", "&total=true"} {
				query := "?" + start + filter + total
				var scans []plan
				for _, node := range (plan{Type: "Limit", Plans: explained("many", query)}).nodes() {
					switch node.Type {
					case "Index Scan", "Index Only Scan":
						scans = append(scans, node)
					case "Limit", "Aggregate":
					default:
						t.Errorf("list %s: the plan has a %s", query, node.Type)
					}
					if node.Removed > 0 {
						t.Errorf("list %s: a %s throws %v rows away", query, node.Type, node.Removed)
					}
				}
				if want := 1 + strings.Count(total, "true"); len(scans) != want || scans[0].Index != index {
					t.Errorf("list %s reads %+v, want %d scans and the page's of %s", query, scans, want, index)
				}
			}
		}
	}

	// A page costs the same at the start, halfway and near the end, and where the next match is far away.
	for _, row := range []struct {
		user, query string
		rows        float64
	}{
		{"many", "?limit=5", 6}, {"many", "?limit=5&completed=true", 6}, {"many", "?limit=5&completed=false", 6}, {"hardly any", "?limit=20&completed=true", 10},
	} {
		for _, before := range []int64{math.MaxInt64, oldest + 30000, oldest + 3000} {
			p := explained(row.user, fmt.Sprintf("%s&before=%d", row.query, before))[0]
			if blocks := p.Hit + p.Read; p.Rows != row.rows || blocks > 20 { // three levels of an index, and a block for each row
				t.Errorf("list %s of %s before %d touches %d blocks for %v rows, want at most 20 for %v", row.query, row.user, before, blocks, p.Rows, row.rows)
			}
		}
	}
}

func FuzzParsePage(f *testing.F) {
	for _, seed := range []string{
		"", "limit=50&offset=7&completed=true&total=false", "before=9223372036854775807&limit=100", "limit=0", "limit=101", "limit=5&limit=6", "offset=9223372036854775808",
		"before=7&offset=0", "limit=+5", "limit=%D9%A1", "before=0", "completed=True", "total=", "x=%ff&y", "a;b", "limit=007",
	} {
		f.Add(seed)
	}
	digits := regexp.MustCompile(`^[0-9]+$`)
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		p, err := readPage(q)
		if err != nil {
			return
		}
		if p.limit < 1 || p.limit > 100 || p.offset < 0 || p.before < 1 || q.Has("before") && q.Has("offset") {
			t.Errorf("readPage(%q) = %+v, out of bounds", query, p)
		}
		for name, values := range q {
			switch name {
			case "limit", "offset", "before":
				if len(values) != 1 || !digits.MatchString(values[0]) {
					t.Errorf("readPage(%q) accepts %s of %q", query, name, values)
				}
			case "completed", "total":
				if len(values) != 1 || values[0] != "true" && values[0] != "false" {
					t.Errorf("readPage(%q) accepts %s of %q", query, name, values)
				}
			}
		}
		if again, err := url.ParseQuery(q.Encode()); err != nil || !reflect.DeepEqual(again, q) {
			t.Errorf("the parameters of %q do not survive a Link: %q (%v)", query, again, err)
		}
	})
}
