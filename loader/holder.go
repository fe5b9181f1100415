package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Errors of a Holder, also on the side of who talks to it.
var (
	ErrUnknownModel = errors.New("no such model is held")
	ErrModelExists  = errors.New("a model of that name is held already")
	ErrAttached     = errors.New("the model is in use by processes that are attached")
)

// HolderOptions describes a Holder. The zero value serves processes of the same user.
type HolderOptions struct {
	Load       Options      // how models are loaded, unless a request says otherwise
	AllowGroup bool         // processes of the same group may attach and list, too; only the same user may add and drop
	Logger     *slog.Logger // nil: silent
	// LinkBytesPerSecond is the speed of the host-device link, for the metrics; 0: unknown. See LinkSpeed.
	LinkBytesPerSecond float64

	requestTime time.Duration // 0: requestTime; others are for tests
	maxClients  int           // 0: maxClients; likewise
}

// Holder keeps models in the memory of a device and lets other processes of the host use them, without copying. Its methods are
// safe for concurrent use. The caller must Close it.
type Holder struct {
	dev *amdhip.Device
	o   HolderOptions
	log *slog.Logger

	mu       sync.Mutex
	models   map[string]*held
	closed   bool
	attached int64 // attachments so far
	refused  int64 // connections that were turned away
}

// held is a model that a Holder keeps.
type held struct {
	name   string
	path   string
	since  time.Time
	opened chan struct{} // closed when weights are there, or it is clear that there will be none
	ended  chan struct{} // closed when the load has ended and its file is closed

	// Under the Holder's lock; the first two do not change any more once they are set.

	weights  *Model
	manifest *manifest
	attached int
	dropping bool
	failed   bool // its memory is free, or will be when nobody is attached any more
}

// HeldModel is what a Holder tells about a model.
type HeldModel struct {
	Name     string  `json:"name"`
	Path     string  `json:"path"`
	DType    string  `json:"dtype"`
	Tensors  int     `json:"tensors"`
	Bytes    uint64  `json:"device_bytes"` // that it takes now
	State    string  `json:"state"`        // "loading", "loaded" or "failed"
	Error    string  `json:"error,omitempty"`
	Attached int     `json:"attached"` // connections of processes that use it now
	Seconds  float64 `json:"load_seconds"`
	Transfer float64 `json:"transfer_seconds"` // of these
	Uploaded uint64  `json:"upload_bytes"`
	Since    int64   `json:"since"` // seconds since 1970
}

// States of a held model.
const (
	stateLoading = "loading"
	stateLoaded  = "loaded"
	stateFailed  = "failed"
)

// NewHolder returns a Holder for models on dev. On the software device that needs SoftwareOptions.Shared.
func NewHolder(dev *amdhip.Device, o HolderOptions) *Holder {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.requestTime == 0 {
		o.requestTime = requestTime
	}
	if o.maxClients == 0 {
		o.maxClients = maxClients
	}
	return &Holder{dev: dev, o: o, log: o.Logger, models: make(map[string]*held)}
}

// Add begins to load the model at path with the Holder's own options, and returns once its memory is allocated. name is what
// others ask for it by, "" for that of the file without its ending and the number of the part; Add returns it. What can go wrong
// before is an error here, as those of Start are, and what matches ErrModelExists; Wait tells how the load ends. A load that
// fails later leaves nothing on the device once nobody is attached to it, but is listed until it is dropped.
func (h *Holder) Add(ctx context.Context, name, path string) (string, error) {
	m, err := h.add(ctx, name, path, h.o.Load)
	if err != nil {
		return "", err
	}
	return m.name, nil
}

// partNumber is what names of the parts of split models end with.
var partNumber = regexp.MustCompile(`-[0-9]{5}-of-[0-9]{5}$`)

// maxName bounds names of models, in bytes.
const maxName = 255

// newHeld checks a name, or makes one.
func newHeld(name, path string) (*held, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if name == "" {
		name = partNumber.ReplaceAllString(strings.TrimSuffix(filepath.Base(path), ".gguf"), "")
	}
	if len(name) > maxName || !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return nil, fmt.Errorf("%w: %.300q as a model's name: use up to %d printable characters", ErrBadOption, name, maxName)
	}
	return &held{name: name, path: path, since: time.Now(), opened: make(chan struct{}), ended: make(chan struct{})}, nil
}

