package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/rank"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

// attachReport is the JSON of attach. Sizes are in bytes; fields are part of the command's contract.
type attachReport struct {
	Model        string              `json:"model"` // name that it is held under
	Architecture string              `json:"architecture"`
	Device       deviceReport        `json:"device"` // the first
	Devices      []deviceReport      `json:"devices"`
	DType        string              `json:"dtype"`
	Share        string              `json:"share"` // how this process got the memory: "fd" or "ipc"
	Files        []hold.FileIdentity `json:"files"`
	DeviceBytes  uint64              `json:"device_bytes"`      // of the model; the holder's, not this process's
	FreeBefore   uint64              `json:"free_bytes_before"` // of the device's memory, before the model was mapped
	FreeAfter    uint64              `json:"free_bytes_after"`
	Tensors      []attachedTensor    `json:"tensors"`
	Seconds      attachSeconds       `json:"seconds"`
	Verified     bool                `json:"verified"`
	VerifiedN    int                 `json:"verified_tensors"`
	ModelTensors int                 `json:"model_tensors"`
	Shard        *shardReport        `json:"shard,omitempty"` // the part of the model that is held; missing: all of it
}

type attachedTensor struct {
	Name   string   `json:"name"`
	DType  string   `json:"dtype"`
	Shape  []uint64 `json:"shape"` // in ggml's order
	Bytes  uint64   `json:"bytes"`
	Ptr    string   `json:"ptr"`    // in this process, hexadecimal
	Device int      `json:"device"` // number of the device that it is on

	Slice *attachedSlice `json:"slice,omitempty"` // which part of the tensor it is; missing: all of it
}

// attachedSlice is the part of a tensor that a rank has.
type attachedSlice struct {
	Dim    int         `json:"dim"`    // that is divided, in ggml's order
	Ranges [][2]uint64 `json:"ranges"` // of its indices, each from the first to the one behind the last
	Shape  []uint64    `json:"shape"`  // of the whole tensor
}

// attachSeconds is where the time went. The parts follow each other: connect, open, map.
type attachSeconds struct {
	Open    float64 `json:"open"`    // starting the runtime and the device in this process
	Connect float64 `json:"connect"` // to the holder, and hearing what there is
	Map     float64 `json:"map"`     // opening the model's memory
	Total   float64 `json:"total"`
}

func newAttachCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attach [MODEL] [flags]",
		Short: "Use a model that another process holds",
		Long: `Map a model that 'gguf2gpu hold' keeps in device memory into this process, and show its tensors and where they are. MODEL is
the name that it is held under; it may be left out if there is only one. Of a model that is held in parts it is the part
of a rank: --rank, or the one that torchrun, mpirun, srun and the like have made of this process.`,
		Example: `  gguf2gpu attach
  gguf2gpu attach assistant --verify
  gguf2gpu attach assistant --json | jq '.tensors[].name'`,
		Args: cobra.MaximumNArgs(1),
	}
	fs := cmd.Flags()
	socket := socketFlag(cmd)
	verify := fs.Bool("verify", false, "read device memory back and compare it with the file")
	file := fs.String("file", "", "the model, if it is not where it was loaded from: a file, or what else load takes")
	number := fs.Int("rank", -1, "the rank whose part to attach to, where a model is held in parts (default from the environment of torchrun, ...)")
	world := fs.Int("world", -1, "with --rank, of how many ranks the parts have to be (default whatever is held)")
	fs.Lookup("rank").DefValue, fs.Lookup("world").DefValue = "", ""
	export := addExportFlags(fs, ", in whose name {rank} and {world} are replaced")
	far := addRemoteFlags(cmd)
	stall := fs.Duration("stall", time.Minute, "give up when nothing at all has happened for so long")
	stay := fs.Bool("stay", false, "stay attached until interrupted, or until the holder has gone (which is a failure)")
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		ctx := cmd.Context()
		if *file != "" && !*verify {
			return usageErrorf("--file is for --verify")
		}
		if err := export.check(nil); err != nil {
			return err
		}
		o := hold.AttachOptions{Socket: *socket, Open: openShared, Waiting: waiting(notices(cmd)), Stall: *stall}
		if o.Rank, o.World, err = attachRank(*number, *world, os.Getenv); err != nil {
			return err
		}
		if len(args) > 0 {
			o.Model = args[0]
		}
		if err := checkOutputs(nil, plannedOutput{flag: "--readback", path: *export.to}); err != nil {
			return err
		}
		w, err := hold.Attach(ctx, o)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, w.Close()) }()
		r, err := describeAttached(ctx, w)
		if err != nil {
			return err
		}
		if *verify {
			result, err := verifyAttached(ctx, far, w, *file)
			if err != nil {
				return err
			}
			r.Verified, r.VerifiedN = true, result.Tensors
		}
		if s := w.Plan().Spec.Shard; s.By != plan.ShardNone {
			*export.to = (&shardFlags{shard: s}).expand(*export.to)
		}
		err = export.write(ctx, w.Model, func() (map[string][]plan.HFTensor, error) { return w.Info.HF, w.Info.HFError })
		if err != nil {
			return err
		}
		if *asJSON {
			err = writeJSON(cmd.OutOrStdout(), r)
		} else {
			err = r.print(cmd.OutOrStdout())
		}
		if err == nil && *stay {
			err = stayAttached(ctx, w, cmd.ErrOrStderr())
		}
		return err
	}
	return cmd
}

