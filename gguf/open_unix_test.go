//go:build unix

package gguf

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestSpecialFiles: each is refused at once; opening the pipe would wait for a writer, and /dev/zero never ends.
func TestSpecialFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe.gguf")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for path, want := range map[string]string{
		pipe: "named pipe", socket: "socket", "/dev/zero": "device", "/dev/null": "device", dir: "directory",
	} {
		if _, err := Open(path); !errors.Is(err, ErrNotGGUF) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want one that says %q", path, err, want)
		}
	}
}

// TestLinkLoop: the system gives up on links that go round, and so does Open.
func TestLinkLoop(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.gguf"), filepath.Join(dir, "b.gguf")
	for from, to := range map[string]string{a: b, b: a} {
		if err := syscall.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(a); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("got %v, want that there are too many links", err)
	}
}
