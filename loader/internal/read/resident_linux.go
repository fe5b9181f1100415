package read

import (
	"math/rand/v2"
	"os"
	"syscall"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"golang.org/x/sys/unix"
)

// probes is how many pages of a window are asked for where the kernel tells only by reading. Up to one of them may be
// missing, so that a window that is not in memory is found out by the second.
const probes = 16

// resident reports whether most of window w is in the page cache.
//
// mincore(2) tells the truth to the owner of a file and to whoever may write to it. Since Linux 5.2 it tells all
// others that every page is there. What it says is therefore believed if a page is missing, or if the file is the
// user's own. Others ask with preadv2(2) and RWF_NOWAIT, which needs no right but that to read. It does not work on
// all file systems; then cachestat(2) is asked, which newer kernels refuse as mincore does. If all fails the mapping
// is used: it always works.
func (p *part) resident(w int64) bool {
	share := residentShare(p.window(w))
	switch {
	case share < enoughResident:
		return false
	case share < 1 || p.own():
		return true
	}
	f, err := p.probe.get()
	if err != nil {
		return true
	}
	off := w * windowBytes
	n := min(windowBytes, p.Size-off)
	if !p.noProbe.Load() {
		if there, known := probe(f, off, n); known {
			return there
		}
		p.noProbe.Store(true)
	}
	there, known := counted(f, off, n)
	return there || !known
}

// own reports whether the file belongs to the user of this process.
func (p *part) own() bool {
	st, ok := p.Info().Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// openProbe opens a part for asking. A page that is asked for and missing is read into the page cache by the kernel;
// with POSIX_FADV_RANDOM it reads that one only.
func openProbe(p *gguf.Part) (*os.File, error) {
	f, err := p.Open(0)
	if err == nil {
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM) // else more is read than need be
	}
	return f, err
}

// probe reads a byte of some of the pages of n bytes from off on, where that does not take waiting for the disk. The
// pages are chosen at random, since those that are missing are in the page cache the next time. known is false if the
// file system does not support this.
func probe(f *os.File, off, n int64) (there, known bool) {
	page := int64(os.Getpagesize())
	pages := (n + page - 1) / page
	count := min(probes, pages)
	missing := int64(0)
	var b [1]byte
	for i := range count {
		lo, hi := i*pages/count, (i+1)*pages/count
		at := off + (lo+rand.Int64N(hi-lo))*page
		_, err := unix.Preadv2(int(f.Fd()), [][]byte{b[:]}, at, unix.RWF_NOWAIT)
		switch err {
		case nil, unix.EINTR:
		case unix.EAGAIN:
			if missing++; float64(missing) > (1-enoughResident)*float64(count) {
				return false, true
			}
		default:
			return false, false
		}
	}
	return true, true
}

// counted lets the kernel count the pages of n bytes from off on. On overlayfs it counts those of the wrong file.
func counted(f *os.File, off, n int64) (there, known bool) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return false, false
	}
	var c unix.Cachestat_t
	r := unix.CachestatRange{Off: uint64(off), Len: uint64(n)}
	if err := unix.Cachestat(uint(f.Fd()), &r, &c, 0); err != nil {
		return false, false
	}
	page := int64(os.Getpagesize())
	return float64(c.Cache) >= enoughResident*float64((n+page-1)/page), true
}

// residentShare is the share of b's pages, a part of a file's mapping, that mincore says are in memory. It is 1 when
// the kernel does not say.
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
