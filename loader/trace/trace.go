package trace

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// Trace collects what a load does and when. The zero value is ready; its methods are safe for concurrent use. Several
// loads may record into one Trace.
type Trace struct {
	mu     sync.Mutex
	tracks []string // in order of appearance
	ids    map[string]int
	spans  []span
}

// span is one thing that a track did.
type span struct {
	track      int // in Trace.tracks
	name       string
	start, end time.Time
	tensor     string // the first one concerned
	bytes      int
}

// Add records that a track, such as a worker or a stream, did something from start to end. tensor is the first one that
// it was about, bytes is how many bytes it was about. An end before the start is taken for the start. A nil Trace
// ignores it.
func (t *Trace) Add(track, name string, start, end time.Time, tensor string, bytes int) {
	if t == nil {
		return
	}
	if end.Before(start) {
		end = start
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	id, ok := t.ids[track]
	if !ok {
		if t.ids == nil {
			t.ids = make(map[string]int)
		}
		id = len(t.tracks)
		t.ids[track] = id
		t.tracks = append(t.tracks, track)
	}
	t.spans = append(t.spans, span{id, name, start, end, tensor, bytes})
}

// event is a complete event ("ph": "X") or a piece of metadata ("M") of Chrome's trace-event format.
type event struct {
	Name string         `json:"name"`
	Cat  string         `json:"cat,omitempty"`
	Ph   string         `json:"ph"`
	Ts   float64        `json:"ts"`            // microseconds
	Dur  *float64       `json:"dur,omitempty"` // likewise; of a complete event, also where it is 0
	Pid  int            `json:"pid"`
	Tid  int            `json:"tid"`
	Args map[string]any `json:"args,omitempty"`
}

// pid is the number of the only process in a trace.
const pid = 1

// WriteTo writes the timeline as Chrome trace-event JSON. Time begins with the first span. Tracks are named, and sorted
// by name. Spans of one track never overlap in part: see the package's documentation. The error is that of w.
func (t *Trace) WriteTo(w io.Writer) (int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	events := make([]event, 0, 1+2*len(t.tracks)+len(t.spans))
	events = append(events, metadata(0, "process_name", "name", "gguf2gpu"))
	order := sortedTracks(t.tracks)
	spans := make([][]span, len(t.tracks))
	for _, s := range t.spans {
		spans[s.track] = append(spans[s.track], s)
	}
	var epoch time.Time
	for i := range spans {
		spans[i] = place(spans[i])
		for _, s := range spans[i] {
			if epoch.IsZero() || s.start.Before(epoch) {
				epoch = s.start
			}
		}
	}
	for i, track := range order {
		events = append(events,
			metadata(i+1, "thread_name", "name", t.tracks[track]), metadata(i+1, "thread_sort_index", "sort_index", i))
	}
	for i, track := range order {
		for _, s := range spans[track] {
			dur := us(s.end.Sub(s.start))
			events = append(events, event{
				Name: s.name, Cat: "load", Ph: "X", Pid: pid, Tid: i + 1, Ts: us(s.start.Sub(epoch)), Dur: &dur,
				Args: map[string]any{"tensor": s.tensor, "bytes": s.bytes},
			})
		}
	}
	b, err := json.Marshal(struct {
		Events []event `json:"traceEvents"`
		Unit   string  `json:"displayTimeUnit"`
	}{events, "ms"})
	if err != nil {
		return 0, fmt.Errorf("trace: %w", err)
	}
	n, err := w.Write(b)
	return int64(n), err
}

// metadata is an event that says something of a track, or with a tid of 0 of the process.
func metadata(tid int, name, key string, value any) event {
	return event{Name: name, Ph: "M", Pid: pid, Tid: tid, Args: map[string]any{key: value}}
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
