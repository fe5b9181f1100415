package loader

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// SplitBy says how a model is spread over several devices of one process.
type SplitBy uint8

// The ways to spread a model: whole layers on each device, or a full copy on each.
const (
	SplitLayers SplitBy = iota
	SplitNone
)

var splitNames = [...]string{SplitLayers: "layer", SplitNone: "none"}

// String returns the name that ParseSplitBy takes.
func (s SplitBy) String() string { return nameOf(s, splitNames[:], "split") }

// ParseSplitBy returns the way of that name: "layer" or "none".
func ParseSplitBy(s string) (SplitBy, error) {
	return parseName[SplitBy](s, splitNames[:], "way to split")
}

// Split says how a model is spread over devices. The zero value is by layers, in proportion to free memory.
type Split struct {
	By    SplitBy
	Ratio []float64 // with SplitLayers, the devices' shares, each above 0; nil: by free memory
}

// Plans lays out m on devs, one plan for each; with SplitNone it is the same for all. Options.Staging and Options.Threads are for all
// devices together, but every device has at least one thread. Where they are left open, each device has what a load to it alone
// would have, as far as there are cores. Nothing is allocated; see [Plan.Check].
func (s Split) Plans(devs []*amdhip.Device, m *gguf.Model, o Options) ([]*Plan, error) {
	if err := s.check(devs); err != nil {
		return nil, err
	}
	if s.By == SplitNone {
		p, err := NewPlan(m, o)
		if err != nil {
			return nil, err
		}
		return slices.Repeat([]*Plan{p}, len(devs)), nil
	}
	whole, err := NewPlan(m, o)
	if err != nil {
		return nil, err
	}
	weights := s.Ratio
	if weights == nil {
		for _, dev := range devs {
			free, err := freeMemory(dev)
			if err != nil {
				return nil, err
			}
			weights = append(weights, float64(max(free, 1)))
		}
	}
	owners, err := assignLayers(whole.Tensors, weights)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadOption, err)
	}
	plans := make([]*Plan, len(devs))
	for n := range plans {
		p := &Plan{model: m, opts: whole.opts, combed: whole.combed}
		if p.opts, err = whole.opts.share(o, n, len(devs)); err != nil {
			return nil, err
		}
		for i := range whole.Tensors {
			if owners[i] == n {
				p.Tensors = append(p.Tensors, whole.Tensors[i])
				p.ReadBytes += uint64(whole.Tensors[i].Size)
			}
		}
		p.layOut() // a part of what fits
		plans[n] = p
	}
	return plans, nil
}

// check refuses what cannot be.
func (s Split) check(devs []*amdhip.Device) error {
	if len(devs) == 0 {
		return fmt.Errorf("%w: no devices", ErrBadOption)
	}
	for i, a := range devs {
		if a.Runtime() != devs[0].Runtime() {
			return fmt.Errorf("%w: devices of several runtimes", ErrBadOption)
		}
		for _, b := range devs[:i] {
			if a.Index() == b.Index() {
				return fmt.Errorf("%w: device %d is there twice", ErrBadOption, a.Index())
			}
		}
	}
	switch {
	case int(s.By) >= len(splitNames):
		return fmt.Errorf("%w: %v: use SplitLayers or SplitNone", ErrBadOption, s.By)
	case s.Ratio == nil:
	case s.By == SplitNone:
		return fmt.Errorf("%w: a ratio is for a split by layers: with full copies there is nothing to share", ErrBadOption)
	case len(s.Ratio) != len(devs):
		return fmt.Errorf("%w: a ratio of %d numbers for %d devices", ErrBadOption, len(s.Ratio), len(devs))
	}
	for _, r := range s.Ratio {
		if !(r > 0 && r <= 1e9 && r >= 1e-9) {
			return fmt.Errorf("%w: a share of %v: use numbers above 0, such as 3,1", ErrBadOption, r)
		}
	}
	return nil
}

