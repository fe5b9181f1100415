package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	// A test that runs the command in this process makes it start this binary where users have gguf2gpu.
	if len(os.Args) == 2 && os.Args[1] == compileKernel {
		main()
	}
	testscript.Main(m, map[string]func(){"gguf2gpu": main})
}

// TestScripts runs the command as a user does. $SAMPLE is the sample model, $SERVER the address of testServer; 'exits CODE COMMAND...' runs a command and
// wants that exit code; afterwards stdout and stderr can be looked at as usual.
func TestScripts(t *testing.T) {
	sample, err := filepath.Abs(filepath.Join("..", "..", "testdata", "tiny-llama.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	server := testServer(t, filepath.Dir(sample))
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("SAMPLE", sample)
			env.Setenv("SERVER", server)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// testServer serves the files of dir: under /whole without ranges, under /private for the bearer of a token, under /flaky with
// connections that break at every other request, under /moved by a redirect; and as a proxy for any host.
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
