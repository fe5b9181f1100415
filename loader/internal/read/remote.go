package read

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const (
	// maxRange is the most that one request asks for, unless the file says less, though a segment is never cut: enough
	// that a round trip between two requests costs little.
	maxRange = 8 << 20
	// minRange is how little a request asks for, for the sake of having several at the end, and of a small model.
	minRange = 1 << 20
	// PieceBytes is how much is copied, converted or looked at in one go: little enough to be in the cache still when
	// the next thing is done with it. Besides, copies of 1 MiB and more write around the caches, and the device then
	// has to fetch from memory what it could have had from a cache.
	PieceBytes = 256 << 10
)

// Requests divides chunks into runs that one request each brings, and returns the number of each run's first chunk. One
// worker should read a whole run. Towards the end runs become shorter, so that all connections end at about the same
// time.
func (s *Source) Requests(chunks []plan.Chunk) []int {
	var starts []int
	var ps *part
	var lo, end, most int64
	left := int64(s.group.ReadBytes) // from the chunk on
	for i := range chunks {
		segs := chunks[i].Segs
		joined := i > 0
		for j := 0; j < len(segs) && joined; j++ {
			end, joined = s.follows(&segs[j], ps, lo, end, most)
		}
		if !joined {
			starts = append(starts, i)
			ps, lo, _ = s.extent(&segs[0])
			_, _, end = s.extent(&segs[len(segs)-1])
			most = max(min(minRange, s.maxRange), min(s.maxRange, left/int64(2*max(1, s.o.Connections))))
		}
		for j := range segs {
			left -= int64(segs[j].SrcBytes)
		}
	}
	return starts
}

// stream is a range of a remote part of which a reader has read the beginning.
type stream struct {
	body    io.ReadCloser // nil: there is none
	ps      *part
	at, end int64 // the next byte in the part, and the one behind the last
}

// Close ends the request that a reader has not read to its end.
func (r *Reader) Close() {
	if r.stream.body != nil {
		_ = r.stream.body.Close() // whatever there was to say, reading has said
		r.stream.body = nil
	}
}

// readRange reads the first of segs. Bytes that stay as they are go straight into the sink's room.
func (r *Reader) readRange(ctx context.Context, segs []plan.Segment) error {
	began := time.Now()
	if err := r.seek(ctx, segs); err != nil {
		return err
	}
	s, st := &segs[0], &r.stream
	t := &r.src.group.Tensors[s.Tensor]
	block, _ := t.Block()
	out := s.DstBytes / (s.SrcBytes / block)
	asIs := r.sink.AsIs(s)
	dst, err := r.sink.Room(s)
	if r.refused = err; err != nil {
		return err
	}
	if !asIs && len(r.scratch) < PieceBytes { // what was inherited may be smaller
		r.scratch = make([]byte, PieceBytes)
	}
	for at, left := s.Src, s.SrcBytes/block; left > 0; {
		n := min(left, PieceBytes/block)
		src := dst[:n*out]
		if !asIs {
			src = r.scratch[:n*block]
		}
		if _, err := io.ReadFull(st.body, src); err != nil {
			return err
		}
		st.at += int64(len(src))
		r.src.remote.Add(int64(len(src)))
		if !asIs || r.sink.Looks() {
			r.src.converting <- struct{}{} // those who hold it wait for nothing
			r.refused = r.sink.PutPart(s, at, dst[:n*out], src)
			<-r.src.converting
			if r.refused != nil {
				return r.refused
			}
		}
		dst, at, left = dst[n*out:], at+int64(len(src)), left-n
	}
	if st.at == st.end {
		r.Close() // so that the connection is free
	}
	if tr := r.src.o.Trace; tr != nil {
		tr.Add(r.Track, "read", began, time.Now(), t.Name, s.SrcBytes)
	}
	return nil
}

// seek makes the first of segs what the stream brings next. If the stream does not come to it, a new request is made,
// for what the worker reads after it, too.
func (r *Reader) seek(ctx context.Context, segs []plan.Segment) error {
	st := &r.stream
	ps, lo, hi := r.src.extent(&segs[0])
	if st.body != nil && (st.ps != ps || lo < st.at || hi > st.end) {
		r.Close()
	}
	if st.body == nil {
		end := r.reach(ps, lo, hi, segs[1:])
		*st = stream{body: ps.remote.Range(ctx, lo, end-lo), ps: ps, at: lo, end: end}
	}
	n, err := io.CopyN(io.Discard, st.body, lo-st.at) // the gap between two tensors
	st.at += n
	return err
}

// reach returns where a request that begins at lo is to end. It is for the bytes up to end at least; then it is made
// longer by segs and by the chunks ahead, as long as they follow closely and the request does not become too large.
func (r *Reader) reach(ps *part, lo, end int64, segs []plan.Segment) int64 {
	for i := 0; ; i++ {
		for j := range segs {
			next, ok := r.src.follows(&segs[j], ps, lo, end, r.src.maxRange)
			if !ok {
				return end
			}
			end = next
		}
		if i == len(r.ahead) {
			return end
		}
		segs = r.ahead[i].Segs
	}
}

// Tensor returns n bytes of tensor t of f from byte off on, as they are in the file: a slice of the mapping where they
// are neighbours there, to be used inside of [gguf.File.Guard], else a copy in buf, which grows as needed.
func Tensor(ctx context.Context, f *gguf.File, buf *[]byte, t *plan.Tensor, off int64, n int) (_ []byte, err error) {
	if f.Parts()[t.Part].Source() != nil {
		*buf, err = fetch(ctx, f, (*buf)[:0], t, off, n)
		return *buf, err
	}
	file := f.Parts()[t.Part].Bytes()
	if file == nil {
		return nil, errors.New("the file is closed")
	}
	if at, run := t.InFile(off); run >= int64(n) {
		return file[at : at+int64(n)], nil
	}
	b := (*buf)[:0]
	err = f.Guard(func() error {
		for len(b) < n {
			at, run := t.InFile(off + int64(len(b)))
			b = append(b, file[at:at+min(run, int64(n-len(b)))]...)
		}
		return nil
	})
	*buf = b
	return b, err
}

// LetGo lets go of the mapping's pages that n bytes from byte off of t on reach over.
func LetGo(f *gguf.File, t *plan.Tensor, off int64, n int) {
	if f.Parts()[t.Part].Source() != nil {
		return
	}
	lo, hi := t.Span(off, int64(n))
	letGo(f.Parts()[t.Part].Bytes()[lo:hi])
}

// fetch appends n bytes of tensor t from byte off on to b, with one request for all that they reach over.
func fetch(ctx context.Context, f *gguf.File, b []byte, t *plan.Tensor, off int64, n int) ([]byte, error) {
	at, end := t.Span(off, int64(n))
	body := f.Parts()[t.Part].Source().Range(ctx, at, end-at)
	defer body.Close()
	b = slices.Grow(b, n)
	for len(b) < n {
		lo, run := t.InFile(off + int64(len(b)))
		if _, err := io.CopyN(io.Discard, body, lo-at); err != nil {
			return b, err
		}
		more := b[len(b) : len(b)+int(min(run, int64(n-len(b))))]
		if _, err := io.ReadFull(body, more); err != nil {
			return b, err
		}
		at, b = lo+int64(len(more)), b[:len(b)+len(more)]
	}
	return b, nil
}
