package loader

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// mapping is memory of another model, as an adopted one has it.
type mapping struct{ closed *atomic.Int64 }

func (m mapping) Close() error { m.closed.Add(1); return nil }

// adopted is a model that was loaded, and one that has adopted its memory.
type adopted struct {
	file     *gguf.File
	devs     []*amdhip.Device
	sw       *soft.Software
	owner    *Model
	model    *Model
	feed     *Feed
	unmapped atomic.Int64 // mappings that were closed
	released atomic.Int64 // calls of release
}

func adopt(t *testing.T, by plan.SplitBy) *adopted {
	t.Helper()
	a := &adopted{file: llama(t)}
	a.devs, a.sw = openDevices(t, 2, soft.Options{})
	o := options{Share: true, Split: plan.Split{By: by}}
	var err error
	if a.owner, err = load(t.Context(), a.file, o, a.devs...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mustClose(t, a.owner) })
	all, err := a.owner.Allocations()
	if err != nil {
		t.Fatal(err)
	}
	memory := make([][]Mapping, 2)
	for _, x := range all {
		memory[x.Device] = append(memory[x.Device], Mapping{Ptr: x.Memory.Ptr(), Memory: mapping{&a.unmapped}})
	}
	a.model, a.feed = Adopt(a.owner.Plan(), a.devs, memory, 0, func() error {
		if n := int(a.unmapped.Load()); n != len(all) {
			t.Errorf("given back with %d of %d mappings closed", n, len(all))
		}
		a.released.Add(1)
		return nil
	})
	return a
}

// TestAdopt: tensors of memory that somebody else fills are ready when that is said, and have the same addresses.
func TestAdopt(t *testing.T) {
	t.Parallel()
	for _, by := range bothSplits {
		synctest.Test(t, func(t *testing.T) {
			a := adopt(t, by)
			tensors := a.model.Plan().Tensors()
			arrived := make(chan string, len(tensors))
			for _, x := range tensors[:3] {
				go func() {
					if err := a.model.Wait(t.Context(), x.Name); err != nil {
						t.Error(err)
					}
					arrived <- x.Name
				}()
			}
			synctest.Wait()
			if len(arrived) != 0 {
				t.Errorf("%d tensors are ready before anybody says so", len(arrived))
			}
			a.feed.Arrived(2)
			a.feed.Arrived(1) // what was said before counts on
			synctest.Wait()
			if len(arrived) != 2 {
				t.Errorf("%d tensors are ready, 2 were said to be", len(arrived))
			}
			a.feed.Loaded()
			a.feed.Loaded()
			s := newStream(t, a.devs[1])
			if err := errors.Join(a.model.WaitAll(t.Context()), verify(t.Context(), a.model, a.file)); err != nil {
				t.Error(err)
			}
			for _, x := range a.owner.Tensors() {
				got, err := a.model.Tensor(x.Name)
				if err != nil || got.Ptr != x.Ptr || got.Device != x.Device || got.Bytes != x.Bytes {
					t.Errorf("%+v, %v, want %+v", got, err, x)
				}
			}
			select {
			case <-a.model.Gone():
				t.Error("gone, although nobody said so")
			default:
			}
			mustClose(t, a.model)
			mustClose(t, a.model)
			if a.released.Load() != 1 {
				t.Errorf("given back %d times", a.released.Load())
			}
			wantClosed(t, a.model, s, tensors[0].Name)
		})
	}
}

// TestLost: memory that is lost must not be used, whether the load was over or not.
func TestLost(t *testing.T) {
	t.Parallel()
	gone := errors.New("its holder has gone")
	for _, over := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a := adopt(t, plan.SplitLayers)
			name := a.model.Plan().Tensors()[0].Name
			if a.feed.Arrived(1); over {
				a.feed.Loaded()
			}
			waiting := make(chan error, 1)
			go func() { waiting <- a.model.WaitAll(t.Context()) }()
			synctest.Wait()
			a.feed.Lose(gone)
			<-a.model.Gone()
			if err := <-waiting; over && err != nil || !over && !errors.Is(err, gone) {
				t.Errorf("loaded %v: WaitAll: %v", over, err)
			}
			_, tensor := a.model.Tensor(name)
			for what, err := range map[string]error{
				"Wait": a.model.Wait(t.Context(), name), "WaitAll": a.model.WaitAll(t.Context()), "Tensor": tensor,
				"WaitStream": a.model.WaitStream(t.Context(), newStream(t, a.devs[0]), name),
				"ReadBack":   verify(t.Context(), a.model, a.file),
			} {
				if !errors.Is(err, gone) {
					t.Errorf("%s: %v, want %v", what, err, gone)
				}
			}
			mustClose(t, a.model)
			if a.released.Load() != 1 || a.unmapped.Load() != 2 {
				t.Errorf("given back %d times, %d mappings were closed", a.released.Load(), a.unmapped.Load())
			}
			if err := a.model.Wait(t.Context(), name); !errors.Is(err, ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		})
	}
}

// TestAdoptedStall: when a device hangs while it is read, the memory is neither unmapped nor given back.
func TestAdoptedStall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := llama(t)
		devs, sw := leakyDevices(t, 1, soft.Options{})
		owner, err := load(t.Context(), f, options{Share: true}, devs...)
		if err != nil {
			t.Fatal(err)
		}
		all, err := owner.Allocations()
		if err != nil {
			t.Fatal(err)
		}
		unmapped, released := new(atomic.Int64), false
		memory := [][]Mapping{{{Ptr: all[0].Memory.Ptr(), Memory: mapping{unmapped}}}}
		w, feed := Adopt(owner.Plan(), devs, memory, 0, func() error { released = true; return nil })
		feed.Loaded()
		sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
		if err := verify(t.Context(), w, f); !errors.Is(err, ErrStalled) {
			t.Errorf("%v, want ErrStalled", err)
		}
		if e, ok := errors.AsType[*LeftError](w.Close()); !ok || unmapped.Load() != 0 || released {
			t.Errorf("%v; %d mappings were closed, given back %v", e, unmapped.Load(), released)
		}
	})
}
