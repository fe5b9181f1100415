package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// builder makes what a load to several devices needs, step by step.
type builder struct {
	split  Split
	devs   []*amdhip.Device
	plans  []*Plan
	ker    *kernels.Kernels
	sets   []*gpu.Set // of each device, until a pipeline has them; nil: it converts nothing
	models []*Model
	team   *team
	began  time.Time
}

// newBuilder plans the load, sees that it fits every device, and allocates device memory. The caller must close the builder, also
// after an error, unless the load begins.
func newBuilder(ctx context.Context, devs []*amdhip.Device, m *gguf.Model, o Options, split Split) (b *builder, err error) {
	b = &builder{split: split, devs: devs, began: time.Now(), team: new(team)}
	if ctx.Err() != nil {
		return b, context.Cause(ctx)
	}
	if b.ker, err = kernels.For(o.ISA); err != nil {
		return b, err
	}
	if b.plans, err = split.Plans(devs, m, o); err != nil {
		return b, err
	}
	var errs []error // all of them: what is to be moved where shows only together
	for i, p := range b.plans {
		if err := p.Check(devs[i]); err != nil {
			errs = append(errs, b.of(i, err))
		}
	}
	if errs != nil {
		return b, errors.Join(errs...)
	}
	planned := time.Now()
	if err := b.compile(ctx); err != nil {
		return b, err
	}
	compiled := time.Now()
	if split.By == SplitNone {
		b.plans[0].grow(o)
	}
	for i, p := range b.plans {
		w, err := p.allocate(devs[i])
		if err != nil {
			return b, b.of(i, err)
		}
		b.models = append(b.models, w)
	}
	b.models[0].report.Plan, b.models[0].report.Kernels = planned.Sub(b.began), compiled.Sub(planned)
	return b, nil
}

// of says which device an error is of.
func (b *builder) of(i int, err error) error {
	if len(b.devs) == 1 {
		return err
	}
	return fmt.Errorf("device %d: %w", b.devs[i].Index(), err)
}

// compile makes the devices' kernels ready. Copies of one plan are all converted by their devices, or all by the CPU.
func (b *builder) compile(ctx context.Context) error {
	for i, p := range b.plans {
		set, err := p.expandOn(ctx, b.devs[i])
		if err != nil {
			return b.of(i, err)
		}
		b.sets = append(b.sets, set)
	}
	if b.split.By != SplitNone || !slices.Contains(b.sets, nil) {
		return nil
	}
	err := b.closeSets()
	p := b.plans[0]
	for i := range p.Tensors {
		p.Tensors[i].expand = false
	}
	b.sets = make([]*gpu.Set, len(b.devs))
	return err
}

// open makes the pipelines. They own the sets then.
func (b *builder) open() error {
	if b.split.By == SplitNone {
		p := newPipeline(b.models[0], converters{cpu: b.ker}, b.began)
		p.copies = b.models[1:]
		for _, w := range p.copies {
			w.sums = b.models[0].sums
		}
		if b.sets[0] != nil {
			p.sets = b.sets
		}
		b.team.pipes = []*pipeline{p}
	} else {
		for i, w := range b.models {
			p := newPipeline(w, converters{cpu: b.ker, gpu: b.sets[i]}, b.began)
			if len(b.models) > 1 {
				p.label = fmt.Sprintf("device %d ", b.devs[i].Index())
			}
			b.team.pipes = append(b.team.pipes, p)
		}
	}
	b.sets = nil
	for i, p := range b.team.pipes {
		p.team = b.team
		if err := p.open(); err != nil {
			if b.split.By == SplitNone {
				return err
			}
			return b.of(i, err)
		}
	}
	return nil
}

// close gives everything back.
func (b *builder) close() error {
	errs := []error{b.closeSets()}
	for _, p := range b.team.pipes {
		errs = append(errs, p.close())
	}
	for _, w := range b.models {
		errs = append(errs, w.free())
	}
	return errors.Join(errs...)
}

func (b *builder) closeSets() error {
	var errs []error
	for _, set := range b.sets {
		if set != nil {
			errs = append(errs, set.Close())
		}
	}
	b.sets = nil
	return errors.Join(errs...)
}
