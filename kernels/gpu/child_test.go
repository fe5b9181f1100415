package gpu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// childArg as the first argument makes this test binary do what the second argument says, instead of running tests.
const childArg = "child"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == childArg {
		os.Exit(beChild(os.Args[2]))
	}
	os.Exit(m.Run())
}

// beChild does what a compiler's process can do, good or bad, and returns the exit code.
func beChild(how string) int {
	var r Request
	if how != "serve" {
		if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 9
		}
	}
	switch how {
	case "serve":
		if err := ServeChild(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	case "compile":
		printAnswer(answer{Code: []byte("code of " + r.Name + strings.Join(r.Options, ",") + "\x00\xff")})
	case "refuse":
		printAnswer(answer{Refused: &amdhip.CompileError{Code: amdhip.ErrRTCCompilation, Name: r.Name, Log: "line 1"}})
	case "half":
		fmt.Print(`{"code":"AAAA`)
	case "garbage":
		fmt.Println("Hello, world!")
		fmt.Fprintln(os.Stderr, "and some words")
	case "empty":
		printAnswer(answer{})
	case "much":
		for range 3 * maxMessages {
			fmt.Fprint(os.Stderr, "0123456789abcdef")
		}
		return 3
	case "segfault": // as Go ends when C code is at fault
		fmt.Fprint(os.Stderr, "SIGSEGV: segmentation violation\nPC=0x0 m=0\n")
		return 2
	case "hang":
		time.Sleep(time.Hour)
	default:
		return signalled(how)
	}
	return 0
}

func printAnswer(a answer) {
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		panic(err)
	}
}

// child returns the function of Child for this test binary, which does what how says.
func child(t *testing.T, how string) func(context.Context, Request) ([]byte, error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Child(self, childArg, how)
}

func TestChildAnswersWithCode(t *testing.T) {
	t.Parallel()
	r := Request{Name: "name", Source: strings.Repeat("x", 1<<20), Options: []string{"-a", "-b"}}
	object, err := child(t, "compile")(t.Context(), r)
	if want := "code of name-a,-b\x00\xff"; err != nil || string(object) != want {
		t.Errorf("got %q, %v, want %q", object, err, want)
	}
}

// TestChildTellsCompileErrors checks that a *CompileError comes over from the other process as such.
func TestChildTellsCompileErrors(t *testing.T) {
	t.Parallel()
	_, err := child(t, "refuse")(t.Context(), Request{Name: "name"})
	e, ok := errors.AsType[*amdhip.CompileError](err)
	if !ok || e.Name != "name" || e.Log != "line 1" || !errors.Is(err, amdhip.ErrRTCCompilation) {
		t.Errorf("error %v, want a *CompileError", err)
	}
}

// TestChildFails lets the child fail in the ways that a program can.
func TestChildFails(t *testing.T) {
	t.Parallel()
	for how, want := range map[string]string{
		"half":     "something that is no code object",
		"garbage":  "something that is no code object\n\tand some words",
		"empty":    "something that is no code object",
		"much":     "failed (exit status 3)\n\t0123456789abcdef0",
		"segfault": "the compiler crashed (exit status 2), as some versions do for architectures they do not know",
		"unknown":  "failed (exit status 8)",
	} {
		t.Run(how, func(t *testing.T) {
			object, err := child(t, how)(t.Context(), Request{})
			if object != nil || err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 2*maxMessages {
				t.Errorf("error %.300v, want %q", err, want)
			}
		})
	}
	if _, err := Child(filepath.Join(t.TempDir(), "nothing"))(t.Context(), Request{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a program that does not exist: %v", err)
	}
}

// TestChildEndsWithItsContext kills a process that would go on for an hour.
func TestChildEndsWithItsContext(t *testing.T) {
	t.Parallel()
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if _, err := child(t, "hang")(ctx, Request{}); !errors.Is(err, cause) {
		t.Errorf("error %v, want the cause of the context's end", err)
	}
}

// TestServeChild asks for a compilation with a library that does not exist.
func TestServeChild(t *testing.T) {
	t.Parallel()
	library := filepath.Join(t.TempDir(), "libamdhip64.so")
	_, err := child(t, "serve")(t.Context(), Request{Library: library})
	if err == nil || !strings.Contains(err.Error(), "no HIP library") || strings.Contains(err.Error(), "exit status") {
		t.Errorf("error %v, want that of the other process, told in the regular way", err)
	}
	for _, in := range []string{"", "garbage", `{"library":`} {
		var out strings.Builder
		if err := ServeChild(strings.NewReader(in), &out); err == nil || out.Len() != 0 {
			t.Errorf("request %q: error %v, answer %q", in, err, &out)
		}
	}
	closedPipe, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	closed(t, closedPipe)
	request := `{"library":"/nowhere/libamdhip64.so"}`
	if err := ServeChild(strings.NewReader(request), closedPipe); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("an answer that cannot be written: %v", err)
	}
}

