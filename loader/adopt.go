package loader

import (
	"cmp"
	"fmt"
	"io"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Allocation is one of the few large pieces of device memory that hold a model.
type Allocation struct {
	Device int            // number in the plan
	Memory *amdhip.Memory // nil: it is not device memory but the host's, on a device that shares it
	Bytes  uint64         // that the plan has in it
}

// Allocations returns the device memory of a model that was loaded, by device and then in the order of the plan. It
// stays the model's. It is for those who share the memory with other processes, see Request.Share.
func (m *Model) Allocations() ([]Allocation, error) {
	if err := m.acquire(); err != nil {
		return nil, err
	}
	defer m.release()
	var all []Allocation
	for d := range m.devices {
		for _, p := range m.parts {
			for n, number := range p.group.Devices {
				if number != d {
					continue
				}
				for i, a := range p.on[n].arenas {
					mem, _ := a.mem.(*amdhip.Memory)
					all = append(all, Allocation{Device: d, Memory: mem, Bytes: p.group.Arenas[i]})
				}
			}
		}
	}
	return all, nil
}

// Mapping is device memory that somebody else allocated and filled, or is filling.
type Mapping struct {
	Ptr    amdhip.DevicePtr
	Memory io.Closer // unmaps it
}

// Feed tells an adopted Model what becomes of its memory. Its methods are called by one goroutine.
type Feed struct {
	model   *Model
	tensors []*plan.Tensor // in file order
	arrived int            // of these, from the first on
	loaded  bool
	gone    chan struct{}
	release func() error
}

// Adopt makes a Model of memory that somebody else allocated: memory has, for each device of the plan, the mappings of
// its allocations. The Feed is to be told what arrives. stall is Config.Stall of what the Model does. Close unmaps the
// memory and then calls release, unless a device hangs and may still use it.
func Adopt(p *plan.Plan, devices []*amdhip.Device, memory [][]Mapping, stall time.Duration, release func() error) (
	*Model, *Feed,
) {
	m := newModel(p, devices)
	m.config.Stall = cmp.Or(stall, defaultStall)
	for _, part := range m.parts {
		for n, d := range part.group.Devices {
			for _, x := range memory[d] {
				part.on[n].arenas = append(part.on[n].arenas, arena{mem: x.Memory, ptr: x.Ptr})
			}
		}
	}
	m.adopted = &Feed{model: m, tensors: p.Tensors(), gone: make(chan struct{}), release: release}
	return m, m.adopted
}

// Arrived says that the first n tensors, in file order, are in device memory. What was said before counts on.
func (f *Feed) Arrived(n int) {
	for ; f.arrived < min(n, len(f.tensors)); f.arrived++ {
		group, i, _ := f.model.plan.Find(f.tensors[f.arrived].Name)
		p := f.model.parts[group]
		p.issued.passTensor(i)
		p.ready.passTensor(i)
	}
}

// Loaded says that all tensors are in device memory.
func (f *Feed) Loaded() {
	f.Arrived(len(f.tensors))
	if !f.loaded {
		f.loaded = true
		close(f.model.finished)
	}
}

// Know says what fingerprints the tensors have: all of them on each device that they are on, as Model.Fingerprints of
// the model that was loaded has given them. Then those of the adopted Model are these, and a Scrubber finds what has
// changed since. It is said before anybody else has the Model. The error matches ErrBadOption when some are missing.
func (f *Feed) Know(all []Fingerprint) error {
	sums := sumsOf(all)
	known := make([][][]fingerprints, len(f.model.parts))
	for i, p := range f.model.parts {
		known[i] = make([][]fingerprints, len(p.on))
		for n, on := range p.on {
			for j := range p.group.Tensors {
				t := &p.group.Tensors[j]
				s := sums[tensorOn{on.device, t.Name}]
				if want := kernels.Fingerprints(int64(t.Bytes)); int64(len(s)) != want {
					return fmt.Errorf("%w: %d fingerprints of tensor %q, not %d", ErrBadOption, len(s), t.Name, want)
				}
				known[i][n] = append(known[i][n], s)
			}
		}
	}
	for i, p := range f.model.parts {
		p.prints = known[i]
	}
	return nil
}

// Lose says that the memory must not be used any more, and why. The model's methods return that error from then on. It
// is said once, and last.
func (f *Feed) Lose(err error) {
	f.model.mu.Lock()
	f.model.err = err
	f.model.mu.Unlock()
	close(f.gone)
	if !f.loaded {
		close(f.model.finished)
	}
}

// close gives the memory back to whoever it is of, after it has been unmapped.
func (f *Feed) close(stuck bool) error {
	if stuck { // the device may still read it, so it must stay until this process has ended
		return nil
	}
	return f.release()
}

// Gone returns a channel that is closed when the memory of an adopted model must not be used any more, as whoever holds
// it has gone, or has failed to load it, or as the model is closed; nil for a model of this process, which depends on
// nobody. From then on the model's methods return an error that says why. The model is still to be closed.
func (m *Model) Gone() <-chan struct{} {
	if m.adopted == nil {
		return nil
	}
	return m.adopted.gone
}
