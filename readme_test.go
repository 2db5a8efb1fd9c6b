package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// README.md is true.

// readmeSection returns the text between a heading of README.md and the next one.
func readmeSection(t *testing.T, heading string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("README.md has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// The transcript of "Try it" runs as written, but with the test's service, user and task.
func TestReadmeTranscript(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	p.waitReady()
	user := newClientOf(t, p.url, newUser()).user
	type exchange struct{ command, output string }
	var transcript []exchange
	for line := range strings.Lines(readmeSection(t, "Try it")) {
		line, isCode := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "    ")
		command, isCommand := strings.CutPrefix(line, "$ ")
		switch {
		case isCommand:
			transcript = append(transcript, exchange{command: command})
		case isCode: // a long line of output is wrapped
			transcript[len(transcript)-1].output += strings.TrimPrefix(line, " ")
		}
	}
	dir := t.TempDir()
	var script strings.Builder
	replace := strings.NewReplacer("alice", user, "http://localhost:8080", p.url, "$TASKS/1",
		"$TASKS/$ID")
	for i, e := range transcript {
		file := filepath.Join(dir, fmt.Sprint(i))
		fmt.Fprintf(&script, "{\n%s\n} >%s\n", replace.Replace(e.command), file)
		fmt.Fprintf(&script, `[ -n "$ID" ] || ID=$(sed -n 's/^{"id":\([0-9]*\),.*/\1/p' %s)`+"\n", file)
	}
	bash := exec.Command("bash", "-c", script.String())
	bash.Env = append(os.Environ(), "DATABASE_URL="+sharedDatabaseURL(),
		"BETTER_AUTH_SECRET="+testSecret)
	if out, err := bash.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s\n%s", err, out, script.String())
	}
	general := func(text string) string {
		text = regexp.MustCompile(`"[0-9]{4}-[0-9-]{5}T[0-9:.]{15}Z"`).ReplaceAllString(text, "TIME")
		text = regexp.MustCompile(`"id":[0-9]+`).ReplaceAllString(text, "ID")
		return strings.TrimSpace(strings.ReplaceAll(text, user, "alice"))
	}
	for i, e := range transcript {
		got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i)))
		if err != nil || general(string(got)) != general(e.output) {
			t.Errorf("$ %s\nprints  %s (%v)\nREADME: %s", e.command, got, err, e.output)
		}
	}
	if len(transcript) < 8 {
		t.Errorf("the transcript has %d commands, want 8 at least", len(transcript))
	}
}

// firstColumn returns what a pattern's group matches in the first column of a section's table.
func firstColumn(section, pattern string) (names []string) {
	for _, row := range regexp.MustCompile(`(?m)^\| [^|]*`).FindAllString(section, -1) {
		for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(row, -1) {
			names = append(names, match[1])
		}
	}
	slices.Sort(names)
	return names
}

func TestReadmeHasEverySettingAndRoute(t *testing.T) {
	t.Parallel()
	read := map[string]bool{"GOGC": true, "GOMEMLIMIT": true} // by main
	env := validEnvironment()
	if _, err := readSettings(func(name string) string { read[name] = true; return env[name] }); err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(maps.Keys(read))
	if got := firstColumn(readmeSection(t, "Settings"), "`([A-Z_]+)`"); !slices.Equal(got, want) {
		t.Errorf("README has the settings %q, want %q", got, want)
	}

	var routes []string
	for pattern := range startService(t, sharedDB, settings{}).routes() {
		_, path, _ := strings.Cut(pattern, " ")
		routes = append(routes, path)
	}
	slices.Sort(routes)
	routes = slices.Compact(routes)
	got := slices.Compact(firstColumn(readmeSection(t, "Routes"), "(/[^` ]*)`"))
	if !slices.Equal(got, routes) {
		t.Errorf("README has the routes %q, want %q", got, routes)
	}
}
