//go:build unix

package gguf

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	manyParts   = 300
	descriptors = 40 // that the process of TestHundredsOfParts may have
	partsVar    = "GGUF_TEST_PARTS"
)

// TestHundredsOfParts opens a split of hundreds of parts in a process that may have few descriptors.
func TestHundredsOfParts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var path string
	for i := range manyParts {
		p := &testPart{
			name:    fmt.Sprintf("m-%05d-of-%05d.gguf", i+1, manyParts),
			keys:    map[string]any{splitNoKey: uint16(i), splitCountKey: uint16(manyParts)},
			tensors: []string{fmt.Sprintf("%04d", i)},
		}
		path = writeFile(t, filepath.Join(dir, p.name), p.bytes(t))
	}
	child := exec.Command(os.Args[0], "-test.run=^TestFewDescriptors$", "-test.v")
	child.Env = append(os.Environ(), partsVar+"="+path)
	out, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestFewDescriptors") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestFewDescriptors is what TestHundredsOfParts runs in a process of its own, as it changes the process's limits.
func TestFewDescriptors(t *testing.T) {
	path := os.Getenv(partsVar)
	if path == "" {
		t.Skip("runs in a process that TestHundredsOfParts starts")
	}
	limit := syscall.Rlimit{Cur: descriptors, Max: descriptors}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, path)
	if len(f.Parts()) != manyParts || len(f.Tensors()) != manyParts {
		t.Errorf("%d parts, %d tensors", len(f.Parts()), len(f.Tensors()))
	}
	for _, p := range f.Parts() {
		again, err := p.Open(0)
		if err != nil {
			t.Fatal(err)
		}
		again.Close()
	}
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	for {
		null, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		open = append(open, null)
	}
	if _, err := Open(path); !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), "ulimit -n") {
		t.Errorf("without descriptors: got %v", err)
	}
}

// TestPartOpenIsBlocking: reads of a part's file wait for the disk, however they are made.
func TestPartOpenIsBlocking(t *testing.T) {
	t.Parallel()
	f, err := openFile(t, tinyLlama).Parts()[0].Open(0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v; want none of O_NONBLOCK", flags, err)
	}
}
