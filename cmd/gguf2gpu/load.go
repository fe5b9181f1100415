package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"regexp/syntax"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// loadFlags are the flags of load that verify has, too: what goes where, and how.
type loadFlags struct {
	device   *deviceFlags
	dtype    *plan.Policy
	rules    []plan.Rule
	tensors  **regexp.Regexp
	streams  *int
	threads  *int
	staging  *uint64
	chunk    *uint64
	sync     *bool
	io       *loader.IO
	remote   remoteFlags
	twice    string // what reads the model a second time; "": nothing
	conns    *int
	dequant  dequantFlags
	check    *bool
	stall    *time.Duration
	progress *string
	json     *bool
	outputs  func() []plannedOutput // what the command writes besides, once ranks are known; nil: nothing
	hashes   *hashFlags             // of load and verify
	shard    *shardFlags            // likewise
	split    *splitFlags            // likewise
	export   *exportFlags           // of load
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
		io:       textFlag(fs, "io", loader.IOAuto, "WAY", "how bytes come off the disk: auto, mmap, direct"),
		remote:   addRemoteFlags(cmd),
		conns:    fs.Int("connections", 0, "ranges of a remote MODEL that are read at the same time (default 32)"),
		dequant:  addDequantFlags(fs),
		check:    fs.Bool("check", false, "fail if a value is not finite, in the file or as what it is converted to"),
		stall:    fs.Duration("stall", time.Minute, "give up when nothing at all has happened for so long"),
		progress: progressFlag(fs),
		json:     jsonFlag(cmd),
	}
	f.device.stall = f.stall
	fs.Var(rulesFlag[plan.Rule]{&f.rules, "REGEXP=DTYPE", parseText[plan.Rule]}, "dtype-for", "exception by tensor name, as in 'norm=f32'; repeatable, the first match wins")
	return f
}

// parseNames reads a regular expression for names.
func parseNames(s string) (*regexp.Regexp, error) {
	re, err := regexp.Compile(s)
	if e, ok := errors.AsType[*syntax.Error](err); ok {
		return nil, fmt.Errorf("no regular expression: %v at %q", e.Code, e.Expr)
	}
	return re, err
}

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

// spec is what is wanted of the model, as the flags say.
func (f *loadFlags) spec() plan.Spec {
	s := plan.Spec{Policy: *f.dtype, Rules: f.rules, Tensors: *f.tensors, Split: f.split.split()}
	if f.shard != nil {
		s.Shard = f.shard.shard
	}
	return s
}

// config is how the loader works, as the flags say.
func (f *loadFlags) config(log *slog.Logger) loader.Config {
	return loader.Config{
		Streams: *f.streams, Threads: *f.threads, Staging: int64(*f.staging), Chunk: int(*f.chunk), IO: *f.io,
		Connections: *f.conns,
		Dequant:     *f.dequant.by, Compiler: kernelCompiler(*f.dequant.cache, log), Stall: *f.stall, Logger: log,
	}
}

// request is what is wanted of one load besides, as the flags say.
func (f *loadFlags) request(progress func(done, total int64), tr *trace.Trace) loader.Request {
	return loader.Request{Check: *f.check, Hash: f.hashes.wanted(), Progress: progress, Trace: tr}
}

// loaded is a model that a command has loaded.
type loaded struct {
	path    string
	file    *gguf.File
	opener  *models.Opener // nil: the model is a file
	rt      *amdhip.Runtime
	weights *loader.Model
	open    time.Duration // opening the file and the device
	openRSS uint64        // resident bytes then
	total   time.Duration // from the start to the end of the load

	shard *shardFlags

	checked, asExpected bool            // by --check and --expect
	verified            readback.Result // after verify
}

// load opens the model and the device and loads one into the other. The caller must close it.
func (f *loadFlags) load(cmd *cobra.Command, path string, tr *trace.Trace) (_ *loaded, err error) {
	ctx := cmd.Context()
	s := &loaded{path: remote.Redact(path), checked: *f.check, shard: f.shard}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := firstError([]error{
		f.dequant.check(*f.sync), f.split.check(*f.device.device), f.shard.resolve(),
		f.export.check(nil), f.hashes.prepare(),
	}); err != nil {
		return nil, err
	}
	f.sayCombinations(notices(cmd), cmd.Flags())
	start := time.Now()
	log := newLogger(cmd, slog.LevelWarn)
	if s.file, s.opener, err = f.remote.openModel(ctx, path, log); err != nil {
		return nil, err
	}
	if err := f.export.check(s.file); err != nil {
		return nil, err
	}
	if f.twice != "" {
		if err := checkTwice(s.file, f.twice); err != nil {
			return nil, err
		}
	}
	f.sayUseless(notices(cmd), cmd.Flags(), path, s.file)
	if err := checkOutputs(s.file, f.plannedOutputs()...); err != nil {
		return nil, err
	}
	if f.shard != nil {
		f.device.local = f.shard.local
	}
	var devs []*amdhip.Device
	if s.rt, devs, err = f.device.openAll(ctx, notices(cmd), log); err != nil {
		return nil, err
	}
	s.open, s.openRSS = time.Since(start), currentRSS()
	doing(ctx, waitCopies, whyCopies)
	bar := newProgress(*f.progress, cmd.ErrOrStderr(), "loading")
	s.weights, err = f.run(ctx, devs, s.file, f.config(log), f.request(bar.Update, tr))
	s.total = time.Since(start)
	if err != nil {
		bar.Abort()
		return nil, err
	}
	bar.Finish()
	doing(ctx, waitFree, whyFree)
	if err := f.hashes.finish(s); err != nil {
		return nil, err
	}
	return s, nil
}

