package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/klauspost/cpuid/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

func newBenchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench [MODEL] [flags]",
		Short: "Measure this machine's ceilings, then the loaders against them",
		Long: `Measure what this machine can do at most (link, memory, disk), then load MODEL synchronously and asynchronously and show
what share of that each reaches. All figures come from this process; runs are repeated and medians shown. The link is
measured again after each group of loads: --chart draws what it reached before and after them as a band, and the single
runs from the slowest to the fastest.

After 40 seconds no other kind of load is begun, and before that loads of large models are repeated less often; --limit
sets another time. Types that do not fit onto the device are left out.

The model should be in the page cache: it is read once before. MODEL may be on a server; file read is then a plain download. Without MODEL a synthetic one is made in the directory for
temporary files and removed afterwards.

On a GPU with hipRTC loads that convert are measured both ways, by the CPU (async) and by the device (async-gpu), of which
--dequant cpu and --dequant gpu choose one.

'bench kernels' measures dequantization alone, on one core or on a device.`,
		Example: `  gguf2gpu bench
  gguf2gpu bench model.gguf --dtype f16 --scaling=false --runs 10
  gguf2gpu bench model.gguf --chart bench.svg --json > bench.json`,
		Args: cobra.MaximumNArgs(1),
	}
	cmd.AddCommand(newBenchKernelsCommand())
	f := addLoadFlags(cmd)
	for name, usage := range map[string]string{
		"device": "auto (a GPU if one is usable, else the software device), soft, hip, or hip:N",
		"dtype":  "load as this element type alone: raw (the file's bytes), f32, f16, bf16",
	} {
		cmd.Flags().Lookup(name).Usage = usage
	}
	cmd.Flags().Lookup("dtype").DefValue = "all"
	_ = cmd.Flags().MarkHidden("sync") // it is there, and said to have no effect
	runs := intFlag(cmd.Flags(), "runs", 5, 1, "loads of each kind; medians are shown")
	limit := cmd.Flags().Duration("limit", 40*time.Second, "leave out what this `TIME` does not suffice for; 0s: nothing, as with --runs")
	scaling := cmd.Flags().Bool("scaling", true, "also load with other numbers of threads and streams and other chunk sizes")
	cold := cmd.Flags().Bool("cold", true, "also load with the file not in the page cache (Linux)")
	preset := textFlag(cmd.Flags(), "preset", synth.Llama1B, "NAME", "what to make when there is no MODEL, as for synth")
	chart := cmd.Flags().String("chart", "", "draw the result into this SVG file")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		config := f.config(newLogger(cmd, slog.LevelWarn))
		if err := firstError([]error{f.dequant.check(*f.sync), config.Check()}); err != nil {
			return err
		}
		sayUselessFlags(notices(cmd), cmd.Flags(), f, args)
		steps := newBenchSteps(*f.progress, cmd.ErrOrStderr())
		defer steps.clear()
		path, remove, err := benchModel(cmd, args, *preset, *f.progress)
		if err != nil {
			return err
		}
		defer remove()
		log := newLogger(cmd, slog.LevelWarn)
		b := &benchTarget{flags: f, log: log}
		defer func() { err = errors.Join(err, b.close()) }()
		if err := b.open(cmd.Context(), path, notices(cmd)); err != nil {
			return err
		}
		if err := checkOutputs(b.file, plannedOutput{flag: "--chart", path: *chart}); err != nil {
			return err
		}
		r := benchReport{
			Model: remote.Redact(path), FileBytes: b.file.Size(), CPUs: runtime.GOMAXPROCS(0), OpenRSS: currentRSS(),
			Device: deviceReport{Kind: b.rt.Kind(), Index: b.dev.Index(), Name: b.dev.Name()},
		}
		loads := b.loads(cmd.Flags().Changed("dtype"))
		loads.Runs, loads.Scaling = *runs, *scaling
		if loads.Limit = *limit; cmd.Flags().Changed("runs") && !cmd.Flags().Changed("limit") {
			loads.Limit = 0
		}
		if !*cold {
			loads.Evict = nil
		}
		f.sayUseless(notices(cmd), cmd.Flags(), path, b.file)
		doing(cmd.Context(), waitCopies, whyCopies)
		loads.Step = steps.step
		if !*f.json {
			r.printHead(cmd.OutOrStdout())
			loads.Row = (&benchTable{out: cmd.OutOrStdout(), steps: steps}).row
		}
		measured, err := loads.Measure(cmd.Context())
		if err != nil {
			return err
		}
		steps.clear()
		r.LoadsReport = *measured
		if *chart != "" {
			if err := writeFile(*chart, func(o *outputFile) error { return bench.Chart(o, r.caption(), measured) }); err != nil {
				return err
			}
		}
		if *f.json {
			return writeJSON(cmd.OutOrStdout(), &r)
		}
		return r.printEnd(cmd.OutOrStdout())
	}
	return cmd
}

