package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Prove says whether a load is proved: whether the devices compute fingerprints of the bytes that they got, and these
// are compared with those of the bytes that were sent.
type Prove uint8

// When a load is proved. ProveAuto does it where it costs next to nothing: for models on servers, on GPUs with memory
// of their own, for loads of 256 MB or more, if the kernel is in the cache or the Compiler compiles it in another
// process. Where that is not so, Report.Unproved says why. ProveOn fails a load that cannot be proved.
const (
	ProveAuto Prove = iota
	ProveOn
	ProveOff
)

var proveNames = []string{ProveAuto: "auto", ProveOn: "on", ProveOff: "off"}

// String returns "auto", "on" or "off".
func (p Prove) String() string { return nameOf(p, proveNames) }

// UnmarshalText sets the choice from its name.
func (p *Prove) UnmarshalText(text []byte) (err error) {
	*p, err = parseName[Prove](text, proveNames, "prove")
	return err
}

// prover is what proves a load: the kernels that compute fingerprints.
type prover struct {
	proves  bool
	kernels []*gpu.Set // by device of the Loader; nil: none is needed
	why     error      // the load is not proved, although nobody said that it should not be
}

// of returns the kernels for the devices of g; nil: nothing is proved.
func (p *prover) of(g *plan.Group) (all []*gpu.Set) {
	for _, d := range g.Devices {
		if p.kernels != nil {
			all = append(all, p.kernels[d])
		}
	}
	return all
}

// Why ProveAuto does not prove a load.
var (
	errSoftware  = errors.New("the device is software, whose sums cost the CPU's time")
	errSharing   = errors.New("the device shares the host's memory, so that sums cost the load's time")
	errLocal     = errors.New("the model is read as fast as the device takes it, so that sums cost the load's time")
	errSmallLoad = errors.New("the load is so small that getting the kernel ready would take longer")
)

// prover decides whether a load is proved, and makes the devices' kernels ready. x is what the devices convert.
func (l *Loader) prover(ctx context.Context, limit *watch.Limit, p *Plan, by Prove, x *expansion) (*prover, error) {
	if by == ProveOff || p.DeviceBytes() == 0 { // of nothing all is proved
		return &prover{proves: by == ProveOn}, nil
	}
	auto := by == ProveAuto
	if why := l.unfree(p); auto && why != nil && !l.config.autoProve {
		return &prover{why: why}, nil
	}
	made, err := l.readyFingerprints(ctx, limit, p, auto, x)
	switch {
	case err == nil:
		return made, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case !auto, watch.Lost(err): // nothing else can be expected of a device that hangs
		return nil, fmt.Errorf("loader: the load cannot be proved: %w", err)
	}
	l.config.Logger.Debug("the load is not proved", "error", err)
	return &prover{why: err}, nil
}

// unfree is why proving a load of p costs something; nil: it costs next to nothing.
func (l *Loader) unfree(p *Plan) error {
	switch {
	case l.devices[0].Runtime().Kind() != "hip":
		return errSoftware
	case slices.ContainsFunc(l.devices, (*amdhip.Device).Integrated):
		return errSharing
	case !p.remote():
		return errLocal
	case p.DeviceBytes() < minSaved && !l.fingerprintsReady():
		return errSmallLoad
	}
	return nil
}

// fingerprintsReady reports whether an earlier load has made all devices' kernels ready.
func (l *Loader) fingerprintsReady() bool {
	return !slices.ContainsFunc(l.kernels, func(k *kernelCache) bool { return len(k.ready(fingerprintKeys)) == 0 })
}

// fingerprintKeys is the kernel that computes fingerprints.
var fingerprintKeys = []gpu.Key{{Fingerprint: true}}

// readyFingerprints sees that the devices have memory for the sums, too, and makes their kernels ready.
func (l *Loader) readyFingerprints(
	ctx context.Context, limit *watch.Limit, p *Plan, auto bool, x *expansion,
) (*prover, error) {
	all, err := p.sizes(l.config, x.tensors)
	if err != nil {
		return nil, err
	}
	free, err := l.free(ctx, limit)
	if err != nil {
		return nil, err
	}
	c := l.compiler()
	if auto { // a compiler that ends the process is more than a load without proof is worth
		outside := *c
		outside.InProcess = false
		c = &outside
	}
	made := &prover{proves: true, kernels: make([]*gpu.Set, len(l.devices))}
	for i := range p.Groups {
		g := &p.Groups[i]
		more := all[i].scratchBytes() + summerBytes(sumBytes(g, x.of(i)))
		for _, d := range g.Devices {
			if err := l.fits(p, d, free[d], more); err != nil {
				return nil, err
			}
			set, err := l.readyOn(ctx, limit, d, c, fingerprintKeys)
			if err != nil {
				return nil, err
			}
			made.kernels[d] = set[fingerprintKeys[0]]
		}
	}
	return made, nil
}

// sumBytes bounds the device memory that the sums of a group take on each device: one for each block, and one more for
// each segment that ends within a block. No chunk but the last is smaller than plan.MinChunk.
func sumBytes(g *plan.Group, expand []bool) (n uint64) {
	for i := range g.Tensors {
		t := &g.Tensors[i]
		segments := 2 + (int64(t.Bytes)+t.Size)/plan.MinChunk
		n += 8 * uint64(kernels.Fingerprints(int64(t.Bytes))+segments)
		if expand != nil && expand[i] {
			n += 8 * uint64(kernels.Fingerprints(t.Size)+segments)
		}
	}
	return n
}

