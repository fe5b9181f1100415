package hold

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Where a load was proved, its fingerprints are kept with its memory: 8 bytes for 64 KiB, in a file in memory that is
// the last of Kept.Files. It has the fingerprints of all blocks, little-endian: by device, from the first on, and of
// each the tensors of the plan in the order of their places. The Holder that adopts the memory compares them in the
// background, as it looks again at memory with Options.Scrub.

// sumBytes is the size of a fingerprint.
const sumBytes = 8

// eachCopy calls f for each tensor on each device that it is on, in the order of a file of fingerprints.
func eachCopy(p *plan.Plan, f func(device int, t *plan.Tensor)) {
	on := make([]*plan.Group, p.Devices)
	for i := range p.Groups {
		for _, d := range p.Groups[i].Devices {
			on[d] = &p.Groups[i]
		}
	}
	for d, g := range on {
		for i := range g.Tensors {
			if g.Tensors[i].Bytes > 0 {
				f(d, &g.Tensors[i])
			}
		}
	}
}

// printsFile returns a file with the fingerprints of r; nil: its load was not proved. The caller closes it.
func (h *Holder) printsFile(r *residence) (*os.File, error) {
	known, err := r.model.Fingerprints()
	if err != nil || len(known) == 0 {
		return nil, err
	}
	sums := make(map[copyOf][]uint64, len(known))
	for i := range known {
		sums[copyOf{slices.Index(h.devices, known[i].Device), known[i].Tensor.Name}] = known[i].Sums
	}
	var b []byte
	eachCopy(r.model.Plan(), func(d int, t *plan.Tensor) {
		for _, sum := range sums[copyOf{d, t.Name}] {
			b = binary.LittleEndian.AppendUint64(b, sum)
		}
	})
	return memoryFile("gguf2gpu fingerprints", b)
}

// copyOf is a tensor on a device of the Holder.
type copyOf struct {
	device int
	tensor string
}

// knowPrints reads a file of fingerprints, and tells the model of r, which is adopted, that it is to have these.
func (h *Holder) knowPrints(r *residence, feed *loader.Feed, file *os.File) error {
	var all []loader.Fingerprint
	var sums int64
	p := r.model.Plan()
	eachCopy(p, func(d int, t *plan.Tensor) {
		all = append(all, loader.Fingerprint{Device: h.devices[d], Tensor: t, Bytes: int64(t.Bytes)})
		sums += kernels.Fingerprints(int64(t.Bytes))
	})
	info, err := file.Stat()
	if err == nil && info.Size() != sumBytes*sums {
		err = fmt.Errorf("hold: its fingerprints have %d bytes, not %d", info.Size(), sumBytes*sums)
	}
	if err != nil {
		return err
	}
	b := make([]byte, sumBytes*sums)
	if _, err = io.ReadFull(io.NewSectionReader(file, 0, int64(len(b))), b); err != nil {
		return err
	}
	unseen := make(map[int]bool)
	for i := range all {
		for range kernels.Fingerprints(all[i].Bytes) {
			all[i].Sums = append(all[i].Sums, binary.LittleEndian.Uint64(b))
			b = b[sumBytes:]
		}
		unseen[slices.Index(h.devices, all[i].Device)] = true
	}
	if err := feed.Know(all); err != nil {
		return err
	}
	r.unseen = unseen
	return nil
}

// compareAdopted compares in the background what the models that were adopted have in device memory with their
// fingerprints, where these are known. What differs is written again, as with Options.Scrub.
func (h *Holder) compareAdopted(all []*held) {
	wanted := make(map[int][]resident)
	h.mu.Lock()
	for _, m := range all {
		if r := m.now; r != nil && h.options.Request.Prove != loader.ProveOff {
			for d := range r.unseen {
				wanted[d] = append(wanted[d], resident{m, r})
			}
		}
	}
	h.mu.Unlock()
	if h.options.Scrub > 0 { // they are looked at at once
		h.looking.Do(func() { close(h.look) })
		return
	}
	for d, those := range wanted {
		h.background.Go(func() {
			s, err := h.loader.NewScrubber(h.ctx, d)
			if err != nil {
				if h.ctx.Err() == nil {
					h.log.Warn("what was taken over cannot be compared with what was loaded", "device", h.devices[d].Name(), "error", err)
				}
				return
			}
			looking := &scrubbing{Holder: h, device: d, scrubber: s, watched: make(map[*residence]*watchedMemory)}
			for _, x := range those {
				if !looking.model(x.m, x.r) {
					break
				}
			}
			looking.close()
		})
	}
}

// seen notes that all memory of r on a device was looked at. With the last device of a model that was adopted it is
// known whether it is what was loaded. h.mu is held.
func (h *Holder) seen(m *held, r *residence, device int) {
	if !r.unseen[device] {
		return
	}
	if delete(r.unseen, device); len(r.unseen) > 0 {
		return
	}
	if r.damaged > 0 {
		r.provedBytes = 0
		return // it is said already
	}
	r.proved = true
	h.log.Info("what was taken over is what was loaded", "model", m.name, "bytes", r.provedBytes,
		"seconds", time.Since(r.began).Seconds())
}

// splitKept takes the file of fingerprints, if there is one, from the descriptors of device memory.
func splitKept(files []*os.File, prints bool, allocations int) (memory []*os.File, file *os.File, err error) {
	want := allocations
	if prints {
		want++
	}
	if len(files) != want {
		return files, nil, fmt.Errorf("hold: there are %d descriptors for %d allocations", len(files), allocations)
	}
	if !prints {
		return files, nil, nil
	}
	return files[:allocations], files[allocations], nil
}

// withPrints gives a model to the Keeper, with its fingerprints where they are known and there is room for them.
func (h *Holder) withPrints(ctx context.Context, m *held, r *residence, d description) error {
	k := Kept{ID: r.id, Files: r.memory.files()}
	if len(k.Files) < maxDescriptors {
		file, err := h.printsFile(r)
		switch {
		case err != nil && !errors.Is(err, loader.ErrClosed): // else it sleeps by now
			h.log.Warn("the model is kept without its fingerprints", "model", m.name, "error", err)
		case file != nil:
			defer file.Close()
			d.Prints, k.Files = true, append(k.Files, file)
		}
	}
	var err error
	if k.Description, err = json.Marshal(d); err != nil {
		return err
	}
	return h.options.Keep.Keep(ctx, k)
}
