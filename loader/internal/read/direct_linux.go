package read

import (
	"io"
	"os"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"golang.org/x/sys/unix"
)

// OpenDirect opens a part once more for direct reads. File systems that have none refuse it, mostly with EINVAL.
func OpenDirect(p *gguf.Part) (*os.File, error) { return p.Open(unix.O_DIRECT) }

// memoryAlign is the alignment of memory that direct reads from f need, in bytes. Kernels before 6.1 and some file
// systems do not tell; then it is taken to be 512, the size of a disk's block, which most disks are content with.
func memoryAlign(f *os.File) int {
	var st unix.Statx_t
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 || st.Dio_mem_align == 0 {
		return 512
	}
	return int(st.Dio_mem_align)
}

// readv reads at off into bufs, one after the other. It may read less than they hold; io.EOF means that nothing is
// there.
func readv(f *os.File, bufs [][]byte, off int64) (int, error) {
	for {
		n, err := unix.Preadv(int(f.Fd()), bufs, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, &os.PathError{Op: "read", Path: f.Name(), Err: err}
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// letGo takes the whole pages of b, a part of a file's mapping, out of this process's memory; they stay in the page
// cache.
func letGo(b []byte) {
	page := uintptr(os.Getpagesize())
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (page - 1)
	if n := uintptr(len(b)); n > skip {
		_ = unix.Madvise(b[skip:], unix.MADV_DONTNEED) // rounds the length up: a page is faulted in again at worst
	}
}
