package loader

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

const (
	// deviceAlign is the alignment of every tensor in device memory, in bytes: what hipMalloc itself guarantees, and a
	// multiple of what the widest vector loads of GPU kernels want.
	deviceAlign = 256
	// minChunk is the least size of a chunk in bytes: far above that of a block, and of what is worth a copy of its own.
	minChunk = pinned.MinBufferBytes
	// arenaBytes is the size from which on a new device allocation is begun: few enough allocations for the largest models,
	// none so large that it must find half the device in one piece.
	arenaBytes = 4 << 30
)

// ErrInsufficientMemory is matched by the error of a load that does not fit the device's free memory.
var ErrInsufficientMemory = errors.New("not enough device memory")

// InsufficientMemoryError says what a load needs and what there is. Nothing has been allocated when it is returned.
type InsufficientMemoryError struct {
	Device  string
	DType   DType
	Needed  uint64  // bytes
	Free    uint64  // bytes
	Fitting []DType // policies with which the same tensors would fit
}

// Error says what is needed, what is free, and which dtype would fit.
func (e *InsufficientMemoryError) Error() string {
	var fit string
	if len(e.Fitting) == 0 {
		fit = "no dtype fits; load fewer tensors or use another device"
	} else {
		names := make([]string, len(e.Fitting))
		for i, d := range e.Fitting {
			names[i] = d.String()
		}
		fit = "it would fit as " + strings.Join(names, " or ")
	}
	return fmt.Sprintf("%v on %s: %s needs %s (%d bytes), free are %s (%d bytes); %s", ErrInsufficientMemory, e.Device,
		e.DType, humanize.IBytes(e.Needed), e.Needed, humanize.IBytes(e.Free), e.Free, fit)
}

// Unwrap makes the error match ErrInsufficientMemory.
func (e *InsufficientMemoryError) Unwrap() error { return ErrInsufficientMemory }

// Plan says which tensors go where on the device, and as what. It holds no resources.
type Plan struct {
	Tensors     []PlannedTensor // in file order, which is also their order in device memory
	DeviceBytes uint64          // size of all allocations: the tensors, and the padding between them
	ReadBytes   uint64          // size of the tensors in the file

	model  *gguf.Model
	opts   Options
	arenas []uint64 // bytes of each device allocation
	combed bool     // there are slices that are not in one piece in the file
}

// PlannedTensor is one tensor's place on the device.
type PlannedTensor struct {
	*gguf.Tensor           // as it is in the file; of a slice, Shape and Size are the slice's, and Offset is that of its first byte
	Target       gguf.Type // element type on the device
	Bytes        uint64    // size on the device
	Slice        *Slice    // the part of the tensor that the rank has; nil: all of it

	whole  *gguf.Tensor // that it is a slice of; nil: none
	comb   *comb        // how a slice lies in the file; nil: in one piece
	arena  int
	offset uint64 // in the arena
	expand bool   // it travels as it is in the file, and is converted on the device
}

// key is the GPU kernel that converts t.
func (t *PlannedTensor) key() gpu.Key { return gpu.Key{To: t.Target, From: t.Type} }

// NewPlan lays out the tensors of m that asked selects. It reads nothing but the header and allocates nothing on a device.
func NewPlan(m *gguf.Model, asked Options) (*Plan, error) {
	o, err := asked.withDefaults()
	if err != nil {
		return nil, err
	}
	p := &Plan{model: m, opts: o}
	all := m.Tensors()
	if o.Tensors == nil {
		p.Tensors = make([]PlannedTensor, 0, len(all))
	}
	for i := range all {
		t := &all[i]
		if o.Tensors != nil && !o.Tensors.MatchString(t.Name) {
			continue
		}
		target := o.dtypeOf(t.Name).Target(t.Type)
		n, ok := target.Bytes(t.Elems())
		if !ok {
			return nil, fmt.Errorf("loader: tensor %q: %d elements as %v overflow", t.Name, t.Elems(), target)
		}
		p.Tensors = append(p.Tensors, PlannedTensor{Tensor: t, Target: target, Bytes: n})
	}
	if len(p.Tensors) == 0 && len(all) > 0 {
		return nil, fmt.Errorf("loader: no tensor's name matches %q; the model has %d", o.Tensors, len(all))
	}
	if p.Tensors, err = o.Shard.share(m, p.Tensors); err != nil {
		return nil, err
	}
	for i := range p.Tensors {
		p.ReadBytes += uint64(p.Tensors[i].Size)
		p.combed = p.combed || p.Tensors[i].comb != nil
	}
	if !p.layOut() {
		return nil, errors.New("loader: the tensors' sizes together overflow")
	}
	return p, nil
}

// dtypeOf is the policy for the tensor of that name.
func (o *Options) dtypeOf(name string) DType {
	for _, r := range o.Rules {
		if r.Name.MatchString(name) {
			return r.DType
		}
	}
	return o.DType
}

// layOut gives every tensor its arena and offset. It is false when the sum does not fit.
func (p *Plan) layOut() bool {
	var at uint64 // end of the current arena
	for i := range p.Tensors {
		t := &p.Tensors[i]
		if len(p.arenas) == 0 || at > 0 && at+t.Bytes > arenaBytes {
			p.arenas = append(p.arenas, 0)
			at = 0
		}
		t.arena, t.offset = len(p.arenas)-1, at
		if t.Bytes > math.MaxInt64-deviceAlign-at {
			return false
		}
		at = alignUp(at+max(t.Bytes, 1), deviceAlign) // a tensor without elements has a place, too
		p.arenas[t.arena] = at
	}
	for _, n := range p.arenas {
		if p.DeviceBytes += n; p.DeviceBytes > math.MaxInt64 {
			return false
		}
	}
	return true
}

