package loader

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"
)

const (
	// DefaultConnections is Options.Connections if that is left open. It keeps a fast network busy in spite of its latency: with a
	// round trip of 50 ms and requests of 8 MiB, 32 connections carry 5 GB/s; without latency they carry what a plain download does (loader/README.md).
	DefaultConnections = 32
	// maxRange is the most that one request asks for, though a segment is never cut: enough that a round trip between two
	// requests costs little.
	maxRange = 8 << 20
	// minRange is how little a request asks for, for the sake of having several at the end, and of a small model.
	minRange = 1 << 20
)

// suitRemote makes room for the connections of a remote model where asked leaves it open, and refuses options that are for disks.
//
// Host memory is the staging buffers, as it is for files, and a scratch buffer of pieceBytes for each connection that converts:
// what comes is put into the staging buffer piece by piece, so that requests can be larger than chunks and nothing else is held.
// A worker has a buffer before it asks for bytes; while it waits for another, in the midst of a request, the server waits, too.
func (p *Plan) suitRemote(asked Options) error {
	if !p.model.Remote() {
		return nil
	}
	if p.opts.IO != IOAuto {
		return fmt.Errorf("%w: reading by %v is for files; %s is remote", ErrBadOption, p.opts.IO, p.model.Parts()[0].Path)
	}
	if asked.Staging == 0 {
		p.opts.Staging = max(defaultStaging(p.opts.Connections, p.opts.Chunk), 2*int64(p.opts.Chunk))
	}
	return nil
}

// requests returns the chunks at which runs begin that one worker reads with one request each. Towards the end they become
// smaller, so that the connections come to it about together.
func (s *source) requests(chunks []chunk) []int {
	var starts []int
	var ps *partSource
	var lo, end, most int64
	left := int64(s.plan.ReadBytes) // from the chunk on
	for i := range chunks {
		segs := chunks[i].segs
		joined := i > 0
		for j := 0; j < len(segs) && joined; j++ {
			end, joined = s.follows(&segs[j], ps, lo, end, most)
		}
		if !joined {
			starts = append(starts, i)
			ps, lo, _ = s.extent(&segs[0])
			_, _, end = s.extent(&segs[len(segs)-1])
			most = max(minRange, min(maxRange, left/int64(2*s.plan.opts.Connections)))
		}
		for j := range segs {
			left -= int64(segs[j].srcBytes)
		}
	}
	return starts
}

// stream is the range of a remote part that a reader is in the midst of.
type stream struct {
	body    io.ReadCloser // nil: there is none
	ps      *partSource
	at, end int64 // the next byte in the part, and the one behind the last
}

// close ends the request that a reader is in the midst of.
func (r *reader) close() {
	if r.stream.body != nil {
		_ = r.stream.body.Close() // whatever there was to say, reading has said
		r.stream.body = nil
	}
}

// readRemote fills the first of segs.
func (r *reader) readRemote(ctx context.Context, segs []segment) error {
	began := time.Now()
	if err := r.seek(ctx, segs); err != nil {
		return err
	}
	s, st, plan := &segs[0], &r.stream, r.src.plan
	t := &plan.Tensors[s.tensor]
	block := t.Type.BlockBytes()
	out := s.dstBytes / (s.srcBytes / block)
	dst := r.fill.place(s)
	asIs := t.Target == t.Type || r.fill.expand
	if !asIs && len(r.scratch) == 0 {
		r.scratch = make([]byte, pieceBytes)
	}
	for at, left := s.src, s.srcBytes/block; left > 0; {
		n := min(left, pieceBytes/block)
		src := dst[:n*out]
		if !asIs {
			src = r.scratch[:n*block]
		}
		if _, err := io.ReadFull(st.body, src); err != nil {
			return err
		}
		st.at += int64(len(src))
		r.src.remote.Add(int64(len(src)))
		if !asIs || r.fill.inspect != nil {
			r.src.busy <- struct{}{} // those who hold it wait for nothing
			err := r.fill.pieces(s, at, dst[:n*out], src)
			<-r.src.busy
			if err != nil {
				return err
			}
		}
		dst, at, left = dst[n*out:], at+int64(len(src)), left-n
	}
	if st.at == st.end {
		r.close() // so that the connection is free
	}
	if plan.opts.Trace != nil {
		plan.opts.Trace.add(r.track, "read", began, time.Now(), t.Name, s.srcBytes)
	}
	return nil
}

// seek brings the stream to the first of segs, with a new request if need be. That asks for what the worker reads next as well.
func (r *reader) seek(ctx context.Context, segs []segment) error {
	st := &r.stream
	ps, lo, hi := r.src.extent(&segs[0])
	if st.body != nil && (st.ps != ps || lo < st.at || hi > st.end) {
		r.close()
	}
	if st.body == nil {
		end := r.reach(ps, lo, hi, segs[1:])
		*st = stream{body: ps.remote.Range(ctx, lo, end-lo), ps: ps, at: lo, end: end}
	}
	n, err := io.CopyN(io.Discard, st.body, lo-st.at) // the gap between two tensors
	st.at += n
	return err
}

// reach is how far a request that begins at lo is to go: over the bytes up to end, then those of segs, then those of the chunks
// ahead.
func (r *reader) reach(ps *partSource, lo, end int64, segs []segment) int64 {
	for i := 0; ; i++ {
		for j := range segs {
			next, ok := r.src.follows(&segs[j], ps, lo, end, maxRange)
			if !ok {
				return end
			}
			end = next
		}
		if i == len(r.ahead) {
			return end
		}
		segs = r.ahead[i].segs
	}
}

// fetch appends n bytes of tensor t from byte off on to b, with one request for all that they reach over.
func (p *Plan) fetch(ctx context.Context, b []byte, t *PlannedTensor, off int64, n int) ([]byte, error) {
	at, end := t.span(off, int64(n))
	body := p.model.Parts()[t.Part].Source().Range(ctx, at, end-at)
	defer body.Close()
	b = slices.Grow(b, n)
	for len(b) < n {
		lo, run := t.inFile(off + int64(len(b)))
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
