package loader

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// checkPeer refuses processes of other users: root and the same user may connect and, with group, the same group.
func checkPeer(conn *net.UnixConn, group bool) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) { cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if sockErr != nil {
		return sockErr
	}
	return allowed(int(cred.Uid), int(cred.Gid), int(cred.Pid), group)
}

// allowed says whether a process may use what this one holds.
func allowed(uid, gid, pid int, group bool) error {
	switch {
	case uid == os.Geteuid() || uid == 0:
		return nil
	case group && gid == os.Getegid():
		return nil
	}
	return fmt.Errorf("loader: process %d belongs to user %d and group %d, which may not use models of user %d and group %d: %w",
		pid, uid, gid, os.Geteuid(), os.Getegid(), os.ErrPermission)
}
