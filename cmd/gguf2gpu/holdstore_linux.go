package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// storeDescription ends the name of the descriptor that has a model's description.
const storeDescription = "-d"

// systemdStore keeps models in systemd's store of descriptors (FileDescriptorStoreMax= in the unit). A model has one
// descriptor for each allocation and one of a file in memory with its description.
type systemdStore struct {
	socket string // $NOTIFY_SOCKET
	stored []*os.File

	mu    sync.Mutex
	files map[string]int // how many a model has beside its description
}

// newSystemdStore is the store that this process has; nil: there is none. $FDSTORE says how many descriptors fit.
func newSystemdStore(stored []*os.File) hold.Keeper {
	socket, most := os.Getenv("NOTIFY_SOCKET"), os.Getenv("FDSTORE")
	if n, err := strconv.Atoi(most); (err != nil || n == 0) && len(stored) == 0 || socket == "" {
		return nil
	}
	return &systemdStore{socket: socket, stored: stored, files: make(map[string]int)}
}

// names are those of a model's n descriptors and of its description.
func (*systemdStore) names(id string, n int) []string {
	all := []string{storePrefix + id + storeDescription}
	for i := range n {
		all = append(all, fmt.Sprintf("%s%s-%d", storePrefix, id, i))
	}
	return all
}

// Keep is hold.Keeper's.
func (s *systemdStore) Keep(_ context.Context, k hold.Kept) error {
	d, err := memoryFile(k.Description)
	if err != nil {
		return err
	}
	defer d.Close()
	s.mu.Lock()
	s.files[k.ID] = len(k.Files)
	s.mu.Unlock()
	names := s.names(k.ID, len(k.Files))
	for i, file := range append([]*os.File{d}, k.Files...) {
		// Without FDPOLL=0 systemd would drop what says that it is closed at the other end.
		if err := s.send("FDSTORE=1\nFDPOLL=0\nFDNAME="+names[i], file); err != nil {
			return err
		}
	}
	return nil
}

// Forget is hold.Keeper's.
func (s *systemdStore) Forget(_ context.Context, id string) error {
	s.mu.Lock()
	n := s.files[id]
	delete(s.files, id)
	s.mu.Unlock()
	var errs []error
	for _, name := range s.names(id, n) {
		errs = append(errs, s.send("FDSTOREREMOVE=1\nFDNAME="+name, nil))
	}
	return errors.Join(errs...)
}

// Kept is hold.Keeper's. It returns what was passed when this process began, once.
func (s *systemdStore) Kept(context.Context) (all []hold.Kept, err error) {
	slices.SortStableFunc(s.stored, func(a, b *os.File) int {
		if len(a.Name()) != len(b.Name()) {
			return len(a.Name()) - len(b.Name()) // -9 before -10
		}
		return strings.Compare(a.Name(), b.Name())
	})
	byID := make(map[string]*hold.Kept)
	for _, file := range s.stored {
		name := strings.TrimPrefix(file.Name(), storePrefix)
		id, part, ok := strings.Cut(name, "-")
		if !ok || id == "" {
			err = errors.Join(err, file.Close())
			continue
		}
		if byID[id] == nil {
			byID[id] = &hold.Kept{ID: id}
		}
		if "-"+part != storeDescription {
			byID[id].Files = append(byID[id].Files, file)
			continue
		}
		b, rerr := io.ReadAll(io.NewSectionReader(file, 0, 64<<20))
		byID[id].Description = b
		err = errors.Join(err, rerr, file.Close())
	}
	s.stored = nil
	for _, k := range byID {
		all = append(all, *k)
		s.mu.Lock()
		s.files[k.ID] = len(k.Files)
		s.mu.Unlock()
	}
	return all, err
}

// send sends a message to systemd, with a descriptor if there is one. Package net sends no descriptors over such
// sockets.
func (s *systemdStore) send(message string, file *os.File) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	defer unix.Close(fd)
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	if err := unix.Sendmsg(fd, []byte(message), rights, &unix.SockaddrUnix{Name: s.socket}, 0); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	return nil
}

// memoryFile returns a file in memory that holds b. The caller closes it.
func memoryFile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("gguf2gpu model", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "description")
	if _, err := f.WriteAt(b, 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
