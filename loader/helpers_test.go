package loader

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

const (
	sample   = "../testdata/tiny-llama.gguf"
	allTypes = "../testdata/gguf/all-types.gguf"
	small    = "../testdata/gguf/align8.gguf" // a few tensors
)

// options are a plan.Spec, a Config and a Request in one, so that a table of tests can have them in a line.
type options struct {
	Policy  plan.Policy
	Rules   []plan.Rule
	Tensors *regexp.Regexp
	Shard   plan.Shard
	Split   plan.Split

	Streams     int
	Threads     int
	Staging     int64
	Chunk       int
	Connections int
	IO          IO
	ISA         kernels.ISA
	Dequant     Dequant
	Compiler    *gpu.Compiler
	Stall       time.Duration
	Logger      *slog.Logger
	autoAlways  bool
	autoProve   bool
	readAt      func(f *os.File, b []byte, off int64) (int, error)

	Check    bool
	Hash     bool
	HashWith HashAlgorithm
	Prove    Prove
	Share    bool
	Progress func(done, total int64)
	Trace    *trace.Trace
}

func (o options) spec() plan.Spec {
	return plan.Spec{Policy: o.Policy, Rules: o.Rules, Tensors: o.Tensors, Shard: o.Shard, Split: o.Split}
}

func (o options) config() Config {
	return Config{
		Streams: o.Streams, Threads: o.Threads, Staging: o.Staging, Chunk: o.Chunk, Connections: o.Connections, IO: o.IO,
		ISA:     o.ISA,
		Dequant: o.Dequant, Compiler: o.Compiler, Stall: o.Stall, Logger: o.Logger, autoAlways: o.autoAlways,
		autoProve: o.autoProve, readAt: o.readAt,
	}
}

func (o options) request() Request {
	return Request{
		Check: o.Check, Hash: o.Hash, HashWith: o.HashWith, Prove: o.Prove, Share: o.Share, Progress: o.Progress,
		Trace: o.Trace,
	}
}

// on returns the options with staging memory for n devices, where it was for one.
func (o options) on(n int) options {
	o.Staging *= int64(n)
	return o
}

// tight is a pipeline with as little staging memory as there can be, so that every buffer is used again and again.
var tight = options{Chunk: 64 << 10, Staging: 3 * 64 << 10, Threads: 4, Streams: 3}

// rawTight is tight for loads that only copy.
func rawTight() options {
	o := tight
	o.Policy = plan.Raw
	return o
}

type loadFunc = func(context.Context, *gguf.File, options, ...*amdhip.Device) (*Model, error)

// load makes a Loader, loads with it, and closes it.
func load(ctx context.Context, f *gguf.File, o options, devs ...*amdhip.Device) (*Model, error) {
	return oneLoad(f, o, devs, func(l *Loader, p *Plan) (*Model, error) { return l.Load(ctx, p, o.request()) })
}

// loadSync is load with LoadSync.
func loadSync(ctx context.Context, f *gguf.File, o options, devs ...*amdhip.Device) (*Model, error) {
	return oneLoad(f, o, devs, func(l *Loader, p *Plan) (*Model, error) { return l.LoadSync(ctx, p, o.request()) })
}

func oneLoad(f *gguf.File, o options, devs []*amdhip.Device, how func(*Loader, *Plan) (*Model, error)) (*Model, error) {
	l, err := New(devs, o.config())
	if err != nil {
		return nil, err
	}
	p, err := l.Plan(f, o.spec())
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	w, err := how(l, p)
	return w, errors.Join(err, l.Close())
}

