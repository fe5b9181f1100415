package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// outputFile is a file that appears under its name only when it is complete. It is written under a temporary name in
// the same directory. Commit renames it, and Discard removes it.
//
// Two kinds of files cannot be replaced by renaming, and are written in place: one that something is mounted on, such
// as a file that a container gets from its host, and one in a directory that the user may not write to. The second
// kind is written to from the beginning on; if it is discarded it becomes empty.
type outputFile struct {
	*os.File
	path    string // as the user has named it
	target  string // that path with symbolic links followed
	inPlace bool   // File is the target itself
	closed  bool
}

// destination is where an output goes.
type destination struct {
	path   string      // as the user has named it
	target string      // with symbolic links followed
	info   os.FileInfo // of the file that is there; nil: none is
}

// findDestination follows the links at path and refuses what is not a regular file, as it would be replaced by one.
func findDestination(path string) (destination, error) {
	d := destination{path: path, target: path}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return d, err
	case info.IsDir():
		return d, fmt.Errorf("%s is a directory, not a file to be written", path)
	case !info.Mode().IsRegular():
		return d, fmt.Errorf("%s is not a regular file and will not be replaced", path)
	default:
		d.info = info
	}
	// A link to a file that does not exist is followed, too. It is done by hand, since the standard library follows
	// links to existing files only.
	for range 255 {
		link, err := os.Readlink(d.target)
		if err != nil {
			return d, nil
		}
		if !filepath.IsAbs(link) {
			dir, _ := filepath.Split(d.target)
			link = dir + link // not Join: what .. means is for the system to say
		}
		d.target = link
	}
	return d, &fs.PathError{Op: "open", Path: path, Err: syscall.ELOOP}
}

// createOutput makes ready to write the file at path. A file that is there already is an error unless overwrite is set.
func createOutput(path string, overwrite bool) (*outputFile, error) {
	d, err := findDestination(path)
	if err != nil {
		return nil, err
	}
	if d.info != nil && !overwrite {
		return nil, fmt.Errorf("%s exists; --force replaces it", path)
	}
	o := &outputFile{path: path, target: d.target}
	if o.File, err = createTemporary(d); err == nil {
		return o, nil
	}
	if d.info != nil {
		if f, err := os.OpenFile(d.target, os.O_RDWR|os.O_TRUNC, 0); err == nil {
			o.File, o.inPlace = f, true
			return o, nil
		}
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		e.Path = path // the temporary name means nothing to the user
	}
	return nil, err
}

// createTemporary creates a file beside the target, with the mode of the file that it is to replace. Its name is
// random, since a process that was killed may have left one, and short, since that of the target may be as long as can
// be.
func createTemporary(d destination) (*os.File, error) {
	dir, _ := filepath.Split(d.target)
	mode := fs.FileMode(0o666)
	if d.info != nil {
		mode = d.info.Mode().Perm()
	}
	for {
		// os.CreateTemp would make a file that only its owner can read, and it would stay so under its final name.
		temp := filepath.Join(dir, fmt.Sprintf(".gguf2gpu-%016x.tmp", rand.Uint64()))
		f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, mode)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil || d.info == nil {
			return f, err
		}
		if err := f.Chmod(mode); err != nil { // what the umask has taken away
			return nil, errors.Join(err, f.Close(), os.Remove(temp))
		}
		return f, nil
	}
}

// Commit brings the file to the disk and gives it its name. A file that cannot be finished is removed.
func (f *outputFile) Commit() error {
	if err := f.finish(); err != nil {
		return errors.Join(f.explain(err), f.discard())
	}
	f.closed = true
	return nil
}

func (f *outputFile) finish() error {
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	if f.inPlace {
		return f.Close()
	}
	temp := f.Name()
	switch err := rename(f.File, f.target); {
	case errors.Is(err, syscall.EBUSY): // something is mounted on the target
		if err := f.copyInPlace(); err != nil {
			return err
		}
		return errors.Join(f.Close(), os.Remove(temp))
	case err != nil:
		return err
	}
	return f.Close()
}

// copyInPlace writes what is in the temporary file to the target.
func (f *outputFile) copyInPlace() error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	to, err := os.OpenFile(f.target, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	if _, err := io.Copy(to, f.File); err != nil {
		return errors.Join(err, to.Truncate(0), to.Close())
	}
	return errors.Join(to.Sync(), to.Close())
}

// explain puts the name that the user knows in place of the temporary one.
func (f *outputFile) explain(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok && e.Path == f.Name() {
		e.Path = f.path
	}
	if e, ok := errors.AsType[*os.LinkError](err); ok && e.Old == f.Name() {
		return &fs.PathError{Op: "write", Path: f.path, Err: e.Err}
	}
	return err
}

// Discard removes the temporary file. It has no effect after Commit, so that it can be deferred.
func (f *outputFile) Discard() {
	_ = f.discard() // an error here would hide the one that is the reason for discarding
}

