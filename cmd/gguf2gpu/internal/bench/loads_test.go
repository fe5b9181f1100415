package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var errNoCompiler = errors.New("no compiler")

// machine is a made-up machine: it notes what is measured, and its loads take as long as it says.
type machine struct {
	log     []string
	unable  bool            // the device cannot convert
	seconds []time.Duration // of the loads, in turn
	loads   int
}

func (m *machine) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

// describe returns Loads that measure this machine: the link at 10 GB/s, memory at 20, the file at 5, the disk at 2.
func (m *machine) describe() *Loads {
	return &Loads{
		Load: func(_ context.Context, s Setup) (Result, error) {
			m.note("load %s %s %d %d %d", s.Mode, s.DType, s.Threads, s.Streams, s.Chunk)
			if m.unable && s.Mode == AsyncGPU {
				return Result{}, errNoCompiler
			}
			took := time.Second
			if len(m.seconds) > 0 {
				took = m.seconds[m.loads%len(m.seconds)]
			}
			m.loads++
			return Result{
				Transfer: took, Total: 2 * took, ReadBytes: 1e9, UploadBytes: 4e9, DeviceBytes: 8e9, PinnedBytes: 7,
				Dequant: "cpu",
			}, nil
		},
		Expands:   func(dtype string) bool { return dtype != "raw" },
		LinkSpeed: func(context.Context) (float64, error) { m.note("link"); return 10e9, nil },
		CopySpeed: func(context.Context) (float64, error) { m.note("memory"); return 20e9, nil },
		ReadSpeed: func(_ context.Context, cold bool) (float64, error) {
			m.note("read cold=%v", cold)
			if cold {
				return 2e9, nil
			}
			return 5e9, nil
		},
		Evict:   func() error { m.note("evict"); return nil },
		PeakRSS: func() uint64 { m.note("peak"); return 42 },
		Runs:    1,
		DTypes:  []string{"raw", "f16"},
		CPU:     true,
		Logger:  slog.New(slog.DiscardHandler),
	}
}

// TestMeasureRows: each kind of load is announced before it begins, and its row is there as soon as it ends, with the
// ceilings that it is compared with.
func TestMeasureRows(t *testing.T) {
	t.Parallel()
	var m machine
	l := m.describe()
	l.Runs, l.DTypes, l.Evict = 2, []string{"raw", "f16"}, nil
	l.Step = func(number, count int, what string) { m.note("%d of %d: %s", number, count, what) }
	l.Row = func(c Ceilings, run Run) {
		m.note("row %s %s, %d runs, %g GB/s of %g", run.Mode, run.DType, len(run.Seconds), run.GBps, c.H2D)
	}
	if _, err := l.Measure(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, line := range m.log {
		if strings.HasPrefix(line, "load ") || strings.HasPrefix(line, "row ") || strings.Contains(line, " of ") {
			got = append(got, line)
		}
	}
	var want []string
	for i, kind := range []string{"sync raw", "async raw", "sync f16", "async f16"} {
		load := "load " + kind + " 0 0 0"
		want = append(want, fmt.Sprintf("%d of 4: %s, 2 runs", i+1, kind), load, load, "row "+kind+", 2 runs, 4 GB/s of 10")
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what is said and done (-want +got):\n%s", diff)
	}
}

// TestMeasureOrder keeps the order in which things are measured: the file is warm before the warm loads, the peak of
// memory is taken before the buffers of the memory ceiling count, and the cold loads come last.
func TestMeasureOrder(t *testing.T) {
	t.Parallel()
	var m machine
	r, err := m.describe().Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"read cold=false", "link", "read cold=false",
		"load sync raw 0 0 0", "load async raw 0 0 0", "link", "load sync f16 0 0 0", "load async f16 0 0 0", "link",
		"peak", "memory",
		"evict", "read cold=true", "evict", "load cold raw 0 0 0", "link",
	}
	if diff := cmp.Diff(want, m.log); diff != "" {
		t.Errorf("what was measured (-want +got):\n%s", diff)
	}
	if want := (Ceilings{H2D: 10, Memcpy: 20, Read: 5, ReadCold: 2}); r.Ceilings != want || r.PeakRSS != 42 {
		t.Errorf("ceilings %+v, peak %d; want %+v and 42", r.Ceilings, r.PeakRSS, want)
	}
	if cold := r.Runs[len(r.Runs)-1]; cold.OfDisk != 0.5 || r.Runs[0].OfDisk != 0 {
		t.Errorf("share of the disk %v, and of a warm load %v; want 0.5 and 0", cold.OfDisk, r.Runs[0].OfDisk)
	}
}

