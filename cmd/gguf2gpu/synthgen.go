package main

import (
	"context"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// chunkBytes is about how much of a tensor is made up and written at a time: large enough for any disk, small enough
// that the buffers of all cores are no burden.
const chunkBytes = 4 << 20

// synthesize makes up the tensors on all cores and has consume read them: one after the other, without gaps. What is read
// depends on the seed only. The reader fails when ctx is canceled.
func synthesize(ctx context.Context, tensors []synthTensor, seed uint64, consume func(io.Reader) error) error {
	// One buffer for each core to fill, and as many for the disk to drain meanwhile.
	buffers := 2 * runtime.GOMAXPROCS(0)
	g, ctx := errgroup.WithContext(ctx)
	s := &synthReader{ctx: ctx, chunks: make(chan synthChunk, buffers), free: make(chan []byte, buffers)}
	for range buffers {
		s.free <- make([]byte, chunkBytes)
	}
	// Hands out the work in order. Ends after the last tensor, or when ctx is canceled.
	g.Go(func() error {
		defer close(s.chunks)
		for i, t := range tensors {
			w := t.weights(mix(seed + uint64(i+1)*golden))
			size := t.bytes()
			// Eight blocks are whole words of the generator, whatever the type.
			unit := int64(8 * t.typ.BlockBytes())
			step := chunkBytes / unit * unit
			for offset := int64(0); offset < size; offset += step {
				var buffer []byte
				select {
				case buffer = <-s.free:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				c := synthChunk{buffer, buffer[:min(step, size-offset)], make(chan struct{})}
				g.Go(func() error { // ends by itself, and in a moment
					w.fill(c.bytes, offset)
					close(c.filled)
					return nil
				})
				s.chunks <- c // has room for every buffer
			}
		}
		return nil
	})
	// Reads. Ends after the last chunk, at an error, or when ctx is canceled.
	g.Go(func() error { return consume(s) })
	return g.Wait()
}

// synthChunk is a run of a tensor's bytes.
type synthChunk struct {
	buffer []byte
	bytes  []byte        // the part of buffer that is used
	filled chan struct{} // closed when bytes are there
}

// synthReader reads the chunks in order and gives their buffers back.
type synthReader struct {
	ctx    context.Context // of the errgroup that fills the chunks
	chunks chan synthChunk
	free   chan []byte
	chunk  synthChunk // the one being read
	rest   []byte     // of its bytes
}

func (s *synthReader) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		if err := s.advance(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// advance waits for the next chunk.
func (s *synthReader) advance() error {
	if s.chunk.buffer != nil {
		s.free <- s.chunk.buffer // has room for every buffer
		s.chunk = synthChunk{}
	}
	c, ok := <-s.chunks
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	if !ok {
		return io.EOF
	}
	<-c.filled
	s.chunk, s.rest = c, c.bytes
	return nil
}
