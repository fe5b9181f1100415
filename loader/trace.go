package loader

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// Trace collects what the pipeline does and when. The zero value is ready; its methods are safe for concurrent use.
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

// add records that a track did something from start to end. A nil Trace ignores it.
func (t *Trace) add(track, name string, start, end time.Time, tensor string, bytes int) {
	if t == nil {
		return
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

// traceEvent is a complete event ("ph": "X") or a piece of metadata ("M") of Chrome's trace-event format.
type traceEvent struct {
	Name string         `json:"name"`
	Cat  string         `json:"cat,omitempty"`
	Ph   string         `json:"ph"`
	Ts   float64        `json:"ts"` // microseconds
	Dur  float64        `json:"dur,omitempty"`
	Pid  int            `json:"pid"`
	Tid  int            `json:"tid"`
	Args map[string]any `json:"args,omitempty"`
}

// WriteTo writes the timeline as Chrome trace-event JSON, which Perfetto and chrome://tracing open. Time begins with the
// first span.
func (t *Trace) WriteTo(w io.Writer) (int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	events := make([]traceEvent, 0, len(t.tracks)+len(t.spans))
	for i, name := range t.tracks {
		events = append(events, traceEvent{Name: "thread_name", Ph: "M", Pid: 1, Tid: i + 1, Args: map[string]any{"name": name}})
	}
	var epoch time.Time
	for _, s := range t.spans {
		if epoch.IsZero() || s.start.Before(epoch) {
			epoch = s.start
		}
	}
	for _, s := range t.spans {
		events = append(events, traceEvent{
			Name: s.name, Cat: "load", Ph: "X", Pid: 1, Tid: s.track + 1,
			Ts: us(s.start.Sub(epoch)), Dur: us(s.end.Sub(s.start)),
			Args: map[string]any{"tensor": s.tensor, "bytes": s.bytes},
		})
	}
	b, err := json.Marshal(struct {
		Events []traceEvent `json:"traceEvents"`
		Unit   string       `json:"displayTimeUnit"`
	}{events, "ms"})
	if err != nil {
		return 0, fmt.Errorf("loader: trace: %w", err)
	}
	n, err := w.Write(b)
	return int64(n), err
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