// TestMeasureModes chooses who converts.
func TestMeasureModes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name             string
		cpu, gpu, unable bool
		want             string
		err              error
	}{
		{"by the CPU", true, false, false, "sync raw, async raw, sync f16, async f16", nil},
		{"by the device", false, true, false, "sync raw, async raw, sync f16, async-gpu f16", nil},
		{"both ways", true, true, false, "sync raw, async raw, sync f16, async f16, async-gpu f16", nil},
		{"both ways, but the device cannot", true, true, true, "sync raw, async raw, sync f16, async f16", nil},
		{"by a device that cannot", false, true, true, "", errNoCompiler},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := machine{unable: tt.unable}
			l := m.describe()
			l.CPU, l.GPU, l.Evict = tt.cpu, tt.gpu, nil
			r, err := l.Measure(t.Context())
			if !errors.Is(err, tt.err) {
				t.Fatalf("got %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			var got []string
			for _, run := range r.Runs {
				got = append(got, string(run.Mode)+" "+run.DType)
			}
			if got := strings.Join(got, ", "); got != tt.want {
				t.Errorf("measured %s, want %s", got, tt.want)
			}
		})
	}
}

// TestMeasureScaling changes one setting at a time, as f16 if that is measured.
func TestMeasureScaling(t *testing.T) {
	t.Parallel()
	var m machine
	l := m.describe()
	l.Scaling, l.CPU, l.GPU = true, false, true
	r, err := l.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Scaling) != 15 || r.Scaling[4].Setting != "threads=16" || r.Scaling[9].Setting != "chunk=256 KiB" {
		t.Errorf("settings %+v; want 5 numbers of threads, 4 of streams, 6 sizes of chunks", r.Scaling)
	}
	links := 0
	for _, what := range m.log {
		if what == "link" {
			links++
		}
	}
	if links != 7 { // before all, after raw, f16, the cold loads, and each setting
		t.Errorf("the link was measured %d times, want 7", links)
	}
	for _, run := range r.Scaling {
		if run.LinkMost != 10 {
			t.Errorf("%s: no speed of the link around it", run.Setting)
		}
		if run.Mode != AsyncGPU || run.DType != "f16" {
			t.Errorf("%s: %s %s, want the device to convert to f16", run.Setting, run.Mode, run.DType)
		}
	}
	for _, want := range []string{"load async-gpu f16 16 0 0", "load async-gpu f16 0 8 0", "load async-gpu f16 0 0 262144"} {
		if !slices.Contains(m.log, want) {
			t.Errorf("%q was not measured", want)
		}
	}
}

// TestMedians computes speeds from the median of the times.
func TestMedians(t *testing.T) {
	t.Parallel()
	m := machine{seconds: []time.Duration{8 * time.Second, time.Second, 2 * time.Second}}
	l := m.describe()
	l.Runs, l.DTypes = 3, []string{"f16"}
	r, err := l.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := Run{
		Mode: Sync, DType: "f16", Dequant: "cpu", Seconds: []float64{8, 1, 2}, Median: 2, Total: 4, GBps: 2, OfLink: 0.2,
		Device: 4, ReadGBps: 0.5, Pinned: 7, LinkLeast: 10, LinkMost: 10,
	}
	if diff := cmp.Diff(want, r.Runs[0]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := median([]float64{4, 1, 3, 2}); got != 2.5 {
		t.Errorf("median of 1 to 4 is %v, want 2.5", got)
	}
}

// TestMeasureLink measures the link before and after each group of loads, and again after loads that were faster.
func TestMeasureLink(t *testing.T) {
	t.Parallel()
	var m machine
	l := m.describe()
	// One for the ceilings; two after raw, as the loads had 4 GB/s; one after f16; three after the cold loads,
	// and no more.
	speeds := []float64{2e9, 3e9, 5e9, 3e9, 1e9, 2e9, 3e9}
	next := 0
	l.LinkSpeed = func(context.Context) (float64, error) { next++; return speeds[next-1], nil }
	r, err := l.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, run := range r.Runs {
		got = append(got, fmt.Sprintf("%s %s %g–%g", run.Mode, run.DType, run.LinkLeast, run.LinkMost))
	}
	want := []string{"sync raw 2–5", "async raw 2–5", "sync f16 3–5", "async f16 3–5", "cold raw 1–3"}
	if diff := cmp.Diff(want, got); diff != "" || next != len(speeds) || r.Ceilings.H2D != 2 {
		t.Errorf("the link was measured %d times, ceiling %g; want %d and 2 (-want +got):\n%s", next, r.Ceilings.H2D,
			len(speeds), diff)
	}
}

// TestMeasureDisk measures the disk again after cold loads that were faster, past the page cache, and at most twice.
func TestMeasureDisk(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		speeds []float64 // of the disk, in turn; the cold loads read 1 GB/s
		share  float64
	}{
		{"faster than the loads", []float64{2e9}, 0.5},
		{"faster at the second time", []float64{0.5e9, 4e9}, 0.25},
		{"never faster", []float64{0.5e9, 0.8e9, 0.4e9}, 1 / 0.8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var m machine
			l := m.describe()
			next := 0
			l.ReadSpeed = func(_ context.Context, cold bool) (float64, error) {
				if !cold {
					return 5e9, nil
				}
				if m.log[len(m.log)-1] != "evict" {
					t.Error("the disk is measured with the file in the page cache")
				}
				next++
				return tt.speeds[next-1], nil
			}
			r, err := l.Measure(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got := r.Runs[len(r.Runs)-1].OfDisk
			if want := slices.Max(tt.speeds) / 1e9; next != len(tt.speeds) || r.Ceilings.ReadCold != want || got != tt.share {
				t.Errorf("measured %d times, ceiling %g, share %g; want %d, %g, %g", next, r.Ceilings.ReadCold, got,
					len(tt.speeds), want, tt.share)
			}
		})
	}
}

