package hold

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// stuckKeeper answers only while it is not stopped.
type stuckKeeper struct {
	KeeperClient
	mu           sync.Mutex
	goOn         chan struct{} // closed: it answers
	begun, ended atomic.Int64  // requests to keep or to forget
}

func (k *stuckKeeper) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.goOn = make(chan struct{})
}

func (k *stuckKeeper) answer() {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.goOn)
}

func (k *stuckKeeper) wait(ctx context.Context) error {
	k.mu.Lock()
	goOn := k.goOn
	k.mu.Unlock()
	k.begun.Add(1)
	defer k.ended.Add(1)
	select {
	case <-goOn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (k *stuckKeeper) Keep(ctx context.Context, x Kept) error {
	return errors.Join(k.wait(ctx), k.KeeperClient.Keep(ctx, x))
}

func (k *stuckKeeper) Forget(ctx context.Context, id string) error {
	if err := k.wait(ctx); err != nil {
		return err
	}
	return k.KeeperClient.Forget(ctx, id)
}

// TestStuckKeeper: a keeper that is stopped holds up neither loading nor sleeping nor dropping, and what it has of
// device memory counts as taken until it answers.
func TestStuckKeeper(t *testing.T) {
	t.Parallel()
	p, err := plan.New(openFile(t, sample), plan.Spec{Policy: plan.Raw}, []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	var one uint64
	for _, n := range p.Groups[0].Arenas {
		one += sharedSize(n)
	}
	k, log := &stuckKeeper{KeeperClient: keeping(t)}, new(lines)
	k.stop()
	k.answer()
	all := copies(t, 2)
	o := Options{Share: ShareFD, Keep: k, VRAM: one, Logger: log.logger(), Spec: plan.Spec{Policy: plan.Raw}}
	o.Request.Prove = loader.ProveOff
	h := hold(t, o, soft.Options{}).with(t, "a", all[0])
	wantKept(t, k.KeeperClient, 1)
	k.stop()
	for i, gone := range []func() error{func() error { return h.Sleep(t.Context(), "a") }, func() error { return h.Drop("a") }} {
		begun, ended := k.begun.Load(), k.ended.Load()
		if err := gone(); err != nil {
			t.Fatal(err)
		}
		if b, e := k.begun.Load(), k.ended.Load(); b == begun || e != ended {
			t.Errorf("it waited for the keeper: %d requests have begun, %d have ended", b-begun, e-ended)
		}
		if s := h.soft.Stats(); s.Physical+s.Mappings != 0 {
			t.Errorf("of the holder's is left %+v", s)
		}
		name := []string{"a", "b"}[i]
		woken := make(chan error, 1)
		go func() {
			if i == 0 {
				woken <- h.Wake(t.Context(), name)
				return
			}
			_, err := h.Add(t.Context(), name, all[1])
			woken <- errors.Join(err, h.Wait(t.Context(), name))
		}()
		eventually(t, "it is said for whom it waits", func() bool {
			return strings.Contains(h.waitsFor(name), "memory has to be given up by the keeper, process ")
		})
		select {
		case err := <-woken:
			t.Fatalf("memory that the keeper has was taken: %v", err)
		default:
		}
		k.answer()
		if err := <-woken; err != nil {
			t.Fatal(err)
		}
		h.wantState(t, name, stateResident, false)
		wantKept(t, k.KeeperClient, 1)
		k.stop()
	}
	k.answer()
	if n := log.count("device memory is not free before the keeper has given it up"); n != 2 {
		t.Errorf("that is said %d times", n)
	}
	// A load does not wait either.
	if err := h.Drop("b"); err != nil {
		t.Fatal(err)
	}
	k.stop()
	h.with(t, "c", all[0])
	if k.begun.Load() == k.ended.Load() {
		t.Error("it waited for the keeper")
	}
	k.answer()
	wantKept(t, k.KeeperClient, 1)
}
