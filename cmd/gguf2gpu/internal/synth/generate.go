package synth

import (
	"context"
	"io"

	"golang.org/x/sync/errgroup"
)

// chunkBytes is about how much of a tensor is generated and written at a time. It is large enough for any disk, and
// small enough that two buffers for each core take little memory.
const chunkBytes = 4 << 20

// generate makes the bytes of the tensors on all cores and has consume read them, one tensor after the other without
// gaps. The bytes depend on the seed only, not on the number of cores. The reader fails when ctx is canceled.
func generate(ctx context.Context, tensors []Tensor, seed uint64, cores int, consume func(io.Reader) error) error {
	buffers := 2 * cores // one for each core to fill, and as many for the disk to drain meanwhile
	g, ctx := errgroup.WithContext(ctx)
	r := &chunkReader{ctx: ctx, chunks: make(chan chunk, buffers), free: make(chan []byte, buffers)}
	for range buffers {
		r.free <- make([]byte, chunkBytes)
	}
	// Starts the work in order. Ends after the last tensor, or when ctx is canceled.
	g.Go(func() error {
		defer close(r.chunks)
		for i, t := range tensors {
			w := t.weights(tensorSeed(seed, i))
			size := t.Bytes()
			// weights.fill needs offsets that are multiples of eight. Eight blocks are one, whatever the type.
			unit := int64(8 * t.Type.BlockBytes())
			step := chunkBytes / unit * unit
			for offset := int64(0); offset < size; offset += step {
				var buffer []byte
				select {
				case buffer = <-r.free:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				c := chunk{buffer, buffer[:min(step, size-offset)], make(chan struct{})}
				g.Go(func() error { // never blocks, so that it ends soon
					w.fill(c.bytes, offset)
					close(c.filled)
					return nil
				})
				r.chunks <- c // never blocks: it has room for every buffer
			}
		}
		return nil
	})
	// Reads. Ends after the last chunk, at an error, or when ctx is canceled.
	g.Go(func() error { return consume(r) })
	return g.Wait()
}

// tensorSeed is the seed of the i-th tensor of a model with that seed.
func tensorSeed(seed uint64, i int) uint64 { return mix(seed + uint64(i+1)*golden) }

// chunk is a run of a tensor's bytes.
type chunk struct {
	buffer []byte
	bytes  []byte        // the part of buffer that is used
	filled chan struct{} // closed when bytes are valid
}

// chunkReader reads the chunks in order and gives their buffers back.
type chunkReader struct {
	ctx     context.Context // of the errgroup that fills the chunks
	chunks  chan chunk      // in the order of the file; closed after the last
	free    chan []byte
	current chunk
	rest    []byte // what is still to read of the current chunk
}

// Read implements io.Reader.
func (r *chunkReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		if err := r.advance(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// advance gives the current chunk's buffer back and waits for the next chunk.
func (r *chunkReader) advance() error {
	if r.current.buffer != nil {
		r.free <- r.current.buffer // never blocks: it has room for every buffer
		r.current = chunk{}
	}
	c, ok := <-r.chunks
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	if !ok {
		return io.EOF
	}
	<-c.filled
	r.current, r.rest = c, c.bytes
	return nil
}
