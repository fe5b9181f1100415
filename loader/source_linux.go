package loader

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openDirect opens the file behind f once more for direct reads. On a file system that has none (tmpfs, some overlays) the
// reads are ordinary ones. Going through /proc makes sure that it is the same file, whatever has become of its name.
func openDirect(f *os.File) (*os.File, error) {
	name := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	d, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		return os.Open(name)
	}
	return d, err
}

// residentShare is the share of b's pages, a part of a file's mapping, that are in memory. It is 1 when the kernel does not say.
func residentShare(b []byte) float64 {
	if len(b) == 0 {
		return 1
	}
	page := os.Getpagesize()
	vec := make([]byte, (len(b)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
		uintptr(unsafe.Pointer(unsafe.SliceData(vec))))
	if errno != 0 {
		return 1
	}
	n := 0
	for _, v := range vec {
		n += int(v & 1)
	}
	return float64(n) / float64(len(vec))
}

// letGo takes the whole pages of b, a part of a file's mapping, out of this process's memory; they stay in the page cache.
func letGo(b []byte) {
	page := uintptr(os.Getpagesize())
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (page - 1)
	if n := uintptr(len(b)); n > skip {
		_ = unix.Madvise(b[skip:], unix.MADV_DONTNEED) // rounds the length up: the page behind is faulted in again at worst
	}
}

// hostAvailable is how many bytes the host can give without swapping.
func hostAvailable() (n uint64, ok bool) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(text)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &n); err == nil {
			return n * 1024, true
		}
	}
	return 0, false
}
