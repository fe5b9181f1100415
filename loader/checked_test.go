package loader

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"regexp"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// pickySource is a file in memory that says how it has to be read, and checks what was read.
type pickySource struct {
	data    []byte
	reading gguf.Reading
	check   func(ctx context.Context, whole bool) error

	mu     sync.Mutex
	ranges [][2]int64
}

func (s *pickySource) Path() string          { return "picky" }
func (s *pickySource) Size() int64           { return int64(len(s.data)) }
func (s *pickySource) Close() error          { return nil }
func (s *pickySource) Reading() gguf.Reading { return s.reading }

func (s *pickySource) Check(ctx context.Context, whole bool) error { return s.check(ctx, whole) }

func (s *pickySource) Range(_ context.Context, off, n int64) io.ReadCloser {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ranges = append(s.ranges, [2]int64{off, off + n})
	return io.NopCloser(bytes.NewReader(s.data[off : off+n]))
}

// openPicky opens the model at a path by way of s.
func openPicky(t *testing.T, path string, s *pickySource) *gguf.File {
	t.Helper()
	var err error
	if s.data, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if s.check == nil {
		s.check = func(context.Context, bool) error { return nil }
	}
	f, err := gguf.OpenSource(t.Context(), "m.gguf", func(context.Context, string) (gguf.Source, error) { return s, nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	s.ranges = nil
	return f
}

// TestCheckedBesideTheLoad: tensors can be used before it is clear that the bytes are right. If they are not, the load
// fails and frees its memory.
func TestCheckedBesideTheLoad(t *testing.T) {
	t.Parallel()
	wrong := errors.New("wrong digest")
	for _, right := range []bool{true, false} {
		decided := make(chan struct{})
		s := &pickySource{check: func(ctx context.Context, whole bool) error {
			if !whole {
				t.Error("the whole model was loaded")
			}
			<-decided
			if right {
				return nil
			}
			return wrong
		}}
		f := openPicky(t, sample, s)
		dev, sw := openDevice(t, soft.Options{})
		m := start(t.Context(), t, f, options{Policy: plan.Raw}, dev)
		for _, x := range f.Tensors() {
			if err := m.Wait(t.Context(), x.Name); err != nil {
				t.Error(err)
			}
		}
		select {
		case <-m.finished:
			t.Error("the load has ended before the check")
		default:
		}
		close(decided)
		if err := m.WaitAll(t.Context()); right && err != nil || !right && !errors.Is(err, wrong) {
			t.Errorf("right %t: %v", right, err)
		}
		if n := sw.Stats().Allocations; right == (n == 0) {
			t.Errorf("right %t: %d allocations", right, n)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		for _, load := range []loadFunc{load, loadSync} {
			m, err := load(t.Context(), f, options{}, dev)
			if right && err != nil || !right && !errors.Is(err, wrong) {
				t.Errorf("right %t: %v", right, err)
			}
			if m != nil {
				m.Close()
			}
			if n := sw.Stats().Allocations; n != 0 {
				t.Errorf("right %t: %d allocations are left", right, n)
			}
		}
	}
}

// TestCheckIsCancelled: closing a model ends its check.
func TestCheckIsCancelled(t *testing.T) {
	t.Parallel()
	checking := make(chan struct{})
	f := openPicky(t, sample, &pickySource{check: func(ctx context.Context, _ bool) error {
		close(checking)
		<-ctx.Done()
		return context.Cause(ctx)
	}})
	dev, _ := openDevice(t, soft.Options{})
	m := start(t.Context(), t, f, options{}, dev)
	<-checking
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestCheckOfAShare: a source is told when not all of the model was loaded.
func TestCheckOfAShare(t *testing.T) {
	t.Parallel()
	for _, o := range []options{
		{Tensors: regexp.MustCompile("norm")},
		{Shard: plan.Shard{By: plan.ShardLayers, Rank: 0, World: 2}},
		{Shard: plan.Shard{By: plan.ShardTensors, World: 1}},
	} {
		asked := false
		f := openPicky(t, sample, &pickySource{check: func(_ context.Context, whole bool) error {
			asked = true
			if whole {
				t.Errorf("%+v: all was loaded", o.spec())
			}
			return nil
		}})
		dev, _ := openDevice(t, soft.Options{})
		m, err := load(t.Context(), f, o, dev)
		if err != nil || !asked {
			t.Fatal(err, asked)
		}
		m.Close()
	}
}

// TestReadOnce: what can be read only once is read in order, onto one device, and onto several, whether they get all of
// it or layers each. The synchronous loader would not read layers in order.
func TestReadOnce(t *testing.T) {
	t.Parallel()
	for _, o := range []options{
		{},
		{Policy: plan.Raw, Connections: 16},
		rawTight(),
		{Shard: plan.Shard{By: plan.ShardTensors, World: 1}},
		{Hash: true},
		{Split: plan.Split{By: plan.SplitNone}},
	} {
		for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
			for n := 1; n <= 3; n++ {
				s := &pickySource{reading: gguf.Reading{Once: true}}
				f := openPicky(t, sample, s)
				devs, _ := openDevices(t, n, soft.Options{})
				m, err := load(t.Context(), f, o, devs...)
				if name == "LoadSync" && n > 1 && o.Split.By == plan.SplitLayers {
					if !errors.Is(err, ErrBadOption) {
						t.Errorf("%s on %d devices: %v", name, n, err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				end := int64(0)
				for _, r := range s.ranges {
					if r[0] < end {
						t.Errorf("%s on %d devices, %+v: byte %d is read after byte %d", name, n, o, r[0], end)
					}
					end = r[1]
				}
				if len(s.ranges) == 0 || m.Report().Connections != 1 && (name == "Load" || n == 1) {
					t.Errorf("%s on %d devices: %d ranges, %d connections", name, n, len(s.ranges), m.Report().Connections)
				}
				same(t, m.Plan(), contents(t, m), wanted(t, openModel(t, sample), o))
				m.Close()
			}
		}
	}
}

// TestShortRanges: a source may want short ranges.
func TestShortRanges(t *testing.T) {
	t.Parallel()
	path := makeModel(t, nil, []made{{"a", gguf.F32, []uint64{4 << 20}}, {"b", gguf.F16, []uint64{1000, 1000}}}).Parts()[0].Path
	for _, most := range []int64{64 << 10, 2 << 20, 0} {
		s := &pickySource{reading: gguf.Reading{MaxRange: most}}
		f := openPicky(t, path, s)
		dev, _ := openDevice(t, soft.Options{})
		m, err := load(t.Context(), f, options{Policy: plan.Raw, Connections: 2}, dev)
		if err != nil {
			t.Fatal(err)
		}
		longest := int64(0)
		for _, r := range s.ranges {
			longest = max(longest, r[1]-r[0])
		}
		if most > 0 && longest > most || most == 0 && longest <= 2<<20 {
			t.Errorf("at most %d bytes are wanted, %d were asked for", most, longest)
		}
		m.Close()
	}
}
