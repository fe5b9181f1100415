package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/measure"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// benchTarget is the model and the device that bench loads.
type benchTarget struct {
	flags  *loadFlags
	log    *slog.Logger
	file   *gguf.File
	opener *models.Opener // nil: the model is a file
	rt     *amdhip.Runtime
	dev    *amdhip.Device
	loader *loader.Loader // of the loads of one setup; nil: none yet
	setup  bench.Setup    // that, without the dtype
}

// defaultConnections is how many ranges are read at the same time to measure the ceiling of a remote model: as many as
// a load of it reads.
const defaultConnections = 32

// open opens the device and the model. The caller must close b, after an error, too.
func (b *benchTarget) open(ctx context.Context, path string, stderr io.Writer) (err error) {
	if b.rt, b.dev, err = b.flags.device.open(ctx, stderr, b.log); err != nil {
		return err
	}
	if b.file, b.opener, err = b.flags.remote.openModel(ctx, path, b.log); err != nil {
		return err
	}
	return checkTwice(b.file, "bench")
}

func (b *benchTarget) close() error {
	errs := []error{b.closeLoader()}
	if b.file != nil {
		errs = append(errs, b.file.Close())
	}
	if b.opener != nil {
		b.opener.Close()
	}
	if b.rt != nil {
		errs = append(errs, b.rt.Close())
	}
	return errors.Join(errs...)
}

// loads returns what package bench needs to measure loads of b, with all dtypes or only that of --dtype.
func (b *benchTarget) loads(onlyDType bool) *bench.Loads {
	threads := cmp.Or(*b.flags.threads, runtime.GOMAXPROCS(0))
	readers := threads
	if b.file.Remote() {
		readers = cmp.Or(*b.flags.conns, defaultConnections)
	}
	by := *b.flags.dequant.by
	l := &bench.Loads{
		Load:    b.load,
		Expands: b.expands,
		Fits:    b.fits,
		LinkSpeed: func(ctx context.Context) (float64, error) {
			b.settle()
			link := func() (float64, error) { return measure.Link(ctx, b.dev) }
			return watch.Do(ctx, b.flags.device.limit(), "measuring the link", link, func(float64) {})
		},
		CopySpeed: func(ctx context.Context) (float64, error) { return measure.Copy(ctx, threads) },
		ReadSpeed: func(ctx context.Context, cold bool) (float64, error) {
			return measure.Read(ctx, b.file, readers, cold)
		},
		PeakRSS: peakRSS,
		CPU:     by != loader.DequantGPU,
		GPU:     by == loader.DequantGPU || by == loader.DequantAuto && b.rt.Kind() == "hip",
		Logger:  b.log,
	}
	if canEvict && !b.file.Remote() {
		l.Evict = b.evict
	}
	dtypes := plan.Policies()
	if onlyDType {
		dtypes = []plan.Policy{*b.flags.dtype}
	}
	for _, d := range dtypes {
		l.DTypes = append(l.DTypes, d.String())
	}
	return l
}

// spec is what is loaded as dtype.
func (b *benchTarget) spec(dtype string) (s plan.Spec, err error) {
	s = b.flags.spec()
	return s, s.Policy.UnmarshalText([]byte(dtype))
}

// config is how one load works. The mode settles who converts.
func (b *benchTarget) config(s bench.Setup) loader.Config {
	c := b.flags.config(b.log)
	c.Dequant = loader.DequantCPU
	if s.Mode == bench.AsyncGPU {
		c.Dequant = loader.DequantGPU
	}
	c.Threads, c.Streams, c.Chunk = cmp.Or(s.Threads, c.Threads), cmp.Or(s.Streams, c.Streams), cmp.Or(s.Chunk, c.Chunk)
	return c
}

// clearingTime is how long a GPU gets after a model was freed, before the next is loaded or the link is measured.
// NVIDIA's driver was seen to clear freed memory in the background, and loads that followed at once took up to half as
// long again.
const clearingTime = 100 * time.Millisecond

// settle waits until the device has cleared what was freed.
func (b *benchTarget) settle() {
	if b.rt.Kind() == "hip" {
		time.Sleep(clearingTime)
	}
}

// load loads the model once and frees it. Loads of the same setup share a Loader.
func (b *benchTarget) load(ctx context.Context, s bench.Setup) (_ bench.Result, err error) {
	same := s
	same.DType = ""
	if b.loader == nil || same != b.setup {
		if err := b.closeLoader(); err != nil {
			return bench.Result{}, err
		}
		if b.loader, err = loader.New([]*amdhip.Device{b.dev}, b.config(s)); err != nil {
			return bench.Result{}, err
		}
		b.setup = same
	}
	spec, err := b.spec(s.DType)
	if err != nil {
		return bench.Result{}, err
	}
	p, err := b.loader.Plan(b.file, spec)
	if err != nil {
		return bench.Result{}, err
	}
	load := b.loader.Load
	if s.Mode == bench.Sync {
		load = b.loader.LoadSync
	}
	b.settle()
	w, err := load(ctx, p, b.flags.request(nil, nil))
	if err != nil {
		return bench.Result{}, err
	}
	r := w.Report()
	return bench.Result{
		Transfer: r.Transfer + r.Prove, Proved: r.Proved, Total: r.Total,
		ReadBytes: r.ReadBytes, UploadBytes: r.UploadBytes, DeviceBytes: r.DeviceBytes, PinnedBytes: r.PinnedBytes,
		Dequant: dequantizedBy(w, b.file),
	}, w.Close()
}

// closeLoader frees what the loads so far have shared.
func (b *benchTarget) closeLoader() error {
	if b.loader == nil {
		return nil
	}
	l := b.loader
	b.loader = nil
	return l.Close()
}

// expands reports whether a load as dtype has something that a device can convert.
func (b *benchTarget) expands(dtype string) bool {
	spec, err := b.spec(dtype)
	if err != nil {
		return false
	}
	p, err := plan.New(b.file, spec, []uint64{0})
	if err != nil {
		return false // the load will return the error
	}
	return slices.ContainsFunc(p.Tensors(), func(t *plan.Tensor) bool { return gpu.Supported(t.Target, t.Type) })
}

// fits says why the model as dtype does not fit onto the device, if it does not.
func (b *benchTarget) fits(dtype string) error {
	spec, err := b.spec(dtype)
	if err != nil {
		return err
	}
	l, err := loader.New([]*amdhip.Device{b.dev}, b.config(bench.Setup{Mode: bench.Sync}))
	if err != nil {
		return err
	}
	defer l.Close()
	p, err := l.Plan(b.file, spec)
	if err != nil {
		return err
	}
	return p.Fits()
}

// evict takes the model out of the page cache.
func (b *benchTarget) evict() error {
	for _, p := range b.file.Parts() {
		f, err := p.Open(0)
		if err == nil {
			err = evict(f)
			f.Close()
		}
		if err != nil {
			return fmt.Errorf("%s cannot be taken out of the page cache: %w", p.Path, err)
		}
	}
	return nil
}