// benchReport is the JSON of bench. Speeds are in units of 10^9 bytes per second.
type benchReport struct {
	Model     string       `json:"model"`
	FileBytes uint64       `json:"file_bytes"`
	Device    deviceReport `json:"device"`
	CPUs      int          `json:"cpus"`
	bench.LoadsReport
	OpenRSS uint64 `json:"open_rss_bytes"` // resident once the device was open, before anything was loaded
}

// caption is what the chart of r says beside the figures.
func (r *benchReport) caption() bench.Caption {
	return bench.Caption{
		Model: filepath.Base(r.Model), FileBytes: r.FileBytes, Device: r.Device.Name,
		CPU: strings.Join(strings.Fields(cpuid.CPU.BrandName), " "), Cores: r.CPUs,
		Date: time.Now().Format(time.DateOnly), Version: version(),
	}
}

// benchModel returns the path of the model to load: the argument, or a synthetic one. The caller must call remove in
// the end.
func benchModel(cmd *cobra.Command, args []string, preset synth.Preset, progress string) (path string, remove func(),
	err error,
) {
	if len(args) == 1 {
		return args[0], func() {}, nil
	}
	dir, err := os.MkdirTemp("", "gguf2gpu-bench-")
	if err != nil {
		return "", nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) } // a leftover in the temporary directory is not worth failing for
	path = filepath.Join(dir, preset.String()+".gguf")
	bar := newProgress(progress, cmd.ErrOrStderr(), "making a model")
	err = writeFile(path, func(o *outputFile) error {
		m := synth.Model{Preset: preset, Types: synth.Q4KM, Seed: 1}
		_, err := m.Write(cmd.Context(), o, bar.Update)
		return err
	})
	if err != nil {
		bar.Abort()
		remove()
		return "", nil, fmt.Errorf("no model could be made to load: %w", err)
	}
	bar.Finish()
	return path, remove, nil
}

// printHead writes what is measured, for people.
func (r *benchReport) printHead(out io.Writer) {
	fmt.Fprintf(out, "%s, %s, on %s, %d CPUs; GB = 10^9 bytes, medians\n", term.Safe(filepath.Base(r.Model)),
		humanize.Bytes(r.FileBytes), r.Device.Name, r.CPUs)
}

// printEnd writes what is known behind the rows only, for people.
func (r *benchReport) printEnd(out io.Writer) error {
	c := r.Ceilings
	disk := ""
	if c.ReadCold > 0 {
		disk = fmt.Sprintf(", file read from disk %.2f", c.ReadCold)
	}
	if len(r.Late) > 0 {
		fmt.Fprintf(out, "\nleft out, for want of time (--limit): %s\n", strings.Join(r.Late, ", "))
	}
	for _, why := range r.TooLarge {
		fmt.Fprintf(out, "\nleft out: %s\n", term.Safe(why))
	}
	_, err := fmt.Fprintf(out, "\nmore ceilings: memory copy %.2f GB/s%s\nhost memory: %s resident at most, %s when the device was open\n",
		c.Memcpy, disk, humanize.IBytes(r.PeakRSS), humanize.IBytes(r.OpenRSS))
	return err
}

// sayUselessFlags says which flags have no effect here.
func sayUselessFlags(w io.Writer, fs *pflag.FlagSet, f *loadFlags, args []string) {
	sayWithout(w, fs, "here: bench measures the synchronous loader, too, beside the others", "sync")
	if len(args) > 0 {
		sayWithout(w, fs, "with a MODEL: it is for what bench makes without one", "preset")
	}
	if !*f.sync {
		f.sayCombinations(w, fs)
	}
}
