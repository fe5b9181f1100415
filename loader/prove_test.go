package loader

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// provedWays are ways to load that are to be proved.
var provedWays = []struct {
	name    string
	devices int
	apu     bool
	load    loadFunc
	o       options
}{
	{"default", 1, false, load, options{}},
	{"tight", 1, false, load, tight},
	{"one", 1, false, load, options{Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1}},
	{"odd", 1, false, load, options{Chunk: 100_001, Hash: true}},
	{"direct", 1, false, load, options{IO: IODirect}},
	{"mapped", 1, false, load, options{IO: IOMapped}},
	{"gpu", 1, false, load, options{Dequant: DequantGPU}},
	{"gpu tight", 1, false, load, onGPU(tight, 0)},
	{"sync", 1, false, loadSync, options{}},
	{"sync tight", 1, false, loadSync, tight},
	{"apu", 1, true, load, options{}},
	{"apu tight", 1, true, load, tight},
	{"apu gpu", 1, true, load, options{Dequant: DequantGPU}},
	{"apus", 2, true, load, options{}},
	{"layers", 3, false, load, options{}},
	{"layers gpu", 2, false, load, options{Dequant: DequantGPU}},
	{"layers sync", 3, false, loadSync, options{}},
	{"copies", 2, false, load, options{Split: plan.Split{By: plan.SplitNone}}},
	{"copies gpu", 3, false, load, options{Dequant: DequantGPU, Split: plan.Split{By: plan.SplitNone}}},
	{"copies apu", 2, true, load, options{Split: plan.Split{By: plan.SplitNone}}},
	{"copies sync", 2, false, loadSync, options{Split: plan.Split{By: plan.SplitNone}}},
	{"slices", 1, false, load, options{Shard: plan.Shard{By: plan.ShardTensors, Rank: 1, World: 2}}},
	{"slices tight", 1, false, load, withShard(tight)},
	{"slices gpu", 1, false, load, withShard(options{Dequant: DequantGPU, Chunk: 64 << 10})},
	{"slices direct", 1, false, load, withShard(options{IO: IODirect, Chunk: 64 << 10})},
	{"slices sync", 1, false, loadSync, withShard(options{})},
}

// withShard returns the options for one of two ranks that have slices.
func withShard(o options) options {
	o.Shard = plan.Shard{By: plan.ShardTensors, Rank: 1, World: 2}
	return o
}

// TestProve proves loads of all kinds, and compares the fingerprints that the model has with those of what is on the
// devices.
func TestProve(t *testing.T) {
	t.Parallel()
	models := map[string]*gguf.File{"llama": llama(t), "tiny": openModel(t, sample), "types": openModel(t, allTypes)}
	for _, way := range provedWays {
		for name, f := range models {
			if way.o.Shard.World > 0 && name != "llama" {
				continue
			}
			for _, policy := range plan.Policies() {
				if policy != plan.Raw && policy != plan.F16 && way.name != "default" {
					continue // these differ in what bytes become, not in how they travel
				}
				t.Run(fmt.Sprintf("%s/%s/%v", way.name, name, policy), func(t *testing.T) {
					t.Parallel()
					devs, sw := openDevices(t, way.devices, soft.Options{Integrated: way.apu, Poison: true})
					o := way.o.on(way.devices)
					o.Policy, o.Prove = policy, ProveOn
					w, err := way.load(t.Context(), f, o, devs...)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					wantProved(t, w)
					if err := verify(t.Context(), w, f); err != nil {
						t.Error(err)
					}
					if s := sw.Stats(); s.DeviceBytes > w.Report().DeviceBytes || s.Modules != 0 {
						t.Errorf("%d bytes on the devices, want %d; %d modules", s.DeviceBytes, w.Report().DeviceBytes, s.Modules)
					}
				})
			}
		}
	}
}

// travels is how many bytes of t travel to a device.
func travels(w *Model, t *plan.Tensor) uint64 {
	if w.Report().Expanded > 0 && isExpandable(t, false, false) {
		return uint64(t.Size)
	}
	return t.Bytes
}