func (h *Holder) add(ctx context.Context, name, path string, o Options) (_ *held, err error) {
	m, err := newHeld(name, path)
	if err != nil {
		return nil, err
	}
	if err := h.reserve(m); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.forget(m)
		}
		close(m.opened)
	}()
	file, err := gguf.Open(m.path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.Close())
		}
	}()
	files, err := identify(file)
	if err != nil {
		return nil, err
	}
	o.exported = true
	weights, err := Start(context.WithoutCancel(ctx), h.dev, file, o) // the model outlives whoever asked for it
	if err != nil {
		return nil, err
	}
	man, err := weights.manifest(m.name, files)
	if err == nil {
		err = man.fits()
	}
	if err != nil {
		return nil, errors.Join(err, weights.Close())
	}
	h.mu.Lock()
	closed := h.closed // meanwhile, so nobody would close it
	if !closed {
		m.weights, m.manifest = weights, man
	}
	h.mu.Unlock()
	if closed {
		return nil, errors.Join(ErrClosed, weights.Close())
	}
	go h.finish(m, file)
	return m, nil
}

// reserve enters m, so that its name is taken.
func (h *Holder) reserve(m *held) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return ErrClosed
	}
	if h.models[m.name] != nil {
		return fmt.Errorf("loader: %q: %w", m.name, ErrModelExists)
	}
	h.models[m.name] = m
	return nil
}

func (h *Holder) forget(m *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.models, m.name)
}

// finish waits for the end of m's load and lets go of the file.
func (h *Holder) finish(m *held, file *gguf.Model) {
	defer close(m.ended)
	w := m.weights
	err := w.WaitAll(context.Background())
	w.mu.Lock()
	w.plan.model = nil
	w.mu.Unlock()
	if err := file.Close(); err != nil {
		h.log.Warn("closing the model's file failed", "model", m.name, "error", err)
	}
	if err == nil {
		r := w.Report()
		h.log.Info("loaded", "model", m.name, "bytes", r.DeviceBytes, "seconds", r.Total.Seconds())
		return
	}
	h.mu.Lock()
	m.failed = true
	free := m.attached == 0
	h.mu.Unlock()
	if !errors.Is(err, ErrClosed) { // else it is being dropped
		h.log.Error("the load failed", "model", m.name, "error", err)
	}
	if free {
		h.free(m)
	}
}

// free gives back the memory of a load that failed.
func (h *Holder) free(m *held) {
	if err := m.weights.Close(); err != nil {
		h.log.Error("freeing memory failed", "model", m.name, "error", err)
	}
}