// plannedOutputs returns what the command writes.
func (f *loadFlags) plannedOutputs() []plannedOutput {
	planned := f.hashes.outputs()
	if f.outputs != nil {
		planned = append(planned, f.outputs()...)
	}
	return planned
}

// run loads file onto devices, with a loader for this one load.
func (f *loadFlags) run(ctx context.Context, devices []*amdhip.Device, file *gguf.File, c loader.Config,
	r loader.Request) (_ *loader.Model, err error) {
	l, err := loader.New(devices, c)
	if err != nil {
		return nil, err
	}
	p, err := l.Plan(file, f.spec())
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if r.Progress != nil {
		r.Progress(0, int64(p.TensorBytes())) // so that it is known from the start how much there is to do
	}
	load := l.Load
	if *f.sync {
		load = l.LoadSync
	}
	m, err := load(ctx, p, r)
	if closing := l.Close(); err != nil || closing != nil {
		if m != nil {
			closing = errors.Join(closing, m.Close())
		}
		return nil, errors.Join(err, closing)
	}
	return m, nil
}

// verify reads everything back and compares it with the file.
func (s *loaded) verify(ctx context.Context) (err error) {
	doing(ctx, waitRead, whyRead)
	defer doing(ctx, waitFree, whyFree)
	s.verified, err = readback.Verify(ctx, s.weights, s.file)
	return err
}

// close gives everything back, in reverse order. What it could not give back it says once.
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
	if s.opener != nil {
		s.opener.Close()
	}
	s.weights, s.rt, s.file, s.opener = nil, nil, nil, nil
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
	PlainBytes     uint64       `json:"plain_bytes"`   // of read_bytes, by ordinary reads
	FetchedBytes   uint64       `json:"fetched_bytes"` // by direct and ordinary reads, with what lies between the pieces of slices
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
	VerifiedCount  int          `json:"verified_tensors"` // that were compared and found equal
	ModelTensors   int          `json:"model_tensors"`    // that the whole model has
	Checked        bool         `json:"checked"`          // every value is finite
	AsExpected     bool         `json:"as_expected"`      // every tensor has the hash that was expected
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
	Check    float64 `json:"check"` // after the transfer, until the digest was compared
	Total    float64 `json:"total"`
}

func describeDevice(d *amdhip.Device) deviceReport {
	return deviceReport{Kind: d.Runtime().Kind(), Index: d.Index(), Name: d.Name()}
}

func (s *loaded) report() loadReport {
	r := s.weights.Report()
	out := loadReport{
		Model: s.path, Architecture: s.file.Architecture(),
		Device: describeDevice(r.Devices[0].Device),
		DType:  s.weights.Plan().Spec.Policy.String(), Dequant: dequantizedBy(s.weights, s.file), Tensors: r.Tensors,
		Expanded:  r.Expanded,
		FileBytes: r.FileBytes, ReadBytes: r.ReadBytes, MappedBytes: r.MappedBytes, DirectBytes: r.DirectBytes,
		PlainBytes: r.PlainBytes, FetchedBytes: r.FetchedBytes,
		UploadBytes: r.UploadBytes, DeviceBytes: r.DeviceBytes, ScratchBytes: r.ScratchBytes,
		Seconds: loadSeconds{
			Open: s.open.Seconds(), Plan: r.Plan.Seconds(), Kernels: r.Kernels.Seconds(), Alloc: r.Alloc.Seconds(),
			Pin: r.Pin.Seconds(), PinTotal: r.PinTotal.Seconds(), Transfer: r.Transfer.Seconds(), Check: r.Check.Seconds(),
			Total: s.total.Seconds(),
		},
		Streams: r.Streams, Threads: r.Threads, ChunkBytes: r.ChunkBytes, PinnedBytes: r.PinnedBytes,
		PeakRSSBytes: peakRSS(), OpenRSSBytes: s.openRSS, UnpinnedCopies: r.UnpinnedCopies,
		Checked: s.checked, AsExpected: s.asExpected, Shard: s.shard.report(s.weights.Tensors()),
		Devices: shares(r.Devices), ModelTensors: r.ModelTensors, VerifiedCount: s.verified.Tensors,
		Verified: s.verified.Of > 0,
	}
	if len(r.Devices) > 1 {
		out.Split = s.weights.Plan().Spec.Split.By.String()
	}
	if s.opener != nil {
		out.remoteReport = remoteReport{RemoteBytes: r.RemoteBytes, Connections: r.Connections}
		out.reportRemote(s.file, s.opener)
	}
	if r.Transfer > 0 {
		out.UploadGBps = float64(r.UploadBytes) / r.Transfer.Seconds() / 1e9
		out.DeviceGBps = float64(r.DeviceBytes) / r.Transfer.Seconds() / 1e9
	}
	return out
}

