package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// reportPeak lets the test binary run the command in the arguments that follow, and print the largest memory that the
// process has had, in bytes, on stderr.
const reportPeak = "report-peak"

func TestMain(m *testing.M) {
	// Tests start a thousand processes. The race detector would let each sleep for a second at its end.
	os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	// A command that a test runs in this process starts its own executable, which is this test binary, to compile a
	// kernel.
	if len(os.Args) == 2 && os.Args[1] == compileKernel {
		main()
	}
	if len(os.Args) > 2 && os.Args[1] == reportPeak {
		code := run(os.Args[2:])
		fmt.Fprintln(os.Stderr, peakRSS())
		os.Exit(int(code))
	}
	testscript.Main(m, map[string]func(){"gguf2gpu": main})
}

// TestScripts runs the command as a user does. In scripts $SAMPLE is the sample model and $SERVER the address of
// testServer. 'exits CODE COMMAND...' runs a command and fails unless it ends with that exit code; stdout and stderr
// can be compared afterwards, as usual.
func TestScripts(t *testing.T) {
	t.Parallel()
	sample, err := filepath.Abs(filepath.Join("..", "..", "testdata", "tiny-llama.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	server := testServer(t, filepath.Dir(sample))
	hubs := startHubs(t, sample)
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("SAMPLE", sample)
			env.Setenv("SERVER", server)
			env.Setenv("GORACE", os.Getenv("GORACE"))
			for _, v := range hubs {
				env.Setenv(v[0], v[1])
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// testServer serves the files of dir, also as a proxy for any host. Under /whole it ignores ranges, under /private it
// wants a token, under /flaky every other request breaks the connection, and /moved redirects.
func testServer(t *testing.T, dir string) string {
	files := http.FileServer(http.Dir(dir))
	var flaky atomic.Int64
	mux := http.NewServeMux()
	mux.Handle("/", files)
	mux.Handle("/whole/", http.StripPrefix("/whole", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Range")
		files.ServeHTTP(w, r)
	})))
	mux.Handle("/private/", http.StripPrefix("/private", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer open-sesame" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		files.ServeHTTP(w, r)
	})))
	mux.Handle("/flaky/", http.StripPrefix("/flaky", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if flaky.Add(1)%2 == 1 {
			panic(http.ErrAbortHandler)
		}
		files.ServeHTTP(w, r)
	})))
	mux.Handle("/moved/", http.RedirectHandler("/tiny-llama.gguf", http.StatusFound))
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("%s: %v", args[1], err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}
