package read

import (
	"context"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Reader is one worker's access to a source. It is not safe for concurrent use.
type Reader struct {
	src     *Source
	sink    Sink
	Track   string         // its name in the trace
	scratch []byte         // aligned, for what has no other place to be read to; made when first needed
	file    fileRead       // scratch of readFile
	segs    []plan.Segment // that are being read
	runs    []plan.Segment // scratch of Read
	mapped  func() error   // readMapped
	refused error          // what the sink returned, if it was an error
	stream  stream         // the range of a remote part that is being read
	ahead   []plan.Chunk   // what the worker is going to read after this chunk
}

// Reader returns a reader that hands each segment's bytes to sink.
func (s *Source) Reader(sink Sink, track string) *Reader {
	r := &Reader{src: s, sink: sink, Track: track}
	r.mapped = r.readMapped // made once: a method value is an allocation
	return r
}

// Inherit takes over the scratch memory of another reader, which is not used any more.
func (r *Reader) Inherit(from *Reader) { r.scratch = from.scratch }

// Error says that bytes of a tensor could not be read.
type Error struct {
	Tensor string
	Offset int64 // of the first byte, in the tensor's (of a slice, in its) bytes in the file
	Bytes  int
	Err    error
}

// Error returns the tensor, the range and the cause.
func (e *Error) Error() string {
	return fmt.Sprintf("tensor %q, bytes %d to %d: %v", e.Tensor, e.Offset, e.Offset+int64(e.Bytes), e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Read gives the bytes of all, which are the segments of a chunk, to the sink. ahead is the chunks that the same worker
// reads next: a request to a server asks for them, too. The error is an *Error, or what the sink returned.
func (r *Reader) Read(ctx context.Context, all []plan.Segment, ahead []plan.Chunk) error {
	r.ahead, r.refused = ahead, nil
	segs := r.src.group.Spread(r.runs[:0], all)
	spread := len(segs) > 0 && &segs[0] != &all[0]
	if spread {
		r.runs = segs
	}
	for len(segs) > 0 {
		ps, lo, _ := r.src.extent(&segs[0])
		var err error
		switch r.src.transport(ps, lo) {
		case byMapping:
			r.segs = segs
			err = r.src.file.Guard(r.mapped)
		case byDirectRead:
			r.segs = r.run(segs)
			err = r.readFile(ps)
		case byRange:
			r.segs = segs[:1]
			err = r.readRange(ctx, segs)
		}
		if r.refused != nil {
			return r.refused
		}
		if err != nil {
			return r.failed(err)
		}
		if !spread {
			r.consumed(r.segs)
		}
		segs = segs[len(r.segs):]
	}
	if spread { // whose runs are pieces of segments
		r.consumed(all)
	}
	return r.sink.Flush()
}

// consumed says that segs have been read. It is said as early as it is true: a chunk may have segments of hundreds of
// small files, each of which stays open until then.
func (r *Reader) consumed(segs []plan.Segment) {
	for i := range segs {
		r.src.consumed(&segs[i])
	}
}

// failed adds the tensor and the range to an error.
func (r *Reader) failed(err error) error {
	s := &r.segs[0]
	_, lo, _ := r.src.extent(s)
	_, _, hi := r.src.extent(&r.segs[len(r.segs)-1])
	return &Error{Tensor: r.src.group.Tensors[s.Tensor].Name, Offset: s.Src, Bytes: int(hi - lo), Err: err}
}

// put gives a segment to the sink.
func (r *Reader) put(s *plan.Segment, src []byte) error {
	r.refused = r.sink.Put(s, src)
	return r.refused
}

// readMapped puts r.segs from the mapping, under the file's Guard.
func (r *Reader) readMapped() error {
	var n int64
	for i := range r.segs {
		ps, lo, hi := r.src.extent(&r.segs[i])
		if err := r.put(&r.segs[i], ps.bytes[lo:hi]); err != nil {
			return err
		}
		n += hi - lo
	}
	r.src.mapped.Add(n)
	return nil
}

// run returns as many of the first segs as one direct read can fetch.
func (r *Reader) run(segs []plan.Segment) []plan.Segment {
	first, lo, end := r.src.extent(&segs[0])
	n := 1
	for ; n < len(segs); n++ {
		next, ok := r.src.follows(&segs[n], first, lo, end, windowBytes)
		if !ok {
			break
		}
		end = next
	}
	return segs[:n]
}

// follows decides whether a read is to be made longer. The read goes from lo to end in ps. If seg lies behind end and
// close to it, and the read would have at most most bytes with it, ok is true, and next is the read's new end.
func (s *Source) follows(seg *plan.Segment, ps *part, lo, end, most int64) (next int64, ok bool) {
	own, l, h := s.extent(seg)
	return h, own == ps && l >= end && l-end <= maxGap && h-lo <= most
}
