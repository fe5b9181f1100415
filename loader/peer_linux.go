package loader

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

// checkPeer refuses processes of other users: root and the same user may connect and, with group, members of the same group.
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
		return peer{}, fmt.Errorf("loader: who is at the other end: %w", err)
	}
	p := peer{pid: int(cred.Pid), owner: int(cred.Uid) == os.Geteuid() || cred.Uid == 0}
	return p, allowed(p, int(cred.Uid), append(groups, cred.Gid), group)
}

// allowed says whether a process of user uid and of these groups may use what this one holds.
func allowed(p peer, uid int, groups []uint32, group bool) error {
	if p.owner || group && slices.Contains(groups, uint32(os.Getegid())) {
		return nil
	}
	hint := "its groups may not either"
	if !group {
		hint = "--allow-group lets members of its group attach"
	}
	return fmt.Errorf("loader: process %d belongs to user %d, who may not use models of user %d (%s): %w", p.pid, uid, os.Geteuid(),
		hint, os.ErrPermission)
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
