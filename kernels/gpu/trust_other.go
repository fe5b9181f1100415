//go:build !unix

package gpu

import (
	"errors"
	"os"
)

// openEntry opens a file for reading.
func openEntry(path string) (*os.File, error) { return os.Open(path) }

// trusted returns an error unless the file is a regular one. On these systems the permissions of the directory protect
// it.
func trusted(info os.FileInfo) error {
	if !info.Mode().IsRegular() {
		return errors.New("it is no regular file")
	}
	return nil
}
