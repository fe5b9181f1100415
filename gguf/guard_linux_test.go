package gguf

import (
	"errors"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestGuardDisk: a page that cannot be read although the file has it is an I/O error, and no fault of the file.
func TestGuardDisk(t *testing.T) {
	f, err := Open("../testdata/tiny-llama.gguf")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapping := f.parts[0].mapping()
	const page = 64 << 10 // a multiple of any page size
	if err := unix.Mprotect(mapping[page:2*page], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	sum := 0
	err = f.Guard(func() error {
		for _, b := range mapping {
			sum += int(b)
		}
		return nil
	})
	if _, ok := errors.AsType[*FormatError](err); ok || !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, want an I/O error", err)
	}
}
