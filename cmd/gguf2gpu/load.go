package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// loadFlags are the flags of load that verify has, too: what goes where, and how.
type loadFlags struct {
	device   *deviceFlags
	dtype    *loader.DType
	rules    []loader.Rule
	tensors  **regexp.Regexp
	streams  *int
	threads  *int
	staging  *uint64
	chunk    *uint64
	sync     *bool
	io       *loader.IO
	remote   remoteFlags
	conns    *int
	dequant  dequantFlags
	check    *bool
	stall    *time.Duration
	progress *string
	json     *bool
	hashes   *hashFlags  // of load and verify
	shard    *shardFlags // likewise
	split    *splitFlags // likewise
}

func addLoadFlags(cmd *cobra.Command) *loadFlags {
	fs := cmd.Flags()
	f := &loadFlags{
		device:   addDeviceFlags(fs),
		dtype:    dtypeFlag(fs),
		tensors:  parsedFlag(fs, "tensors", nil, "REGEXP", "only the tensors whose names match", parseNames),
		streams:  fs.Int("streams", 0, "streams that copies are spread over (default chosen for the machine)"),
		threads:  fs.Int("threads", 0, "workers that read and dequantize (default chosen for the machine)"),
		staging:  byteSizeFlag(fs, "staging", "pinned staging memory, such as 64MiB (default chosen for the machine)"),
		chunk:    byteSizeFlag(fs, "chunk", "bytes of one copy, such as 4MiB (default chosen for the machine)"),
		sync:     fs.Bool("sync", false, "the synchronous reference loader: one thread, one copy at a time"),
		io:       parsedFlag(fs, "io", loader.IOAuto, "WAY", "how bytes come off the disk: auto, mmap, direct", loader.ParseIO),
		remote:   addRemoteFlags(fs),
		conns:    fs.Int("connections", 0, "ranges of a remote MODEL that are read at the same time (default 32)"),
		dequant:  addDequantFlags(fs),
		check:    fs.Bool("check", false, "fail if a value is not finite, in the file or as what it is converted to"),
		stall:    fs.Duration("stall", time.Minute, "give up when nothing at all has happened for so long"),
		progress: progressFlag(fs),
		json:     jsonFlag(cmd),
	}
	fs.Var(rulesFlag[loader.Rule]{&f.rules, "REGEXP=DTYPE", loader.ParseRule}, "dtype-for", "exception by tensor name, as in 'norm=f32'; repeatable, the first match wins")
	return f
}

func parseNames(s string) (*regexp.Regexp, error) { return regexp.Compile(s) }

// rulesFlag collects the values of a flag that may be given several times.
type rulesFlag[T fmt.Stringer] struct {
	rules *[]T
	kind  string // what the help calls a value
	parse func(string) (T, error)
}

func (f rulesFlag[T]) Type() string { return f.kind }

func (f rulesFlag[T]) String() string {
	if f.rules == nil || len(*f.rules) == 0 {
		return ""
	}
	texts := make([]string, len(*f.rules))
	for i, rule := range *f.rules {
		texts[i] = rule.String()
	}
	return strings.Join(texts, " ")
}

func (f rulesFlag[T]) Set(s string) error {
	rule, err := f.parse(s)
	if err == nil {
		*f.rules = append(*f.rules, rule)
	}
	return err
}

// options are the loader's, as the flags say.
func (f *loadFlags) options(progress func(done, total int64), log *slog.Logger) loader.Options {
	o := loader.Options{
		DType: *f.dtype, Rules: f.rules, Tensors: *f.tensors,
		Streams: *f.streams, Threads: *f.threads, Staging: int64(*f.staging), Chunk: int(*f.chunk), IO: *f.io, Connections: *f.conns,
		Dequant: *f.dequant.by, Compiler: kernelCompiler(*f.dequant.cache, log),
		Check: *f.check, Hash: f.hashes.wanted(),
		Stall: *f.stall, Progress: progress, Logger: log,
	}
	if f.shard != nil {
		o.Shard = f.shard.shard
	}
	return o
}

