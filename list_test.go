package main

import (
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

// Lists: pages, their links, parameters, and what a list reads.

var nextLink = regexp.MustCompile(`^<(/api/[!-;=?-~]*)>; rel="next"$`) // ASCII without < and >

// nextPage returns the URL of the next page, "" on the last one.
func nextPage(t testing.TB, a answer) string {
	t.Helper()
	link := a.header.Get("Link")
	if link == "" {
		return ""
	}
	match := nextLink.FindStringSubmatch(link)
	if match == nil {
		t.Fatalf("Link = %q, want one URL with rel=\"next\"", link)
	}
	return match[1]
}

// idsOf returns the ids of the tasks in a list.
func idsOf(t testing.TB, a answer) []int64 {
	t.Helper()
	ids := []int64{}
	for _, task := range decode[[]wireTask](t, a.body) {
		ids = append(ids, task.ID)
	}
	return ids
}

func TestPagesShowEachTaskOnce(t *testing.T) {
	t.Parallel()
	for _, user := range []string{newUser(), `a b/ü>"<?#%41;,` + newUser()} {
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
		none := []int64{}
		for _, row := range []struct {
			query string
			want  []int64
			pages []int
			total string
		}{
			{"", all, []int{50, 50, 50, 50, 50}, ""}, // the last page is full
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
			{fmt.Sprintf("?completed=true&total=true&before=%d", completed[9]), completed[10:],
				[]int{50, 23}, "83"},
			{fmt.Sprintf("?before=%d&total=true", all[249]), none, []int{0}, "250"},
			{"?before=1", none, []int{0}, ""},
			{"?before=9223372036854775807&limit=0100", all, []int{100, 100, 50}, ""},
			{"?offset=0&limit=1&completed=true&offse=7", completed, slices.Repeat([]int{1}, 83), ""},
			{"?offset=250&total=true", none, []int{0}, "250"},
			{"?offset=83&completed=true", none, []int{0}, ""},
			{"?offset=9223372036854775807&limit=100&total=true&completed=false", none, []int{0}, "167"},
			{"?offset=9223372036854775807", none, []int{0}, ""},
		} {
			got, pages := []int64{}, []int{}
			for next := c.path(row.query); next != "" && len(got) <= len(row.want); {
				a := c.send("GET", next, "")
				if total := a.header.Get("X-Total-Count"); a.status != 200 || total != row.total {
					t.Fatalf("%s = %v, %q in all, want 200, %q", next, a, total, row.total)
				}
				page := idsOf(t, a)
				if len(page) == 0 && strings.TrimSpace(a.body) != "[]" {
					t.Errorf("%s = %v, want []", next, a)
				}
				got, pages = append(got, page...), append(pages, len(page))
				next = nextPage(t, a)
			}
			if !slices.Equal(got, row.want) || !slices.Equal(pages, row.pages) {
				t.Errorf("list %s = pages of %v, ids %v, want pages of %v, ids %v",
					row.query, pages, got, row.pages, row.want)
			}
		}
	}
}

// Tasks that are created or deleted while a client reads do not shift the tasks of later pages.
func TestPagesAreStableWhileTasksChange(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	ids := c.fill(4)
	a := c.do("GET", "?limit=2", "")
	c.create("newer than the page")
	for _, id := range ids[:2] { // also the task of the cursor
		c.do("DELETE", fmt.Sprintf("/%d", id), "")
	}
	a = c.send("GET", nextPage(t, a), "")
	if got := idsOf(t, a); !slices.Equal(got, ids[2:]) || nextPage(t, a) != "" {
		t.Errorf("page 2 = %v, Link %q, want %v and none", got, a.header.Get("Link"), ids[2:])
	}
}

func TestLinkKeepsParameters(t *testing.T) {
	t.Parallel()
	c := newClientOf(t, sharedURL, `ü/<`+newUser())
	ids := c.fill(7)
	for _, row := range []struct {
		query string
		want  string // the same parameters without before
		last  int64  // the value of before
	}{
		{"limit=2", "limit=2", ids[1]},
		{"offset=2&limit=2", "limit=2", ids[3]},
		{fmt.Sprintf("limit=2&before=%d&total=true", ids[1]), "limit=2&total=true", ids[3]},
		{"completed=false&limit=1&total=false", "completed=false&limit=1&total=false", ids[0]},
		{"x=1&limit=1&x=2&Limit=0&%3E%22%3C=%26%3D+%3B%0A&empty&%C3%BC=%FF&Before=7&page=%3E%3B+rel%3D%22next",
			"x=1&limit=1&x=2&Limit=0&%3E%22%3C=%26%3D+%3B%0A&empty=&%C3%BC=%FF&Before=7&page=%3E%3B+rel%3D%22next",
			ids[0]},
	} {
		a := c.do("GET", "?"+row.query, "")
		link, err := url.Parse(nextPage(t, a))
		if err != nil {
			t.Fatalf("Link of %s = %q: %v", row.query, a.header.Get("Link"), err)
		}
		want, err := url.ParseQuery(row.want)
		if err != nil {
			t.Fatal(err)
		}
		want.Set("before", fmt.Sprint(row.last))
		if got := link.Query(); !reflect.DeepEqual(got, want) || link.EscapedPath() != c.path("") {
			t.Errorf("Link of %s = %q, want the path of the list with %v", row.query, link, want)
		}
	}
}

func TestQueryParameters(t *testing.T) {
	t.Parallel()
	c := newClient(t)
	c.fill(3)
	type rejection struct{ query, detail string }
	rejections := []rejection{
		{"limit=0", `^limit .*1 to 100`},
		{"limit=101", `^limit .*1 to 100`},
		{"limit=5&limit=5", `^limit .*single`},
		{"offset=5&offset=", `^offset .*single`},
		{"before=0", `^before .*from 1`},
		{"before=7&before=8", `^before .*single`},
		{"before=7&offset=0", `before.*offset`},
		{"offset=0&before=7&total=true", `before.*offset`},
		{"completed=true&completed=true", `^completed `},
		{"completed=true&completed=", `^completed `},
		{"total=true&total=false", `^total `},
		{"%zz", `query string`},
		{"limit=%", `query string`},
		{"x=%4", `query string`},
		{"a;b", `query string`},
		{"limit=5;total=true", `query string`},
	}
	for _, name := range []string{"limit", "offset", "before"} {
		rejections = append(rejections, rejection{name, "^" + name + " .*number"})
		for _, value := range []string{"-1", "+5", "%2B5", "1.5", "1.0", "abc", "", "1e1", "0x10", "1_0",
			"%D9%A1", "%EF%BC%95", "5%20", "%205", "5%00", "1,000",
			"9223372036854775808", "18446744073709551617", "99999999999999999999"} {
			rejections = append(rejections, rejection{name + "=" + value, "^" + name + " .*number"})
		}
	}
	for _, name := range []string{"completed", "total"} {
		for _, value := range []string{"True", "TRUE", "1", "0", "yes", "null", "", "true%20",
			"%22true%22"} {
			rejections = append(rejections, rejection{name + "=" + value, "^" + name + " .*true or false"})
		}
	}
	for _, r := range rejections {
		a := c.do("GET", "?"+r.query, "")
		if a.status != 422 || !regexp.MustCompile(r.detail).MatchString(a.detail()) {
			t.Errorf("list ?%s = %v, want 422 %s", r.query, a, r.detail)
		}
	}
	for _, query := range []string{"", "?", "?&&", "?Limit=0&TOTAL=7&x", "?limit=007", "?limit=%33",
		"?limit=100&offset=0&completed=false&total=true"} {
		if a := c.do("GET", query, ""); a.status != 200 {
			t.Errorf("list %s = %v, want 200", query, a)
		}
	}
}

// A list reads one index from the cursor on, whatever the planner's statistics say, and also when a
// prepared statement has a generic plan. Nearly all tasks are completed. Exceptions are half of the
// tasks of the user "many" and, of the thousand tasks of the user "few", all but the ten oldest.
func TestListsReadOneIndex(t *testing.T) {
	t.Parallel()
	const noAutovacuum = `ALTER TABLE public.tasks SET (autovacuum_enabled = off);`
	for _, row := range []struct{ statistics, before, after string }{
		{"current", "", `VACUUM ANALYZE public.tasks`},
		{"none", noAutovacuum, ""},
		{"of an empty table", noAutovacuum + `ANALYZE public.tasks`, ""},
	} {
		t.Run(row.statistics, func(t *testing.T) {
			t.Parallel()
			var tracer statementTracer
			d := startDB(t, openDB(t, createDatabase(t), func(config *pgxpool.Config) {
				config.ConnConfig.Tracer = &tracer
			}))
			sqlExec(t, d.pool, row.before)
			sqlExec(t, d.pool, `
				INSERT INTO public.tasks (user_id, title, completed)
				SELECT CASE WHEN i % 60 = 0 THEN 'few'
				            WHEN i % 20 = 1 THEN 'many'
				            ELSE 'user ' || i % 1009 END,
				       'task ' || i,
				       CASE WHEN i % 60 = 0 THEN i <= 600
				            WHEN i % 20 = 1 THEN i % 40 = 1
				            ELSE true END
				FROM generate_series(1, 60000) AS i`)
			sqlExec(t, d.pool, row.after)
			service := startService(t, d, settings{})
			for _, mode := range []string{"force_generic_plan", "force_custom_plan"} {
				checkPlans(t, mode, func(user, query string) (plans []plan) {
					t.Helper()
					tracer.asked = nil
					newClientOf(t, service.url, user).list(query)
					asked := slices.Clone(tracer.asked) // explain's statements are traced too
					for _, statement := range asked {
						plans = append(plans, explain(t, d, mode, statement))
					}
					return plans
				})
			}
		})
	}
}

// checkPlans checks the plans of the statements of lists. The tasks' ids begin at 1.
func checkPlans(t *testing.T, mode string, plans func(user, query string) []plan) {
	for _, filter := range []string{"", "&completed=true", "&completed=false"} {
		index := "tasks_pkey"
		if filter != "" {
			index = "tasks_user_id_completed_id_idx"
		}
		for _, start := range []string{"limit=50&total=true", "limit=100&before=30000",
			"limit=1&offset=30", "limit=1&before=30000&total=true"} {
			query := "?" + start + filter
			for i, p := range plans("many", query) {
				var types, indexes []string
				for _, node := range p.nodes() {
					if node.Type != "Result" { // a value
						types = append(types, node.Type)
					}
					if node.Index != "" {
						indexes = append(indexes, node.Index)
					}
					if node.Removed > 0 {
						t.Errorf("%s, list %s: a %s removes %v rows", mode, query, node.Type, node.Removed)
					}
				}
				if i == 0 && !slices.Equal(types, []string{"Limit", "Index Scan"}) {
					t.Errorf("%s, list %s has the plan %q, want an Index Scan", mode, query, types)
				}
				if len(indexes) != 1 || i == 0 && indexes[0] != index { // a count may read any index
					t.Errorf("%s, list %s reads %q, want %s", mode, query, indexes, index)
				}
			}
		}
	}

	// A page costs the same at the start, in the middle and near the end, also if the next match is
	// far away.
	for _, row := range []struct {
		user, query string
		rows        float64
	}{
		{"many", "?limit=5", 6},
		{"many", "?limit=5&completed=true", 6},
		{"many", "?limit=5&completed=false", 6},
		{"few", "?limit=20&completed=true", 10},
	} {
		for _, before := range []int64{math.MaxInt64, 30000, 3000} {
			query := fmt.Sprintf("%s&before=%d", row.query, before)
			p := plans(row.user, query)[0]
			// Three levels of an index, and a block for each row.
			if blocks := p.Hit + p.Read; p.Rows != row.rows || blocks > 20 {
				t.Errorf("%s, list %s of %s reads %d blocks for %v rows, want at most 20 for %v",
					mode, query, row.user, blocks, p.Rows, row.rows)
			}
		}
	}
}

func FuzzReadPage(f *testing.F) {
	for _, seed := range []string{
		"", "limit=50&offset=7&completed=true&total=false", "before=9223372036854775807&limit=100",
		"limit=0", "limit=101", "limit=5&limit=6", "offset=9223372036854775808", "before=7&offset=0",
		"limit=+5", "limit=%D9%A1", "before=0", "completed=True", "total=", "x=%ff&y", "a;b", "limit=007",
	} {
		f.Add(seed)
	}
	rules := map[string]*regexp.Regexp{}
	for _, name := range []string{"limit", "offset", "before"} {
		rules[name] = regexp.MustCompile(`^[0-9]+$`)
	}
	for _, name := range []string{"completed", "total"} {
		rules[name] = regexp.MustCompile(`^(true|false)$`)
	}
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		p, err := readPage(q)
		if err != nil {
			return
		}
		if p.limit < 1 || p.limit > 100 || p.offset < 0 {
			t.Errorf("readPage(%q) = %+v, out of bounds", query, p)
		}
		if p.before < 1 || q.Has("before") && q.Has("offset") {
			t.Errorf("readPage(%q) = %+v, want a valid cursor", query, p)
		}
		for name, values := range q {
			if rule := rules[name]; rule != nil && (len(values) != 1 || !rule.MatchString(values[0])) {
				t.Errorf("readPage(%q) accepts %s = %q", query, name, values)
			}
		}
		if again, err := url.ParseQuery(q.Encode()); err != nil || !reflect.DeepEqual(again, q) {
			t.Errorf("the parameters of %q in a Link are %q (%v)", query, again, err)
		}
	})
}
