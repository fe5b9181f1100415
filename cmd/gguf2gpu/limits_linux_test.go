package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestModelsOfManyParts loads a split of more parts than the process may have descriptors, in every way to read.
func TestModelsOfManyParts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const parts = 300
	name := func(i int) string { return filepath.Join(dir, fmt.Sprintf("m-%05d-of-%05d.gguf", i+1, parts)) }
	for i := range parts {
		writeOdd(t, name(i), map[string]any{
			"split.no": uint16(i), "split.count": uint16(parts), "split.tensors.count": int32(parts),
		}, []oddTensor{{fmt.Sprintf("blk.%d.w", i), gguf.F32, []uint64{16384}, 65536}})
	}
	command := filepath.Join(dir, "gguf2gpu") // the name says which command the test binary is
	self, err := os.Executable()
	must(t, err, os.Symlink(self, command))
	for _, io := range []string{"auto", "direct", "mmap"} {
		out, err := exec.Command("sh", "-c", `ulimit -n 40; exec "$0" "$@"`, command, "load", name(parts/2), "--device", "soft",
			"--progress", "none", "--threads", "4", "--io", io, "--verify").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "verified: 300 of 300 tensors") {
			t.Errorf("--io %s: %v\n%s", io, err, out)
		}
	}
}

// TestWithoutProc loads in a root directory that has the program, its libraries and the model, but no /proc, no /sys,
// no /dev and no directory for temporary files.
func TestWithoutProc(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	must(t, err)
	root := t.TempDir()
	put := func(from, to string) {
		t.Helper()
		b, err := os.ReadFile(from)
		must(t, err, os.MkdirAll(filepath.Dir(root+to), 0o755), os.WriteFile(root+to, b, 0o755))
	}
	put(self, "/gguf2gpu")
	put(samplePath, "/m.gguf")
	libraries, err := exec.Command("ldd", self).Output()
	if err != nil {
		t.Skip("there is no ldd that says which libraries the program needs: ", err)
	}
	for _, path := range regexp.MustCompile(`/\S+`).FindAllString(string(libraries), -1) {
		put(path, path)
	}
	attr := &syscall.SysProcAttr{Chroot: root}
	if os.Geteuid() != 0 { // who may not change the root directory may do so as root of a name space
		attr.Cloneflags = syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	}
	for _, args := range [][]string{
		{"load", "/m.gguf", "--device", "soft", "--verify"},
		{"load", "/m.gguf", "--device", "soft", "--dtype", "raw", "--io", "direct", "--verify"},
		{"load", "/m.gguf", "--device", "soft", "--readback", "/out.safetensors"},
		{"inspect", "/m.gguf"},
		{"devices"},
		{"bench", "/m.gguf", "--device", "soft", "--runs", "1", "--dtype", "raw", "--scaling=false"},
	} {
		cmd := exec.Command("/gguf2gpu", args...)
		cmd.Dir, cmd.SysProcAttr, cmd.Env = "/", attr, []string{}
		out, err := cmd.CombinedOutput()
		if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
			t.Skip("this user may not change the root directory: ", err)
		}
		if err != nil || args[len(args)-1] == "--verify" && !strings.Contains(string(out), "verified: 40 of 40 tensors") {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}
}