// attachRank returns for which rank of how many this process attaches, by --rank and --world, negative if they were not
// given, or by the environment. Nil: nothing says so. A world of 0 is unknown.
func attachRank(number, world int, getenv func(string) string) (*int, int, error) {
	switch {
	case number < 0 && world < 0:
		r, err := rank.Detect(getenv)
		if err != nil { // what is not divided needs no rank; else the holder says which there are
			return nil, 0, nil
		}
		return &r.Rank, r.World, nil
	case number < 0:
		return nil, 0, usageErrorf("--world is given without --rank")
	case world == 0, world > 0 && number >= world:
		return nil, 0, usageErrorf("--rank is %d, but --world is %d: ranks are counted from 0", number, world)
	}
	return &number, max(world, 0), nil
}

// openShared opens the software devices of a holder.
func openShared(kind string, count int) (*amdhip.Runtime, error) {
	if kind != "soft" {
		return nil, fmt.Errorf("the holder's devices are of an unknown kind %q", kind)
	}
	return soft.OpenRuntime(soft.Options{Devices: count, Shared: true})
}

func describeAttached(ctx context.Context, w *hold.Attached) (*attachReport, error) {
	info, report := w.Info, w.Report()
	r := &attachReport{
		Model: info.Name, Architecture: info.Architecture, DType: info.Policy.String(), Share: info.Share.String(),
		Files:       info.Files,
		DeviceBytes: report.DeviceBytes, FreeBefore: info.FreeBytes, Tensors: []attachedTensor{},
		ModelTensors: report.ModelTensors,
		Seconds: attachSeconds{
			Open: info.Open.Seconds(), Connect: info.Connect.Seconds(), Map: info.Map.Seconds(), Total: info.Total.Seconds(),
		},
	}
	free := make(chan uint64, len(w.Devices()))
	err := w.Guard(ctx, "asking for free device memory", func() error {
		for _, dev := range w.Devices() {
			n, _, err := dev.MemInfo()
			if err != nil {
				return err
			}
			free <- n
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, dev := range w.Devices() {
		r.FreeAfter += <-free
		r.Devices = append(r.Devices, describeDevice(dev))
	}
	r.Device = r.Devices[0]
	for _, t := range w.Tensors() {
		x := attachedTensor{
			Name: t.Name, DType: t.Type.String(), Shape: t.Shape, Bytes: t.Bytes, Ptr: fmt.Sprintf("%#x", uintptr(t.Ptr)),
			Device: t.Device.Index(),
		}
		if t.Slice != nil {
			x.Slice = &attachedSlice{t.Slice.Dim, t.Slice.Ranges, t.Slice.Shape}
		}
		r.Tensors = append(r.Tensors, x)
	}
	r.Shard = reportShard(w.Plan().Spec.Shard, w.Tensors())
	return r, nil
}

// verifyAttached compares w with its model, of that name or what it was loaded from.
func verifyAttached(
	ctx context.Context, far remoteFlags, w *hold.Attached, name string,
) (r readback.Result, err error) {
	first := w.Info.Files[0]
	if name == "" && first.Once {
		return r, usageErrorf("%s came as a stream: --file says what to compare it with", w.Info.Name)
	}
	err = far.withModel(ctx, cmp.Or(name, first.Name, first.Path), func(file *gguf.File) error {
		if err := hold.SameFile(w.Info.Files, file); err != nil {
			return withCode(exitMismatch, err)
		}
		r, err = readback.Verify(ctx, w.Model, file)
		return err
	})
	return r, err
}

// stayAttached waits for the user or the holder to end it.
func stayAttached(ctx context.Context, w *hold.Attached, stderr io.Writer) error {
	ending := w.Ending()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ending:
			fmt.Fprintln(stderr, "gguf2gpu: the holder is ending")
			ending = nil
		case <-w.Gone():
			return w.WaitAll(context.WithoutCancel(ctx)) // it has ended: this is why
		}
	}
}

// print is the report for people.
func (r *attachReport) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "TENSOR\tDTYPE\tSHAPE\tBYTES\tPOINTER")
	for _, t := range r.Tensors {
		fmt.Fprintf(tw, "%s\t%s\t%v\t%d\t%s\n", keyText(t.Name), t.DType, t.Shape, t.Bytes, t.Ptr)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	ms := func(seconds float64) time.Duration {
		return time.Duration(seconds * float64(time.Second)).Round(10 * time.Microsecond)
	}
	_, err := fmt.Fprintf(w, "%d tensors, %s on %s, attached in %v: connecting %v, starting the device %v, mapping %v\n", len(r.Tensors),
		humanize.Bytes(r.DeviceBytes), r.Device.Name, ms(r.Seconds.Total), ms(r.Seconds.Connect), ms(r.Seconds.Open),
		ms(r.Seconds.Map))
	if err == nil {
		r.Shard.print(w)
	}
	if err == nil && r.Verified {
		_, err = fmt.Fprintf(w, "verified: %d of %d tensors\n", r.VerifiedN, r.ModelTensors)
	}
	return err
}