// TestMeasureFails returns the error of each function.
func TestMeasureFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	fail := func(context.Context) (float64, error) { return 0, broken }
	for name, set := range map[string]func(*Loads){
		"link":   func(l *Loads) { l.LinkSpeed = fail },
		"memory": func(l *Loads) { l.CopySpeed = fail },
		"read":   func(l *Loads) { l.ReadSpeed = func(ctx context.Context, _ bool) (float64, error) { return fail(ctx) } },
		"evict":  func(l *Loads) { l.Evict = func() error { return broken } },
		"load": func(l *Loads) {
			l.Load = func(context.Context, Setup) (Result, error) { return Result{}, broken }
		},
		"scaling": func(l *Loads) {
			load := l.Load
			l.Scaling = true
			l.Load = func(ctx context.Context, s Setup) (Result, error) {
				if s.Streams == 8 {
					return Result{}, broken
				}
				return load(ctx, s)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := new(machine).describe()
			set(l)
			if r, err := l.Measure(t.Context()); !errors.Is(err, broken) || r != nil {
				t.Errorf("got %+v, %v; want only the error %v", r, err, broken)
			}
		})
	}
}

// TestLimit: each kind of load gets its share of the time and is done once at least; what does not fit is left out, and
// said.
func TestLimit(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		limit time.Duration
		runs  []int // of each kind that is measured, raw and f16, sync and async, then 15 variants, then cold
		late  int
	}{
		{0, []int{5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5}, 0},
		{time.Hour, []int{5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5}, 0},
		{40 * time.Second, []int{2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2}, 0},
		{6 * time.Second, []int{1, 1, 1, 1, 1, 1}, 14},
		{1, []int{1}, 19},
	} {
		synctest.Test(t, func(t *testing.T) {
			var m machine
			l := m.describe()
			l.Runs, l.Scaling, l.Limit = 5, true, x.limit
			load := l.Load
			l.Load = func(ctx context.Context, s Setup) (Result, error) {
				time.Sleep(time.Second)
				return load(ctx, s)
			}
			r, err := l.Measure(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var runs []int
			for _, run := range append(slices.Clone(r.Runs), r.Scaling...) {
				runs = append(runs, len(run.Seconds))
			}
			if diff := cmp.Diff(x.runs, runs); diff != "" || len(r.Late) != x.late {
				t.Errorf("limit %v: %s\n%q are left out", x.limit, diff, r.Late)
			}
		})
	}
}

// TestTooLarge: what does not fit onto the device is left out, with the reason; if nothing fits, that is the error.
func TestTooLarge(t *testing.T) {
	t.Parallel()
	var m machine
	l := m.describe()
	large := errors.New("f16 is too large")
	l.Fits = func(dtype string) error {
		if dtype == "f16" {
			return large
		}
		return nil
	}
	l.Scaling = true
	r, err := l.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, run := range append(r.Runs, r.Scaling...) {
		if run.DType != "raw" {
			t.Errorf("a load as %s", run.DType)
		}
	}
	if diff := cmp.Diff([]string{"f16 is too large"}, r.TooLarge); diff != "" {
		t.Error(diff)
	}
	l.DTypes = []string{"f16"}
	if _, err := l.Measure(t.Context()); !errors.Is(err, large) {
		t.Error(err)
	}
}
