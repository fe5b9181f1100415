package bench

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Mode is a way of loading.
type Mode string

// Ways of loading.
const (
	Sync     Mode = "sync"      // the reference: one thread, one blocking copy at a time
	Async    Mode = "async"     // the pipeline; the CPU converts
	AsyncGPU Mode = "async-gpu" // the pipeline; the device converts what it has a kernel for
	Cold     Mode = "cold"      // as async, with the file not in the page cache
)

// Setup is one load: the way of loading and what is set. 0 stands for the usual value.
type Setup struct {
	Mode    Mode
	DType   string // "raw", "f16", ...
	Threads int
	Streams int
	Chunk   int // bytes
}

// Result is what one load took. Sizes are in bytes.
type Result struct {
	Transfer    time.Duration // from the first read to the end of the last copy, and of comparing fingerprints
	Proved      bool          // fingerprints were compared
	Total       time.Duration // with planning, allocation and pinning
	ReadBytes   uint64
	UploadBytes uint64 // over the link
	DeviceBytes uint64 // what became of them on the device
	PinnedBytes int64
	Dequant     string // who converted: "gpu" (some tensors at least), "cpu" or "none"
}

// Loads says what to measure, and how. All functions but Evict are required.
type Loads struct {
	// Load loads the model once and frees it.
	Load func(ctx context.Context, s Setup) (Result, error)
	// Expands reports whether a load as dtype has a tensor that the device can convert.
	Expands func(dtype string) bool
	// LinkSpeed measures copies from pinned memory to the device, in bytes per second.
	LinkSpeed func(ctx context.Context) (float64, error)
	// CopySpeed measures copies from memory to memory by all threads of a load, in bytes per second.
	CopySpeed func(ctx context.Context) (float64, error)
	// ReadSpeed measures reading the model, in bytes per second; cold means from the disk, past the page cache.
	ReadSpeed func(ctx context.Context, cold bool) (float64, error)
	// Fits returns why a load as dtype does not fit onto the device; such loads are left out. Nil: all fit.
	Fits func(dtype string) error
	// Evict takes the model out of the page cache. Without it there are no cold loads.
	Evict func() error
	// PeakRSS is the largest resident memory of the process so far, in bytes; 0 if it is not known.
	PeakRSS func() uint64

	// Step is called before each kind of load, with its number, from 1 on, how many there are, and a name for it. Row is
	// called after each, with the ceilings that are known by then. Both may be nil.
	Step func(number, count int, what string)
	Row  func(c Ceilings, run Run)

	Runs int // loads of each kind, at least 1
	// Limit is after what time no other kind of load is begun, and no load repeated: each kind gets its share of it, and
	// is done once at least. 0: there is no limit.
	Limit   time.Duration
	DTypes  []string // at least one
	CPU     bool     // measure loads that the CPU converts for
	GPU     bool     // measure loads that the device converts for
	Scaling bool     // also load with other numbers of threads and streams, and other sizes of chunks
	Logger  *slog.Logger
}

// Ceilings is what the machine does at most, measured just before the loads. The disk is measured again if cold loads
// were faster, and the greatest speed counts; what the link reached around each load is in [Run].
type Ceilings struct {
	H2D      float64 `json:"h2d_gbps"`       // pinned memory to device memory
	Memcpy   float64 `json:"memcpy_gbps"`    // memory to memory, all threads of a load together
	Read     float64 `json:"read_gbps"`      // the file, from the page cache if it is there
	ReadCold float64 `json:"read_cold_gbps"` // the file, directly from the disk
}

