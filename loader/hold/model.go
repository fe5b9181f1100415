package hold

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Model is what a Holder tells about a model.
type Model struct {
	Name     string      `json:"name"`
	Path     string      `json:"path"`
	Policy   plan.Policy `json:"dtype"`
	Tensors  int         `json:"tensors"`
	Bytes    uint64      `json:"device_bytes"` // of all devices, that it takes now
	State    string      `json:"state"`        // "loading", "resident", "asleep", "stored" or "failed"
	Error    string      `json:"error,omitempty"`
	Attached int         `json:"attached"`         // connections of processes that use it now
	Seconds  float64     `json:"load_seconds"`     // 0 until it is loaded
	Transfer float64     `json:"transfer_seconds"` // of these
	Uploaded uint64      `json:"upload_bytes"`     // likewise 0 until then
	Since    int64       `json:"since"`            // seconds since 1970

	Tiers    TierBytes `json:"tier_bytes"`
	Pinned   bool      `json:"pinned"`             // it makes no room for others
	LastUsed int64     `json:"last_used"`          // seconds since 1970: the last attaching, detaching or waking
	Devices  []int     `json:"devices"`            // numbers of the devices, as HIP counts them in the Holder
	Share    Share     `json:"share"`              // how others get at its device memory
	Adopted  bool      `json:"adopted,omitempty"`  // an earlier Holder has loaded it
	Wakes    int       `json:"wakes"`              // how often it came back to device memory
	WakeTime float64   `json:"wake_seconds"`       // what the last of them took; 0 before
	Progress float64   `json:"progress,omitempty"` // the share of its tensors that have arrived, while it loads

	Proved      bool   `json:"proved"`       // the last load, waking or adopting compared fingerprints, and all were right
	ProvedBytes uint64 `json:"proved_bytes"` // by it, of all devices

	Shard *Shard `json:"shard,omitempty"` // which rank's part of a model it is; nil: it is whole

	Scrub *Scrub `json:"scrub,omitempty"` // what was found when memory was looked at again; nil: nobody looks

	links int // devices that bytes of it were copied to
}

// Shard says which part of a model is held.
type Shard struct {
	By    plan.ShardBy `json:"by"`
	Rank  int          `json:"rank"`
	World int          `json:"world"`
	Model string       `json:"model"` // the name that stands for all parts; it is Model.Name where there are no others
}

// TierBytes is what a model takes in each tier, in bytes.
type TierBytes struct {
	VRAM uint64 `json:"vram"` // device memory, of all devices
	RAM  uint64 `json:"ram"`  // page-locked host memory
}

// States of a held model. A model that is asleep has the bytes of its file in page-locked memory; one that is stored is
// only in its file.
const (
	stateLoading  = "loading"
	stateResident = "resident"
	stateAsleep   = "asleep"
	stateStored   = "stored"
	stateFailed   = "failed"
)

// held is a model that a Holder keeps, in whatever tier.
type held struct {
	name    string
	path    string
	since   time.Time
	spec    plan.Spec
	request loader.Request
	adopted bool          // from a Keeper
	opened  chan struct{} // closed when the first residence is there, or it is clear that there will be none
	turn    chan struct{} // has one place: whoever puts something there may change the tier

	ranges ranges // addresses that are the model's as long as it is held

	// Set before opened is closed, and changed only by whoever has the turn; plan under the Holder's lock, too.

	plan  *plan.Plan // nil: the model could not be opened
	files []FileIdentity
	arch  string

	hf      map[string][]plan.HFTensor // what the tensors are in transformers, by name
	hfError error                      // why nobody knows

	// Under the Holder's lock.

	now      *residence // nil: it has no device memory
	coming   bool       // it is on its way to device memory, and has none yet
	claims   *residence // what has room there by then; nil: nothing
	image    *hostImage // nil: it has no page-locked memory
	imaging  chan struct{}
	noImage  func() // ends imaging; nil: it is not going on
	attached int
	pinned   bool
	once     bool // it came as a stream, and cannot be loaded again
	dropping bool
	loaded   bool // it was in device memory once
	used     time.Time
	order    uint64 // of the last use: the Holder counts uses
	wakes    int
	wakeTime time.Duration
	report   loader.Report // of the load from the file
	scrub    Scrub
	passes   []int // over its memory on each device
}

// residence is the time that a model spends in device memory, from the load to the release.
type residence struct {
	id       string // of this and no other residence
	model    *loader.Model
	manifest *manifest
	memory   *sharedMemory // nil: IPC
	claimed  []uint64      // bytes of device memory, by device of the Holder
	scratch  []uint64      // what its load takes besides, under the Holder's lock; nil: it has ended
	file     *gguf.File    // that it is loaded from; nil: from the image, or it was adopted
	image    *hostImage    // that it is loaded from; nil: from the file
	tee      *teeing       // what its load fills with what it reads; nil: nothing
	began    time.Time
	ended    chan struct{} // closed when the load has ended and is done with its file
	arrivals arrivals

	// Under Holder.keeping.

	keptBy     string // the instance of the Keeper that has it; "": none
	keepFailed bool   // that is said already
	unkept     bool   // no Keeper is to have it any more

	// Under the Holder's lock.

	finished bool   // the load has ended
	err      error  // why it failed; once finished
	freed    bool   // the model is closed
	promised bool   // that its memory will be free soon
	settled  bool   // what it claimed is given back, or never will be
	left     uint64 // bytes that closing it could not free

	proved      bool   // the load compared fingerprints, and all were right
	provedBytes uint64 // by it
	damaged     int    // blocks that were found damaged and are so still

	withKeeper bool // a Keeper has been asked to give it up, and may have it still

	unseen map[int]bool // of a model that was adopted with fingerprints: devices that are not compared with them yet
}

