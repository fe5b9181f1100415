package amdhip

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// makeTree creates files (and their directories) below a new root. "a -> b" is a symbolic link to b, relative to the
// root.
func makeTree(t *testing.T, entries ...string) string {
	t.Helper()
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		name, target, link := strings.Cut(entry, " -> ")
		path := filepath.Join(root, filepath.FromSlash(name))
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			if link {
				err = os.Symlink(filepath.Join(root, filepath.FromSlash(target)), path)
			} else {
				err = os.WriteFile(path, []byte("not a library"), 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

var errNotLibrary = errors.New("not a library")

// search runs a finder in root and returns the paths that were tried, relative to root, and the one that opened.
func search(
	root, explicit string, env map[string]string, good func(string) bool,
) (tried []string, found string, err error) {
	f := finder{
		root: root,
		env:  func(key string) string { return env[key] },
		open: func(path string) error {
			if good != nil && good(path) {
				return nil
			}
			return errNotLibrary
		},
	}
	found, err = f.find(explicit)
	trim := func(path string) string { return filepath.ToSlash(strings.TrimPrefix(path, root)) }
	for _, a := range f.attempts {
		tried = append(tried, a.Source+" "+trim(a.Path))
	}
	return tried, trim(found), err
}

func loaderNames() (names []string) {
	for _, name := range sonames {
		names = append(names, "loader "+name)
	}
	return names
}

func TestFind(t *testing.T) {
	root := makeTree(t,
		"env/lib/libamdhip64.so.6", "env/lib/libamdhip64.so",
		"opt/rocm-5.7.1/lib/libamdhip64.so.5",
		"opt/rocm-6.10.0/lib/libamdhip64.so.6",
		"opt/rocm-6.2.0/lib/libamdhip64.so.6",
		"opt/rocm -> opt/rocm-5.7.1",
	)
	in := func(dir string) string { return filepath.Join(root, dir) }
	inOpt := []string{
		"/opt/rocm* /opt/rocm-6.10.0/lib/libamdhip64.so.7", "/opt/rocm* /opt/rocm-6.10.0/lib/libamdhip64.so.6",
		"/opt/rocm* /opt/rocm-6.10.0/lib/libamdhip64.so.5", "/opt/rocm* /opt/rocm-6.10.0/lib/libamdhip64.so",
		"/opt/rocm* /opt/rocm-6.2.0/lib/libamdhip64.so.7",
	}
	inEnv := []string{
		"ROCM_PATH /env/lib/libamdhip64.so.7", "ROCM_PATH /env/lib/libamdhip64.so.6",
		"ROCM_PATH /env/lib/libamdhip64.so.5", "ROCM_PATH /env/lib/libamdhip64.so",
	}
	for _, tt := range []struct {
		name, explicit string
		env            map[string]string
		good           string // end of the only path that opens
		tried          []string
		found          string
	}{
		{
			name: "option", explicit: "/x/lib.so", good: "lib.so", found: "/x/lib.so",
			env: map[string]string{"GGUF2GPU_HIP_LIBRARY": "/y/lib.so"},
		},
		{
			name: "option is final", explicit: "/x/lib.so", good: "amdhip64.so.6",
			env:   map[string]string{"GGUF2GPU_HIP_LIBRARY": "/y/libamdhip64.so.6"},
			tried: []string{"Options.Library /x/lib.so"},
		},
		{
			name: "variable is final", good: "amdhip64.so.6", env: map[string]string{"GGUF2GPU_HIP_LIBRARY": "/y/lib.so"},
			tried: []string{"GGUF2GPU_HIP_LIBRARY /y/lib.so"},
		},
		{
			name: "ROCM_PATH", good: "env/lib/libamdhip64.so.6", found: "/env/lib/libamdhip64.so.6",
			env: map[string]string{"ROCM_PATH": in("env"), "HIP_PATH": in("other")}, tried: inEnv[:1],
		},
		{
			name: "HIP_PATH after a ROCM_PATH that is not there", good: "env/lib/libamdhip64.so",
			found: "/env/lib/libamdhip64.so",
			env:   map[string]string{"ROCM_PATH": in("missing"), "HIP_PATH": in("env")},
			tried: []string{
				"ROCM_PATH /missing/lib", "HIP_PATH /env/lib/libamdhip64.so.7", "HIP_PATH /env/lib/libamdhip64.so.6",
				"HIP_PATH /env/lib/libamdhip64.so.5",
			},
		},
		{
			name: "the loader's newest", good: "libamdhip64.so.7", found: "libamdhip64.so.7",
		},
		{
			name: "the loader after ROCM_PATH", good: "libamdhip64.so.5", found: "libamdhip64.so.5",
			env: map[string]string{"ROCM_PATH": in("env")}, tried: append(slices.Clone(inEnv), loaderNames()[:2]...),
		},
		{
			name: "opt newest first", good: "6.2.0/lib/libamdhip64.so.6", found: "/opt/rocm-6.2.0/lib/libamdhip64.so.6",
			tried: append(loaderNames(), inOpt...),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tried, found, err := search(root, tt.explicit, tt.env, func(path string) bool {
				// Only the last case may find something below /opt, and the loader knows bare names only.
				return strings.HasSuffix(filepath.ToSlash(path), tt.good)
			})
			if !slices.Equal(tried, tt.tried) {
				t.Errorf("tried\n%s\nwant\n%s", strings.Join(tried, "\n"), strings.Join(tt.tried, "\n"))
			}
			if found != tt.found || (err == nil) != (found != "") {
				t.Errorf("found %q, %v, want %q", found, err, tt.found)
			}
		})
	}
}

func TestFindNothing(t *testing.T) {
	root := makeTree(t, "opt/rocm-6.2.0/lib/libamdhip64.so.6")
	tried, _, err := search(root, "", nil, nil)
	want := loaderNames()
	for _, name := range sonames {
		want = append(want, "/opt/rocm* /opt/rocm-6.2.0/lib/"+name)
	}
	if !slices.Equal(tried, want) {
		t.Errorf("tried\n%s\nwant\n%s", strings.Join(tried, "\n"), strings.Join(want, "\n"))
	}
	e, ok := errors.AsType[*LibraryError](err)
	if !ok || !errors.Is(err, ErrNoLibrary) || !errors.Is(err, errNotLibrary) || !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("got %v, want a LibraryError that matches its causes", err)
	}
	for _, a := range e.Attempts {
		if line := "\n\t" + a.Path + " (" + a.Source + "): " + a.Err.Error(); !strings.Contains(err.Error(), line) {
			t.Errorf("the message lacks %q", line)
		}
	}

	tried, _, _ = search(makeTree(t), "", nil, nil)
	if want := append(loaderNames(), "/opt/rocm* /opt/rocm*/lib"); !slices.Equal(tried, want) {
		t.Errorf("without /opt: got %q, want %q", tried, want)
	}
}

func TestOptDirs(t *testing.T) {
	for _, tt := range []struct {
		name    string
		entries []string
		want    []string
	}{
		{"none", []string{"opt/other/lib/x", "opt/rocm-6.0.0/bin/x"}, nil},
		{"plain directory", []string{"opt/rocm/lib/x"}, []string{"/opt/rocm/lib"}},
		{
			"a link shows its version",
			[]string{"opt/rocm-6.2.0/lib/x", "opt/rocm-5.7.0/lib/x", "opt/rocm -> opt/rocm-6.2.0"},
			[]string{"/opt/rocm/lib", "/opt/rocm-5.7.0/lib"},
		},
		{
			"numbers, not text",
			[]string{"opt/rocm-6.9.0/lib/x", "opt/rocm-6.10.0/lib/x", "opt/rocm-10.0/lib/x"},
			[]string{"/opt/rocm-10.0/lib", "/opt/rocm-6.10.0/lib", "/opt/rocm-6.9.0/lib"},
		},
		{
			"core layout",
			[]string{
				"opt/rocm/core-10.1/lib/x", "opt/rocm/core-10.0/lib/x", "opt/rocm/core -> opt/rocm/core-10.1",
				"opt/rocm/lib -> opt/rocm/core-10.1/lib", "opt/rocm-6.2.0/lib/x",
			},
			[]string{"/opt/rocm/lib", "/opt/rocm/core-10.0/lib", "/opt/rocm-6.2.0/lib"},
		},
		{
			"no version comes last",
			[]string{"opt/rocm/lib/x", "opt/rocm-beta/lib/x", "opt/rocm-5.0.0/lib/x"},
			[]string{"/opt/rocm-5.0.0/lib", "/opt/rocm-beta/lib", "/opt/rocm/lib"},
		},
		{
			"suffix",
			[]string{"opt/rocm-7.0.0-rc1/lib/x", "opt/rocm-7.0.0/lib/x", "opt/rocm-7.0.1/lib/x"},
			[]string{"/opt/rocm-7.0.1/lib", "/opt/rocm-7.0.0-rc1/lib", "/opt/rocm-7.0.0/lib"},
		},
		{"dead link", []string{"opt/rocm -> opt/rocm-9.9.9", "opt/rocm-6.0.0/lib/x"}, []string{"/opt/rocm-6.0.0/lib"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := makeTree(t, tt.entries...)
			var got []string
			for _, dir := range optDirs(root) {
				got = append(got, filepath.ToSlash(strings.TrimPrefix(dir, root)))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestHiddenBy names the environment variables that hide GPUs, those most of all that are set and empty.
func TestHiddenBy(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  map[string]string
		want string
	}{
		{nil, ""},
		{
			map[string]string{"ROCR_VISIBLE_DEVICES": ""},
			"; the environment hides GPUs: ROCR_VISIBLE_DEVICES is set and empty, so that none is seen",
		},
		{map[string]string{"HIP_VISIBLE_DEVICES": "7"}, `; the environment hides GPUs: HIP_VISIBLE_DEVICES is "7"`},
		{map[string]string{"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "-1"}, "; the environment hides GPUs: " +
			`HIP_VISIBLE_DEVICES is set and empty, so that none is seen, CUDA_VISIBLE_DEVICES is "-1"`},
	} {
		if got := hiddenBy(func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok }); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.env, got, tt.want)
		}
	}
}
