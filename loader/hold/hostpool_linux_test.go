package hold

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// kernelFiles writes what the kernel says of memory below a new root. Sizes are in bytes; limit is text.
type kernelFiles struct {
	available, group, locked uint64
	limit                    string
	capabilities             uint64
}

func (k kernelFiles) write(t *testing.T, root string) string {
	t.Helper()
	for name, text := range map[string]string{
		"proc/meminfo":             fmt.Sprintf("MemTotal: 1 kB\nMemAvailable:  %d kB\n", k.available/1024),
		"proc/self/cgroup":         "0::/pod\n",
		"sys/fs/cgroup/memory.max": fmt.Sprintln(k.group),
		"proc/self/status": fmt.Sprintf("Name:\tx\nVmLck:\t%8d kB\nVmPin:\t       0 kB\nCapEff:\t%016x\n", k.locked/1024,
			k.capabilities),
		"proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units\n" +
			"Max locked memory         " + k.limit + "              9999999999              bytes\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestHostPoolLimits makes page-locked memory under limits of the host, of the control group and of locked memory.
// Those are looked at for all that is missing, before anything is made. That of locked memory counts once the kernel
// has counted a piece.
func TestHostPoolLimits(t *testing.T) {
	t.Parallel()
	const much = 1 << 40
	plenty := kernelFiles{available: much, group: much, limit: "8388608"}
	with := func(change func(k *kernelFiles)) kernelFiles {
		k := plenty
		change(&k)
		return k
	}
	for _, tt := range []struct {
		name   string
		files  kernelFiles
		counts bool // the driver's memory counts as locked
		pieces int  // that are made of four of 2 MiB
		err    string
	}{
		{"plenty, and a driver that does not count", plenty, false, 4, ""},
		{"the host", with(func(k *kernelFiles) { k.available = hostReserve + 7<<20 }), false, 0, "has 519 MiB left"},
		{"the control group", with(func(k *kernelFiles) { k.group = hostReserve + 7<<20 }), false, 0, "has 519 MiB left"},
		{"locked memory, just enough", plenty, true, 4, ""},
		{
			"locked memory", with(func(k *kernelFiles) { k.locked = 1 << 20 }), true, 1,
			"6.0 MiB more are needed, 3.0 MiB are locked, and the limit of locked memory is 8.0 MiB",
		},
		{"no limit", with(func(k *kernelFiles) { k.limit, k.locked = "unlimited", 1<<30 }), true, 4, ""},
		{"root", with(func(k *kernelFiles) { k.capabilities = 1 << 14; k.locked = 1 << 30 }), true, 4, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, devices := openSoft(t, soft.Options{})
			files, root := tt.files, t.TempDir()
			files.write(t, root)
			made := 0
			calls := new(watch.Calls)
			p := &hostPool{budget: 8 << 20, slab: 2 << 20, root: root}
			p.make = func(n int) (*amdhip.HostMemory, error) {
				made++
				if tt.counts {
					files.locked += uint64(n)
					files.write(t, root)
				}
				return devices[0].HostMalloc(n)
			}
			p.limit = func() *watch.Limit { return calls.Limit(time.Minute) }
			p.rest = func() *watch.Limit { return calls.Rest(time.Minute) }
			slabs, err := p.take(t.Context(), 8<<20, nil)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if made != tt.pieces || (err == nil) != (len(slabs) == 4) {
				t.Errorf("%d pieces were made, %d returned, want %d", made, len(slabs), tt.pieces)
			}
			if n := p.bytes(); n != int64(made)<<21 {
				t.Errorf("%d bytes count as used", n)
			}
			p.putSlabs(slabs)
			if err := p.close(); err != nil || p.bytes() != 0 {
				t.Errorf("%v, %d bytes are left", err, p.bytes())
			}
		})
	}
	if left, ok := hostLeft("/"); !ok || left == 0 {
		t.Errorf("this host has %d bytes left, %t", left, ok)
	}
	if l := lockedMemory("/"); !l.known {
		t.Error("it is not known how much is locked")
	}
}

// TestControlGroupLimit: a Holder in a control group that is too small for its page-locked memory says so once, takes
// none, and goes on without that tier.
func TestControlGroupLimit(t *testing.T) {
	t.Parallel()
	log := new(lines)
	root := kernelFiles{available: 1 << 40, group: hostReserve, limit: "unlimited"}.write(t, t.TempDir())
	o := Options{RAM: 1 << 30, Spec: plan.Spec{Policy: plan.Raw}, Logger: log.logger(), root: root}
	h := hold(t, o, soft.Options{})
	for i, path := range copies(t, 2) {
		name := fmt.Sprintf("m%d", i)
		h.with(t, name, path)
		if err := errors.Join(h.Sleep(t.Context(), name), h.Wake(t.Context(), name)); err != nil {
			t.Fatal(err)
		}
	}
	if n := log.count("page-locked memory can be had"); n != 1 {
		t.Errorf("it was said %d times", n)
	}
	if n := h.pool.bytes(); n != 0 {
		t.Errorf("%d bytes of page-locked memory", n)
	}
}