// partNumber is what the names of the parts of a split model end with.
var partNumber = regexp.MustCompile(`-[0-9]{5}-of-[0-9]{5}$`)

// maxName bounds names of models, in bytes.
const maxName = 255

// DefaultName returns the name that a model is held under if none is given: the last element of its path or name,
// without .gguf and without the number of a split model's part.
func DefaultName(path string) string {
	return partNumber.ReplaceAllString(strings.TrimSuffix(filepath.Base(path), ".gguf"), "")
}

// newHeld checks a name. elsewhere says that the model is not a file, so that path is not a path.
func newHeld(name, path string, elsewhere bool) (*held, error) {
	if !elsewhere {
		var err error
		if path, err = filepath.Abs(path); err != nil {
			return nil, err
		}
	}
	if err := checkName(name); err != nil {
		return nil, fmt.Errorf("%w: %w", loader.ErrBadOption, err)
	}
	now := time.Now()
	return &held{
		name: name, path: path, since: now, used: now, opened: make(chan struct{}), turn: make(chan struct{}, 1),
	}, nil
}

// checkName refuses what cannot be the name of a model.
func checkName(name string) error {
	unprintable := func(r rune) bool { return !strconv.IsPrint(r) }
	if name == "" || len(name) > maxName || !utf8.ValidString(name) || strings.ContainsFunc(name, unprintable) {
		return fmt.Errorf("%.300q as a model's name: use 1 to %d bytes of printable characters", name, maxName)
	}
	return nil
}

// isOpen reports whether m could be opened. The Holder's lock is held.
func (m *held) isOpen() bool {
	select {
	case <-m.opened:
		return m.plan != nil
	default:
		return false
	}
}

// Models tells about all models, by name. It never waits for a device.
func (h *Holder) Models() []Model {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]Model, 0, len(h.models))
	for _, m := range h.models {
		if m.isOpen() && !m.dropping {
			all = append(all, m.describe(h))
		}
	}
	slices.SortFunc(all, func(a, b Model) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// describe tells about m. The Holder's lock is held, so it asks nothing of the model itself.
func (m *held) describe(h *Holder) Model {
	d := Model{
		Name: m.name, Path: m.path, Policy: m.plan.Spec.Policy, Tensors: m.plan.Len(), State: m.state(), Attached: m.attached,
		Since: m.since.Unix(), Pinned: m.pinned, LastUsed: m.used.Unix(), Share: h.share, Adopted: m.adopted, Wakes: m.wakes,
		WakeTime: m.wakeTime.Seconds(),
	}
	for i := range m.plan.Groups {
		if len(m.plan.Groups[i].Tensors) == 0 {
			continue
		}
		for _, n := range m.plan.Groups[i].Devices {
			d.Devices = append(d.Devices, h.devices[n].Index())
		}
	}
	slices.Sort(d.Devices)
	if s := m.plan.Spec.Shard; s.By != plan.ShardNone {
		d.Shard = &Shard{By: s.By, Rank: s.Rank, World: s.World, Model: m.base()}
	}
	if m.loaded {
		d.Seconds, d.Transfer, d.Uploaded = m.report.Total.Seconds(), m.report.Transfer.Seconds(), m.report.UploadBytes
		for i := range m.report.Devices {
			if m.report.Devices[i].UploadBytes > 0 {
				d.links++
			}
		}
	}
	if r := m.now; r != nil {
		d.Bytes = m.plan.DeviceBytes()
		if r.freed {
			d.Bytes = r.left
		}
		if r.err != nil {
			d.Error = r.err.Error()
		}
		if r.err == nil {
			d.Proved, d.ProvedBytes = r.proved, r.provedBytes
		}
		if !r.finished {
			d.Progress = float64(r.arrivals.tensors()) / float64(max(1, m.plan.Len()))
		}
	}
	if h.options.Scrub > 0 || m.scrub.Bytes > 0 {
		d.Scrub = m.scrubbed()
	}
	d.Tiers.VRAM = d.Bytes
	if m.image != nil {
		d.Tiers.RAM = uint64(m.image.bytes())
	}
	return d
}

// state is what the model's tier is called. The Holder's lock is held.
func (m *held) state() string {
	switch r := m.now; {
	case r != nil && r.err != nil:
		return stateFailed
	case r != nil && r.finished:
		return stateResident
	case r != nil || m.coming:
		return stateLoading
	case m.image != nil:
		return stateAsleep
	}
	return stateStored
}

// arrival is how far a load has come.
type arrival struct {
	tensors int // that have arrived, from the first on, in the order of the file
	ended   bool
	err     error // why it failed; once ended
}

// loaded reports whether all tensors have arrived, and nothing went wrong.
func (a arrival) loaded() bool { return a.ended && a.err == nil }

// arrivals tells any number of goroutines how far a load has come.
type arrivals struct {
	mu      sync.Mutex
	last    arrival
	changed chan struct{} // closed when last is not the last any more
}

// set says how far the load has come.
func (a *arrivals) set(now arrival) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = now
	close(a.changed)
	a.changed = make(chan struct{})
}

// get returns how far the load has come, and a channel that is closed when it has come further.
func (a *arrivals) get() (arrival, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last, a.changed
}

// tensors is the number of tensors that have arrived.
func (a *arrivals) tensors() int {
	now, _ := a.get()
	return now.tensors
}
