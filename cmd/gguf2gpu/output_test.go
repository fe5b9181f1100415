package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func TestOutputFile(t *testing.T) {
	t.Parallel()
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name      string
		existing  string // "": no file
		overwrite bool
		commit    bool
		want      string // what the file holds in the end; "": no file
		refused   bool
	}{
		{name: "committed", commit: true, want: "new"},
		{name: "discarded", want: ""},
		{name: "replaced", existing: "old", overwrite: true, commit: true, want: "new"},
		{name: "not replaced", existing: "old", want: "old", refused: true},
		{name: "discarded over a file", existing: "old", overwrite: true, want: "old"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "out")
			if tt.existing != "" {
				write(t, path, tt.existing)
			}
			f, err := createOutput(path, tt.overwrite)
			if (err != nil) != tt.refused {
				t.Fatalf("createOutput: %v, want an error: %t", err, tt.refused)
			}
			if err == nil {
				if _, err := f.WriteString("new"); err != nil {
					t.Fatal(err)
				}
				if tt.commit {
					if err := f.Commit(); err != nil {
						t.Fatal(err)
					}
				}
				f.Discard()
			}
			got, err := os.ReadFile(path)
			if string(got) != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("the file holds %q (%v), want %q", got, err, tt.want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestOutputNotRegular(t *testing.T) {
	t.Parallel()
	if f, err := createOutput(t.TempDir(), true); err == nil {
		f.Discard()
		t.Error("a directory was accepted as an output file")
	}
}

// TestOutputTargets writes to files that are something else than a name in a directory.
func TestOutputTargets(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		make func(t *testing.T, dir string) (path, target string) // target: the file that gets the text
		mode fs.FileMode                                          // that the target then has; 0: any
	}{
		{"a link", func(t *testing.T, dir string) (string, string) {
			must(t, os.WriteFile(dir+"/target", []byte("old and longer"), 0o644), os.Symlink("target", dir+"/out"))
			return dir + "/out", dir + "/target"
		}, 0},
		{"a link to nothing", func(t *testing.T, dir string) (string, string) {
			must(t, os.Symlink("target", dir+"/out"))
			return dir + "/out", dir + "/target"
		}, 0},
		{"links through a linked directory", func(t *testing.T, dir string) (string, string) {
			must(t, os.MkdirAll(dir+"/a/b", 0o755), os.Symlink("a/b", dir+"/near"), os.Symlink("../target", dir+"/a/b/out"),
				os.WriteFile(dir+"/target", []byte("not this one"), 0o644))
			return dir + "/near/out", dir + "/a/target" // and not dir/target
		}, 0},
		{"the longest name", func(t *testing.T, dir string) (string, string) {
			path := filepath.Join(dir, strings.Repeat("n", 255))
			return path, path
		}, 0},
		{"a mode that the umask would change", func(t *testing.T, dir string) (string, string) {
			must(t, os.WriteFile(dir+"/out", []byte("old"), 0o600), os.Chmod(dir+"/out", 0o666))
			return dir + "/out", dir + "/out"
		}, 0o666},
		{"a secret", func(t *testing.T, dir string) (string, string) {
			must(t, os.WriteFile(dir+"/out", []byte("old"), 0o600))
			return dir + "/out", dir + "/out"
		}, 0o600},
		{"what a killed process has left", func(t *testing.T, dir string) (string, string) {
			must(t, os.WriteFile(fmt.Sprintf("%s/.out.%d.tmp", dir, os.Getpid()), nil, 0o600))
			return dir + "/out", dir + "/out"
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if runtime.GOOS == "windows" {
				t.Skip("links, modes and long names are other ones here")
			}
			path, target := tt.make(t, t.TempDir())
			link, _ := os.Readlink(path)
			must(t, checkOutputs(nil, plannedOutput{flag: "--x", path: path}), writeFile(path, func(o *outputFile) error {
				_, err := o.WriteString("new")
				return err
			}))
			got, err := os.ReadFile(target)
			if err != nil || string(got) != "new" {
				t.Errorf("the file holds %q, %v", got, err)
			}
			if now, _ := os.Readlink(path); now != link {
				t.Errorf("the link goes to %q, before to %q", now, link)
			}
			if info, err := os.Stat(target); err != nil || tt.mode != 0 && info.Mode() != tt.mode {
				t.Errorf("mode %v, %v, want %v", info.Mode(), err, tt.mode)
			}
		})
	}
}

// TestOutputInPlace: what cannot be replaced is written to, and left empty when it is discarded.
func TestOutputInPlace(t *testing.T) {
	t.Parallel()
	for _, commit := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "out")
		must(t, os.WriteFile(path, []byte("old and longer"), 0o644))
		f, err := os.OpenFile(path, os.O_RDWR|os.O_TRUNC, 0)
		must(t, err)
		o := &outputFile{File: f, path: path, target: path, inPlace: true}
		if _, err := o.WriteString("new"); err != nil {
			t.Fatal(err)
		}
		want := ""
		if commit {
			must(t, o.Commit())
			want = "new"
		}
		o.Discard()
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("commit %t: %q, %v, want %q", commit, got, err, want)
		}
	}
	// As after a rename that said that the target is busy.
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	must(t, os.WriteFile(path, []byte("old and longer"), 0o644))
	o, err := createOutput(path, true)
	must(t, err)
	if _, err := o.WriteString("new"); err != nil {
		t.Fatal(err)
	}
	must(t, o.copyInPlace())
	o.Discard()
	if got, err := os.ReadFile(path); err != nil || string(got) != "new" {
		t.Errorf("copied: %q, %v", got, err)
	}
}