// Run is one kind of load, done several times.
type Run struct {
	Mode     Mode      `json:"mode"`
	DType    string    `json:"dtype"`
	Dequant  string    `json:"dequant"`              // who converted: "gpu" (some at least), "cpu" or "none"
	Setting  string    `json:"setting,omitempty"`    // what is not as usual, such as "threads=4"
	Seconds  []float64 `json:"seconds"`              // of each transfer
	Median   float64   `json:"median_seconds"`       // of Seconds
	Total    float64   `json:"median_total_seconds"` // with planning, allocation and pinning
	GBps     float64   `json:"upload_gbps"`
	OfLink   float64   `json:"of_link"`           // upload_gbps as a share of h2d_gbps
	Device   float64   `json:"device_gbps"`       // bytes on the device, per second of transfer
	ReadGBps float64   `json:"read_gbps"`         // bytes of the file, per second of transfer
	OfDisk   float64   `json:"of_disk,omitempty"` // read_gbps as a share of read_cold_gbps; cold loads only
	Pinned   int64     `json:"pinned_bytes"`
	Proved   bool      `json:"proved"` // the devices' fingerprints were compared, within Seconds

	// The least and the greatest speed of the link just before and after the group of runs that this one belongs to, such
	// as all loads of a dtype. They are not known yet when [Loads.Row] is called.
	LinkLeast float64 `json:"link_least_gbps"`
	LinkMost  float64 `json:"link_most_gbps"`
}

// LoadsReport is what [Loads.Measure] finds.
type LoadsReport struct {
	Ceilings Ceilings `json:"ceilings"`
	Runs     []Run    `json:"runs"`
	Scaling  []Run    `json:"scaling,omitempty"`   // async or async-gpu, with one setting changed
	Late     []string `json:"late,omitempty"`      // kinds of loads left out because of the limit, such as "threads=4"
	TooLarge []string `json:"too_large,omitempty"` // why loads as some types were left out
	PeakRSS  uint64   `json:"peak_rss_bytes"`
}

