package read

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"golang.org/x/sys/unix"
)

// evict takes a file out of the page cache. The test is skipped where the file system keeps it there.
func evict(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	if residentShare(b) > 0.1 {
		t.Skip("the file system of temporary files keeps its files in memory")
	}
}

func warm(t *testing.T, path string) {
	t.Helper()
	if _, err := os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
}

// TestAsking compares what reading and counting tell with what is so.
func TestAsking(t *testing.T) {
	t.Parallel()
	path := written(t, 4<<20)
	f, err := openProbe(open(t, path).Parts()[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const n = 4 << 20
	evict(t, path)
	there, counts := counted(f, 0, n)
	if counts && there {
		t.Error("counted: the file is not in the page cache")
	}
	there, reads := probe(f, 0, n)
	if reads && there {
		t.Error("probe: the file is not in the page cache")
	}
	warm(t, path)
	if there, known := counted(f, 0, n); known != counts || known && !there {
		t.Errorf("counted: %t, %t; the file is in the page cache", there, known)
	}
	if there, known := probe(f, 0, n); known != reads || known && !there {
		t.Errorf("probe: %t, %t; the file is in the page cache", there, known)
	}
	t.Logf("counting works: %t, asking by reading: %t", counts, reads)
}

// TestOfOthers: whose file it is makes no difference to which windows are read directly. mincore(2) tells everybody
// but the owner that all is in memory.
func TestOfOthers(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can become another user")
	}
	const owner, other = 1234, 65534
	path := written(t, 2*windowBytes)
	if err := os.Chown(path, owner, owner); err != nil {
		t.Skip("root of this machine cannot give files away: ", err)
	}
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f := open(t, path)
	g := group(t, f, plan.Spec{Policy: plan.Raw})
	chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
	ask := func(uid int) (all []uint32) {
		src, err := Open(f, g, chunks, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		done := make(chan struct{})
		go func() { // on a thread of its own, which ends with the goroutine
			defer close(done)
			runtime.LockOSThread()
			if err := unix.Setfsuid(uid); err != nil {
				t.Error(err)
			}
			for w := range src.parts[0].windows {
				all = append(all, src.transport(src.parts[0], int64(w)*windowBytes))
			}
			if share := residentShare(f.Parts()[0].Bytes()); uid == other && share != 1 {
				t.Errorf("mincore says %.2f to others: then this test shows nothing", share)
			}
		}()
		<-done
		return all
	}
	evict(t, path)
	if _, known := probe(mustProbe(t, f), 0, windowBytes); !known {
		t.Skip("the file system of temporary files does not support RWF_NOWAIT")
	}
	evict(t, path)
	for _, uid := range []int{other, owner, 0, other} { // asking must not change the answer
		if got := fmt.Sprint(ask(uid)); got != fmt.Sprint([]uint32{byDirectRead, byDirectRead, byDirectRead}) {
			t.Errorf("user %d, nothing in the page cache: %v", uid, got)
		}
	}
	warm(t, path)
	for _, uid := range []int{other, owner, 0} {
		if got := fmt.Sprint(ask(uid)); got != fmt.Sprint([]uint32{byMapping, byMapping, byMapping}) {
			t.Errorf("user %d, all in the page cache: %v", uid, got)
		}
	}
}

func mustProbe(t *testing.T, f *gguf.File) *os.File {
	t.Helper()
	p, err := openProbe(f.Parts()[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// sparse is a model with one tensor of n zeros, which take no room on the disk.
func sparse(t *testing.T, n uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sparse.gguf")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	err = errors.Join(w.Set("general.architecture", "x"), w.AddTensor("a", gguf.F32, n/4), w.WriteHeader())
	if err := errors.Join(err, f.Truncate(1<<20+int64(n))); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestUnmapped reads a file that cannot be mapped. A process that may have little more address space than it has
// cannot map a large one.
func TestUnmapped(t *testing.T) {
	path := os.Getenv("READ_TEST_UNMAPPED")
	if path == "" {
		c := exec.Command(os.Args[0], "-test.run=^TestUnmapped$", "-test.v")
		c.Env = append(os.Environ(), "READ_TEST_UNMAPPED="+sparse(t, 300<<20))
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestUnmapped") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	status, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var pages uint64
	if _, err := fmt.Sscan(string(status), &pages); err != nil {
		t.Fatal(err)
	}
	limit := pages*uint64(os.Getpagesize()) + 256<<20
	if err := syscall.Setrlimit(syscall.RLIMIT_AS, &syscall.Rlimit{Cur: limit, Max: limit}); err != nil {
		t.Fatal(err)
	}
	f := open(t, path)
	if !f.Remote() || f.Parts()[0].Info() == nil {
		t.Fatal("the file has been mapped")
	}
	g := group(t, f, plan.Spec{Policy: plan.Raw})
	chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
	for _, mode := range []Mode{Auto, Direct, Mapped} {
		var told []Fallback
		src, err := Open(f, g, chunks, Options{
			Mode: mode, Threads: 2, Connections: 2, Fallback: func(f Fallback) { told = append(told, f) },
		})
		if mode == Mapped {
			if err == nil || !strings.Contains(err.Error(), "cannot be mapped into memory") {
				t.Errorf("mmap: %v", err)
			}
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		s := &summing{group: g}
		r := src.Reader(s, "worker 0")
		for i := range chunks {
			if err := r.Read(t.Context(), chunks[i].Segs, chunks[i+1:]); err != nil {
				t.Fatal(err)
			}
		}
		r.Close()
		src.Close()
		stats := src.Stats()
		if mode == Auto && (stats.Remote != int64(g.ReadBytes) || len(told) != 1 || told[0].Instead != ordinaryReads) ||
			mode == Direct && (stats.Direct != int64(g.ReadBytes) || len(told) != 0) {
			t.Errorf("mode %d: %+v, told %+v", mode, stats, told)
		}
		if s.bytes != int64(g.ReadBytes) {
			t.Errorf("mode %d: %d bytes came of %d", mode, s.bytes, g.ReadBytes)
		}
	}
}

// summing is a sink that counts bytes.
type summing struct {
	group *plan.Group
	bytes int64
	room  []byte
}

func (s *summing) Put(_ *plan.Segment, src []byte) error {
	s.bytes += int64(len(src))
	return nil
}
func (s *summing) AsIs(*plan.Segment) bool { return true }
func (s *summing) Room(seg *plan.Segment) ([]byte, error) {
	if len(s.room) < seg.DstBytes {
		s.room = AlignedBytes(seg.DstBytes)
	}
	s.bytes += int64(seg.SrcBytes)
	return s.room[:seg.DstBytes], nil
}
func (s *summing) PutPart(*plan.Segment, int64, []byte, []byte) error { return nil }
func (s *summing) Looks() bool                                        { return false }
func (s *summing) Flush() error                                       { return nil }
