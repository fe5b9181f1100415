package loader

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// traceEvent is one of a trace in Chrome's format.
type traceEvent struct {
	Name, Ph string
	Ts, Dur  float64
	Tid      int
	Args     struct{ Tensor, Name string }
}

// decodeTrace returns the spans of tr by name, and the first words of its tracks' names.
func decodeTrace(t *testing.T, tr *trace.Trace) (spans map[string][]traceEvent, tracks map[string]bool) {
	t.Helper()
	var out bytes.Buffer
	if _, err := tr.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	var got struct{ TraceEvents []traceEvent }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	spans, tracks = make(map[string][]traceEvent), make(map[string]bool)
	for _, e := range got.TraceEvents {
		if e.Ph == "M" {
			tracks[e.Args.Name] = true
			continue
		}
		spans[e.Name] = append(spans[e.Name], e)
		if e.Args.Tensor == "" || e.Ts < 0 || e.Dur < 0 {
			t.Errorf("event %+v", e)
		}
	}
	return spans, tracks
}

// TestTrace wants every stage on the timeline, and stages that overlap.
func TestTrace(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	dev, _ := openDevice(t, soft.Options{LinkBytesPerSecond: 200e6})
	o := tight
	o.IO, o.Trace = IODirect, new(trace.Trace)
	w, err := load(t.Context(), m, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	chunks := len(w.Plan().Groups[0].Cut(plan.CutOptions{Bytes: w.Report().ChunkBytes, Ramp: w.Report().Threads}))
	spans, tracks := decodeTrace(t, o.Trace)
	for _, name := range []string{"wait", "issue", "copy"} {
		if len(spans[name]) != chunks {
			t.Errorf("%d events %q, want %d", len(spans[name]), name, chunks)
		}
	}
	if n := len(spans["dequantize"]) + len(spans["stage"]); n != chunks || len(spans["read"]) == 0 {
		t.Errorf("%d chunks filled, %d reads; want %d chunks", n, len(spans["read"]), chunks)
	}
	for _, track := range []string{"worker 0", "reader 0", "stream 0", "stream 2"} {
		if !tracks[track] {
			t.Errorf("no track of %s among %v", track, tracks)
		}
	}
	overlap := 0
	for _, c := range spans["copy"] {
		for _, d := range spans["dequantize"] {
			if c.Ts < d.Ts+d.Dur && d.Ts < c.Ts+c.Dur {
				overlap++
			}
		}
	}
	if overlap < chunks/4 {
		t.Errorf("%d of %d chunks were copied while another was dequantized", overlap, chunks)
	}
}

// TestTraceOfSeveral: what happens for each device is on tracks of its own.
func TestTraceOfSeveral(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := llama(t)
		devs, _ := openDevices(t, 2, soft.Options{})
		o := tight.on(2)
		o.Trace = new(trace.Trace)
		w, err := load(t.Context(), m, o, devs...)
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, w)
		_, tracks := decodeTrace(t, o.Trace)
		for track := range tracks {
			if strings.Contains(track, "worker") && !strings.HasPrefix(track, "device ") {
				t.Errorf("track %q", track)
			}
		}
		if !tracks["device 0 stream 0"] || !tracks["device 1 stream 0"] { // workers may help the other device
			t.Errorf("tracks %v", tracks)
		}
	})
}
