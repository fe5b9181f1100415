package hold

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peer is the process at the other end of a connection.
type peer struct {
	pid   int
	owner bool // of this process's user, or root
}

// openFiles is how many files this process may have open.
func openFiles() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return maxClients
	}
	return int(min(limit.Cur, 1<<20))
}

// checkPeer finds out who is at the other end. It refuses all but root, the same user and, with group, members of the
// same group.
func checkPeer(conn *net.UnixConn, group bool) (peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return peer{}, err
	}
	var cred *unix.Ucred
	var groups []uint32
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		if cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); sockErr == nil && group {
			groups, sockErr = peerGroups(fd)
		}
	})
	if err := errors.Join(err, sockErr); err != nil {
		return peer{}, fmt.Errorf("hold: finding out who has connected: %w", err)
	}
	p := peer{pid: int(cred.Pid), owner: int(cred.Uid) == os.Geteuid() || cred.Uid == 0}
	return p, allowed(p, int(cred.Uid), append(groups, cred.Gid), group)
}

// allowed refuses processes of user uid, who is in these groups, that may not use what this process holds.
func allowed(p peer, uid int, groups []uint32, group bool) error {
	if p.owner || group && slices.Contains(groups, uint32(os.Getegid())) {
		return nil
	}
	who := "nobody else may"
	if group {
		who = fmt.Sprintf("members of group %d may", os.Getegid())
	}
	return fmt.Errorf("hold: process %d belongs to user %d, who may not use models of user %d (%s): %w", p.pid, uid, os.Geteuid(),
		who, os.ErrPermission)
}

// peerGroups returns the supplementary groups of the process at the other end of fd, when it connected.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		n := uint32(4 * len(groups)) // bytes; the kernel says how many there are
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&n)), 0)
		switch {
		case errno == 0:
			return groups[:n/4], nil
		case errno != unix.ERANGE || int(n/4) <= len(groups):
			return nil, errno
		}
		groups = make([]uint32, n/4)
	}
}