// start starts a load on a Loader of its own, which is closed at the end of the test.
func start(ctx context.Context, t *testing.T, f *gguf.File, o options, devs ...*amdhip.Device) *Model {
	t.Helper()
	l := newLoader(t, o, devs...)
	w, err := l.Start(ctx, mustPlan(t, l, f, o), o.request())
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// newLoader returns a Loader that is closed at the end of the test.
func newLoader(t testing.TB, o options, devs ...*amdhip.Device) *Loader {
	t.Helper()
	l, err := New(devs, o.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func mustPlan(t testing.TB, l *Loader, f *gguf.File, o options) *Plan {
	t.Helper()
	p, err := l.Plan(f, o.spec())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// planned is the plan for the same tensors on one device.
func planned(t testing.TB, f *gguf.File, o options) *plan.Plan {
	t.Helper()
	o.Split = plan.Split{}
	p, err := plan.New(f, o.spec(), []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func openModel(t testing.TB, path string) *gguf.File {
	t.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// openDevice opens a software device and fails the test when anything is left on it at the end.
func openDevice(t testing.TB, o soft.Options) (*amdhip.Device, *soft.Software) {
	t.Helper()
	devs, sw := openDevices(t, 1, o)
	return devs[0], sw
}

// openDevices opens n software devices; see openDevice.
func openDevices(t testing.TB, n int, o soft.Options) (devs []*amdhip.Device, sw *soft.Software) {
	t.Helper()
	devs, sw = leakyDevices(t, n, o)
	t.Cleanup(func() { nothingLeft(t, sw) })
	return devs, sw
}

// leakyDevices opens n software devices on which something may be left at the end.
func leakyDevices(t testing.TB, n int, o soft.Options) (devs []*amdhip.Device, sw *soft.Software) {
	t.Helper()
	o.Devices = n
	rt, err := soft.OpenRuntime(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		dev, err := rt.Device(i)
		if err != nil {
			t.Fatal(err)
		}
		devs = append(devs, dev)
	}
	return devs, soft.Of(rt)
}

// nothingLeft fails the test when something is allocated on sw.
func nothingLeft(t testing.TB, sw *soft.Software) {
	t.Helper()
	if r := using(sw); r != (resources{}) {
		t.Errorf("left on the device: %+v", r)
	}
}

func mustClose(t testing.TB, w *Model) {
	t.Helper()
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

// contents reads all tensors back from the devices, those that are on several from the first.
func contents(t *testing.T, w *Model) map[string][]byte {
	t.Helper()
	return contentsOf(t, w, ReadOptions{}, func(Piece) bool { return true })
}

// contentsOn reads back what is on one device.
func contentsOn(t *testing.T, w *Model, dev *amdhip.Device) map[string][]byte {
	t.Helper()
	return contentsOf(t, w, ReadOptions{EveryCopy: true}, func(p Piece) bool { return p.Device == dev })
}

func contentsOf(t *testing.T, w *Model, o ReadOptions, want func(Piece) bool) map[string][]byte {
	t.Helper()
	room := make(map[string][]byte)
	for _, x := range w.Tensors() {
		room[x.Name] = make([]byte, x.Bytes)
	}
	seen := make(map[string]*atomic.Int64)
	for name := range room {
		seen[name] = new(atomic.Int64)
	}
	err := w.ReadBack(t.Context(), o, func() func(Piece) error {
		return func(p Piece) error {
			if want(p) {
				seen[p.Tensor.Name].Add(int64(copy(room[p.Tensor.Name][p.Offset:], p.Bytes)))
			}
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range seen {
		switch n.Load() {
		case int64(len(room[name])):
		case 0: // on another device
			delete(room, name)
		default:
			t.Errorf("%s: %d bytes were read back of %d", name, n.Load(), len(room[name]))
		}
	}
	return room
}

// wanted is what the devices should hold: the generic kernels' output, or the file's own bytes.
func wanted(t *testing.T, f *gguf.File, o options) map[string][]byte {
	t.Helper()
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string][]byte)
	for _, x := range planned(t, f, o).Tensors() {
		want[x.Name] = bytes.Clone(f.Data(x.Tensor))
		if x.Target == x.Type {
			continue
		}
		want[x.Name] = make([]byte, x.Bytes)
		if err := k.Dequantize(want[x.Name], x.Target, f.Data(x.Tensor), x.Type); err != nil {
			t.Fatal(err)
		}
	}
	return want
}

// same compares what two maps of the plan's tensors hold; NaNs may differ.
func same(t *testing.T, p *plan.Plan, got, want map[string][]byte) {
	t.Helper()
	if len(got) != len(want) || len(want) != p.Len() {
		t.Errorf("%d tensors, want %d; the plan has %d", len(got), len(want), p.Len())
	}
	for _, x := range p.Tensors() {
		if len(got[x.Name]) != len(want[x.Name]) {
			t.Errorf("%s: %d bytes, want %d", x.Name, len(got[x.Name]), len(want[x.Name]))
		} else if i := difference(got[x.Name], want[x.Name], x.Target); i >= 0 {
			t.Errorf("%s differs at byte %d", x.Name, i)
		}
	}
}

// difference is where a and b, elements of type t, differ; -1: nowhere. NaNs of any kind are equal.
func difference(a, b []byte, t gguf.Type) int {
	if bytes.Equal(a, b) {
		return -1
	}
	size := map[gguf.Type]int{gguf.F32: 4, gguf.F16: 2, gguf.BF16: 2}[t]
	nan := func(e []byte) bool {
		switch t {
		case gguf.F32:
			return binary.LittleEndian.Uint32(e)&0x7fffffff > 0x7f800000
		case gguf.F16:
			return binary.LittleEndian.Uint16(e)&0x7fff > 0x7c00
		default:
			return binary.LittleEndian.Uint16(e)&0x7fff > 0x7f80
		}
	}
	for i := range a {
		if a[i] == b[i] {
			continue
		}
		if size > 0 {
			if at := i / size * size; nan(a[at:at+size]) && nan(b[at:at+size]) {
				continue
			}
		}
		return i
	}
	return -1
}

// unequal is what verify finds.
type unequal struct {
	device *amdhip.Device
	tensor string
	at     int64 // in the tensor's bytes on the device
}

func (e *unequal) Error() string {
	return fmt.Sprintf("device %d: tensor %q differs at byte %d", e.device.Index(), e.tensor, e.at)
}

// verify reads every copy of every tensor back and compares it with what the generic kernels make of f, as
// readback.Verify does, which this package cannot import. It is an error when a byte was not read back.
func verify(ctx context.Context, w *Model, f *gguf.File) error {
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		return err
	}
	var seen atomic.Uint64
	err = w.ReadBack(ctx, ReadOptions{EveryCopy: true}, func() func(Piece) error {
		var scratch []byte
		return func(p Piece) error {
			t := p.Tensor
			want, err := read.Tensor(ctx, f, &scratch, t, p.Src, p.SrcBytes)
			if err == nil && t.Target != t.Type {
				src := want
				want = make([]byte, len(p.Bytes))
				err = k.Dequantize(want, t.Target, src, t.Type)
			}
			if err != nil {
				return err
			}
			if i := difference(p.Bytes, want, t.Target); i >= 0 {
				return &unequal{p.Device, t.Name, p.Offset + int64(i)}
			}
			seen.Add(uint64(len(want)))
			return nil
		}
	})
	if err != nil {
		return err
	}
	var want uint64
	for i := range w.plan.Groups {
		g := &w.plan.Groups[i]
		for j := range g.Tensors {
			want += g.Tensors[j].Bytes * uint64(len(g.Devices))
		}
	}
	if n := seen.Load(); n != want {
		return fmt.Errorf("%d bytes were read back of %d", n, want)
	}
	return nil
}
