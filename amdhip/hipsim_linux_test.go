package amdhip

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ebitengine/purego"
)

// require skips the test, or fails it if the environment says that what it needs must be there: AMDHIP_REQUIRE is a
// list of "cc" (a C compiler), "amd" (AMD's runtime) and "headers" (its headers).
func require(t *testing.T, what, reason string) {
	t.Helper()
	if strings.Contains(os.Getenv("AMDHIP_REQUIRE"), what) {
		t.Fatalf("AMDHIP_REQUIRE names %q, but %s", what, reason)
	}
	t.Skipf("%s (set AMDHIP_REQUIRE=%s to make this a failure)", reason, what)
}

// wantVersion fails the test if the environment variable AMDHIP_VERSION names another version than got, "6.4" for
// example: a test that is to look at one of several runtimes must not look at another.
func wantVersion(t *testing.T, what, got string) {
	t.Helper()
	if want := os.Getenv("AMDHIP_VERSION"); want != "" && got != want {
		t.Fatalf("%s are of HIP %s, and AMDHIP_VERSION is %s", what, got, want)
	}
}

// compiler returns the C compiler that the Go tool would use.
func compiler(t *testing.T, what string) string {
	t.Helper()
	name := "cc"
	if out, err := exec.Command("go", "env", "CC").Output(); err == nil && len(bytes.TrimSpace(out)) > 0 {
		name = string(bytes.TrimSpace(out))
	}
	for _, cc := range []string{name, "cc"} {
		if path, err := exec.LookPath(cc); err == nil {
			return path
		}
	}
	require(t, what, "there is no C compiler")
	return ""
}

// simulators holds what buildLibrary has compiled, by its arguments.
var simulators sync.Map

// buildSim compiles the simulator and returns the path of a copy of its own, which the dynamic loader takes for another
// library: no test sees the state of another. It has hipRTC in it, as HIP 5 and 6 have, unless a define says that it
// has only what is required.
func buildSim(t *testing.T, defines ...string) string {
	t.Helper()
	sources := []string{"hipsim.c", "hiprtc.c"}
	if slices.Contains(defines, "-DHIPSIM_NO_OPTIONAL") {
		sources = sources[:1]
	}
	return buildLibrary(t, filepath.Join(t.TempDir(), "libamdhip64.so"), sources, defines...)
}

// buildLibrary compiles sources of the simulator to the library path, once for all tests, and copies it then.
func buildLibrary(t *testing.T, path string, sources []string, defines ...string) string {
	t.Helper()
	args := append([]string{"-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"}, defines...)
	for _, source := range sources {
		args = append(args, filepath.Join("..", "testdata", "hipsim", source))
	}
	key := strings.Join(args, " ")
	image, ok := simulators.Load(key)
	if !ok {
		if out, err := exec.Command(compiler(t, "cc"), append(args, "-o", path)...).CombinedOutput(); err != nil {
			t.Fatalf("compiling the simulator: %v\n%s", err, out)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		simulators.Store(key, b)
		return path
	}
	if err := os.WriteFile(path, image.([]byte), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// sim is a loaded simulator.
type sim struct {
	t         *testing.T
	configure func(name, value string) int32
	stat      func(name string) int64
	live      func() int64
}

// openSim loads a simulator of its own, with settings "NAME=value" of its README. At the end of the test nothing may be
// left alive in it.
func openSim(t *testing.T, settings ...string) (*Runtime, *sim) {
	t.Helper()
	return openSimAt(t, buildSim(t), settings...)
}

// openSimAt is openSim for a library that is there.
func openSimAt(t *testing.T, path string, settings ...string) (*Runtime, *sim) {
	t.Helper()
	lib, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		t.Fatal(err)
	}
	s := &sim{t: t}
	purego.RegisterLibFunc(&s.configure, lib, "hipsim_configure")
	purego.RegisterLibFunc(&s.stat, lib, "hipsim_stat")
	purego.RegisterLibFunc(&s.live, lib, "hipsim_live")
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		s.set(name, value)
	}
	rt, err := Open(Options{Library: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := s.live(); n != 0 {
			t.Errorf("%d handles are still alive in the library", n)
		}
		if n := rt.open.Load(); n != 0 {
			t.Errorf("%d handles are still open in Go", n)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	return rt, s
}

func (s *sim) set(name, value string) {
	s.t.Helper()
	if s.configure(name, value) != 0 {
		s.t.Fatalf("the simulator refuses %s=%s", name, value)
	}
}

// wantStat compares a statistic of the simulator.
func (s *sim) wantStat(name string, want int64) {
	s.t.Helper()
	if got := s.stat(name); got != want {
		s.t.Errorf("%s: got %d, want %d", name, got, want)
	}
}

// device returns GPU i.
func device(t *testing.T, rt *Runtime, i int) *Device {
	t.Helper()
	return must(rt.Device(i))(t)
}

// must returns a function that gives v, or fails the test it is called with: must(f())(t).
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// check fails the test at an error.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// closing closes c at the end of the test.
func closing[T interface{ Close() error }](t *testing.T, c T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// wantCode compares the HIP call and code that an error carries.
func wantCode(t *testing.T, err error, call string, code Status) {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Func != call || e.Code != code || !errors.Is(err, code) {
		t.Errorf("got %v, want %s: %v", err, call, code)
	}
}

// wantIs compares an error with a sentinel.
func wantIs(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("got %v, want one that matches %q", err, target)
	}
}
