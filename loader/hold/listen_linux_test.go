package hold

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// listenOn is Listen, and closes the listener in the end.
func listenOn(t *testing.T, path string, group bool) (l *net.UnixListener, remove func() error) {
	t.Helper()
	l, remove, err := Listen(path, group)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, remove
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		if e.Name() != lockName {
			all = append(all, e.Name())
		}
	}
	return strings.Join(all, " ")
}

func TestListen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, remove := listenOn(t, path, false)
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, _, err := Listen(path, false); err == nil || !strings.Contains(err.Error(), "another process holds models") {
		t.Errorf("while somebody listens: %v", err)
	}
	l.Close() // as when the process is killed: the socket is left
	if got := names(t, dir); got != "s" {
		t.Errorf("there are %s", got)
	}
	second, removeSecond := listenOn(t, path, true)
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := remove(); err != nil || names(t, dir) != "s" {
		t.Errorf("the first one's remove: %v, there are %s", err, names(t, dir))
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	second.Close()
	if err := removeSecond(); err != nil || names(t, dir) != "" {
		t.Errorf("%v, there are %s", err, names(t, dir))
	}
	if err := removeSecond(); err != nil {
		t.Errorf("again: %v", err)
	}

	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Listen(path, false); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("where a file is: %v", err)
	}
	_, _, err = Listen(filepath.Join(dir, strings.Repeat("x", 100)), false)
	if err == nil || !strings.Contains(err.Error(), "longer") {
		t.Errorf("with a long name: %v", err)
	}
	if _, _, err := Listen(filepath.Join(dir, "none", "s"), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
	if got := names(t, dir); got != "s" {
		t.Errorf("there are %s", got)
	}
}

