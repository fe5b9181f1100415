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