// TestCheckOutputs: what will be in the way is found before the load, and nothing is left of looking.
func TestCheckOutputs(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("links need a privilege here")
	}
	dir := t.TempDir()
	sample, err := os.ReadFile("../../testdata/tiny-llama.gguf")
	must(t, err, os.WriteFile(dir+"/m.gguf", sample, 0o644), os.WriteFile(dir+"/a", nil, 0o644),
		os.WriteFile(dir+"/other.gguf", []byte("GGUF\x03"), 0o644),
		os.Mkdir(dir+"/sub", 0o755), os.Link(dir+"/m.gguf", dir+"/hard"))
	for name, to := range map[string]string{
		"link": "m.gguf", "b": "a", "c": "new", "sub2": "sub", "loop": "loop",
	} {
		must(t, os.Symlink(to, filepath.Join(dir, name)))
	}
	m, err := gguf.Open(dir + "/link")
	must(t, err)
	defer m.Close()
	for _, tt := range []struct {
		one, two string
		code     exitCode
		text     string
	}{
		{"a", "", exitOK, ""},
		{"new", "sub/new", exitOK, ""},
		{"-", "a", exitUsage, "a file of that name is ./-"},
		{"-x", "", exitUsage, "looks like a flag"},
		{"other.gguf", "", exitUsage, "is a model, which would be lost"},
		{"m.gguf", "", exitUsage, "is the model itself"},
		{"link", "", exitUsage, "is the model itself"},
		{"hard", "", exitUsage, "is the model itself"},
		{"a", "b", exitUsage, "are the same file"},
		{"c", "new", exitUsage, "are the same file"},
		{"sub/new", "sub2/new", exitUsage, "are the same file"},
		{"new", "sub/../new", exitUsage, "are the same file"},
		{"sub", "", exitFailed, "is a directory"},
		{"missing/x", "", exitFailed, "no such file or directory"},
		{"a/x", "", exitFailed, "not a directory"},
		{"loop", "", exitFailed, "too many levels of symbolic links"},
	} {
		at := func(name string) string {
			if name == "" || name[0] == '-' {
				return name
			}
			return dir + "/" + name
		}
		before, err := os.ReadDir(dir)
		must(t, err)
		err = checkOutputs(m, plannedOutput{flag: "--one", path: at(tt.one)}, plannedOutput{flag: "--two", path: at(tt.two)})
		if got := codeOf(t.Context(), err); got != tt.code || err != nil && (!strings.Contains(err.Error(), tt.text) ||
			!strings.Contains(err.Error(), "--one")) {
			t.Errorf("%s and %s: %v, code %d, want %d and %q", tt.one, tt.two, err, got, tt.code, tt.text)
		}
		if after, err := os.ReadDir(dir); err != nil || len(after) != len(before) {
			t.Errorf("%s and %s: something is left or gone", tt.one, tt.two)
		}
	}
}

// TestCheckOutputsThatAreRead: what a command reads is not written by it, and need be neither a file nor writable.
func TestCheckOutputsThatAreRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	list := filepath.Join(dir, "sums.txt")
	must(t, os.WriteFile(list, []byte("x"), 0o444))
	out := plannedOutput{flag: "--hash", path: list, stdout: true}
	err := checkOutputs(nil, out, plannedOutput{flag: "--expect", path: list, read: true})
	if codeOf(t.Context(), err) != exitUsage || !strings.Contains(err.Error(), "are the same file") {
		t.Errorf("got %v", err)
	}
	for _, path := range []string{"sha256:00", "-", filepath.Join(dir, "none"), dir} {
		out.path = "-"
		must(t, checkOutputs(nil, out, plannedOutput{flag: "--expect", path: path, read: true}))
	}
}

// TestOutputNames: a name with the ending of something else is refused.
func TestOutputNames(t *testing.T) {
	t.Parallel()
	for _, p := range []plannedOutput{
		{flag: "--readback", path: "m.GGUF"}, {flag: "--chart", path: "a/b.png"}, {flag: "--chart", path: "b.pdf"},
	} {
		err := checkOutputs(nil, p)
		if codeOf(t.Context(), err) != exitUsage || !strings.Contains(err.Error(), "has the ending of something else") {
			t.Errorf("%+v: %v", p, err)
		}
	}
	for _, p := range []plannedOutput{
		{flag: "--readback", path: "m.safetensors"},
		{flag: "--readback", path: "m"},
		{flag: "--readback", path: "m.bin"},
		{flag: "--chart", path: "c.svg"},
		{flag: "--chart", path: "c"},
		{flag: "--trace", path: "t.gguf"},
	} {
		must(t, checkOutputName(p), checkEnding(p))
	}
}

// TestOutputReadOnly: a file that may be written in a directory that may not is written in place.
func TestOutputReadOnly(t *testing.T) {
	t.Parallel()
	if os.Geteuid() == 0 || runtime.GOOS == "windows" {
		t.Skip("root may write everywhere, and so may users of Windows")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	must(t, os.WriteFile(path, []byte("old and longer"), 0o644), os.Chmod(dir, 0o555))
	t.Cleanup(func() { _ = os.Chmod(dir, 0o755) })
	must(t, checkOutputs(nil, plannedOutput{flag: "--x", path: path}), writeFile(path, func(o *outputFile) error {
		_, err := o.WriteString("new")
		return err
	}))
	if got, err := os.ReadFile(path); err != nil || string(got) != "new" {
		t.Errorf("%q, %v", got, err)
	}
	if err := checkOutputs(nil, plannedOutput{flag: "--x", path: filepath.Join(dir, "other")}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a new file: %v", err)
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
