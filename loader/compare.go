package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// proved is what the comparison of a group says.
type proved struct {
	tensors int              // that all devices of the group have got
	bytes   uint64           // that travelled to all of them, without padding
	prints  [][]fingerprints // by device of the group, by tensor: fingerprints of the tensor's bytes there
}

// fingerprints is the fingerprints of a tensor, one for each block.
type fingerprints []uint64

// keep says that the tensors of the last round that are for ever what they are now are those that have arrived, as
// another round is to begin.
func (p *proof) keep(arrived []bool) {
	if p == nil || len(p.rounds) == 0 {
		return
	}
	last := p.rounds[len(p.rounds)-1]
	last.counts = slices.Clone(arrived)
	for _, r := range p.rounds[:len(p.rounds)-1] {
		for i := range last.counts {
			last.counts[i] = last.counts[i] && !r.counts[i]
		}
	}
}

// finish copies the sums from the devices, and compares them. All kernels that make sums must have ended. With stuck, a
// copy may still be under way. The error is a *ProveError for the first block that is wrong, one for each device.
func (p *proof) finish(ctx context.Context, limit *watch.Limit) (_ *proved, stuck bool, err error) {
	all := &proved{prints: make([][]fingerprints, len(p.part.on))}
	var want []collected
	var summing sync.WaitGroup // while the devices' sums are on their way
	summing.Go(func() { want = p.collect(func(r *round) []uint64 { return r.host }, false) })
	defer summing.Wait()
	var errs []error
	for n := range p.part.on {
		if stuck, err := p.fetch(ctx, limit, n); err != nil {
			return nil, stuck, onDevice(p.part.on[n].device, len(p.part.on) > 1, err)
		}
		got := p.collect(func(r *round) []uint64 { return r.sumsOf(n) }, true)
		if err := p.covered(got); err != nil {
			return nil, false, err
		}
		summing.Wait()
		errs = append(errs, p.compare(n, want, got))
		all.prints[n] = make([]fingerprints, len(got))
		for i := range got {
			if all.prints[n][i] = got[i].travel; got[i].expanded {
				all.prints[n][i] = got[i].out
			}
			all.bytes += uint64(got[i].bytes)
		}
	}
	all.tensors = len(p.part.group.Tensors)
	return all, false, errors.Join(errs...)
}

// sumsOf is what was copied from the n-th device.
func (r *round) sumsOf(n int) []uint64 {
	if r.slots == 0 {
		return nil
	}
	return r.on[n].sums(r.slots)
}

// fetch copies the sums of the n-th device to the host.
func (p *proof) fetch(ctx context.Context, limit *watch.Limit, n int) (stuck bool, err error) {
	last := p.rounds[len(p.rounds)-1]
	if last.slots == 0 {
		return false, nil // only a group without any bytes has none in its last round
	}
	stream, event := last.on[n].stream, last.on[n].event
	left := limit.Left()
	deadline := time.Now().Add(left - left/8)
	var begun, over atomic.Bool
	err = watch.Call(ctx, limit, "copying fingerprints from the device", func() error {
		begun.Store(true)
		var err error
		for _, r := range p.rounds {
			if err == nil && r.slots > 0 {
				err = stream.CopyToHost(r.on[n].copied, 0, r.on[n].mem.Ptr(), sumSize*r.slots)
			}
		}
		if err == nil {
			err = stream.Record(event)
		}
		query := event.Query
		if err != nil { // then there may be no event behind what was enqueued
			query = stream.Query
		}
		rest, failed := watch.Drain(query, amdhip.StopsWork, deadline)
		over.Store(rest)
		return errors.Join(err, failed)
	})
	if err != nil {
		err = fmt.Errorf("loader: reading the fingerprints: %w", err)
	}
	return begun.Load() && !over.Load(), err
}

// collected is what the rounds together know of a tensor.
type collected struct {
	travel, out, source fingerprints
	expanded            bool
	bytes               int64 // of travel that were summed up
	next                int64 // where travel is to go on, if no byte is left out or there twice
	outNext             int64 // likewise, of out
	broken              bool
}

// collect adds up the slots of each tensor. Only a device has sums of what it has converted.
func (p *proof) collect(slots func(*round) []uint64, onDevice bool) []collected {
	all := make([]collected, len(p.part.group.Tensors))
	for _, r := range p.rounds {
		from := slots(r)
		for i := range r.lists {
			for j := range r.lists[i] {
				x := &r.lists[i][j]
				if r.counts != nil && !r.counts[x.tensor] {
					continue
				}
				c := &all[x.tensor]
				c.broken = c.broken || c.next != x.travel.at || c.outNext != x.out.at && x.out.bytes > 0
				c.next, c.outNext = x.travel.at+x.travel.bytes, x.out.at+x.out.bytes
				c.bytes += x.travel.bytes
				c.expanded = c.expanded || x.out.bytes > 0
				c.travel.add(x.travel, from)
				if onDevice {
					c.out.add(x.out, from)
				} else {
					c.source.add(x.source, from)
				}
			}
		}
	}
	return all
}

// add adds the slots of x.
func (s *fingerprints) add(x stretch, slots []uint64) {
	first := int(x.at / kernels.FingerprintBlock)
	if missing := first + x.slots - len(*s); missing > 0 {
		*s = append(*s, make(fingerprints, missing)...)
	}
	for i, sum := range slots[x.slot : x.slot+x.slots] {
		(*s)[first+i] += sum
	}
}

// covered wants every byte of every tensor to have been summed up once.
func (p *proof) covered(all []collected) error {
	for i := range all {
		t, c := &p.part.group.Tensors[i], &all[i]
		travel, out := int64(t.Bytes), int64(0)
		if c.expanded {
			travel, out = t.Size, int64(t.Bytes)
		}
		if c.broken || c.bytes != travel || c.next != travel || c.outNext != out {
			return fmt.Errorf("loader: internal error: tensor %q: %d of %d bytes have fingerprints", t.Name, c.bytes, travel)
		}
	}
	return nil
}

// compare compares the fingerprints of all tensors with those that the n-th device has.
func (p *proof) compare(n int, want, got []collected) error {
	var first *ProveError
	blocks := 0
	differ := func(i, block int, want, got uint64, inFile, host bool) {
		if blocks++; first == nil {
			first = &ProveError{
				Device: p.part.on[n].device, Tensor: p.part.group.Tensors[i].Name, InFile: inFile, Host: host, Want: want, Got: got,
			}
			first.place(block, &p.part.group.Tensors[i])
		}
	}
	for i := range got {
		t := &p.part.group.Tensors[i]
		inFile := got[i].expanded || t.Target == t.Type
		right := want[i].travel
		if p.image != nil {
			of := p.image.prints[t.Name]
			if inFile {
				right = of
			} else if b := different(of, want[i].source); b >= 0 { // what the CPU has converted
				differ(i, b, of[b], want[i].source[b], true, true)
				continue
			}
		}
		for b := range got[i].travel {
			if w, g := right[b], got[i].travel[b]; w != g {
				differ(i, b, w, g, got[i].expanded, p.image != nil && inFile && p.image.damaged(t, b))
			}
		}
	}
	if first == nil {
		return nil
	}
	first.Blocks = blocks
	return first
}

// different is the first block in which two lists of fingerprints differ; -1: there is none.
func different(a, b fingerprints) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}
