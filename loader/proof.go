package loader

import (
	"context"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// proof is what it takes to prove what one group gets. Nil: nothing is proved.
//
// A tensor has one fingerprint for each 64 KiB of its bytes, counted from its beginning, whatever it is cut into on its
// way: fingerprints are sums, and a segment that has only a part of a block adds what that part contributes. So each
// segment of a chunk gets slots, one for every block that it touches. Its worker writes what the bytes in staging
// memory contribute to the slots of the host, and a kernel that waits for the copy writes the same of what the device
// has got to the slots of the device. At the end the device's slots are copied back, all in one piece, slots of the
// same block are added up, and the sums are compared.
//
// An example: a tensor of 100 KiB travels as the last 60 KiB of one chunk and the first 40 KiB of the next one. The
// first segment has slot 0 (60 KiB of block 0), the second one slots 1 (4 KiB of block 0) and 2 (36 KiB of block 1).
// Fingerprint 0 of the tensor is the sum of slots 0 and 1, fingerprint 1 is slot 2.
type proof struct {
	loader  *Loader
	part    *part
	kernels []*gpu.Set // by device of the group
	image   *Image     // that the group is loaded from; nil: it is not
	rounds  []*round   // one for each attempt to load the group
}

// round is one attempt.
type round struct {
	*proof
	chunks []plan.Chunk
	lists  [][]segmentSums // by chunk, by segment
	slots  int
	host   []uint64 // by slot: what the host's bytes contribute
	on     []*summer
	counts []bool // by tensor: what came in this round is what the devices have; nil: all that is in its chunks is
}

// segmentSums are the slots of a segment.
type segmentSums struct {
	tensor int
	travel stretch // bytes as they travel: those of the file if the device converts them, else those on the device
	out    stretch // of the same segment, what the device converts the bytes to; empty: it converts nothing
	source stretch // likewise, the Image's bytes that the CPU converts; empty: it does not, or there is no Image
}

// stretch is a run of a tensor's bytes, and its slots.
type stretch struct {
	slot, slots int
	at, bytes   int64
}

// stretch gives slots to a run of bytes.
func (r *round) stretch(at, bytes int64) stretch {
	s := stretch{slot: r.slots, at: at, bytes: bytes}
	s.slots = int((at+bytes-1)/kernels.FingerprintBlock - at/kernels.FingerprintBlock + 1)
	r.slots += s.slots
	return s
}

// begin makes a round for chunks, of which the devices convert some.
func (p *proof) begin(ctx context.Context, limit *watch.Limit, chunks []plan.Chunk) (*round, error) {
	g := p.part.group
	r := &round{proof: p, chunks: chunks, lists: make([][]segmentSums, len(chunks))}
	for i := range chunks {
		c := &chunks[i]
		for j := range c.Segs {
			s := &c.Segs[j]
			t := &g.Tensors[s.Tensor]
			at, in, out := int64(g.TensorOffset(s)), int64(s.SrcBytes), int64(s.DstBytes)
			x := segmentSums{tensor: s.Tensor}
			switch {
			case c.Expand:
				x.travel = r.stretch(s.Src, in)
				src, dst := t.Block()
				x.out = r.stretch(at, in/int64(src)*int64(dst))
			case p.image != nil && t.Target != t.Type:
				x.travel, x.source = r.stretch(at, out), r.stretch(s.Src, in)
			default:
				x.travel = r.stretch(at, out)
			}
			r.lists[i] = append(r.lists[i], x)
		}
	}
	p.rounds = append(p.rounds, r)
	if r.slots == 0 {
		return r, nil
	}
	r.host = make([]uint64, r.slots)
	for _, on := range p.part.on {
		s, err := p.loader.takeSummer(ctx, limit, on.device, r.slots)
		if err != nil {
			return nil, onDevice(on.device, len(p.part.on) > 1, err)
		}
		r.on = append(r.on, s)
	}
	return r, nil
}

// of returns the slots of chunk i; nil without a proof.
func (r *round) of(i int) []segmentSums {
	if r == nil {
		return nil
	}
	return r.lists[i]
}

// enqueue lets the n-th device sum up a run of bytes at from, once what is on the stream has come there.
func (r *round) enqueue(n int, stream *amdhip.Stream, x stretch, from amdhip.DevicePtr) error {
	to := r.on[n].mem.Ptr() + amdhip.DevicePtr(sumSize*x.slot)
	if err := r.kernels[n].FingerprintPart(stream, to, from, x.bytes, x.at); err != nil {
		return &unsummed{err}
	}
	return nil
}

// unsummed says that it was a fingerprint that failed.
type unsummed struct{ error }

func (e *unsummed) Unwrap() error { return e.error }

// travelled lets the n-th device sum up chunk i, whose bytes come to the address at on the stream; nil: they are there.
func (r *round) travelled(n int, stream *amdhip.Stream, i int, at amdhip.DevicePtr) error {
	if r == nil {
		return nil
	}
	if !r.chunks[i].Expand { // else the next copy on the stream would be written over the blocks
		from := stream
		if stream = r.on[n].stream; from != nil {
			if err := r.on[n].follow(from); err != nil {
				return &unsummed{err}
			}
		}
	}
	for j := range r.lists[i] {
		err := r.enqueue(n, stream, r.lists[i][j].travel, at+amdhip.DevicePtr(r.chunks[i].Segs[j].Dst))
		if err != nil {
			return err
		}
	}
	return nil
}

// expanded lets the n-th device sum up what it has made of chunk i.
func (r *round) expanded(n int, stream *amdhip.Stream, i int) error {
	if r == nil {
		return nil
	}
	for j := range r.lists[i] {
		x := &r.lists[i][j]
		t := &r.part.group.Tensors[x.tensor]
		if err := r.enqueue(n, stream, x.out, r.part.ptr(n, t.Arena, t.DeviceOffset+uint64(x.out.at))); err != nil {
			return err
		}
	}
	return nil
}

// write adds what b contributes to the slots of x. b begins at byte at of the tensor.
func (r *round) write(x stretch, at int64, b []byte) {
	kernels.AddFingerprint(r.slotsOf(x, at), at, b)
}

// copy is write for bytes that are copied on the way.
func (r *round) copy(x stretch, at int64, dst, src []byte) {
	kernels.CopyAddFingerprint(dst, src, r.slotsOf(x, at), at)
}

// slotsOf returns the slots of x from that of byte at of the tensor on.
func (r *round) slotsOf(x stretch, at int64) []uint64 {
	first := x.slot + int(at/kernels.FingerprintBlock-x.at/kernels.FingerprintBlock)
	return r.host[first : x.slot+x.slots]
}