// share is what device i of n has of o, which is filled: asked tells what was left open.
func (o Options) share(asked Options, i, n int) (Options, error) {
	threads := o.Threads
	if asked.Threads == 0 {
		threads = min(runtime.GOMAXPROCS(0), n*maxDefaultThreads)
	}
	o.Threads = max(1, threads/n)
	if i < threads%n && threads > n {
		o.Threads++
	}
	if asked.Staging == 0 {
		o.Staging = max(defaultStaging(o.Threads, o.Chunk), 2*int64(o.Chunk))
		return o, nil
	}
	o.Staging /= int64(n)
	switch {
	case o.Staging >= int64(o.Chunk) && (asked.Chunk != 0 || o.Staging >= 2*int64(o.Chunk)):
	case asked.Chunk == 0 && o.Staging >= minChunk: // two chunks at least, as with one device
		o.Chunk = max(minChunk, int(o.Staging/2))
	default:
		return o, fmt.Errorf("%w: %d bytes of staging memory for each of %d devices do not hold a chunk of %d bytes",
			ErrBadOption, o.Staging, n, max(asked.Chunk, minChunk))
	}
	return o, nil
}

// SplitModel is a model that is spread over several devices, or on its way there. Its methods are safe for concurrent use. The caller
// must Close it.
type SplitModel struct {
	split  Split
	models []*Model
}

