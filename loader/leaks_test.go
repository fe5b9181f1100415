package loader

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// resources is what a load takes of a software device and has to give back.
type resources struct {
	Allocations, HostAllocations, Registrations, Streams, Events, IPCMappings, Modules int
}

// using counts what is in use now.
func using(sw *soft.Software) resources {
	s := sw.Stats()
	return resources{s.Allocations, s.HostAllocations, s.Registrations, s.Streams, s.Events, s.IPCMappings, s.Modules}
}

// wantBack ends the test when something else is in use than want. What ends in the background gets a moment for it.
func wantBack(t *testing.T, sw *soft.Software, want resources) {
	t.Helper()
	var now resources
	for wait := 100 * time.Microsecond; wait < time.Second; wait += wait / 2 {
		if now = using(sw); now == want {
			return
		}
		time.Sleep(wait)
	}
	t.Fatalf("in use afterwards: %+v\nbefore: %+v", now, want)
}

// ownCopy returns the path of a copy of a file that only this test opens, so that its descriptors and mappings can be
// counted while other tests run.
func ownCopy(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), filepath.Base(path))
	if err := os.WriteFile(own, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return own
}

// openFiles are this process's descriptors and mappings of one file; 0 where /proc is missing.
type openFiles struct{ descriptors, mappings int }

// opened counts what is open of the file at path.
func opened(path string) (n openFiles) {
	links, _ := filepath.Glob("/proc/self/fd/*")
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && to == path {
			n.descriptors++
		}
	}
	maps, _ := os.ReadFile("/proc/self/maps")
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(strings.TrimSpace(line), " "+path) {
			n.mappings++
		}
	}
	return n
}

// closedAgain fails the test when something else is open of the file at path than before.
func closedAgain(t *testing.T, path string, before openFiles) {
	t.Helper()
	if now := opened(path); now != before {
		t.Errorf("%+v of the file, %+v before", now, before)
	}
}

// alone runs the test that calls it in a process of its own, as it measures what the whole process takes, and fails it
// when it fails there. It reports whether this is that process.
func alone(t *testing.T) bool {
	t.Helper()
	const variable = "GGUF2GPU_TEST_ALONE"
	if os.Getenv(variable) == t.Name() {
		return true
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.short=" + strconv.FormatBool(testing.Short())}
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), variable+"="+t.Name())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a process of its own: %v\n%s", err, out)
	} else if bytes.Contains(out, []byte("no tests to run")) {
		t.Errorf("it did not run in a process of its own:\n%s", out)
	}
	return false
}
