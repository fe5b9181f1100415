package trace

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// written is an event as a reader of the file has it.
type written struct {
	Name string
	Ph   string
	Ts   float64
	Dur  *float64
	Pid  int
	Tid  int
	Args map[string]any
}

// start and end in nanoseconds.
func (e *written) start() int64 { return int64(e.Ts*1000 + 0.5) }
func (e *written) end() int64   { return e.start() + int64(*e.Dur*1000+0.5) }

// write writes t and reads it again: the spans by the name of their track, and the names in their order.
func write(t *testing.T, tr *Trace) (spans map[string][]written, tracks []string) {
	t.Helper()
	var b bytes.Buffer
	n, err := tr.WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatal(n, err)
	}
	var all struct {
		TraceEvents     []written
		DisplayTimeUnit string
	}
	if err := json.Unmarshal(b.Bytes(), &all); err != nil || all.DisplayTimeUnit != "ms" {
		t.Fatal(all.DisplayTimeUnit, err)
	}
	names, process := make(map[int]string), ""
	spans = make(map[string][]written)
	for _, e := range all.TraceEvents {
		switch {
		case e.Pid != 1:
			t.Errorf("an event of process %d", e.Pid)
		case e.Ph == "M" && e.Name == "process_name":
			process = e.Args["name"].(string)
		case e.Ph == "M" && e.Name == "thread_name":
			names[e.Tid] = e.Args["name"].(string)
			tracks = append(tracks, names[e.Tid])
		case e.Ph == "M" && e.Name == "thread_sort_index":
			if i := int(e.Args["sort_index"].(float64)); i != len(tracks)-1 || names[e.Tid] != tracks[i] {
				t.Errorf("track %q is sorted as number %d of %q", names[e.Tid], i, tracks)
			}
		case e.Ph == "X":
			if e.Dur == nil || *e.Dur < 0 || e.Ts < 0 || names[e.Tid] == "" {
				t.Fatalf("%+v on track %q", e, names[e.Tid])
			}
			spans[names[e.Tid]] = append(spans[names[e.Tid]], e)
		default:
			t.Errorf("an event of another kind: %+v", e)
		}
	}
	if process != "gguf2gpu" {
		t.Errorf("the process is %q", process)
	}
	for name, all := range spans {
		checkNested(t, name, all)
	}
	return spans, tracks
}

// checkNested wants no span of a track to overlap another in part, as Perfetto would drop it.
func checkNested(t *testing.T, track string, all []written) {
	t.Helper()
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b written) int {
		return cmp.Or(cmp.Compare(a.start(), b.start()), cmp.Compare(b.end(), a.end()))
	})
	var open []int64 // ends
	for _, e := range all {
		for len(open) > 0 && open[len(open)-1] <= e.start() {
			open = open[:len(open)-1]
		}
		if len(open) > 0 && e.end() > open[len(open)-1] {
			t.Fatalf("%s: %s from %d to %d overlaps one that ends at %d", track, e.Name, e.start(), e.end(), open[len(open)-1])
		}
		open = append(open, e.end())
	}
}

// at is a point in time, microseconds after any.
func at(us int) time.Time {
	return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(us) * time.Microsecond)
}

// times are the spans as "name from-to", in microseconds.
func times(all []written) (s []string) {
	for _, e := range all {
		s = append(s, fmt.Sprintf("%s %g-%g", e.Name, e.Ts, e.Ts+*e.Dur))
	}
	return s
}

func TestPlacing(t *testing.T) {
	t.Parallel()
	type add struct {
		name       string
		start, end int
	}
	for _, x := range []struct {
		name string
		adds []add
		want []string
	}{
		{
			"one behind the other",
			[]add{{"copy", 0, 10}, {"copy", 10, 20}, {"copy", 30, 40}},
			[]string{"copy 0-10", "copy 10-20", "copy 30-40"},
		},
		{
			"seen late",
			[]add{{"copy", 0, 10}, {"copy", 14, 24}, {"copy", 20, 30}},
			[]string{"copy 0-10", "copy 10-20", "copy 20-30"},
		},
		{
			"all seen at the same moment",
			[]add{{"copy", 20, 30}, {"copy", 25, 30}, {"copy", 10, 30}},
			[]string{"copy 0-10", "copy 10-15", "copy 15-35"},
		}, // time begins at -5
		{
			"inside of the next",
			[]add{{"copy", 0, 1}, {"copy", 15, 20}, {"copy", 11, 21}},
			[]string{"copy 0-1", "copy 6-11", "copy 11-21"},
		},
		{"recorded in another order", []add{{"copy", 20, 30}, {"copy", 0, 10}}, []string{"copy 0-10", "copy 20-30"}},
		{"inside", []add{{"read", 2, 8}, {"convert", 0, 10}}, []string{"convert 0-10", "read 2-8"}},
		{
			"a worker",
			[]add{{"wait", 0, 5}, {"read", 5, 9}, {"read", 9, 12}, {"convert", 5, 20}, {"issue", 20, 21}},
			[]string{"wait 0-5", "convert 5-20", "read 5-9", "read 9-12", "issue 20-21"},
		},
		{
			"others overlap",
			[]add{{"wait", 0, 10}, {"issue", 5, 15}, {"convert", 7, 9}},
			[]string{"wait 0-10", "convert 7-9", "issue 10-15"},
		},
		{"nothing", []add{{"wait", 5, 5}, {"wait", 5, 5}}, []string{"wait 0-0", "wait 0-0"}},
		{"backwards", []add{{"wait", 0, 1}, {"issue", 9, 3}}, []string{"wait 0-1", "issue 9-9"}},
	} {
		var tr Trace
		for _, a := range x.adds {
			tr.Add("stream 0", a.name, at(a.start), at(a.end), "x", 1)
		}
		spans, _ := write(t, &tr)
		got := times(spans["stream 0"])
		if !slices.Equal(got, x.want) {
			t.Errorf("%s: %q, want %q", x.name, got, x.want)
		}
		again, _ := write(t, &tr) // writing changes nothing
		if !slices.Equal(times(again["stream 0"]), got) {
			t.Errorf("%s: the second time %q", x.name, times(again["stream 0"]))
		}
	}
}

