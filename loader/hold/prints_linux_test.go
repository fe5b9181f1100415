package hold

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// keptOne is the one model that is kept. The test closes its files.
func keptOne(t *testing.T, k Keeper) Kept {
	t.Helper()
	all, err := k.Kept(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("%d models are kept, %v", len(all), err)
	}
	t.Cleanup(func() { closeAll(all[0].Files) })
	return all[0]
}

// flipBit flips a bit in what a descriptor is for.
func flipBit(t *testing.T, file *os.File, at int64) {
	t.Helper()
	var b [1]byte
	if _, err := file.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := file.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// TestAdoptCompares: what is adopted is compared with the fingerprints of its load. What has changed while nobody held
// it is written again from the file; who is attached has the right bytes by then.
func TestAdoptCompares(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first, next loader.Prove
		scrubbed    bool // the next Holder looks again and again
		split       plan.SplitBy
		proved      bool // is known of what is whole
	}{
		"proved":              {loader.ProveOn, loader.ProveAuto, false, plan.SplitLayers, true},
		"proved copies":       {loader.ProveOn, loader.ProveOn, false, plan.SplitNone, true},
		"proved and scrubbed": {loader.ProveOn, loader.ProveAuto, true, plan.SplitLayers, true},
		"not wanted":          {loader.ProveOn, loader.ProveOff, false, plan.SplitLayers, false},
		"not proved":          {loader.ProveOff, loader.ProveOn, false, plan.SplitLayers, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k, log := keeping(t), new(lines)
			o := Options{Share: ShareFD, Keep: k, Logger: log.logger(), Spec: plan.Spec{Split: plan.Split{By: c.split}}}
			o.Request.Prove = c.first
			h := hold(t, o, soft.Options{Devices: 2}).with(t, "m", sample)
			was := h.model(t, "m")
			wantKept(t, k, 1)
			o.Request.Prove = c.next
			if c.scrubbed {
				o.Scrub = 1 << 40 // once, at once
			}
			for round := range 3 { // whole, damaged, and whole again
				h.stop()
				if err := h.Close(); err != nil {
					t.Error(err)
				}
				if round == 1 {
					kept := keptOne(t, k)
					if n := len(kept.Files); (n == 3) != (c.first == loader.ProveOn) {
						t.Errorf("%d descriptors are kept", n)
					}
					flipBit(t, kept.Files[0], 300)
					flipBit(t, kept.Files[1], 70000)
				}
				h = holdAt(t, h.socket, o, soft.Options{Devices: 2})
				if names, err := h.Adopt(t.Context()); err != nil || !slices.Equal(names, []string{"m"}) {
					t.Fatalf("adopted %q, %v", names, err)
				}
				h.with(t, "m", sample)
				if !c.proved {
					h.background.Wait()
					if m := h.model(t, "m"); !m.Adopted || m.Proved || m.Scrub != nil {
						t.Errorf("round %d: %+v", round, m)
					}
					continue
				}
				eventually(t, "it is compared", func() bool { return h.model(t, "m").Proved })
				m := h.model(t, "m")
				s := m.Scrub
				if s == nil || !m.Adopted || m.ProvedBytes != was.ProvedBytes || s.Bytes != was.ProvedBytes || s.Passes != 1 ||
					s.Now != 0 {
					t.Fatalf("round %d: %+v of %+v, before %+v", round, s, m, was)
				}
				if want := []int{0, 2, 0}[round]; s.Damaged != want || s.Rewritten != want {
					t.Errorf("round %d: %+v, want %d blocks", round, s, want)
				}
				a := h.attach(t, "m")
				wantContents(t, a.Model, openFile(t, sample))
				mustClose(t, a)
				h.wantAttached(t, 0)
			}
			if said := log.count("it is taken over as it is") > 0; said != (name == "not proved") {
				t.Errorf("that nothing is known is said: %t", said)
			}
			if n := log.count("what was taken over is what was loaded"); (n == 3) != c.proved {
				t.Errorf("that it is whole is said %d times", n)
			}
		})
	}
}

// TestAdoptDamaged: damage without a file to write it again from is said, and stays.
func TestAdoptDamaged(t *testing.T) {
	t.Parallel()
	k, log := keeping(t), new(lines)
	b, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	o := Options{Share: ShareFD, Keep: k, Logger: log.logger(), Request: loader.Request{Prove: loader.ProveOn}}
	h := hold(t, o, soft.Options{}).with(t, "", path)
	wantKept(t, k, 1)
	flipBit(t, keptOne(t, k).Files[0], 300)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	h = h.again(t, o)
	if _, err := h.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.background.Wait()
	m := h.model(t, "m")
	if s := m.Scrub; m.State != stateResident || m.Proved || m.ProvedBytes != 0 || s == nil || s.Now != 1 ||
		s.Damaged != 1 || s.Rewritten != 0 {
		t.Errorf("%+v of %+v", s, m)
	}
	if log.count("device memory stays damaged") != 1 || log.count("what was taken over is what was loaded") != 0 {
		t.Errorf("the log says %s", log.all.String())
	}
}

// TestBadPrints: with fingerprints that cannot be those of the model it is adopted as if there were none.
func TestBadPrints(t *testing.T) {
	t.Parallel()
	k, log := keeping(t), new(lines)
	o := Options{Share: ShareFD, Keep: k, Logger: log.logger(), Request: loader.Request{Prove: loader.ProveOn}}
	h := hold(t, o, soft.Options{}).with(t, "m", sample)
	wantKept(t, k, 1)
	good := keptOne(t, k)
	for _, n := range []int64{0, 8, 1 << 20} {
		short, err := memoryFile("test", []byte("x"))
		if err == nil {
			err = short.Truncate(n)
		}
		bad := Kept{ID: good.ID, Description: good.Description, Files: []*os.File{good.Files[0], short}}
		if err := errors.Join(err, k.Keep(t.Context(), bad), short.Close()); err != nil {
			t.Fatal(err)
		}
		h = h.again(t, o)
		if names, err := h.Adopt(t.Context()); err != nil || len(names) != 1 {
			t.Fatalf("%d bytes: adopted %q, %v", n, names, err)
		}
		h.background.Wait()
		if m := h.model(t, "m"); m.Proved || m.Scrub != nil {
			t.Errorf("%d bytes: %+v", n, m)
		}
	}
	if n := log.count("cannot be compared with what was loaded"); n != 3 {
		t.Errorf("that is said %d times", n)
	}
	without := Kept{ID: good.ID, Files: good.Files}
	without.Description = []byte(strings.Replace(string(good.Description), `"prints":true`, `"prints":false`, 1))
	if err := k.Keep(t.Context(), without); err != nil {
		t.Fatal(err)
	}
	h = h.again(t, o)
	if names, err := h.Adopt(t.Context()); err != nil || len(names) != 0 || log.count("there are 2 descriptors for 1 allocations") != 1 {
		t.Errorf("a descriptor too many: adopted %q, %v", names, err)
	}
}