// TestListenAtOnce lets several take over a socket that was left behind: one gets it, and can be reached.
func TestListenAtOnce(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	for range 20 {
		l, _ := listenOn(t, path, false)
		l.Close()
		var all sync.WaitGroup
		got := make(chan *net.UnixListener, 8)
		for range cap(got) {
			all.Go(func() {
				if l, _, err := Listen(path, false); err == nil {
					got <- l
				}
			})
		}
		all.Wait()
		close(got)
		if len(got) != 1 {
			t.Fatalf("%d listen", len(got))
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		(<-got).Close()
	}
}

func TestListenLocked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	others, err := os.Open(dir) // as anybody may who can read it
	if err != nil {
		t.Fatal(err)
	}
	defer others.Close()
	if err := unix.Flock(int(others.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	l, _ := listenOn(t, filepath.Join(dir, "s"), false)
	l.Close()
	info, err := os.Stat(filepath.Join(dir, lockName))
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("%v, %v: others can lock it", info, err)
	}
	f, err := os.Open(filepath.Join(dir, lockName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		l, _, err := Listen(filepath.Join(dir, "s"), false)
		if err == nil {
			l.Close()
		}
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("did not wait: %v", err)
	default:
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestListenShared refuses a directory where others may put and remove files, or that belongs to somebody else.
func TestListenShared(t *testing.T) {
	t.Parallel()
	for _, mode := range []os.FileMode{0o777, 0o777 | os.ModeSticky, 0o770} {
		dir := t.TempDir()
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Listen(filepath.Join(dir, "s"), true); err == nil || !strings.Contains(err.Error(), "only you can write") {
			t.Errorf("%v: %v", mode, err)
		}
		if got, err := os.ReadDir(dir); err != nil || len(got) > 0 {
			t.Errorf("%v: there are %v, %v", mode, got, err)
		}
	}
}

// TestLongSocketPath: both sides say that a path is too long for a socket, where the system says "invalid argument".
func TestLongSocketPath(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), strings.Repeat("s", maxSocketPath))
	_, _, listening := Listen(path, false)
	_, attaching := Attach(t.Context(), AttachOptions{Socket: path})
	_, listing := (&Client{Socket: path}).List(t.Context())
	for _, err := range []error{listening, attaching, listing} {
		if err == nil || !strings.Contains(err.Error(), "longer than the path of a socket may be, 107 bytes") {
			t.Errorf("got %v", err)
		}
	}
}

// TestDefaultName: a model is called as its file, without the ending and without the number of a part.
func TestDefaultName(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/models/a.gguf": "a", "a-00002-of-00003.gguf": "a", "hf:org/repo:Q8_0": "repo:Q8_0", "a.gguf.gguf": "a.gguf",
	} {
		if got := DefaultName(path); got != want {
			t.Errorf("%s is held as %q, want %q", path, got, want)
		}
	}
}

func TestSocketPath(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("XDG_RUNTIME_DIR", dir)
	if got := SocketPath(); got != filepath.Join(dir, "gguf2gpu.sock") {
		t.Error(got)
	}
	l, remove := listenOn(t, "", false)
	if l.Addr().Network() != "unix" || names(t, dir) != "gguf2gpu.sock" {
		t.Errorf("%v, there are %s", l.Addr(), names(t, dir))
	}
	l.Close()
	if err := remove(); err != nil || names(t, dir) != "" {
		t.Errorf("%v, there are %s", err, names(t, dir))
	}
	// A directory that others can write to is not where a socket of this user's is looked for, or put.
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	_, _, err := Listen("", false)
	if err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("listening: %v", err)
	}
	if _, err := Attach(t.Context(), AttachOptions{}); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("attaching: %v", err)
	}
	if _, err := (Client{}).List(t.Context()); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("listing: %v", err)
	}
	// A path that is not absolute is ignored. Without a runtime directory it is one of the user's own, made when it is
	// needed.
	t.Setenv("XDG_RUNTIME_DIR", "")
	without := SocketPath()
	t.Setenv("XDG_RUNTIME_DIR", "run/user")
	if got := SocketPath(); got != without || !filepath.IsAbs(got) {
		t.Errorf("with a relative runtime directory the socket is %s, without one %s", got, without)
	}
	t.Setenv("XDG_RUNTIME_DIR", "")
	if _, err := os.Stat("/run/user"); err == nil {
		return // that is used then, and it is not the test's
	}
	t.Setenv("TMPDIR", dir)
	if err := os.Symlink(t.TempDir(), filepath.Dir(SocketPath())); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Listen("", false); err == nil || !strings.Contains(err.Error(), "is a symbolic link") {
		t.Errorf("listening behind a link: %v", err)
	}
	if _, err := Attach(t.Context(), AttachOptions{}); err == nil || !strings.Contains(err.Error(), "is a symbolic link") {
		t.Errorf("attaching behind a link: %v", err)
	}
	if err := os.Remove(filepath.Dir(SocketPath())); err != nil {
		t.Fatal(err)
	}
	if _, err := Attach(t.Context(), AttachOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("attaching where nobody is: %v", err)
	}
	l, remove = listenOn(t, "", false)
	if info, err := os.Stat(filepath.Dir(SocketPath())); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	l.Close()
	if err := remove(); err != nil {
		t.Error(err)
	}
}

func TestPeer(t *testing.T) {
	t.Parallel()
	me, group := os.Geteuid(), uint32(os.Getegid())
	for _, tt := range []struct {
		name   string
		owner  bool
		uid    int
		groups []uint32
		group  bool
		ok     bool
	}{
		{"the same user", true, me, []uint32{group + 1}, false, true},
		{"another user", false, me + 1, []uint32{group + 1}, false, false},
		{"another user of the group", false, me + 1, []uint32{group}, false, false},
		{"another user, with groups", false, me + 1, []uint32{group + 1}, true, false},
		{"a member of the group, with groups", false, me + 1, []uint32{group + 1, group}, true, true},
	} {
		err := allowed(peer{pid: 1, owner: tt.owner}, tt.uid, tt.groups, tt.group)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, os.ErrPermission) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	l, _ := listenOn(t, filepath.Join(t.TempDir(), "s"), false)
	for _, group := range []bool{false, true} {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		there, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		defer there.Close()
		if p, err := checkPeer(there, group); err != nil || p.pid != os.Getpid() || !p.owner {
			t.Errorf("%+v, %v", p, err)
		}
	}
}

// TestPrivate looks at a socket's file before anybody had a chance to change its mode.
func TestPrivate(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{Control: private}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}