func (f *outputFile) discard() error {
	if f.closed {
		return nil
	}
	f.closed = true
	if f.inPlace {
		err := f.Truncate(0) // so that nobody takes it for complete
		f.Close()            // which finish may have done
		return err
	}
	f.Close()
	return os.Remove(f.Name())
}

// writeFile lets write make the file at path, which appears only when it is complete.
func writeFile(path string, write func(*outputFile) error) error {
	o, err := createOutput(path, true)
	if err != nil {
		return err
	}
	defer o.Discard()
	if err := write(o); err != nil {
		return o.explain(err)
	}
	return o.Commit()
}

// plannedOutput is a file that a flag names, which the command writes in the end.
type plannedOutput struct {
	flag   string
	path   string // "": there is none
	stdout bool   // "-" is stdout
	read   bool   // the command reads the file, and must not write it
}

// checkOutputs finds out, before anything takes long, whether the outputs can be written. It refuses one that is the
// model, another model, or the same file as another one, whatever names and links lead to it. model is nil where it is
// not known.
func checkOutputs(model *gguf.File, outputs ...plannedOutput) error {
	type checked struct {
		plannedOutput
		destination
		dir os.FileInfo
	}
	var done []checked
	for _, p := range outputs {
		if p.path == "" || p.path == "-" && p.stdout {
			continue
		}
		if err := checkOutputName(p); err != nil {
			return err
		}
		d, err := findDestination(p.path)
		if p.read && (err != nil || d.info == nil) {
			continue // it is no file
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p.flag, err)
		}
		if part := partOf(model, d.info); part != "" && !p.read {
			return usageErrorf("%s %s is the model itself (%s): name another file", p.flag, p.path, part)
		}
		if !p.read && isModel(d) {
			return usageErrorf("%s %s is a model, which would be lost: name another file, or remove that one", p.flag, p.path)
		}
		if err := checkEnding(p); err != nil {
			return err
		}
		if err := checkWritable(d); err != nil && !p.read {
			return fmt.Errorf("%s: %w", p.flag, err)
		}
		c := checked{plannedOutput: p, destination: d}
		if c.dir, err = os.Stat(directoryOf(d.target)); err != nil {
			return fmt.Errorf("%s: %w", p.flag, err)
		}
		for _, other := range done {
			same := d.info != nil && other.info != nil && os.SameFile(d.info, other.info) ||
				os.SameFile(c.dir, other.dir) && filepath.Base(d.target) == filepath.Base(other.target)
			if same {
				return usageErrorf("%s %s and %s %s are the same file: name two",
					other.flag, other.plannedOutput.path, p.flag, p.path)
			}
		}
		done = append(done, c)
	}
	return nil
}

// wrongEndings are endings of names that say what an output is not: it would be taken for that later.
var wrongEndings = map[string][]string{
	"--readback": {".gguf"},
	"--chart":    {".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".html"},
}

// checkOutputName refuses a name that was hardly meant as that of a file.
func checkOutputName(p plannedOutput) error {
	if p.path == "-" && !p.read {
		return usageErrorf("%s writes a file, and %q would be stdout: a file of that name is ./-", p.flag, p.path)
	}
	if strings.HasPrefix(p.path, "-") && !p.read {
		return usageErrorf("%s takes a file, and %q looks like a flag: a file of that name is ./%s", p.flag, p.path, p.path)
	}
	return nil
}

// checkEnding refuses a name with the ending of another kind of file.
func checkEnding(p plannedOutput) error {
	ending := strings.ToLower(filepath.Ext(p.path))
	if slices.Contains(wrongEndings[p.flag], ending) {
		what := map[string]string{"--readback": "safetensors", "--chart": "SVG"}[p.flag]
		return usageErrorf("%s writes %s, and %s has the ending of something else: name it %s.%s", p.flag, what, p.path,
			strings.TrimSuffix(p.path, filepath.Ext(p.path)), strings.ToLower(what))
	}
	return nil
}

// isModel reports whether there is a GGUF file where an output is to go.
func isModel(d destination) bool {
	if d.info == nil {
		return false
	}
	f, err := os.Open(d.target)
	if err != nil {
		return false
	}
	defer f.Close()
	var magic [4]byte
	_, err = io.ReadFull(f, magic[:])
	return err == nil && string(magic[:]) == "GGUF"
}

func directoryOf(path string) string {
	if dir, _ := filepath.Split(path); dir != "" {
		return dir
	}
	return "."
}

// partOf returns the path of the model's part that the file is, "" if it is none.
func partOf(model *gguf.File, info os.FileInfo) string {
	if model == nil || info == nil {
		return ""
	}
	for _, p := range model.Parts() {
		if have := p.Info(); have != nil && os.SameFile(have, info) {
			return p.Path
		}
	}
	return ""
}

// checkWritable does what createOutput does, and leaves no trace of it.
func checkWritable(d destination) error {
	f, err := createTemporary(d)
	if err == nil {
		return errors.Join(f.Close(), os.Remove(f.Name()))
	}
	if d.info != nil {
		if f, err := os.OpenFile(d.target, os.O_RDWR, 0); err == nil {
			return f.Close()
		}
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		e.Path = d.path
	}
	return err
}
