package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// benchReport is the JSON of bench. Speeds are in units of 10^9 bytes per second.
type benchReport struct {
	Model     string       `json:"model"`
	FileBytes uint64       `json:"file_bytes"`
	Device    deviceReport `json:"device"`
	CPUs      int          `json:"cpus"`
	Ceilings  ceilings     `json:"ceilings"`
	Runs      []benchRun   `json:"runs"`
	Scaling   []benchRun   `json:"scaling,omitempty"` // mode "async" or "async-gpu" with one setting changed
	PeakRSS   uint64       `json:"peak_rss_bytes"`
	OpenRSS   uint64       `json:"open_rss_bytes"` // resident once the device was open, before anything was loaded
}

// ceilings is what this machine can do at most, measured in this process just before the runs.
type ceilings struct {
	H2D      float64 `json:"h2d_gbps"`       // pinned memory to device memory
	Memcpy   float64 `json:"memcpy_gbps"`    // memory to memory, all threads of a load together
	Read     float64 `json:"read_gbps"`      // the file, from the page cache if it is there
	ReadCold float64 `json:"read_cold_gbps"` // the file, directly from the disk
}

// Ways of loading.
const (
	modeSync     = "sync"
	modeAsync    = "async"     // the CPU converts
	modeAsyncGPU = "async-gpu" // the device converts what it has a kernel for
	modeCold     = "cold"      // async, with the file not in the page cache
)

// benchRun is one way of loading, done several times. Times are those of the transfer, from the first read to the end of the
// last copy.
type benchRun struct {
	Mode     string    `json:"mode"`
	DType    string    `json:"dtype"`
	Dequant  string    `json:"dequant"`           // who converted: "gpu" (some at least), "cpu" or "none"
	Setting  string    `json:"setting,omitempty"` // what is not as usual, "threads=4"
	Seconds  []float64 `json:"seconds"`
	Median   float64   `json:"median_seconds"`
	Total    float64   `json:"median_total_seconds"` // with planning, allocation and pinning
	GBps     float64   `json:"upload_gbps"`
	OfLink   float64   `json:"of_link"`           // upload_gbps as a share of h2d_gbps
	Device   float64   `json:"device_gbps"`       // what became of the uploaded bytes on the device, per second
	ReadGBps float64   `json:"read_gbps"`         // file bytes per second
	OfDisk   float64   `json:"of_disk,omitempty"` // read_gbps as a share of read_cold_gbps; cold runs only
	Pinned   int64     `json:"pinned_bytes"`
}

func newBenchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench [MODEL] [flags]",
		Short: "Measure this machine's ceilings, then the loaders against them",
		Long: `Measure what this machine can do at most (link, memory, disk), then load MODEL synchronously and asynchronously and show
what share of that each reaches. All figures come from this process; runs are repeated and medians shown.

The model should be in the page cache: it is read once before. MODEL may be on a server; file read is then a plain download. Without MODEL a synthetic one is made in the directory for
temporary files and removed afterwards.

On a GPU with hipRTC loads that convert are measured both ways, by the CPU (async) and by the device (async-gpu), of which
--dequant cpu and --dequant gpu choose one.

'bench kernels' measures dequantization alone, on one core or on a device.`,
		Args: cobra.MaximumNArgs(1),
	}
	cmd.AddCommand(newBenchKernelsCommand())
	f := addLoadFlags(cmd)
	runs := cmd.Flags().Int("runs", 5, "loads of each kind; medians are shown")
	scaling := cmd.Flags().Bool("scaling", true, "also load with other numbers of threads and streams and other chunk sizes")
	cold := cmd.Flags().Bool("cold", true, "also load with the file not in the page cache (Linux)")
	preset := cmd.Flags().String("preset", "llama-1b", "what to make when there is no MODEL, as for synth")
	chart := cmd.Flags().String("chart", "", "draw the result into this SVG file")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if *runs < 1 {
			return usageErrorf("--runs %d: at least 1", *runs)
		}
		if err := f.dequant.check(*f.sync); err != nil {
			return err
		}
		path, remove, err := benchModel(cmd.Context(), args, *preset, cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		defer remove()
		log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
		b := &bench{flags: f, runs: *runs, log: log}
		defer func() { err = errors.Join(err, b.close()) }()
		if err := b.open(cmd.Context(), path, cmd.ErrOrStderr()); err != nil {
			return err
		}
		dtypes := loader.DTypes()
		if cmd.Flags().Changed("dtype") {
			dtypes = []loader.DType{*f.dtype}
		}
		if err := b.measure(cmd.Context(), dtypes, *cold, *scaling); err != nil {
			return err
		}
		if *chart != "" {
			err := writeFile(*chart, func(o *outputFile) error { return drawBench(o, &b.report) })
			if err != nil {
				return err
			}
		}
		if *f.json {
			return writeJSON(cmd.OutOrStdout(), &b.report)
		}
		return b.report.print(cmd.OutOrStdout())
	}
	return cmd
}

