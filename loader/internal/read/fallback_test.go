package read

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// trouble is how a file cannot be read. Nil errors are none.
type trouble struct {
	openDirect, openPlain error
	direct                error // of direct reads
	after                 int64 // so many of them go well
	times                 int64 // so many of them fail; 0: all others
	plain                 error // of ordinary reads
}

// source opens f with that trouble, as if nothing of it were in the page cache. told gets the fallbacks.
func (x *trouble) source(
	t *testing.T, f *gguf.File, chunks []plan.Chunk, g *plan.Group, mode Mode, told *[]Fallback,
) *Source {
	t.Helper()
	var direct atomic.Pointer[os.File]
	var reads atomic.Int64
	src, err := Open(f, g, chunks, Options{
		Mode: mode, Fallback: func(f Fallback) { *told = append(*told, f) },
		ReadAt: func(f *os.File, b []byte, off int64) (int, error) {
			if f != direct.Load() {
				if x.plain != nil {
					return 0, x.plain
				}
				return f.ReadAt(b, off)
			}
			n := reads.Add(1)
			if x.direct != nil && n > x.after && (x.times == 0 || n <= x.after+x.times) {
				return 0, x.direct
			}
			return f.ReadAt(b, off)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := src.parts[0]
	openDirect, openPlain := p.direct.open, p.plain.open
	p.direct.open = func() (*os.File, error) {
		if x.openDirect != nil {
			return nil, x.openDirect
		}
		f, err := openDirect()
		direct.Store(f)
		return f, err
	}
	p.plain.open = func() (*os.File, error) {
		if x.openPlain != nil {
			return nil, x.openPlain
		}
		return openPlain()
	}
	for w := range p.windows {
		p.windows[w].transport.Store(byDirectRead)
	}
	return src
}

// TestFallback: whatever does not work and whenever, Auto brings every byte once, and says once what it does instead.
func TestFallback(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, windowBytes+1<<20))
	replaced := &gguf.FormatError{Path: "x", Offset: -1, Err: gguf.ErrReplaced}
	for _, x := range []struct {
		name string
		trouble
		instead string // "": nothing is told
	}{
		{"no direct reads", trouble{openDirect: syscall.EINVAL}, ordinaryReads},
		{"direct reads are forbidden", trouble{openDirect: syscall.EPERM}, ordinaryReads},
		{"a kernel without", trouble{openDirect: syscall.ENOSYS}, ordinaryReads},
		{"direct reads fail", trouble{direct: syscall.EINVAL}, ordinaryReads},
		{"direct reads fail later", trouble{direct: syscall.EINVAL, after: 5}, ordinaryReads},
		{"a direct read fails once", trouble{direct: syscall.EIO, after: 3, times: 1}, ordinaryReads},
		{"replaced", trouble{openDirect: replaced, openPlain: replaced}, theMapping},
		{"removed", trouble{openDirect: syscall.ENOENT, openPlain: syscall.ENOENT}, theMapping},
		{"too many files", trouble{openDirect: syscall.EMFILE, openPlain: syscall.EMFILE}, theMapping},
		{"too many files later", trouble{direct: syscall.EINVAL, after: 2, openPlain: syscall.EMFILE}, theMapping},
		{"memory of a driver", trouble{direct: syscall.EFAULT, times: 1}, ""},
		{"alignment", trouble{direct: syscall.EINVAL, after: 2, times: 1}, ""},
	} {
		for name, spec := range specs {
			for _, looks := range []bool{false, true} {
				g := group(t, f, spec)
				chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
				var told []Fallback
				src := x.source(t, f, chunks, g, Auto, &told)
				k := newTaken(g)
				k.looks, k.fits = looks, true
				readAll(t, src, chunks, k, 1)
				s := src.Stats()
				if s.Mapped+s.Direct+s.Plain != int64(g.ReadBytes) {
					t.Errorf("%s, %s: %+v of %d bytes", x.name, name, s, g.ReadBytes)
				}
				checkConsumed(t, src)
				src.Close()
				if name != "raw" {
					continue // slices are read in the ordinary way; what is converted has no rooms
				}
				if len(told) > 1 || (len(told) == 1) != (x.instead != "") ||
					len(told) == 1 && told[0].Instead != x.instead {
					t.Errorf("%s: told %+v, want %q once", x.name, told, x.instead)
				}
				if x.instead == "" && s.Direct != int64(g.ReadBytes) {
					t.Errorf("%s: %+v, want direct reads of all", x.name, s)
				}
				if len(told) == 1 && (told[0].Path != f.Parts()[0].Path || told[0].Err == nil) {
					t.Errorf("%s: %+v", x.name, told[0])
				}
			}
		}
	}
}

// TestNoFallback: a mode that is asked for fails where it does not work, and a disk that fails is an error in any.
func TestNoFallback(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, 1<<20))
	for _, x := range []struct {
		mode Mode
		trouble
		want error
		text string
	}{
		{Direct, trouble{openDirect: syscall.EPERM}, syscall.EPERM, "direct reads do not work on this file"},
		{Direct, trouble{direct: syscall.EINVAL, after: 2}, syscall.EINVAL, "direct reads do not work on this file"},
		{Direct, trouble{direct: syscall.EIO}, syscall.EIO, "at offset 0x"},
		{Auto, trouble{direct: syscall.EIO, plain: syscall.EIO}, syscall.EIO, "at offset 0x"},
		{Auto, trouble{direct: syscall.EINVAL, plain: syscall.EIO}, syscall.EIO, "at offset 0x"},
	} {
		for _, spec := range []plan.Spec{{Policy: plan.Raw}, {Policy: plan.F16}} {
			g := group(t, f, spec)
			chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
			var told []Fallback
			src := x.source(t, f, chunks, g, x.mode, &told)
			err := first(t, src, chunks, newSink(newTaken(g)))
			if e, ok := errors.AsType[*Error](err); !ok || !errors.Is(e, x.want) || !strings.Contains(err.Error(), x.text) {
				t.Errorf("mode %d, %+v: %v", x.mode, x.trouble, err)
			}
			if len(told) != 0 {
				t.Errorf("mode %d, %+v: told %+v", x.mode, x.trouble, told)
			}
			src.Close()
		}
	}
}

// TestRooms: direct reads bring bytes straight to rooms that fit, all but the ends.
func TestRooms(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, 1<<20))
	for _, looks := range []bool{false, true} {
		for _, bytes := range []int{plan.MinChunk, 300_000, 16 << 20} {
			g := group(t, f, plan.Spec{Policy: plan.Raw})
			chunks := g.Cut(plan.CutOptions{Bytes: bytes})
			src, err := Open(f, g, chunks, Options{Mode: Direct})
			if err != nil {
				t.Fatal(err)
			}
			k := newTaken(g)
			k.looks, k.fits = looks, true
			s := newSink(k)
			r := src.Reader(s, "worker 0")
			inRooms := 0
			for i := range chunks {
				if err := r.Read(t.Context(), chunks[i].Segs, nil); err != nil {
					t.Fatal(err)
				}
				for _, in := range r.file.inside {
					inRooms += int(in.hi - in.lo)
				}
			}
			checkTaken(t, k, f)
			if inRooms < 1<<20 {
				t.Errorf("chunks of %d bytes: only %d bytes were read to their places", bytes, inRooms)
			}
			src.Close()
		}
	}
}
