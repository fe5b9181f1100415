package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOutputMounted: a file that something is mounted on, as containers get files of their host, is written in place.
func TestOutputMounted(t *testing.T) {
	dir := t.TempDir()
	host, path := filepath.Join(dir, "host"), filepath.Join(dir, "out")
	must(t, os.WriteFile(host, []byte("old and longer"), 0o644), os.WriteFile(path, nil, 0o644))
	if err := unix.Mount(host, path, "", unix.MS_BIND, ""); err != nil {
		t.Skip("this process may not mount: ", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(path, 0)) })
	must(t, checkOutputs(nil, plannedOutput{flag: "--x", path: path}), writeFile(path, func(o *outputFile) error {
		_, err := o.WriteString("new")
		return err
	}))
	if got, err := os.ReadFile(host); err != nil || string(got) != "new" {
		t.Errorf("the mounted file holds %q, %v", got, err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 2 {
		t.Errorf("left behind: %v, %v", all, err)
	}
}