// TestCopies: copies of a stream follow each other on the device, and the host sees their ends late. They keep their
// durations, and none is later than it was seen.
func TestCopies(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		var tr Trace
		now, seen := 1000, 0
		var ends, durations []int
		for range 100 {
			now += rng.IntN(2) * rng.IntN(20)
			took := 1 + rng.IntN(30)
			now += took
			seen = max(seen, now+rng.IntN(50))
			ends, durations = append(ends, seen), append(durations, took)
			tr.Add("stream 1", "copy", at(seen-took), at(seen), "x", took)
		}
		spans, _ := write(t, &tr)
		all := spans["stream 1"]
		offset := ends[len(ends)-1] - int(all[len(all)-1].end()/1000) // of the beginning of the trace
		for i, e := range all {
			bytes := int(e.Args["bytes"].(float64)) // the duration again
			if int(*e.Dur) != durations[i] || int(e.end()/1000)+offset > ends[i] || bytes != durations[i] {
				t.Fatalf("copy %d: %g for %g, want it to take %d and to end at %d", i, e.Ts, *e.Dur, durations[i], ends[i]-offset)
			}
		}
	}
}

// TestAnyTrace: whatever is recorded, no span overlaps another in part, and none is lost.
func TestAnyTrace(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		var tr Trace
		n := rng.IntN(60)
		for range n {
			start := rng.IntN(100)
			tr.Add(fmt.Sprint("worker ", rng.IntN(3)), string(rune('a'+rng.IntN(4))), at(start), at(start+rng.IntN(40)), "", 0)
		}
		spans, _ := write(t, &tr)
		got := 0
		for _, all := range spans {
			got += len(all)
		}
		if got != n {
			t.Fatalf("%d of %d spans", got, n)
		}
	}
}

func TestTracks(t *testing.T) {
	t.Parallel()
	var tr Trace
	for _, name := range []string{
		"worker 10", "stream 1", "worker 2", "hip:1 stream 0", "worker 02x", "hip:0 worker 1", "stream 01", "worker",
		"stream 0",
	} {
		tr.Add(name, "x", at(0), at(1), "t", 5)
	}
	_, tracks := write(t, &tr)
	want := []string{
		"hip:0 worker 1", "hip:1 stream 0", "stream 0", "stream 1", "stream 01", "worker", "worker 2", "worker 02x",
		"worker 10",
	}
	if !slices.Equal(tracks, want) {
		t.Errorf("%q, want %q", tracks, want)
	}
}

// TestEmpty: nothing was recorded, or nobody wants it.
func TestEmpty(t *testing.T) {
	t.Parallel()
	var none *Trace
	none.Add("worker 0", "read", at(0), at(1), "x", 1)
	var tr Trace
	if spans, tracks := write(t, &tr); len(spans)+len(tracks) != 0 {
		t.Errorf("%v on %q", spans, tracks)
	}
}

// TestTogether: many may record while it is written.
func TestTogether(t *testing.T) {
	t.Parallel()
	var tr Trace
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for i := range 100 {
				tr.Add(fmt.Sprint("worker ", w), "read", at(i), at(i+1), "x", i)
			}
		})
	}
	write(t, &tr)
	all.Wait()
	spans, _ := write(t, &tr)
	for w := range 4 {
		if n := len(spans[fmt.Sprint("worker ", w)]); n != 100 {
			t.Errorf("worker %d has %d spans", w, n)
		}
	}
}

// full is a disk without room.
type full struct{}

var errFull = errors.New("no space left")

func (full) Write(b []byte) (int, error) { return 3, errFull }

func TestWriteError(t *testing.T) {
	t.Parallel()
	var tr Trace
	tr.Add("worker 0", "read", at(0), at(1), "x", 1)
	if n, err := tr.WriteTo(full{}); n != 3 || !errors.Is(err, errFull) {
		t.Error(n, err)
	}
}
