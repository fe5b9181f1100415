package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"regexp"
	"regexp/syntax"
	"time"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
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
	prove    *loader.Prove
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
		streams:  intFlag(fs, "streams", 0, math.MinInt, "streams that copies are spread over (default chosen for the machine)"),
		threads:  intFlag(fs, "threads", 0, math.MinInt, "workers that read and dequantize (default chosen for the machine)"),
		staging:  byteSizeFlag(fs, "staging", "pinned staging memory, such as 64MiB (default chosen for the machine)"),
		chunk:    byteSizeFlag(fs, "chunk", "bytes of one copy, such as 4MiB (default chosen for the machine)"),
		sync:     fs.Bool("sync", false, "the synchronous reference loader: one thread, one copy at a time"),
		io:       textFlag(fs, "io", loader.IOAuto, "WAY", "how bytes come off the disk: auto, mmap, direct"),
		remote:   addRemoteFlags(cmd),
		conns:    intFlag(fs, "connections", 0, math.MinInt, "ranges of a remote MODEL that are read at the same time (default 32)"),
		dequant:  addDequantFlags(fs),
		prove:    proveFlag(fs),
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
	r := loader.Request{Check: *f.check, Hash: f.hashes.wanted(), Prove: *f.prove, Progress: progress, Trace: tr}
	if r.Hash {
		r.HashWith = f.hashes.with
	}
	return r
}

// loaded is a model that a command has loaded.
type loaded struct {
	path    string
	file    *gguf.File
	opener  *models.Opener // nil: the model is a file of which nothing is expected
	rt      *amdhip.Runtime
	weights *loader.Model
	open    time.Duration // opening the file and the device
	openRSS uint64        // resident bytes then
	total   time.Duration // from the start to the end of the load

	shard *shardFlags

	checked    bool            // by --check
	hash       string          // what tensors were hashed with; "": they were not
	asExpected string          // what --expect has compared; "": nothing
	verified   readback.Result // after verify
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
		f.export.check(nil), f.hashes.prepare(path), f.config(newLogger(cmd, slog.LevelWarn)).Check(),
	}); err != nil {
		return nil, err
	}
	f.remote.expect, s.hash = f.hashes.expect(), f.hashes.algorithm()
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
	r loader.Request,
) (_ *loader.Model, err error) {
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
	VerifiedCount  int          `json:"verified_tensors"`   // that were compared and found equal
	ModelTensors   int          `json:"model_tensors"`      // that the whole model has
	Proved         bool         `json:"proved"`             // all fingerprints of what the devices got are right
	ProvedBytes    uint64       `json:"proved_bytes"`       // that travelled, to all devices
	ProvedCount    int          `json:"proved_tensors"`     // whose fingerprints are right, on all their devices
	Unproved       string       `json:"unproved,omitempty"` // with --prove=auto: why it is not proved
	Checked        bool         `json:"checked"`            // every value is finite
	AsExpected     bool         `json:"as_expected"`        // every tensor, or every file, has the hash that was expected
	Hash           string       `json:"hash,omitempty"`     // what tensors were hashed with: "sha256" or "blake3"
	Shard          *shardReport `json:"shard,omitempty"`
	Split          string       `json:"split,omitempty"` // with several devices
	// Devices are those that the other fields are about together; Device is the first of them.
	Devices []deviceShare `json:"devices"`
	remoteReport

	expected string // what was compared
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
	Prove    float64 `json:"prove"` // after the transfer, until the fingerprints were compared
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
			Prove: r.Prove.Seconds(),
			Total: s.total.Seconds(),
		},
		Streams: r.Streams, Threads: r.Threads, ChunkBytes: r.ChunkBytes, PinnedBytes: r.PinnedBytes,
		PeakRSSBytes: peakRSS(), OpenRSSBytes: s.openRSS, UnpinnedCopies: r.UnpinnedCopies,
		Checked: s.checked, AsExpected: s.asExpected != "", Hash: s.hash, Shard: s.shard.report(s.weights.Tensors()),
		Devices: shares(r.Devices), ModelTensors: r.ModelTensors, VerifiedCount: s.verified.Tensors,
		Verified: s.verified.Of > 0, expected: s.asExpected,
		Proved: r.Proved, ProvedBytes: r.ProvedBytes, ProvedCount: r.ProvedTensors, Unproved: r.Unproved,
	}
	if len(r.Devices) > 1 {
		out.Split = s.weights.Plan().Spec.Split.By.String()
	}
	if s.opener != nil {
		out.remoteReport = remoteReport{RemoteBytes: r.RemoteBytes, Connections: r.Connections}
		if models.IsPath(s.path) { // a file that is read by ranges, for the sake of its digest
			out.RemoteBytes, out.PlainBytes = 0, out.PlainBytes+r.RemoteBytes
		}
		out.reportRemote(s.file, s.opener)
	}
	if r.Transfer > 0 {
		out.UploadGBps = float64(r.UploadBytes) / r.Transfer.Seconds() / 1e9
		out.DeviceGBps = float64(r.DeviceBytes) / r.Transfer.Seconds() / 1e9
	}
	return out
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
  -, fd:N                                   standard input, or a descriptor
What is not on this machine is read by ranges, and nothing is written to disk unless --cache says so; a proxy is taken from
HTTPS_PROXY. --verify fetches it a second time.`,
		Example: `  gguf2gpu load model.gguf --verify
  gguf2gpu load model.gguf --dtype bf16 --dtype-for 'norm=f32' --json
  gguf2gpu load model.gguf --prove
  gguf2gpu load model.gguf --device hip:0,1 --plan
  gguf2gpu load hf:ORG/REPO:Q4_K_M --dtype raw`,
		Args: cobra.ExactArgs(1),
	}
	f := addLoadFlags(cmd)
	f.hashes, f.shard = addHashFlags(cmd, f.json), addShardFlags(cmd.Flags(), false)
	f.hashes.shard, f.split = f.shard, addSplitFlags(cmd.Flags())
	planOnly := cmd.Flags().Bool("plan", false, "print what would go where, with bytes per device and per rank, and stop")
	verify := cmd.Flags().Bool("verify", false, "read device memory back afterwards and compare it with the file")
	f.export = addExportFlags(cmd.Flags(), "")
	traceTo := cmd.Flags().String("trace", "", "write the pipeline's timeline to this file (Chrome trace events; opens in Perfetto)")
	f.outputs = func() []plannedOutput {
		return []plannedOutput{
			{flag: "--readback", path: f.shard.expand(*f.export.to)}, {flag: "--trace", path: f.shard.expand(*traceTo)},
		}
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