// benchModel returns the model to load: the argument, or one that is made, and what removes it.
func benchModel(ctx context.Context, args []string, preset string, stderr io.Writer) (path string, remove func(), err error) {
	if len(args) == 1 {
		return args[0], func() {}, nil
	}
	dir, err := os.MkdirTemp("", "gguf2gpu-bench-")
	if err != nil {
		return "", nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) } // a leftover in the temporary directory is not worth failing for
	path = filepath.Join(dir, preset+".gguf")
	synth := []string{"synth", "-o", path, "--preset", preset, "--type", "q4_k_m", "--progress", "none"}
	if code := Main(ctx, synth, nil, io.Discard, stderr); code != exitOK {
		remove()
		return "", nil, withCode(code, errors.New("no model could be made to load"))
	}
	return path, remove, nil
}

// bench is a device and a model, and what has been measured.
type bench struct {
	flags  *loadFlags
	runs   int
	log    *slog.Logger
	file   *gguf.Model
	client *remote.Client // nil: the model is a file
	rt     *amdhip.Runtime
	dev    *amdhip.Device
	report benchReport
}

func (b *bench) open(ctx context.Context, path string, stderr io.Writer) (err error) {
	if b.rt, b.dev, err = b.flags.device.open(stderr, b.log); err != nil {
		return err
	}
	if b.file, b.client, err = b.flags.remote.open(ctx, path, b.log); err != nil {
		return err
	}
	b.report = benchReport{
		Model: remote.Redact(path), FileBytes: b.file.Size(), CPUs: runtime.GOMAXPROCS(0), OpenRSS: currentRSS(),
		Device: deviceReport{Kind: b.rt.Kind(), Index: b.dev.Index(), Name: b.dev.Name()},
	}
	return nil
}

func (b *bench) close() error {
	var errs []error
	if b.file != nil {
		errs = append(errs, b.file.Close())
	}
	if b.client != nil {
		b.client.Close()
	}
	if b.rt != nil {
		errs = append(errs, b.rt.Close())
	}
	return errors.Join(errs...)
}

// measure fills the report.
func (b *bench) measure(ctx context.Context, dtypes []loader.DType, cold, scaling bool) error {
	if err := b.measureLoads(ctx, dtypes, scaling); err != nil {
		return err
	}
	// Cold runs come last: they throw the file out of the page cache.
	if cold && !b.file.Remote() {
		return b.measureCold(ctx)
	}
	return nil
}

// measureLoads measures the ceilings, then every warm load.
func (b *bench) measureLoads(ctx context.Context, dtypes []loader.DType, scaling bool) (err error) {
	c := &b.report.Ceilings
	threads := *b.flags.threads
	if threads == 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	readers := threads
	if b.file.Remote() {
		readers = cmp.Or(*b.flags.conns, loader.DefaultConnections)
	}
	if _, err = loader.ReadSpeed(ctx, b.file, readers, false); err != nil { // warms the cache
		return err
	}
	for _, m := range []struct {
		to      *float64
		measure func() (float64, error)
	}{
		{&c.H2D, func() (float64, error) { return loader.LinkSpeed(ctx, b.dev) }},
		{&c.Read, func() (float64, error) { return loader.ReadSpeed(ctx, b.file, readers, false) }},
	} {
		speed, err := m.measure()
		if err != nil {
			return err
		}
		*m.to = speed / 1e9
	}
	if err := b.measureModes(ctx, dtypes); err != nil {
		return err
	}
	b.report.PeakRSS = peakRSS() // before the memory ceiling, whose buffers would count
	speed, err := loader.CopySpeed(ctx, threads)
	if err != nil {
		return err
	}
	c.Memcpy = speed / 1e9
	if !scaling {
		return nil
	}
	d := dtypes[0]
	if slices.Contains(dtypes, loader.F16) {
		d = loader.F16
	}
	return b.measureScaling(ctx, d)
}