// wantProved wants the report to say that everything is proved, and the model to have the fingerprints of what is on
// the devices.
func wantProved(t *testing.T, w *Model) {
	t.Helper()
	r := w.Report()
	var bytes uint64
	for _, p := range w.parts {
		for i := range p.group.Tensors {
			bytes += travels(w, &p.group.Tensors[i]) * uint64(len(p.on))
		}
	}
	if !r.Proved || r.ProvedTensors != w.Plan().Len() || r.ProvedBytes != bytes || r.Unproved != "" {
		t.Errorf("proved: %v, %d of %d tensors, %d of %d bytes, %q", r.Proved, r.ProvedTensors, w.Plan().Len(),
			r.ProvedBytes, bytes, r.Unproved)
	}
	all, err := w.Fingerprints()
	if err != nil {
		t.Fatal(err)
	}
	has := make(map[string][]byte)
	for _, dev := range w.Devices() {
		for name, b := range contentsOn(t, w, dev) {
			has[fmt.Sprint(dev.Index(), name)] = b
		}
	}
	for _, x := range all {
		key := fmt.Sprint(x.Device.Index(), x.Tensor.Name)
		b := has[key]
		delete(has, key)
		want := make([]uint64, kernels.Fingerprints(int64(len(b))))
		kernels.Fingerprint(want, b)
		on, err := w.TensorOn(x.Device, x.Tensor.Name)
		if !slices.Equal(x.Sums, want) || x.Bytes != int64(len(b)) || err != nil || on.Ptr != x.Ptr {
			t.Errorf("%s: %d bytes at %#x with fingerprints %x; there are %d bytes at %#x with %x", x.Tensor.Name, x.Bytes, x.Ptr, x.Sums,
				len(b), on.Ptr, want)
		}
	}
	for key, b := range has {
		if len(b) > 0 {
			t.Errorf("%s: no fingerprints", key)
		}
	}
}

// TestProveReadsNothingBack: a load that is proved copies as many bytes as one that is not, and 8 for each fingerprint.
func TestProveReadsNothingBack(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	for name, o := range map[string]options{"cpu": {}, "gpu": {Dequant: DequantGPU}, "raw": {Policy: plan.Raw}} {
		var copied [2]uint64
		var copies [2]int64
		for i, prove := range []Prove{ProveOff, ProveOn} {
			dev, sw := openDevice(t, soft.Options{})
			l := newLoader(t, o, dev)
			p := mustPlan(t, l, f, o)
			for range 2 { // the first makes the kernels ready
				before := sw.Stats()
				w, err := l.Load(t.Context(), p, Request{Prove: prove})
				if err != nil {
					t.Fatal(err)
				}
				if r := w.Report(); r.Proved != (prove == ProveOn) {
					t.Errorf("%s: proved: %v", name, r.Proved)
				}
				mustClose(t, w)
				copied[i], copies[i] = sw.Stats().CopiedBytes-before.CopiedBytes, sw.Stats().Copies-before.Copies
			}
		}
		if more := copied[1] - copied[0]; copies[1] != copies[0]+1 || more == 0 || more > copied[0]/1000 {
			t.Errorf("%s: %d copies of %d bytes, and with a proof %d of %d", name, copies[0], copied[0], copies[1], copied[1])
		}
	}
}

// TestProveAuto proves where it costs next to nothing, and says why it does not elsewhere.
func TestProveAuto(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	for _, x := range []struct {
		name string
		o    options
		apu  bool
		want error // nil: it is proved
	}{
		{"software", options{}, false, errSoftware},
		{"integrated", options{}, true, errSoftware},
		{"taken for a GPU", options{autoProve: true}, false, nil},
		{"off", options{autoProve: true, Prove: ProveOff}, false, nil},
	} {
		dev, _ := openDevice(t, soft.Options{Integrated: x.apu})
		w, err := load(t.Context(), f, x.o, dev)
		if err != nil {
			t.Fatal(err)
		}
		why := ""
		if x.want != nil {
			why = x.want.Error()
		}
		if r := w.Report(); r.Proved != (x.o.autoProve && x.o.Prove == ProveAuto) || r.Unproved != why {
			t.Errorf("%s: proved: %v, %q", x.name, r.Proved, r.Unproved)
		}
		if all, err := w.Fingerprints(); err != nil || len(all) > 0 != w.Report().Proved {
			t.Errorf("%s: %d fingerprints, %v", x.name, len(all), err)
		}
		mustClose(t, w)
		if _, err := w.Fingerprints(); err != ErrClosed {
			t.Errorf("%s: fingerprints after Close: %v", x.name, err)
		}
	}
}