// loaded is a model that a command has loaded.
type loaded struct {
	path    string
	file    *gguf.Model
	client  *remote.Client // nil: the model is a file
	rt      *amdhip.Runtime
	dev     *amdhip.Device // the first
	weights onDevices
	models  []*loader.Model // that weights consist of, one for each device
	open    time.Duration   // opening the file and the device
	openRSS uint64          // resident bytes then
	total   time.Duration   // from the start to the end of the load

	shard *shardFlags

	checked, asExpected bool // by --check and --expect
}

// load opens the model and the device and loads one into the other. The caller must close it.
func (f *loadFlags) load(ctx context.Context, path string, stderr io.Writer, trace *loader.Trace) (_ *loaded, err error) {
	s := &loaded{path: remote.Redact(path), checked: *f.check, shard: f.shard}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := errors.Join(f.dequant.check(*f.sync), f.split.check(*f.device.device, *f.sync), f.shard.resolve(), f.hashes.prepare()); err != nil {
		return nil, err
	}
	start := time.Now()
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if s.file, s.client, err = f.remote.open(ctx, path, log); err != nil {
		return nil, err
	}
	if f.shard != nil {
		f.device.local = f.shard.local
	}
	var devs []*amdhip.Device
	if s.rt, devs, err = f.device.openAll(stderr, log); err != nil {
		return nil, err
	}
	s.dev = devs[0]
	s.open, s.openRSS = time.Since(start), currentRSS()
	bar := newProgress(*f.progress, stderr, "loading")
	o := f.options(bar.Update, log)
	o.Trace = trace
	s.weights, s.models, err = f.run(ctx, devs, s.file, o)
	s.total = time.Since(start)
	if err != nil {
		bar.Abort()
		return nil, err
	}
	bar.Finish()
	if err := f.hashes.finish(s); err != nil {
		return nil, err
	}
	return s, nil
}

// close gives everything back, in reverse order.
func (s *loaded) close() error {
	var errs []error
	if s.weights != nil {
		errs = append(errs, s.weights.Close())
	}
	if s.rt != nil {
		errs = append(errs, s.rt.Close())
	}
	if s.file != nil {
		errs = append(errs, s.file.Close())
	}
	if s.client != nil {
		s.client.Close()
	}
	return errors.Join(errs...)
}

// loadReport is the JSON of load. Sizes are in bytes; fields are part of the command's contract.
type loadReport struct {
	Model          string       `json:"model"`
	Architecture   string       `json:"architecture"`
	Device         deviceReport `json:"device"`
	DType          string       `json:"dtype"`
	Dequant        string       `json:"dequant"` // who converted: "gpu" (some at least), "cpu" or "none"
	Tensors        int          `json:"tensors"`
	Expanded       int          `json:"expanded_tensors"` // of these, converted on the device
	FileBytes      uint64       `json:"file_bytes"`
	ReadBytes      uint64       `json:"read_bytes"`
	MappedBytes    uint64       `json:"mapped_bytes"`  // of read_bytes, through the mapping
	DirectBytes    uint64       `json:"direct_bytes"`  // of read_bytes, by direct reads
	FetchedBytes   uint64       `json:"fetched_bytes"` // by direct reads, with what lies between the pieces of slices
	UploadBytes    uint64       `json:"upload_bytes"`
	DeviceBytes    uint64       `json:"device_bytes"`
	ScratchBytes   uint64       `json:"scratch_bytes"` // of device memory during the load, beside device_bytes
	Seconds        loadSeconds  `json:"seconds"`
	UploadGBps     float64      `json:"upload_gbps"` // over the link, 10^9 bytes per second of transfer
	DeviceGBps     float64      `json:"device_gbps"` // device_bytes, likewise: what was delivered
	Streams        int          `json:"streams"`
	Threads        int          `json:"threads"`
	ChunkBytes     int          `json:"chunk_bytes"`
	PinnedBytes    int64        `json:"pinned_bytes"`
	PeakRSSBytes   uint64       `json:"peak_rss_bytes"`
	OpenRSSBytes   uint64       `json:"open_rss_bytes"` // resident once the device was open
	UnpinnedCopies int64        `json:"unpinned_copies"`
	Verified       bool         `json:"verified"`
	Checked        bool         `json:"checked"`     // every value is finite
	AsExpected     bool         `json:"as_expected"` // every tensor has the hash that was expected
	Shard          *shardReport `json:"shard,omitempty"`
	Split          string       `json:"split,omitempty"` // with several devices
	// Devices are those that the other fields are about together; Device is the first of them.
	Devices []deviceShare `json:"devices"`
	remoteReport
}

