package hold

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// SocketPath is where a Holder of this user listens by default: gguf2gpu.sock in the user's runtime directory. Where
// there is no such directory, it is in one of the user's own in the directory for temporary files.
func SocketPath() string {
	dir, _ := socketDirectory()
	return filepath.Join(dir, "gguf2gpu.sock")
}

// socketDirectory is the directory of SocketPath. ours says that it is one that gguf2gpu makes, in a directory where
// everybody may make one.
func socketDirectory() (dir string, ours bool) {
	// The XDG Base Directory Specification wants paths that are not absolute to be ignored: where one leads depends on the
	// directory that a process happens to run in.
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return dir, false
	}
	uid := strconv.Itoa(os.Getuid())
	dir = filepath.Join("/run/user", uid)
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return dir, false
	}
	return filepath.Join(os.TempDir(), "gguf2gpu-"+uid), true
}

// socketOrDefault is path. For "" it is SocketPath, if no other user can have put something there.
func socketOrDefault(path string) (string, error) {
	if path != "" {
		return path, nil
	}
	dir, ours := socketDirectory()
	err := checkPrivate(dir)
	if info, lerr := os.Lstat(dir); ours && lerr == nil && info.Mode().Type() == fs.ModeSymlink {
		// Whoever made it can let it lead elsewhere as soon as it was looked at.
		err = fmt.Errorf("%s is a symbolic link", dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("hold: the default directory for sockets: %w; name a socket elsewhere", err)
	}
	return SocketPath(), nil
}

// maxSocketPath is the longest path that a Unix socket can have, in bytes: sun_path has 108, the last of which is 0
// (unix(7)).
const maxSocketPath = 107

// Listen makes the Unix socket of a Holder at path, "" for SocketPath, with mode 0600, or 0660 with group. It replaces
// a socket that a process left behind when it was killed. A socket that somebody listens on, and any other file, is an
// error. The caller calls remove when the listener is closed; that leaves alone what another process has put there
// since.
func Listen(path string, group bool) (l *net.UnixListener, remove func() error, err error) {
	if path == "" {
		if err := os.MkdirAll(filepath.Dir(SocketPath()), 0o700); err != nil {
			return nil, nil, err
		}
	}
	if path, err = socketOrDefault(path); err != nil {
		return nil, nil, err
	}
	if len(path) > maxSocketPath {
		return nil, nil, tooLong(path)
	}
	lock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	if err := makeRoom(path); err != nil {
		return nil, nil, err
	}
	made, err := (&net.ListenConfig{Control: private}).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, nil, err
	}
	l = made.(*net.UnixListener)
	l.SetUnlinkOnClose(false)
	mode := os.FileMode(0o600)
	if group {
		mode = 0o660
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, nil, errors.Join(err, l.Close(), os.Remove(path))
	}
	return l, func() error { return removeSocket(path) }, nil
}

func tooLong(path string) error {
	return fmt.Errorf("hold: %s is longer than the path of a socket may be, %d bytes", path, maxSocketPath)
}

// removeSocket removes the socket at path if nobody listens on it any more.
func removeSocket(path string) error {
	lock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer lock.Close()
	_ = makeRoom(path) // an error says that it is somebody else's by now
	return nil
}

// makeRoom sees that there can be a socket at path. It removes one that nobody listens on.
func makeRoom(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("hold: %s exists and is no socket: choose another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if errors.Is(err, syscall.ECONNREFUSED) { // left behind by a process that was killed
		return os.Remove(path)
	}
	if err == nil {
		_ = conn.Close()
	}
	return fmt.Errorf("hold: another process holds models on %s: let it add yours, or choose another path", path)
}