// Measure measures the ceilings, then the loads. If CPU and GPU are both set, a device that cannot convert is worth a
// warning only; with GPU alone it is an error. Other errors are those of the functions.
func (l *Loads) Measure(ctx context.Context) (*LoadsReport, error) {
	m := &measurement{Loads: l, count: l.count(), began: time.Now()}
	for _, step := range []func(context.Context) error{
		m.measureCeilings, m.measureModes, m.measureMemory, m.measureScaling,
		m.measureCold, // last, as it throws the file out of the page cache
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return &m.report, nil
}

// measurement is a report in the making.
type measurement struct {
	*Loads
	report        LoadsReport
	number, count int     // of kinds of loads: those that have begun, and all
	link          float64 // what the link reached when it was measured last, in GB/s
	began         time.Time
}

// late reports whether the time is over, and notes then that a kind of load is left out.
func (m *measurement) late(format string, args ...any) bool {
	if m.Limit == 0 || time.Since(m.began) < m.Limit {
		return false
	}
	m.number++
	m.report.Late = append(m.report.Late, fmt.Sprintf(format, args...))
	return true
}

// count returns how many kinds of loads there are.
func (l *Loads) count() (n int) {
	for _, d := range l.DTypes {
		n += len(l.modes(d))
	}
	if l.Scaling {
		n += len(variants(Setup{}))
	}
	if l.Evict != nil {
		n++
	}
	return n
}

// begin says that a kind of load begins.
func (m *measurement) begin(s Setup, setting string) {
	m.number++
	if m.Step == nil {
		return
	}
	what := fmt.Sprintf("%s %s", s.Mode, s.DType)
	if setting != "" {
		what += ", " + setting
	}
	upTo := ""
	if m.Limit > 0 {
		upTo = "up to "
	}
	m.Step(m.number, m.count, fmt.Sprintf("%s, %s%s", what, upTo, counted(m.Runs)))
}

// finish takes the figures of a kind of load.
func (m *measurement) finish(to *[]Run, run Run) {
	*to = append(*to, run)
	if m.Row != nil {
		m.Row(m.report.Ceilings, run)
	}
}

// measureCeilings measures the link and reading.
func (m *measurement) measureCeilings(ctx context.Context) error {
	if _, err := m.ReadSpeed(ctx, false); err != nil { // brings the file into the page cache
		return err
	}
	speed, err := m.LinkSpeed(ctx)
	if err != nil {
		return err
	}
	m.link = speed / 1e9
	m.report.Ceilings.H2D = m.link
	speed, err = m.ReadSpeed(ctx, false)
	m.report.Ceilings.Read = speed / 1e9
	return err
}

// ceilingRetries is how often a ceiling is measured again, at most, after loads that were faster.
const ceilingRetries = 2

// counted returns how many runs there are, in words: "1 run", "5 runs".
func counted(runs int) string {
	if runs == 1 {
		return "1 run"
	}
	return fmt.Sprintf("%d runs", runs)
}

// measureLink measures the link after a group of runs, and notes for each run what it reached before and after. Loads
// cannot be faster than the link for long: if some were, it was slow by chance, and is measured again.
func (m *measurement) measureLink(ctx context.Context, group []Run) error {
	if len(group) == 0 {
		return nil
	}
	least, most, fastest := m.link, m.link, 0.0
	for _, run := range group {
		fastest = max(fastest, run.GBps)
	}
	for try := 0; try == 0 || try <= ceilingRetries && fastest > most; try++ {
		speed, err := m.LinkSpeed(ctx)
		if err != nil {
			return err
		}
		m.link = speed / 1e9
		least, most = min(least, m.link), max(most, m.link)
	}
	for i := range group {
		group[i].LinkLeast, group[i].LinkMost = least, most
	}
	return nil
}

// measureModes measures all warm loads with the usual settings.
func (m *measurement) measureModes(ctx context.Context) error {
	unable := false
	var tooLarge error
	for _, d := range m.DTypes {
		if m.Fits != nil {
			if err := m.Fits(d); err != nil {
				if tooLarge == nil {
					tooLarge = err
				}
				m.number += len(m.modes(d))
				m.report.TooLarge = append(m.report.TooLarge, err.Error())
				continue
			}
		}
		first := len(m.report.Runs)
		for _, mode := range m.modes(d) {
			if mode == AsyncGPU && unable || m.late("%s %s", mode, d) {
				continue
			}
			run, err := m.run(ctx, Setup{Mode: mode, DType: d}, "")
			if err != nil && mode == AsyncGPU && m.CPU && ctx.Err() == nil {
				m.Logger.Warn("loads that the device converts for are not measured, as it cannot", "error", err)
				unable = true
				continue
			}
			if err != nil {
				return err
			}
			m.finish(&m.report.Runs, run)
		}
		if err := m.measureLink(ctx, m.report.Runs[first:]); err != nil {
			return err
		}
	}
	if len(m.report.Runs) == 0 {
		return tooLarge
	}
	return nil
}

// modes returns the warm loads that are compared for dtype.
func (l *Loads) modes(dtype string) []Mode {
	switch {
	case !l.GPU || !l.Expands(dtype):
		return []Mode{Sync, Async}
	case !l.CPU:
		return []Mode{Sync, AsyncGPU}
	}
	return []Mode{Sync, Async, AsyncGPU}
}

// measureMemory takes the peak of resident memory, then measures copies in memory, whose buffers would count for the
// peak.
func (m *measurement) measureMemory(ctx context.Context) error {
	m.report.PeakRSS = m.PeakRSS()
	speed, err := m.CopySpeed(ctx)
	m.report.Ceilings.Memcpy = speed / 1e9
	return err
}

// measureScaling changes one setting at a time. It loads as f16 if that is among the types, else as the first of them.
func (m *measurement) measureScaling(ctx context.Context) error {
	if !m.Scaling {
		return nil
	}
	usual := Setup{Mode: Async, DType: m.DTypes[0]}
	if slices.Contains(m.DTypes, "f16") && (m.Fits == nil || m.Fits("f16") == nil) {
		usual.DType = "f16"
	}
	if m.GPU && !m.CPU && m.Expands(usual.DType) {
		usual.Mode = AsyncGPU
	}
	first := 0 // of the group of variants of one setting
	for _, v := range variants(usual) {
		if m.late("%s", v.name) {
			continue
		}
		if n := len(m.report.Scaling); n > 0 && settingKind(v.name) != settingKind(m.report.Scaling[n-1].Setting) {
			if err := m.measureLink(ctx, m.report.Scaling[first:]); err != nil {
				return err
			}
			first = n
		}
		run, err := m.run(ctx, v.Setup, v.name)
		if err != nil {
			return err
		}
		m.finish(&m.report.Scaling, run)
	}
	return m.measureLink(ctx, m.report.Scaling[first:])
}

// settingKind returns which setting a name such as "threads=4" is about.
func settingKind(name string) string {
	kind, _, _ := strings.Cut(name, "=")
	return kind
}

// variant is a setup with one setting changed, and the name of the change.
type variant struct {
	name string
	Setup
}

func variants(usual Setup) []variant {
	var all []variant
	add := func(s Setup, format string, value any) { all = append(all, variant{fmt.Sprintf(format, value), s}) }
	for _, n := range []int{1, 2, 4, 8, 16} {
		s := usual
		s.Threads = n
		add(s, "threads=%d", n)
	}
	for _, n := range []int{1, 2, 4, 8} {
		s := usual
		s.Streams = n
		add(s, "streams=%d", n)
	}
	for _, n := range []int{256 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20} {
		s := usual
		s.Chunk = n
		add(s, "chunk=%s", humanize.IBytes(uint64(n)))
	}
	return all
}

// measureCold measures the disk, and a raw load of a file that is not in the page cache.
func (m *measurement) measureCold(ctx context.Context) error {
	if m.Evict == nil || m.late("%s", Cold) {
		return nil
	}
	if err := m.Evict(); err != nil {
		return err
	}
	speed, err := m.ReadSpeed(ctx, true)
	if err != nil {
		return err
	}
	disk := &m.report.Ceilings.ReadCold
	*disk = speed / 1e9
	run, err := m.run(ctx, Setup{Mode: Cold, DType: "raw"}, "")
	if err != nil {
		return err
	}
	for try := 0; try < ceilingRetries && run.ReadGBps > *disk; try++ { // as for the link
		if err := m.Evict(); err != nil {
			return err
		}
		if speed, err = m.ReadSpeed(ctx, true); err != nil {
			return err
		}
		*disk = max(*disk, speed/1e9)
	}
	run.OfDisk = run.ReadGBps / *disk
	m.finish(&m.report.Runs, run)
	return m.measureLink(ctx, m.report.Runs[len(m.report.Runs)-1:])
}

// run loads the model several times. setting is the name of what is not as usual.
func (m *measurement) run(ctx context.Context, s Setup, setting string) (Run, error) {
	run := Run{Mode: s.Mode, DType: s.DType, Setting: setting}
	m.begin(s, setting)
	var totals []float64
	var last Result
	began := time.Now()
	share := (m.Limit - began.Sub(m.began)) / time.Duration(m.count-m.number+1)
	for i := range m.Runs {
		if took := time.Since(began); m.Limit > 0 && i > 0 && took+took/time.Duration(i) > share {
			break
		}
		if s.Mode == Cold {
			if err := m.Evict(); err != nil {
				return run, err
			}
		}
		var err error
		if last, err = m.Load(ctx, s); err != nil {
			return run, err
		}
		run.Seconds = append(run.Seconds, last.Transfer.Seconds())
		totals = append(totals, last.Total.Seconds())
	}
	run.Dequant, run.Pinned, run.Proved = last.Dequant, last.PinnedBytes, last.Proved
	run.Median, run.Total = median(run.Seconds), median(totals)
	if run.Median > 0 {
		run.GBps = float64(last.UploadBytes) / run.Median / 1e9
		run.Device = float64(last.DeviceBytes) / run.Median / 1e9
		run.ReadGBps = float64(last.ReadBytes) / run.Median / 1e9
	}
	run.OfLink = run.GBps / m.report.Ceilings.H2D
	return run, nil
}

// median returns the median of x, which must not be empty: the mean of the two in the middle if there are two.
func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
