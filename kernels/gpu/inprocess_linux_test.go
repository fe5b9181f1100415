package gpu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// openSimulator opens a device of the simulated HIP library, whose hipRTC compiles for the host. To this package it is
// a GPU.
func openSimulator(t *testing.T) *amdhip.Device {
	t.Helper()
	cxx(t) // its hipRTC calls one
	cc, err := exec.LookPath("cc")
	if err != nil {
		if strings.Contains(os.Getenv("AMDHIP_REQUIRE"), "cc") {
			t.Fatalf("AMDHIP_REQUIRE names cc, but there is no C compiler: %v", err)
		}
		t.Skipf("there is no C compiler to build the simulator with: %v (AMDHIP_REQUIRE=cc makes this a failure)", err)
	}
	lib := filepath.Join(t.TempDir(), "libamdhip64.so")
	args := []string{"-O1", "-shared", "-fPIC", "-pthread", "-o", lib}
	for _, source := range []string{"hipsim.c", "hiprtc.c"} {
		args = append(args, filepath.Join("..", "..", "testdata", "hipsim", source))
	}
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("compiling the simulator: %v\n%s", err, out)
	}
	rt, err := amdhip.Open(amdhip.Options{Library: lib})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, rt) })
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// TestNothingIsCompiledUnasked loads a kernel with the zero Compiler, which may not compile it: with an empty cache,
// after another compiler has filled the cache, and with a damaged cache.
func TestNothingIsCompiledUnasked(t *testing.T) {
	t.Parallel()
	dev, dir := openSimulator(t), t.TempDir()
	_, err := (&Compiler{Dir: dir}).Load(t.Context(), dev, []Key{q80ToF32})
	if !errors.Is(err, ErrNotCompiled) {
		t.Fatalf("nothing in the cache: error %v, want ErrNotCompiled", err)
	}
	for _, want := range []string{"Q8_0 to F32", "Compiler.Run", "Compiler.InProcess"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %s", err, want)
		}
	}

	s := mustLoad(t, &Compiler{Dir: dir, InProcess: true}, dev, q80ToF32)
	if got := s.Stats(); got.Compiled != 1 {
		t.Errorf("in this process: %+v, want one kernel compiled", got)
	}
	s = mustLoad(t, &Compiler{Dir: dir}, dev, q80ToF32)
	if got := s.Stats(); got.Compiled != 0 || got.Cached != 1 {
		t.Errorf("with the cache: %+v, want one kernel from there", got)
	}

	// An entry that is of no use is not compiled again.
	path, _ := entryOf(t, &Compiler{Dir: dir}, dev, q80ToF32)
	if err := os.Truncate(path, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := (&Compiler{Dir: dir}).Load(t.Context(), dev, []Key{q80ToF32}); !errors.Is(err, ErrNotCompiled) {
		t.Errorf("a damaged entry: error %v, want ErrNotCompiled", err)
	}
}

// TestRunComesBeforeInProcess sets both.
func TestRunComesBeforeInProcess(t *testing.T) {
	t.Parallel()
	asked := errors.New("asked")
	c := Compiler{Dir: NoCache, InProcess: true}
	c.Run = func(context.Context, Request) ([]byte, error) { return nil, asked }
	if _, err := c.Load(t.Context(), openSimulator(t), []Key{q80ToF32}); !errors.Is(err, asked) {
		t.Errorf("error %v, want the one of Run", err)
	}
}