// LoadSplit puts the tensors of m on devs, which must be different devices of one runtime, as split says, and returns when all have
// arrived. Devices load at the same time, and share the workers and the staging memory. With SplitNone every byte is read, and
// converted, once. On an error of any device, or when ctx ends before, nothing is left on any. Errors: those of Load.
func LoadSplit(ctx context.Context, devs []*amdhip.Device, m *gguf.Model, o Options, split Split) (*SplitModel, error) {
	w, err := StartSplit(ctx, devs, m, o, split)
	if err != nil {
		return nil, err
	}
	for _, w := range w.models { // not ctx: what is in flight must be over first
		<-w.finished
	}
	if err := w.models[0].failure(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// StartSplit is LoadSplit without waiting for the end: it returns once device memory is allocated. See [Model.Wait] and
// [Model.WaitStream]. With SplitNone a tensor counts as arrived when it is on all devices.
func StartSplit(ctx context.Context, devs []*amdhip.Device, m *gguf.Model, o Options, split Split) (*SplitModel, error) {
	b, err := newBuilder(ctx, devs, m, o, split)
	if err == nil {
		err = b.open()
	}
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	w := &SplitModel{split: split, models: b.models}
	ctx, cancel := context.WithCancelCause(ctx)
	for _, w := range b.models {
		w.cancel = cancel
	}
	b.team.start(ctx, cancel)
	return w, nil
}

// Split is how the model is spread.
func (w *SplitModel) Split() Split { return w.split }

// Models returns what is on each device, in the order of the devices. They are closed by Close; closing one before the end of the load
// ends that of all.
func (w *SplitModel) Models() []*Model { return w.models }

// Find returns the tensor of that name and the model that it belongs to, and so its device; with SplitNone, the first one's.
func (w *SplitModel) Find(name string) (*Model, Tensor, error) {
	for _, m := range w.models {
		if _, ok := m.index[name]; ok {
			t, err := m.Tensor(name)
			return m, t, err
		}
	}
	return nil, Tensor{}, fmt.Errorf("loader: no tensor %q on any of the %d devices", name, len(w.models))
}

// Wait blocks until the tensor of that name is in device memory, as [Model.Wait] does.
func (w *SplitModel) Wait(ctx context.Context, name string) error {
	m, _, err := w.Find(name)
	if m == nil {
		return err
	}
	return m.Wait(ctx, name)
}

// WaitAll blocks until the load has ended, and returns its error.
func (w *SplitModel) WaitAll(ctx context.Context) error {
	var errs error
	for _, m := range w.models {
		if err := m.WaitAll(ctx); err != nil && errs == nil {
			errs = err
		}
	}
	return errs
}

// Tensors returns all tensors in the order of the file: each once, with SplitNone the first device's.
func (w *SplitModel) Tensors() []Tensor {
	var all []Tensor
	for _, x := range w.order() {
		x.model.mu.RLock()
		if x.model.arenas != nil {
			all = append(all, x.model.tensor(x.index))
		}
		x.model.mu.RUnlock()
	}
	return all
}

// owned is a tensor of a model.
type owned struct {
	model *Model
	index int // in its plan
}

func (o owned) planned() *PlannedTensor { return &o.model.plan.Tensors[o.index] }

// distinct are the models that together have every tensor once.
func (w *SplitModel) distinct() []*Model {
	if w.split.By == SplitNone {
		return w.models[:1]
	}
	return w.models
}

// order is every tensor once, in the order of the file.
func (w *SplitModel) order() []owned {
	var all []owned
	for _, m := range w.distinct() {
		for i := range m.plan.Tensors {
			all = append(all, owned{m, i})
		}
	}
	slices.SortStableFunc(all, func(a, b owned) int {
		x, y := a.planned(), b.planned()
		return cmp.Or(cmp.Compare(x.Part, y.Part), cmp.Compare(x.Offset, y.Offset))
	})
	return all
}

// Hashes returns the hashes that Options.Hash asked for, as [Model.Hashes] does.
func (w *SplitModel) Hashes() []TensorHash {
	sums := make(map[string][sha256.Size]byte)
	for _, m := range w.distinct() {
		for _, h := range m.Hashes() {
			sums[h.Name] = h.Sum
		}
	}
	var all []TensorHash
	for _, x := range w.order() {
		if sum, ok := sums[x.planned().Name]; ok {
			all = append(all, TensorHash{x.planned().Name, sum})
		}
	}
	return all
}

// Verify is [Model.Verify] for every device.
func (w *SplitModel) Verify(ctx context.Context) error {
	return w.each(ctx, w.models, func(ctx context.Context, m *Model) error { return m.Verify(ctx) })
}

// WriteSafetensors writes what is in device memory as [Model.WriteSafetensors] does, from all devices into one file; with SplitNone,
// what is in the first one's.
func (w *SplitModel) WriteSafetensors(ctx context.Context, out io.WriterAt) error {
	var tensors []*PlannedTensor
	order := w.order()
	for _, x := range order {
		tensors = append(tensors, x.planned())
	}
	header, at, err := safetensorsHeader(w.models[0].plan.opts.Shard, tensors)
	if err != nil {
		return err
	}
	if _, err := out.WriteAt(header, 0); err != nil {
		return err
	}
	starts := make(map[*Model][]uint64)
	for _, m := range w.distinct() {
		starts[m] = make([]uint64, len(m.plan.Tensors))
	}
	for i, x := range order {
		starts[x.model][x.index] = uint64(len(header)) + at[i]
	}
	return w.each(ctx, w.distinct(), func(ctx context.Context, m *Model) error { return m.writeData(ctx, out, starts[m]) })
}

// each does something for several models at once. The first error ends the others, and is returned with the device that it is of.
func (w *SplitModel) each(ctx context.Context, models []*Model, do func(context.Context, *Model) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for _, m := range models {
		all.Go(func() {
			if err := do(ctx, m); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("device %d: %w", m.dev.Index(), err))
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// Report is what the devices' loads did together. Times are those of the slowest, but for what is done for one after the other.
func (w *SplitModel) Report() Report {
	sum := w.models[0].Report()
	for _, m := range w.models[1:] {
		r := m.Report()
		sum.UploadBytes += r.UploadBytes
		sum.DeviceBytes += r.DeviceBytes
		sum.ScratchBytes += r.ScratchBytes
		sum.Streams += r.Streams
		sum.Alloc += r.Alloc
		sum.Total = max(sum.Total, r.Total)
		if w.split.By == SplitNone {
			continue // all else is done once
		}
		sum.Tensors += r.Tensors
		sum.Expanded += r.Expanded
		sum.ReadBytes += r.ReadBytes
		sum.MappedBytes += r.MappedBytes
		sum.DirectBytes += r.DirectBytes
		sum.FetchedBytes += r.FetchedBytes
		sum.RemoteBytes += r.RemoteBytes
		sum.Connections += r.Connections
		sum.Threads += r.Threads
		sum.PinnedBytes += r.PinnedBytes
		sum.UnpinnedCopies += r.UnpinnedCopies
		sum.Pin += r.Pin
		sum.PinTotal += r.PinTotal
		sum.Transfer = max(sum.Transfer, r.Transfer)
	}
	return sum
}

// Close frees what is on all devices, as [Model.Close] does.
func (w *SplitModel) Close() error {
	var errs []error
	for _, m := range w.models {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
