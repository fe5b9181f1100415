package loader

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

// SocketPath is where a Holder of this user listens unless told otherwise: gguf2gpu.sock in the user's runtime directory, or
// in a directory of the user's own under the temporary one where there is none.
func SocketPath() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "gguf2gpu.sock")
	}
	uid := strconv.Itoa(os.Getuid())
	dir := filepath.Join("/run/user", uid)
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return filepath.Join(dir, "gguf2gpu.sock")
	}
	return filepath.Join(os.TempDir(), "gguf2gpu-"+uid, "gguf2gpu.sock")
}

// socketOrDefault is path, or SocketPath for "" if no other user can have put something there.
func socketOrDefault(path string) (string, error) {
	if path != "" {
		return path, nil
	}
	path = SocketPath()
	if err := checkPrivate(filepath.Dir(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("loader: the directory for sockets: %w; name another place with --socket", err)
	}
	return path, nil
}

// maxSocketPath is the longest name that a Unix socket can have, in bytes.
const maxSocketPath = 107

// Listen makes the Unix socket of a Holder at path, "" for SocketPath, with mode 0600, or 0660 with group. One that was left behind
// by a process that has ended is replaced; one that somebody listens on, and any other file, is an error. The caller calls remove
// when the listener is closed; it leaves alone what another process has put there meanwhile.
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
		return nil, nil, fmt.Errorf("loader: %s is longer than the name of a socket may be, %d bytes", path, maxSocketPath)
	}
	lock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	if err := free(path); err != nil {
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

// removeSocket removes the socket at path if nobody listens on it any more.
func removeSocket(path string) error {
	lock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer lock.Close()
	_ = free(path) // what is another's now stays
	return nil
}

// free sees that path may be taken: there is nothing, or a socket that nobody listens on any more, which it removes.
func free(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("loader: %s exists and is no socket: choose another place with --socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if errors.Is(err, syscall.ECONNREFUSED) { // left behind by a process that was killed
		return os.Remove(path)
	}
	if err == nil {
		_ = conn.Close()
	}
	return fmt.Errorf("loader: another process holds models on %s: --add gives it one more, --socket chooses another place", path)
}
