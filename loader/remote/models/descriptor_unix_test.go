//go:build unix

package models_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// TestDescriptor: a file that has no name any more can be opened by its descriptor, and read again later.
func TestDescriptor(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 2<<20)
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, model, 0o600); err != nil {
		t.Fatal(err)
	}
	own := openFile(t, path, 0)
	defer own.Close()
	number, err := syscall.Dup(int(own.Fd())) // for the Opener, which closes it
	if err != nil {
		t.Fatal(err)
	}
	o := models.New(models.Options{})
	f, err := o.Open(t.Context(), fmt.Sprintf("fd:%d", number))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantTensor(t, f, model)
	runtime.GC() // what is held by nobody may be closed now
	if !f.Remote() {
		again, err := f.Parts()[0].Open(0)
		if err != nil {
			t.Error(err)
		} else {
			again.Close()
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	o.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	o = models.New(models.Options{Stdin: dir})
	defer o.Close()
	if _, err := o.Open(t.Context(), "-"); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Error(err)
	}
	if _, err := o.Open(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