// Wait blocks until the load of the model has ended, and returns its error, or the cause of ctx's end.
func (h *Holder) Wait(ctx context.Context, name string) error {
	m, err := h.await(ctx, name)
	if err != nil {
		return err
	}
	select {
	case <-m.ended:
		return m.weights.WaitAll(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Model returns the model of that name, "" for the only one, for use in this process: one cannot attach to its own. It is the
// Holder's to close. Its file is closed once it is loaded: see [Model.Use].
func (h *Holder) Model(name string) (*Model, error) {
	m, err := h.find(name)
	if err != nil {
		return nil, err
	}
	return m.weights, nil
}

// find returns the model of that name; "" means the only one.
func (h *Holder) find(name string) (*held, error) {
	m, err := h.reserved(name)
	if err != nil {
		return nil, err
	}
	select {
	case <-m.opened:
		if m.weights == nil { // it came to nothing, since
			return nil, fmt.Errorf("loader: %q: %w", m.name, ErrUnknownModel)
		}
		return m, nil
	default:
		return nil, fmt.Errorf("loader: %q: %w yet: it is just being opened", m.name, ErrUnknownModel)
	}
}

// await is find, but waits for a model that is just being opened.
func (h *Holder) await(ctx context.Context, name string) (*held, error) {
	m, err := h.reserved(name)
	if err != nil {
		return nil, err
	}
	select {
	case <-m.opened:
		return h.find(m.name)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// reserved is find for models that are being opened, too.
func (h *Holder) reserved(name string) (*held, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, ErrClosed
	}
	m := h.models[name]
	if name == "" && len(h.models) == 1 {
		for _, m = range h.models { // there is one
		}
	}
	switch {
	case m != nil && !m.dropping:
		return m, nil
	case name == "" && len(h.models) > 1:
		return nil, fmt.Errorf("loader: several models are held: name one of %s: %w", h.names(), ErrUnknownModel)
	case len(h.models) == 0:
		return nil, fmt.Errorf("loader: %q: %w: none is", name, ErrUnknownModel)
	}
	return nil, fmt.Errorf("loader: %q: %w; held are %s", name, ErrUnknownModel, h.names())
}

// names lists the models. h.mu is held.
func (h *Holder) names() string {
	var names []string
	for name := range h.models {
		names = append(names, fmt.Sprintf("%q", name))
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// Drop frees a model's memory. While processes are attached to it the error matches ErrAttached: the device may be using it.
func (h *Holder) Drop(name string) error {
	m, err := h.find(name)
	if err != nil {
		return err
	}
	h.mu.Lock()
	attached, dropping := m.attached, m.dropping
	if attached == 0 {
		m.dropping = true
	}
	h.mu.Unlock()
	switch {
	case dropping: // by another call, since
		return fmt.Errorf("loader: %q: %w", m.name, ErrUnknownModel)
	case attached > 0:
		return fmt.Errorf("loader: %q: %w, %d of them", m.name, ErrAttached, attached)
	}
	err = m.weights.Close()
	<-m.ended
	h.forget(m)
	h.log.Info("dropped", "model", m.name)
	return err
}

// Models tells about all models, by name.
func (h *Holder) Models() []HeldModel {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]HeldModel, 0, len(h.models))
	for _, m := range h.models {
		if m.weights != nil && !m.dropping {
			all = append(all, m.describe())
		}
	}
	slices.SortFunc(all, func(a, b HeldModel) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// describe tells about m. The Holder's lock is held.
func (m *held) describe() HeldModel {
	r := m.weights.Report()
	d := HeldModel{
		Name: m.name, Path: m.path, DType: m.manifest.DType, Tensors: r.Tensors, Bytes: r.DeviceBytes, State: stateLoading,
		Attached: m.attached, Seconds: r.Total.Seconds(), Transfer: r.Transfer.Seconds(), Uploaded: r.UploadBytes, Since: m.since.Unix(),
	}
	select {
	case <-m.ended:
		d.State = stateLoaded
		if m.failed {
			d.State, d.Error = stateFailed, m.weights.failure().Error()
		}
		if m.failed && m.attached == 0 && !m.weights.stuck.Load() {
			d.Bytes = 0
		}
	default:
	}
	return d
}

// Close ends all loads, and frees all models. Processes that are attached lose their memory, so end Serve first, which lets
// them go. It is idempotent.
func (h *Holder) Close() error {
	h.mu.Lock()
	h.closed = true
	models := h.models
	h.models = make(map[string]*held)
	h.mu.Unlock()
	var errs []error
	for _, m := range models {
		if m.weights != nil {
			errs = append(errs, m.weights.Close())
			<-m.ended
		}
	}
	return errors.Join(errs...)
}

// options are those of an add request: the Holder's own with the request's exceptions, and without what is for who made the
// Holder to look at.
func (h *Holder) options(r *request) (o Options, err error) {
	o = h.o.Load
	o.Progress, o.Trace, o.Hash = nil, nil, false
	if r.DType != "" {
		if o.DType, err = ParseDType(r.DType); err != nil {
			return o, fmt.Errorf("%w: %w", ErrBadOption, err)
		}
	}
	if len(r.Rules) > 0 {
		o.Rules = nil
	}
	for _, s := range r.Rules {
		rule, err := ParseRule(s)
		if err != nil {
			return o, fmt.Errorf("%w: %w", ErrBadOption, err)
		}
		o.Rules = append(o.Rules, rule)
	}
	if r.Tensors != "" {
		if o.Tensors, err = regexp.Compile(r.Tensors); err != nil {
			return o, fmt.Errorf("%w: %w", ErrBadOption, err)
		}
	}
	return o, nil
}