// measureScaling changes one setting at a time.
func (b *bench) measureScaling(ctx context.Context, d loader.DType) error {
	type variant struct {
		name string
		set  func(*loader.Options)
	}
	var variants []variant
	for _, n := range []int{1, 2, 4, 8, 16} {
		variants = append(variants, variant{fmt.Sprintf("threads=%d", n), func(o *loader.Options) { o.Threads = n }})
	}
	for _, n := range []int{1, 2, 4, 8} {
		variants = append(variants, variant{fmt.Sprintf("streams=%d", n), func(o *loader.Options) { o.Streams = n }})
	}
	for _, n := range []int{256 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20} {
		variants = append(variants, variant{fmt.Sprintf("chunk=%s", humanize.IBytes(uint64(n))), func(o *loader.Options) {
			o.Chunk = n
		}})
	}
	mode := modeAsync
	if *b.flags.dequant.by == loader.DequantGPU && b.expands(d) {
		mode = modeAsyncGPU
	}
	for _, v := range variants {
		o := b.options(mode, d)
		v.set(&o)
		run, err := b.run(ctx, mode, d, v.name, o)
		if err != nil {
			return err
		}
		b.report.Scaling = append(b.report.Scaling, run)
	}
	return nil
}

// measureCold measures the disk and a raw load of a file that is not in the page cache.
func (b *bench) measureCold(ctx context.Context) error {
	if !canEvict {
		return nil
	}
	o := b.options(modeCold, loader.Raw)
	threads := o.Threads
	if threads == 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	if err := b.evict(); err != nil {
		return err
	}
	speed, err := loader.ReadSpeed(ctx, b.file, threads, true)
	if err != nil {
		return err
	}
	b.report.Ceilings.ReadCold = speed / 1e9
	run, err := b.run(ctx, modeCold, loader.Raw, "", o)
	if err != nil {
		return err
	}
	run.OfDisk = run.ReadGBps / b.report.Ceilings.ReadCold
	b.report.Runs = append(b.report.Runs, run)
	return nil
}

// evict takes the model out of the page cache.
func (b *bench) evict() error {
	for _, p := range b.file.Parts() {
		if err := evict(p.File()); err != nil {
			return fmt.Errorf("%s cannot be taken out of the page cache: %w", p.Path, err)
		}
	}
	return nil
}

// run loads the model several times and returns the medians.
func (b *bench) run(ctx context.Context, mode string, d loader.DType, setting string, o loader.Options) (benchRun, error) {
	run := benchRun{Mode: mode, DType: d.String(), Setting: setting}
	load := loader.Load
	if mode == modeSync {
		load = loader.LoadSync
	}
	var totals []float64
	var last loader.Report
	for range b.runs {
		if mode == modeCold {
			if err := b.evict(); err != nil {
				return run, err
			}
		}
		w, err := load(ctx, b.dev, b.file, o)
		if err != nil {
			return run, err
		}
		last, run.Dequant = w.Report(), dequantizedBy(w, b.file)
		if err := w.Close(); err != nil {
			return run, err
		}
		run.Seconds = append(run.Seconds, last.Transfer.Seconds())
		totals = append(totals, last.Total.Seconds())
	}
	run.Median, run.Total, run.Pinned = median(run.Seconds), median(totals), last.PinnedBytes
	if run.Median > 0 {
		run.GBps = float64(last.UploadBytes) / run.Median / 1e9
		run.Device = float64(last.DeviceBytes) / run.Median / 1e9
		run.ReadGBps = float64(last.ReadBytes) / run.Median / 1e9
	}
	run.OfLink = run.GBps / b.report.Ceilings.H2D
	return run, nil
}

func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// print is the report for people.
func (r *benchReport) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(out, "%s, %s, on %s, %d CPUs; GB = 10^9 bytes, medians\n", filepath.Base(r.Model), humanize.Bytes(r.FileBytes),
		r.Device.Name, r.CPUs)
	c := r.Ceilings
	fmt.Fprintf(out, "ceilings: link %.2f GB/s, memory copy %.2f, file read %.2f", c.H2D, c.Memcpy, c.Read)
	if c.ReadCold > 0 {
		fmt.Fprintf(out, ", from disk %.2f", c.ReadCold)
	}
	fmt.Fprintf(out, "\nhost memory: %s resident at most, %s when the device was open\n\n", humanize.IBytes(r.PeakRSS),
		humanize.IBytes(r.OpenRSS))
	fmt.Fprintln(w, "mode\tdtype\tdequant\tsetting\tseconds\tmin\tmax\tGB/s\tof link\tdevice GB/s\tread GB/s\tof disk\t")
	for _, run := range slices.Concat(r.Runs, r.Scaling) {
		disk := ""
		if run.OfDisk > 0 {
			disk = fmt.Sprintf("%.1f %%", 100*run.OfDisk)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%.4f\t%.4f\t%.4f\t%.2f\t%.1f %%\t%.2f\t%.2f\t%s\t\n", run.Mode, run.DType, run.Dequant,
			run.Setting, run.Median, slices.Min(run.Seconds), slices.Max(run.Seconds), run.GBps, 100*run.OfLink, run.Device,
			run.ReadGBps, disk)
	}
	return w.Flush()
}
