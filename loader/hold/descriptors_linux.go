package hold

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxDescriptors is how many descriptors one message can bring: the kernel's SCM_MAX_FD.
const maxDescriptors = 253

// writeWithFiles sends v, and descriptors for files with its first byte.
func writeWithFiles(conn *net.UnixConn, v any, files []*os.File) error {
	if len(files) == 0 {
		return writeMessage(conn, v)
	}
	b, err := frame(v)
	if err != nil {
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	n, _, err := conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	if err == nil && n < len(b) {
		_, err = conn.Write(b[n:])
	}
	return err
}

// readLengthAndFiles is readLength, and takes the descriptors that come with the message. begun is called when the
// first byte has come. The caller closes the files.
func readLengthAndFiles(conn *net.UnixConn, limit int, begun func() error) (
	length int64, files []*os.File, err error,
) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var size [4]byte
	control := make([]byte, unix.CmsgSpace(4*maxDescriptors))
	n, c, flags, _, err := conn.ReadMsgUnix(size[:], control)
	if err != nil {
		return 0, nil, err
	}
	if n == 0 && c == 0 {
		return 0, nil, io.EOF
	}
	if files, err = filesOf(control[:c]); err != nil {
		return 0, files, err
	}
	if err := begun(); err != nil {
		return 0, files, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return 0, files, errors.New("hold: a message with more descriptors than this process takes: too many files are open, mostly")
	}
	length, err = readLength(io.MultiReader(strings.NewReader(string(size[:n])), conn), limit)
	return length, files, err
}

// filesOf makes files of the descriptors of control messages.
func filesOf(control []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		if messages[i].Header.Level != unix.SOL_SOCKET || messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "memory of a GPU"))
		}
	}
	return files, nil
}

// memoryFile returns a file in memory that holds b. The caller closes it.
func memoryFile(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// who tells about the process at the other end of a connection, for people who wait for it.
func who(conn *net.UnixConn) string {
	raw, err := conn.SyscallConn()
	if err != nil {
		return "a process"
	}
	var cred *unix.Ucred
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET,
			unix.SO_PEERCRED)
	})
	if errors.Join(err, sockErr) != nil {
		return "a process"
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cred.Pid))
	if err != nil {
		return fmt.Sprintf("process %d", cred.Pid)
	}
	_, after, _ := strings.Cut(string(text), ") ") // the name before it may have anything in it
	if state, _, _ := strings.Cut(after, " "); state == "T" || state == "t" {
		return fmt.Sprintf("process %d, which is stopped (kill -CONT %d lets it go on)", cred.Pid, cred.Pid)
	}
	return fmt.Sprintf("process %d", cred.Pid)
}

// unreachable reports whether an error of connecting says that nobody is there.
func unreachable(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}