// Check compares the plan with what is free on dev. The error is an *InsufficientMemoryError when it does not fit.
func (p *Plan) Check(dev *amdhip.Device) error { return p.check(dev, 0) }

// check is Check with some bytes more, for the time of the load.
func (p *Plan) check(dev *amdhip.Device, more uint64) error {
	free, err := freeMemory(dev)
	if err != nil {
		return err
	}
	if p.DeviceBytes+more <= free {
		return nil
	}
	e := &InsufficientMemoryError{Device: dev.Name(), DType: p.opts.DType, Needed: p.DeviceBytes + more, Free: free}
	for _, d := range DTypes() {
		if q, ok := p.as(d); ok && d != p.opts.DType && q.DeviceBytes <= free {
			e.Fitting = append(e.Fitting, d)
		}
	}
	return e
}

// as is a plan for the same tensors with another policy; false if their sizes overflow.
func (p *Plan) as(d DType) (*Plan, bool) {
	q := &Plan{Tensors: slices.Clone(p.Tensors), opts: p.opts}
	q.opts.DType = d
	for i := range q.Tensors {
		t := &q.Tensors[i]
		t.Target = q.opts.dtypeOf(t.Name).Target(t.Type)
		var ok bool
		if t.Bytes, ok = t.Target.Bytes(t.Elems()); !ok {
			return nil, false
		}
	}
	return q, q.layOut()
}

func alignUp(n, align uint64) uint64 { return (n + align - 1) &^ (align - 1) }

// segment is a run of whole blocks of one tensor inside a chunk.
type segment struct {
	tensor   int   // in Plan.Tensors
	src      int64 // first byte, in the tensor's bytes in the file
	srcBytes int
	dst      int // first byte, in the chunk
	dstBytes int
}

// chunk is what travels in one copy. Usually that is a run of device memory: whole blocks of one tensor, or of several
// neighbours with the padding between them. A chunk that is expanded on the device holds blocks as they are in the file, each
// segment at a multiple of deviceAlign.
type chunk struct {
	arena  int
	off    uint64 // in the arena; unused when expanded
	bytes  int
	expand bool
	segs   []segment // in file order, at least one
}

// tensorOffset is where in its tensor's device bytes a segment begins.
func (p *Plan) tensorOffset(s *segment) uint64 {
	t := &p.Tensors[s.tensor]
	n, _ := t.Target.Bytes(uint64(s.src) / uint64(t.Type.BlockBytes()) * uint64(t.Type.BlockElems())) // part of what fits
	return n
}

// cut divides the plan into chunks of at most size bytes, on the device as well as in the file. The first ones, up to ramp of
// them, are smaller, the very first the smallest: so the link gets something to do while as many workers fill their first
// chunks, and the workers do not come to its end all at once. With expand, tensors to be expanded are in chunks of that kind;
// without it, all chunks are runs of device memory.
func (p *Plan) cut(size, ramp int, expand bool) []chunk {
	segs := make([]segment, 0, len(p.Tensors)+int(p.DeviceBytes/uint64(size))+1)
	var chunks []chunk
	var cur chunk
	var first, srcBytes, limit int
	begin := func(next chunk) {
		if len(segs) > first {
			cur.segs = segs[first:len(segs):len(segs)]
			chunks = append(chunks, cur)
		}
		cur = next
		first, srcBytes, limit = len(segs), 0, size
		if len(chunks) < ramp {
			limit = min(size, max(minChunk, size/ramp*(len(chunks)+1)))
		}
	}
	begin(chunk{})
	for i := range p.Tensors {
		t := &p.Tensors[i]
		blocks := int64(t.Elems() / uint64(t.Type.BlockElems()))
		if blocks == 0 {
			continue
		}
		src := t.Type.BlockBytes()
		out := int(t.Bytes / uint64(blocks)) // per block, whole: all blocks are alike
		dst, step := out, int64(1)
		inFile := expand && t.expand
		if inFile {
			dst, step = src, int64(max(1, deviceAlign/t.Type.BlockElems())) // so that what a kernel writes begins aligned
		}
		for b := int64(0); b < blocks; {
			at := t.offset + uint64(b)*uint64(out)
			pos, room := 0, int64(0)
			alone := p.opts.Hash && b == 0 && blocks*int64(dst) > int64(size) // so that several workers can read such tensors, see runs
			if len(segs) > first && cur.expand == inFile && (inFile || cur.arena == t.arena) && !alone {
				if pos = int(at - cur.off); inFile {
					pos = int(alignUp(uint64(cur.bytes), deviceAlign))
				}
				room = wholeSteps(min(int64(limit-pos)/int64(dst), int64(limit-srcBytes)/int64(src)), step, blocks-b)
			}
			if room <= 0 {
				begin(chunk{arena: t.arena, off: at, expand: inFile})
				pos, room = 0, wholeSteps(int64(limit/max(dst, src)), step, blocks-b)
			}
			s := segment{tensor: i, src: b * int64(src), srcBytes: int(room) * src, dst: pos, dstBytes: int(room) * dst}
			segs = append(segs, s)
			srcBytes += s.srcBytes
			cur.bytes = s.dst + s.dstBytes
			b += room
		}
	}
	begin(chunk{})
	return chunks
}

// wholeSteps is how many of the blocks that are left go where there is room for so many: all of them, or whole steps.
func wholeSteps(room, step, left int64) int64 {
	if left <= room {
		return left
	}
	return room - room%step
}
