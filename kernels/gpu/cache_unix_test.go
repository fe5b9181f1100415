//go:build unix

package gpu

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestEntriesOfOthersAreNotUsed makes an entry one that other users could have written, a link, or a pipe.
func TestEntriesOfOthersAreNotUsed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	dev, _ := openSoft(t)
	c := Compiler{Dir: dir}
	mustLoad(t, &c, dev, someKeys...)
	path, _ := entryOf(t, &c, dev, q4kToF16)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "entry")
	if err := os.WriteFile(elsewhere, good, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func() error{
		"the group may write": func() error { return os.Chmod(path, 0o620) },
		"all may write":       func() error { return os.Chmod(path, 0o602) },
		"link": func() error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Symlink(elsewhere, path)
		},
		"pipe": func() error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return syscall.Mkfifo(path, 0o600)
		},
		"another user's": func() error { return os.Chown(path, 65534, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "another user's" && os.Geteuid() != 0 {
				t.Skip("only root may give a file away")
			}
			if err := spoil(); err != nil {
				t.Fatal(err)
			}
			replaced(t, c, path, good)
			if info, err := os.Lstat(path); err != nil || info.Mode() != 0o600 {
				t.Errorf("the new entry: %v, %v", info.Mode(), err)
			}
		})
	}
	if is, err := os.ReadFile(elsewhere); err != nil || string(is) != string(good) {
		t.Errorf("the link's target was written: %v", err)
	}
}
