package amdhip

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// sonames of AMD's runtime, newest first. The number is HIP's major version (ROCm 10 still has 7). The plain name comes
// last: it belongs to development packages and says nothing about the version.
var sonames = []string{"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"}

// Attempt is one path that Open, or Runtime.Compiler, tried in vain.
type Attempt struct {
	Path string
	// Source says who named it: "Options.Library", an environment variable, "loader" or "/opt/rocm*", for hipRTC also
	// "HIP library" and "beside the HIP library".
	Source string
	Err    error
}

// listAttempts returns each attempt on a line of its own.
func listAttempts(attempts []Attempt) string {
	var b strings.Builder
	for _, a := range attempts {
		fmt.Fprintf(&b, "\n\t%s (%s): %v", a.Path, a.Source, a.Err)
	}
	return b.String()
}

// attemptErrors returns what, followed by the errors of the attempts.
func attemptErrors(what error, attempts []Attempt) []error {
	errs := []error{what}
	for _, a := range attempts {
		errs = append(errs, a.Err)
	}
	return errs
}

// LibraryError is the error of Open when no HIP library could be used. It matches ErrNoLibrary, and whatever the errors
// of its attempts match.
type LibraryError struct {
	Attempts []Attempt // in the order in which they were made
}

// Error lists every attempt on a line of its own.
func (e *LibraryError) Error() string {
	return "amdhip: " + ErrNoLibrary.Error() + listAttempts(e.Attempts)
}

// Unwrap returns ErrNoLibrary and the errors of the attempts.
func (e *LibraryError) Unwrap() []error { return attemptErrors(ErrNoLibrary, e.Attempts) }

// finder searches for a library. What tests replace is a field.
type finder struct {
	root     string // of the file system, for /opt
	env      func(string) string
	open     func(path string) error
	attempts []Attempt
}

// find opens the first library in the order of the package documentation and returns its path.
func (f *finder) find(explicit string) (string, error) {
	for _, e := range []struct{ source, path string }{
		{"Options.Library", explicit},
		{"GGUF2GPU_HIP_LIBRARY", f.env("GGUF2GPU_HIP_LIBRARY")},
	} {
		if e.path == "" {
			continue
		}
		// Whoever names a file wants that file: to take another one silently would hide the mistake.
		if f.try(e.source, e.path) {
			return e.path, nil
		}
		return "", &LibraryError{Attempts: f.attempts}
	}
	for _, key := range []string{"ROCM_PATH", "HIP_PATH"} {
		dir := f.env(key)
		if dir == "" {
			continue
		}
		if path, ok := f.tryDir(key, filepath.Join(dir, "lib"), sonames); ok {
			return path, nil
		}
	}
	for _, name := range sonames {
		if f.try("loader", name) {
			return name, nil
		}
	}
	for _, dir := range f.optDirs() {
		if path, ok := f.tryDir("/opt/rocm*", dir, sonames); ok {
			return path, nil
		}
	}
	return "", &LibraryError{Attempts: f.attempts}
}

// optDirs returns the library directories below /opt. If there are none, that counts as a failed attempt.
func (f *finder) optDirs() []string {
	dirs := optDirs(f.root)
	if len(dirs) == 0 {
		f.failed("/opt/rocm*", filepath.Join(f.root, "opt", "rocm*", "lib"), fs.ErrNotExist)
	}
	return dirs
}

// findCompiler opens hipRTC for the HIP library of that major version and returns its path. hip is the path or name
// under which the HIP library was opened, real the file that it is, "" if that is unknown. Up to HIP 6 the HIP library
// has the functions of hipRTC, too. A hipRTC of another major version is never taken, because it would bring another
// HIP library into the process.
func (f *finder) findCompiler(major int, hip, real string) (string, error) {
	if path := f.env("GGUF2GPU_HIPRTC_LIBRARY"); path != "" {
		if f.try("GGUF2GPU_HIPRTC_LIBRARY", path) {
			return path, nil
		}
		return "", &CompilerError{Attempts: f.attempts}
	}
	if major < 7 && f.try("HIP library", hip) {
		return hip, nil
	}
	name := fmt.Sprintf("libhiprtc.so.%d", major)
	var tried []string
	search := func(source string, dirs []string) (string, bool) {
		for _, dir := range dirs {
			if slices.Contains(tried, dir) {
				continue
			}
			tried = append(tried, dir)
			if path, ok := f.tryDir(source, dir, []string{name}); ok {
				return path, true
			}
		}
		return "", false
	}
	var beside []string
	for _, path := range []string{real, hip} {
		if strings.ContainsRune(path, '/') {
			beside = append(beside, filepath.Dir(path))
		}
	}
	if path, ok := search("beside the HIP library", beside); ok {
		return path, nil
	}
	if f.try("loader", name) {
		return name, nil
	}
	if path, ok := search("/opt/rocm*", f.optDirs()); ok {
		return path, nil
	}
	return "", &CompilerError{Attempts: f.attempts}
}

// tryDir tries the names in a directory. A directory that is not there is one attempt, however many the names.
func (f *finder) tryDir(source, dir string, names []string) (string, bool) {
	if _, err := os.Stat(dir); err != nil {
		f.failed(source, dir, pathCause(err))
		return "", false
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); err != nil {
			f.failed(source, path, pathCause(err))
		} else if f.try(source, path) {
			return path, true
		}
	}
	return "", false
}

func (f *finder) try(source, path string) bool {
	err := f.open(path)
	if err != nil {
		f.failed(source, path, err)
	}
	return err == nil
}

func (f *finder) failed(source, path string, err error) {
	f.attempts = append(f.attempts, Attempt{Path: path, Source: source, Err: err})
}

// pathCause strips operation and path, which the attempt already tells.
func pathCause(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	return err
}

var versionedDir = regexp.MustCompile(`^(?:rocm|core)-(\d+(?:\.\d+)*)`)

// optDirs returns the library directories below root/opt of the classic layout (/opt/rocm-6.2.0/lib) and the newer one
// (/opt/rocm/core-10.1/lib), newest first and each once, whatever symbolic links lead to it. Those that show no version
// come last.
func optDirs(root string) []string {
	type candidate struct {
		path    string
		version []int
	}
	var found []candidate
	seen := map[string]bool{}
	for _, pattern := range []string{"rocm*/lib", "rocm*/core*/lib"} {
		// Glob fails on a malformed pattern only.
		paths, _ := filepath.Glob(filepath.Join(root, "opt", pattern))
		for _, path := range paths {
			real, err := filepath.EvalSymlinks(path)
			if err != nil || seen[real] {
				continue
			}
			seen[real] = true
			found = append(found, candidate{path, dirVersion(real)})
		}
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		return cmp.Or(slices.Compare(b.version, a.version), cmp.Compare(a.path, b.path))
	})
	var dirs []string
	for _, c := range found {
		dirs = append(dirs, c.path)
	}
	return dirs
}

// dirVersion returns the version in the innermost directory name that has one, nil if none has.
func dirVersion(path string) []int {
	for dir := filepath.Dir(path); dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		m := versionedDir.FindStringSubmatch(filepath.Base(dir))
		if m == nil {
			continue
		}
		var version []int
		for part := range strings.SplitSeq(m[1], ".") {
			n, _ := strconv.Atoi(part) // digits only; one that overflows is as new as can be
			version = append(version, n)
		}
		return version
	}
	return nil
}
