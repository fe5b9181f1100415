package hold

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// checkPrivate refuses a directory in which others than this user could put a socket.
func checkPrivate(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(stat.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s belongs to another user, or others may write to it", dir)
	}
	return nil
}

// lockTime is how long another process may hold the lock of a directory, which it does for the time of making a socket.
const lockTime = 5 * time.Second

// lockName is the file in a socket's directory whose lock keeps processes from making sockets there at the same time.
// Only its owner can open it, so nobody else can hold the lock. The directory itself would not do: whoever can read it
// can lock it.
const lockName = ".gguf2gpu.lock"

// lockDirectory keeps other processes from making or removing sockets in dir until the file that it returns is closed.
// It refuses a directory in which others could have put the file.
func lockDirectory(dir string) (*os.File, error) {
	if err := checkPrivate(dir); err != nil {
		return nil, fmt.Errorf("hold: the socket's directory: %w; choose one that only you can write to", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockTime); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			_ = f.Close()
			return nil, fmt.Errorf("hold: locking the directory %s: %w", dir, err)
		}
	}
}

// private makes the file that a socket will have one of this user alone, before there is one: nobody can connect in
// between.
func private(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), 0o600) })
	return errors.Join(err, failed)
}