// deviceReport says which device a command used.
type deviceReport struct {
	Kind  string `json:"kind"` // "hip" or "soft"
	Index int    `json:"index"`
	Name  string `json:"name"`
}

// loadSeconds is where the time went. The parts but pin_total follow each other; total has small gaps besides.
type loadSeconds struct {
	Open     float64 `json:"open"`
	Plan     float64 `json:"plan"`
	Kernels  float64 `json:"kernels"` // making the device's kernels ready: compiling, loading and checking them
	Alloc    float64 `json:"alloc"`
	Pin      float64 `json:"pin"`
	PinTotal float64 `json:"pin_total"` // pinning in all; what is beyond pin overlapped the transfer
	Transfer float64 `json:"transfer"`
	Total    float64 `json:"total"`
}

func (s *loaded) report(dtype loader.DType) loadReport {
	r := s.weights.Report()
	out := loadReport{
		Model: s.path, Architecture: s.file.Architecture(),
		Device: deviceReport{Kind: s.rt.Kind(), Index: s.dev.Index(), Name: s.dev.Name()},
		DType:  dtype.String(), Dequant: dequantizedBy(s.weights, s.file), Tensors: r.Tensors, Expanded: r.Expanded,
		FileBytes: r.FileBytes, ReadBytes: r.ReadBytes, MappedBytes: r.MappedBytes, DirectBytes: r.DirectBytes,
		FetchedBytes: r.FetchedBytes,
		UploadBytes:  r.UploadBytes, DeviceBytes: r.DeviceBytes, ScratchBytes: r.ScratchBytes,
		Seconds: loadSeconds{
			Open: s.open.Seconds(), Plan: r.Plan.Seconds(), Kernels: r.Kernels.Seconds(), Alloc: r.Alloc.Seconds(),
			Pin: r.Pin.Seconds(), PinTotal: r.PinTotal.Seconds(), Transfer: r.Transfer.Seconds(), Total: s.total.Seconds(),
		},
		Streams: r.Streams, Threads: r.Threads, ChunkBytes: r.ChunkBytes, PinnedBytes: r.PinnedBytes,
		PeakRSSBytes: peakRSS(), OpenRSSBytes: s.openRSS, UnpinnedCopies: r.UnpinnedCopies,
		Checked: s.checked, AsExpected: s.asExpected, Shard: s.shard.report(s.weights.Tensors()),
		Devices: shares(s.models),
	}
	if w, ok := s.weights.(*loader.SplitModel); ok {
		out.Split = w.Split().By.String()
	}
	if s.client != nil {
		st := s.client.Stats()
		out.remoteReport = remoteReport{r.RemoteBytes, r.Connections, st.Requests, st.Retries}
	}
	if r.Transfer > 0 {
		out.UploadGBps = float64(r.UploadBytes) / r.Transfer.Seconds() / 1e9
		out.DeviceGBps = float64(r.DeviceBytes) / r.Transfer.Seconds() / 1e9
	}
	return out
}