// print is the report for people.
func (r *loadReport) print(w io.Writer) {
	fmt.Fprintf(w, "%d tensors of %s as %s on %s\n", r.Tensors, term.Safe(r.Model), r.DType, names(r.Devices))
	r.Shard.print(w)
	fmt.Fprintf(w, "  %s read, %s uploaded in %.3f s: %.2f GB/s\n", humanize.Bytes(r.ReadBytes), humanize.Bytes(r.UploadBytes),
		r.Seconds.Transfer, r.UploadGBps)
	if len(r.Devices) > 1 {
		for _, d := range r.Devices {
			fmt.Fprintf(w, "  %s:%d: %d tensors, %s on the device, %s uploaded in %.3f s: %.2f GB/s\n", d.Kind, d.Index, d.Tensors,
				humanize.IBytes(d.DeviceBytes), humanize.Bytes(d.UploadBytes), d.Transfer, d.UploadGBps)
		}
	}
	for _, d := range r.Devices {
		if d.Tensors == 0 && r.ModelTensors > 0 {
			fmt.Fprintf(w, "  %s:%d gets nothing: there are fewer layers than devices or ranks\n", d.Kind, d.Index)
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
		fmt.Fprintf(w, "  verified: %d of %d tensors\n", r.VerifiedCount, r.ModelTensors)
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

MODEL is a GGUF file, or any part of a split model, or
  hf:ORG/REPO[@REVISION][:QUANT or /FILE]   of Hugging Face's hub, with a token in HF_TOKEN
  ollama:NAME[:TAG]                         of ollama on this machine, or else of its registry
  oci://REGISTRY/REPO:TAG or @DIGEST        of a registry, with the credentials of Docker's configuration
  s3://BUCKET/KEY, gs://BUCKET/KEY          in a bucket, with the credentials that AWS's tools use, or Google's HMAC keys
  https://HOST/PATH                         on a server that supports ranges, with a token in GGUF2GPU_TOKEN
  -  or  fd:N                               standard input, or a descriptor
What is not on this machine is read by ranges, and nothing is written to disk unless --cache says so; a proxy is taken from
HTTPS_PROXY. --verify fetches it a second time.`,
		Example: `  gguf2gpu load model.gguf --verify
  gguf2gpu load model.gguf --dtype bf16 --dtype-for 'norm=f32' --json
  gguf2gpu load model.gguf --device hip:0,1 --plan
  gguf2gpu load hf:ORG/REPO:Q4_K_M --dtype raw`,
		Args: cobra.ExactArgs(1),
	}
	f := addLoadFlags(cmd)
	f.hashes, f.shard = addHashFlags(cmd, f.json), addShardFlags(cmd.Flags())
	f.hashes.shard, f.split = f.shard, addSplitFlags(cmd.Flags())
	planOnly := cmd.Flags().Bool("plan", false, "print what would go where, with bytes per device and per rank, and stop")
	verify := cmd.Flags().Bool("verify", false, "read device memory back afterwards and compare it with the file")
	f.export = addExportFlags(cmd.Flags(), "")
	traceTo := cmd.Flags().String("trace", "", "write the pipeline's timeline to this file (Chrome trace events; opens in Perfetto)")
	f.outputs = func() []plannedOutput {
		return []plannedOutput{{"--readback", f.shard.expand(*f.export.to)}, {"--trace", f.shard.expand(*traceTo)}}
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if *planOnly {
			sayPlanOnly(notices(cmd), cmd.Flags())
			return f.plan(cmd, args[0])
		}
		var tr *trace.Trace
		if *traceTo != "" {
			tr = new(trace.Trace)
		}
		if *verify {
			f.twice = "--verify"
		}
		s, err := f.load(cmd, args[0], tr)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		if *verify {
			if err := s.verify(cmd.Context()); err != nil {
				return err
			}
		}
		r := s.report()
		if err := f.export.writeRank(cmd.Context(), s, f.spec()); err != nil {
			return err
		}
		if tr != nil {
			err := writeFile(f.shard.expand(*traceTo), func(o *outputFile) error { _, err := tr.WriteTo(o); return err })
			if err != nil {
				return err
			}
		}
		return f.printReport(cmd, s, &r)
	}
	return cmd
}

// printReport closes s and prints r on stdout, as JSON or for people; on stderr when stdout is taken. Closing comes
// first: if it fails, stdout is for that.
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