// runner returns a build whose Run is run. It is for the software device, where Load itself ignores Run.
func runner(t *testing.T, dir string, run func(context.Context, Request) ([]byte, error)) *build {
	t.Helper()
	dev, _ := openSoft(t)
	b, err := (&Compiler{Dir: dir}).begin(dev)
	if err != nil {
		t.Fatal(err)
	}
	b.Run = run // which the software device does without
	return b
}

// TestRunIsAskedOnce compiles all kernels by Run, which must be called once for each and not too often at a time, and
// then takes them from the cache.
func TestRunIsAskedOnce(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	asked, running, most := map[string]bool{}, 0, 0
	b := runner(t, t.TempDir(), func(_ context.Context, r Request) ([]byte, error) {
		mu.Lock()
		if running++; asked[r.Name] || !strings.Contains(r.Source, r.Name) || len(r.Options) != 2 {
			t.Errorf("asked for %s with %q, again: %v", r.Name, r.Options, asked[r.Name])
		}
		asked[r.Name], most = true, max(most, running)
		mu.Unlock()
		time.Sleep(100 * time.Microsecond)
		mu.Lock()
		defer mu.Unlock()
		running--
		return []byte(r.Name), nil
	})
	for _, cached := range []bool{false, true} {
		codes, err := b.codes(t.Context(), Keys())
		if err != nil {
			t.Fatal(err)
		}
		for i, k := range Keys() {
			if string(codes[i].object) != k.Name() || codes[i].cached != cached {
				t.Fatalf("%v: code %q, from the cache: %v", k, codes[i].object, codes[i].cached)
			}
		}
	}
	if most > maxRuns || len(asked) != len(Keys()) {
		t.Errorf("%d kernels, up to %d at a time", len(asked), most)
	}
}

// TestRunFails checks that the error of Run comes back with the kernel and the architecture, and that other calls end.
func TestRunFails(t *testing.T) {
	t.Parallel()
	crash := errors.New("the compiler crashed")
	dir := t.TempDir()
	b := runner(t, dir, func(ctx context.Context, r Request) ([]byte, error) {
		if r.Name == q80ToF32.Name() {
			return nil, crash
		}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	_, err := b.codes(t.Context(), []Key{q80ToF32, q4kToF16})
	if !errors.Is(err, crash) || !strings.Contains(err.Error(), "compiling Q8_0 to F32 for gfx") {
		t.Errorf("error %v", err)
	}
	if all := files(t, dir); len(all) != 0 {
		t.Errorf("kept: %v", all)
	}
}

// TestRunEndsWithTheContext checks that Run's context ends with that of Load.
func TestRunEndsWithTheContext(t *testing.T) {
	t.Parallel()
	cause := errors.New("enough")
	b := runner(t, NoCache, func(ctx context.Context, _ Request) ([]byte, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	b.Logger = slog.New(slog.DiscardHandler)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, cause)
		defer cancel()
		if _, err := b.codes(ctx, Keys()); !errors.Is(err, cause) {
			t.Errorf("error %v", err)
		}
	})
}