// print is the report for people.
func (r *loadReport) print(w io.Writer) {
	fmt.Fprintf(w, "%d tensors of %s as %s on %s\n", r.Tensors, r.Model, r.DType, names(r.Devices))
	r.Shard.print(w)
	fmt.Fprintf(w, "  %s read, %s uploaded in %.3f s: %.2f GB/s\n", humanize.Bytes(r.ReadBytes), humanize.Bytes(r.UploadBytes),
		r.Seconds.Transfer, r.UploadGBps)
	if len(r.Devices) > 1 {
		for _, d := range r.Devices {
			fmt.Fprintf(w, "  %s:%d: %d tensors, %s on the device, %s uploaded in %.3f s: %.2f GB/s\n", d.Kind, d.Index, d.Tensors,
				humanize.IBytes(d.DeviceBytes), humanize.Bytes(d.UploadBytes), d.Transfer, d.UploadGBps)
		}
	}
	if r.Expanded > 0 {
		fmt.Fprintf(w, "  %d tensors dequantized on the device: %.2f GB/s delivered\n", r.Expanded, r.DeviceGBps)
	}
	fmt.Fprintf(w, "  %.3f s in all: open %.3f, plan %.3f, kernels %.3f, alloc %.3f, pin %.3f, transfer %.3f\n", r.Seconds.Total,
		r.Seconds.Open, r.Seconds.Plan, r.Seconds.Kernels, r.Seconds.Alloc, r.Seconds.Pin, r.Seconds.Transfer)
	fmt.Fprintf(w, "  %d threads, %d streams, chunks of %s, %s pinned, %s resident at most\n", r.Threads, r.Streams,
		humanize.IBytes(uint64(r.ChunkBytes)), humanize.IBytes(uint64(r.PinnedBytes)), humanize.IBytes(r.PeakRSSBytes))
	r.remoteReport.print(w)
	if r.Verified {
		fmt.Fprintln(w, "  verified: device memory equals the file")
	}
	if r.Checked {
		fmt.Fprintln(w, "  checked: every value is finite")
	}
	if r.AsExpected {
		fmt.Fprintln(w, "  as expected: every tensor has its SHA-256")
	}
}

func newLoadCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "load MODEL [flags]",
		Short: "Put a model on the device",
		Long: `Put a model on the device: read, dequantize and upload its tensors, all at the same time.

MODEL is a GGUF file, or any part of a split model. It may be on a server that supports ranges: https://HOST/PATH, with a token
in GGUF2GPU_TOKEN (for huggingface.co in HF_TOKEN) and a proxy in HTTPS_PROXY. --verify then fetches it a second time.`,
		Args: cobra.ExactArgs(1),
	}
	f := addLoadFlags(cmd)
	f.hashes, f.shard = addHashFlags(cmd, f.json), addShardFlags(cmd.Flags())
	f.hashes.shard, f.split = f.shard, addSplitFlags(cmd.Flags())
	planOnly := cmd.Flags().Bool("plan", false, "print what would go where, with bytes per device and per rank, and stop")
	verify := cmd.Flags().Bool("verify", false, "read device memory back afterwards and compare it with the file")
	readback := cmd.Flags().String("readback", "", "write what is in device memory to this safetensors file")
	traceTo := cmd.Flags().String("trace", "", "write the pipeline's timeline to this file (Chrome trace events; opens in Perfetto)")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if *planOnly {
			return f.plan(cmd, args[0])
		}
		var trace *loader.Trace
		if *traceTo != "" {
			trace = new(loader.Trace)
		}
		s, err := f.load(cmd.Context(), args[0], cmd.ErrOrStderr(), trace)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		r := s.report(*f.dtype)
		if *verify {
			if err := s.weights.Verify(cmd.Context()); err != nil {
				return err
			}
			r.Verified = true
		}
		if *readback != "" {
			err := writeFile(f.shard.expand(*readback), func(o *outputFile) error { return s.weights.WriteSafetensors(cmd.Context(), o) })
			if err != nil {
				return err
			}
		}
		if trace != nil {
			err := writeFile(f.shard.expand(*traceTo), func(o *outputFile) error { _, err := trace.WriteTo(o); return err })
			if err != nil {
				return err
			}
		}
		return f.printReport(cmd, s, &r)
	}
	return cmd
}

// writeFile lets write make the file at path, which appears only when it is complete.
func writeFile(path string, write func(*outputFile) error) error {
	o, err := createOutput(path, true)
	if err != nil {
		return err
	}
	defer o.Discard()
	if err := write(o); err != nil {
		return err
	}
	return o.Commit()
}

// printReport closes s and prints r on stdout, as JSON or for people; on stderr when stdout is taken. Closing comes first: if it
// fails, stdout is for that.
func (f *loadFlags) printReport(cmd *cobra.Command, s *loaded, r *loadReport) error {
	if err := s.close(); err != nil {
		return err
	}
	switch {
	case *f.json:
		return writeJSON(cmd.OutOrStdout(), r)
	case f.hashes.ownsStdout():
		r.print(cmd.ErrOrStderr())
	default:
		r.print(cmd.OutOrStdout())
	}
	return nil
}
