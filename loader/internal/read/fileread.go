package read

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// minRoom is the least number of bytes that are read straight into a room: below that it is cheaper to copy them than
// to have one more piece in the read.
const minRoom = 32 << 10

// fileRead is one read of a run of segments. The bytes of segments that stay as they are go straight into their rooms,
// as far as the alignment of direct reads allows; all others go into the scratch buffer.
type fileRead struct {
	rooms   [][]byte // of the segments; empty: they are put
	inside  []span   // by segment: what is read into its room
	inRooms int      // segments of which something is
	bufs    [][]byte // that are read into, one after the other
	scraps  []scrap  // that go into the scratch buffer
}

// span is a range of bytes of a part.
type span struct{ lo, hi int64 }

// scrap is a range of a part that goes into the scratch buffer, as number buf of the buffers.
type scrap struct {
	span
	buf   int
	bytes []byte
}

// unfit reports whether err may say that the memory, the offset or the kind of read does not suit the file. Memory
// that a driver has mapped cannot be read to directly, which is EFAULT.
func unfit(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EFAULT) || errors.Is(err, syscall.EOPNOTSUPP)
}

// takeRooms asks for the rooms of r.segs, once, if all of them stay as they are.
func (r *Reader) takeRooms() error {
	x := &r.file
	if len(x.rooms) > 0 {
		return nil
	}
	for i := range r.segs {
		if !r.sink.AsIs(&r.segs[i]) {
			return nil
		}
	}
	for i := range r.segs {
		room, err := r.sink.Room(&r.segs[i])
		if err != nil {
			r.refused = err
			return err
		}
		x.rooms = append(x.rooms, room)
	}
	return nil
}

// layout decides where the bytes of r.segs go. They begin at start; need bytes from there on are wanted. Direct reads
// are of whole blocks, to memory that is aligned.
func (r *Reader) layout(ps *part, d *descriptor) (start int64, need int) {
	x := &r.file
	block, align := int64(1), uintptr(1)
	if d == &ps.direct {
		block, align = directAlign, uintptr(d.mem)
	}
	_, lo, _ := r.src.extent(&r.segs[0])
	_, _, hi := r.src.extent(&r.segs[len(r.segs)-1])
	start = lo &^ (block - 1)
	x.inRooms, x.inside, x.bufs, x.scraps = 0, x.inside[:0], x.bufs[:0], x.scraps[:0]
	at := start
	scrap := func(end int64) {
		if end > at {
			x.scraps = append(x.scraps, scrap{span: span{at, end}, buf: len(x.bufs)})
			x.bufs = append(x.bufs, nil)
		}
	}
	for i, room := range x.rooms {
		_, l, h := r.src.extent(&r.segs[i])
		in := span{(l + block - 1) &^ (block - 1), h &^ (block - 1)}
		if in.hi-in.lo < minRoom || block > 1 && ps.noRooms.Load() ||
			(uintptr(unsafe.Pointer(unsafe.SliceData(room)))+uintptr(in.lo-l))%align != 0 {
			x.inside = append(x.inside, span{})
			continue
		}
		scrap(in.lo)
		x.bufs = append(x.bufs, room[in.lo-l:in.hi-l])
		x.inside = append(x.inside, in)
		x.inRooms++
		at = in.hi
	}
	scrap((hi + block - 1) &^ (block - 1))
	r.placeScraps()
	return start, int(hi - start)
}

// placeScraps gives the scraps their places in the scratch buffer.
func (r *Reader) placeScraps() {
	x := &r.file
	total := 0
	for _, s := range x.scraps {
		total += int(s.hi - s.lo)
	}
	if len(r.scratch) < total {
		r.scratch = AlignedBytes(total)
	}
	rest := r.scratch
	for i := range x.scraps {
		s := &x.scraps[i]
		n := s.hi - s.lo
		s.bytes, rest = rest[:n:n], rest[n:]
		x.bufs[s.buf] = s.bytes
	}
}

// scrapped is what was read of bytes lo to hi into the scratch buffer, all of them in one scrap.
func (x *fileRead) scrapped(lo, hi int64) []byte {
	if lo == hi {
		return nil
	}
	i, found := slices.BinarySearchFunc(x.scraps, lo, func(s scrap, lo int64) int {
		switch {
		case s.hi <= lo:
			return -1
		case s.lo > lo:
			return 1
		}
		return 0
	})
	if !found {
		return nil // never: the layout covers everything
	}
	s := &x.scraps[i]
	return s.bytes[lo-s.lo : hi-s.lo]
}

// fetch reads r.segs from f, the file of d.
func (r *Reader) fetch(ps *part, d *descriptor, f *os.File) error {
	start, need := r.layout(ps, d)
	began := time.Now()
	if err := r.src.readFull(ps, f, r.file.bufs, start, need); err != nil {
		return err
	}
	if t := r.src.o.Trace; t != nil {
		t.Add(r.Track, "read", began, time.Now(), r.src.group.Tensors[r.segs[0].Tensor].Name, need)
	}
	r.src.fetched.Add(int64(need))
	return nil
}

// deliver gives the sink what has been read.
func (r *Reader) deliver(direct bool) error {
	x := &r.file
	counter := &r.src.plain
	if direct {
		counter = &r.src.direct
	}
	for i := range r.segs {
		s := &r.segs[i]
		_, lo, hi := r.src.extent(s)
		var err error
		switch {
		case len(x.rooms) == 0:
			err = r.put(s, x.scrapped(lo, hi))
		case x.inside[i] == span{}:
			err = r.putPart(s, x.rooms[i], x.scrapped(lo, hi))
		default:
			in, room := x.inside[i], x.rooms[i]
			copy(room, x.scrapped(lo, in.lo))
			copy(room[in.hi-lo:], x.scrapped(in.hi, hi))
			if r.sink.Looks() {
				err = r.putPart(s, room, room)
			}
		}
		if err != nil {
			return err
		}
		counter.Add(hi - lo)
	}
	return nil
}

// readFull reads at least need bytes at off from f into bufs, which it changes; for direct reads all is aligned.
func (s *Source) readFull(ps *part, f *os.File, bufs [][]byte, off int64, need int) error {
	for got := 0; got < need; {
		if got%directAlign != 0 { // behind a short read the rest is not aligned
			var err error
			if f, err = ps.plain.get(); err != nil {
				return err
			}
		}
		n, err := s.readv(f, bufs, off+int64(got))
		if got += n; got >= need {
			break
		}
		if errors.Is(err, io.EOF) {
			return &gguf.FormatError{
				Path: ps.Path, Offset: off + int64(got), Field: "tensor data",
				Err: fmt.Errorf("%w: the file has become shorter", gguf.ErrTruncated),
			}
		}
		if err != nil {
			return fmt.Errorf("at offset %#x: %w", off+int64(got), err)
		}
		bufs = behind(bufs, n)
	}
	return nil
}

// readv reads into bufs, or only into the first of them.
func (s *Source) readv(f *os.File, bufs [][]byte, off int64) (int, error) {
	if s.o.ReadAt != nil {
		return s.o.ReadAt(f, bufs[0], off)
	}
	return readv(f, bufs, off)
}

// behind is what is left of bufs behind n bytes.
func behind(bufs [][]byte, n int) [][]byte {
	for n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	bufs[0] = bufs[0][n:]
	return bufs
}
