package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// outputFile is a file that appears under its name only when it is complete: it is written beside it under a temporary
// name, which Commit replaces and Discard removes.
type outputFile struct {
	*os.File
	path string
}

// createOutput starts to write path. A file of that name is replaced only when overwrite is set; anything that is not a
// regular file never is.
func createOutput(path string, overwrite bool) (*outputFile, error) {
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file and will not be replaced", path)
	case !overwrite:
		return nil, fmt.Errorf("%s exists; --force replaces it", path)
	}
	dir, base := filepath.Split(path)
	// Not os.CreateTemp, whose files are private to their owner: this one keeps its mode when it gets its name.
	temp := filepath.Join(dir, fmt.Sprintf(".%s.%d.tmp", base, os.Getpid()))
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			e.Path = path // the name that means something to the user
		}
		return nil, err
	}
	return &outputFile{f, path}, nil
}

// Commit gives the file its name. A file that cannot be finished is removed.
func (f *outputFile) Commit() error {
	err := f.Close()
	if err == nil {
		err = os.Rename(f.Name(), f.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// Discard removes the file. It has no effect after Commit, so that it can be deferred.
func (f *outputFile) Discard() {
	if f.Close() == nil { // else Commit has closed it
		// The file is of no use to anyone, and an error on the way out would hide why.
		_ = os.Remove(f.Name())
	}
}