// TestProveImage loads from an Image, and wants the same to be proved.
func TestProveImage(t *testing.T) {
	t.Parallel()
	for _, path := range []string{sample, allTypes} {
		f := openModel(t, path)
		for _, policy := range plan.Policies() {
			for name, o := range map[string]options{
				"cpu": {Policy: policy, Dequant: DequantCPU}, "tight": onGPU(tight, policy), "gpu": onGPU(options{}, policy),
				"mixed": {Policy: policy, Dequant: DequantCPU, Rules: []plan.Rule{mustRule(t, "attn=raw")}},
				"two":   onGPU(options{Split: plan.Split{By: plan.SplitNone}, Chunk: 64 << 10}, policy),
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(path), policy, name), func(t *testing.T) {
					t.Parallel()
					n := 1
					if name == "two" {
						n = 2
					}
					devs, _ := openDevices(t, n, soft.Options{Poison: true})
					l := newLoader(t, o, devs...)
					made := mustPlan(t, l, f, options{Policy: plan.Raw, Split: o.Split})
					im := imageOf(t, devs[0], f, made.Plan, 100_000)
					p, err := l.PlanImage(mustPlan(t, l, f, o).Plan, im)
					if err != nil {
						t.Fatal(err)
					}
					w, err := l.Load(t.Context(), p, Request{Prove: ProveOn})
					if err != nil {
						t.Fatal(err)
					}
					same(t, w.Plan(), contents(t, w), wanted(t, f, o))
					if r := w.Report(); !r.Proved || r.ProvedTensors != w.Plan().Len() {
						t.Errorf("proved: %v, %d of %d tensors", r.Proved, r.ProvedTensors, w.Plan().Len())
					}
					mustClose(t, w)
					for _, x := range p.Tensors() {
						if x.Size == 0 {
							continue
						}
						off := x.Size * 2 / 3
						flipImage(im, x, off)
						_, err := l.Load(t.Context(), p, Request{Prove: ProveOn})
						wantDamage(t, err, ProveError{
							Device: devs[0], Tensor: x.Name, Offset: off, Bit: 3, Host: true, InFile: x.Target != x.Type, Blocks: 1,
						})
						flipImage(im, x, off)
					}
					if w, err = l.Load(t.Context(), p, Request{Prove: ProveOn}); err != nil {
						t.Fatal(err)
					}
					mustClose(t, w)
				})
			}
		}
	}
}

// flipImage flips bit 3 of a byte of a tensor in an Image.
func flipImage(im *Image, x *plan.Tensor, off int64) {
	im.each(im.places[x.Name].off+off, 1, func(slab, from, _, _ int) { im.slabs[slab].Bytes()[from] ^= 1 << 3 })
}

// wantDamage wants err to be a *ProveError like want, whose Offset and Bit are those of the one bit that was flipped.
func wantDamage(t *testing.T, err error, want ProveError) {
	t.Helper()
	e, ok := errors.AsType[*ProveError](err)
	if !ok {
		t.Fatalf("%v, want a *ProveError: %+v", err, want)
	}
	byte, bit := e.Offset+e.Bit/8, e.Bit%8
	if e.Device != want.Device || e.Tensor != want.Tensor || byte != want.Offset || bit != want.Bit ||
		e.InFile != want.InFile || e.Host != want.Host ||
		e.Blocks != want.Blocks || e.Offset%kernels.FingerprintBlock != 0 || e.Want == e.Got {
		t.Errorf("%+v, want %+v", *e, want)
	}
	bitOf := fmt.Sprintf("bit %d of byte %d", want.Bit, want.Offset)
	for _, part := range []string{fmt.Sprintf("tensor %q", want.Tensor), bitOf, fmt.Sprintf("%#016x", e.Got)} {
		if !strings.Contains(e.Error(), part) {
			t.Errorf("%q does not say %q", e.Error(), part)
		}
	}
}

// TestProveRemote proves loads of a model on a server, and of one that can be read only once.
func TestProveRemote(t *testing.T) {
	t.Parallel()
	for _, once := range []bool{false, true} {
		f := openPicky(t, sample, &pickySource{reading: gguf.Reading{Once: once, MaxRange: 128 << 10}})
		for name, o := range map[string]options{
			"raw": {Policy: plan.Raw}, "f16": {Connections: 3}, "gpu": {Dequant: DequantGPU}, "slices": withShard(options{Hash: true}),
		} {
			for kind, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
				if kind == "LoadSync" && name == "gpu" {
					continue // it converts on the CPU
				}
				o.Prove = ProveOn
				if o.Shard.World > 0 {
					o.Shard.Rules = mustShardRules(t, "attn_output|ffn_down=rows")
				}
				dev, _ := openDevice(t, soft.Options{Poison: true})
				w, err := load(t.Context(), f, o, dev)
				if err != nil {
					t.Fatalf("%s, %s: %v", name, kind, err)
				}
				wantProved(t, w)
				mustClose(t, w)
			}
		}
	}
}

// TestProveTogether proves several loads of one Loader at the same time, which share streams, and one after the other,
// which share the memory for sums.
func TestProveTogether(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	devs, sw := openDevices(t, 2, soft.Options{})
	o := tight.on(2)
	l := newLoader(t, o, devs...)
	p := mustPlan(t, l, f, o)
	most := 0
	for range 3 {
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() {
				w, err := l.Load(t.Context(), p, Request{Prove: Prove(i % 2)}) // auto, which does not prove here, and on
				if err != nil {
					t.Error(err)
					return
				}
				if r := w.Report(); r.Proved != (i%2 == int(ProveOn)) {
					t.Errorf("proved: %v", r.Proved)
				}
				mustClose(t, w)
			})
		}
		all.Wait()
		if n := sw.Stats().Allocations; most > 0 && n > most {
			t.Errorf("%d allocations are kept, %d before", n, most)
		} else if most == 0 {
			most = n + 2 // the loads may not have overlapped yet
		}
	}
}