// ProveError says that a device does not have the bytes that were sent to it, or that the host's copy of a model is
// not what it was when it was made.
type ProveError struct {
	Device *amdhip.Device // nil: no device has anything to do with it
	Tensor string
	// Offset is where in the tensor's bytes on the device the first block that is wrong begins; with InFile, in those in
	// the file. Bytes is how long it is. When a single bit of it is wrong, Bit says which, counted from Offset; else it
	// is -1.
	Offset int64
	Bytes  int
	Bit    int64
	// InFile says that the bytes are those of the file: blocks on their way to being converted on the device.
	InFile bool
	// Host says that it is the Image that has changed since it was filled. What the device has is the same.
	Host      bool
	Want, Got uint64 // the fingerprints
	Blocks    int    // how many are wrong, of all tensors on the device
}

// Error names device, tensor, offset and both fingerprints.
func (e *ProveError) Error() string {
	what := fmt.Sprintf("bytes %d to %d", e.Offset, e.Offset+int64(e.Bytes))
	if e.Bit >= 0 {
		what = fmt.Sprintf("bit %d of byte %d", e.Bit%8, e.Offset+e.Bit/8)
	}
	if e.InFile {
		what += " of its blocks"
	}
	where := "in the host's copy of the model"
	if !e.Host {
		where = fmt.Sprintf("on device %d (%s)", e.Device.Index(), e.Device.Name())
	}
	text := fmt.Sprintf("loader: tensor %q is damaged %s: %s: the fingerprint is %#016x, want %#016x", e.Tensor, where, what, e.Got,
		e.Want)
	if e.Blocks > 1 {
		text += fmt.Sprintf(" (the first of %d blocks)", e.Blocks)
	}
	return text
}

// place says where block number block of t is, and which of its bits is wrong if it is one.
func (e *ProveError) place(block int, t *plan.Tensor) {
	size := int64(t.Bytes)
	if e.InFile {
		size = t.Size
	}
	e.Offset = int64(block) * kernels.FingerprintBlock
	e.Bytes = int(min(size-e.Offset, kernels.FingerprintBlock))
	e.Bit = kernels.FlippedBit(e.Want, e.Got)
	if e.Bit >= 8*int64(e.Bytes) {
		e.Bit = -1
	}
}

// proving ends the proof of a group, and puts its result into the report and the model.
func (r *groupReport) proving(ctx context.Context, limit *watch.Limit, m *Model, p *proof) (stuck bool, err error) {
	start := time.Now()
	all, stuck, err := p.finish(ctx, limit)
	if r.prove = time.Since(start); err != nil {
		return stuck, err
	}
	r.provedTensors, r.provedBytes = all.tensors, all.bytes
	m.mu.Lock()
	defer m.mu.Unlock()
	p.part.prints = all.prints
	return false, nil
}

// prove says that a load has ended well, of which all was to be proved that by proves. The error is an internal one.
func (r *Report) prove(by *prover) error {
	if !by.proves || r.Unproved != "" {
		return nil
	}
	if r.ProvedTensors != r.Tensors {
		return fmt.Errorf("loader: internal error: %d of %d tensors are proved", r.ProvedTensors, r.Tensors)
	}
	r.Proved = true
	return nil
}

// unprove says that the load is not proved in the end.
func (m *Model) unprove(why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report.Unproved = why.Error()
}

// opOf is what was being done when err came up: op, or computing fingerprints.
func opOf(op string, err error) string {
	if _, ok := errors.AsType[*unsummed](err); ok {
		return "prove"
	}
	return op
}

// Fingerprint is what is known of a tensor on a device since it was loaded.
type Fingerprint struct {
	Device *amdhip.Device
	Tensor *plan.Tensor
	Ptr    amdhip.DevicePtr // of the tensor's first byte
	Bytes  int64            // on the device
	// Sums are the fingerprints of its bytes, one for each block of kernels.FingerprintBlock bytes. They must not be
	// changed. Of what the device has converted they are the device's own.
	Sums []uint64
}

// tensorOn is a tensor on one of its devices.
type tensorOn struct {
	device *amdhip.Device
	name   string
}

// sumsOf finds the sums of a tensor on a device.
func sumsOf(all []Fingerprint) map[tensorOn][]uint64 {
	sums := make(map[tensorOn][]uint64, len(all))
	for i := range all {
		sums[tensorOn{all[i].Device, all[i].Tensor.Name}] = all[i].Sums
	}
	return sums
}

// Fingerprints returns the fingerprints of all tensors on all devices that they are on, once a load that was proved has
// ended well, or as Feed.Know has said. Of other models there are none. What a tensor's bytes are to be later can be
// found out by computing them again.
func (m *Model) Fingerprints() ([]Fingerprint, error) {
	if err := m.acquire(); err != nil {
		return nil, err
	}
	defer m.release()
	m.mu.Lock()
	proved := m.report.Proved || m.adopted != nil
	m.mu.Unlock()
	if !proved {
		return nil, nil
	}
	var all []Fingerprint
	for _, p := range m.parts {
		for n, on := range p.on {
			for i := range p.group.Tensors {
				t := &p.group.Tensors[i]
				if p.prints == nil || t.Bytes == 0 {
					continue
				}
				all = append(all, Fingerprint{
					Device: on.device, Tensor: t, Ptr: p.ptr(n, t.Arena, t.DeviceOffset), Bytes: int64(t.Bytes), Sums: p.prints[n][i],
				})
			}
		}
	}
	return all, nil
}
