package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// attachReport is the JSON of attach. Sizes are in bytes; fields are part of the command's contract.
type attachReport struct {
	Model        string                `json:"model"` // name that it is held under
	Architecture string                `json:"architecture"`
	Device       deviceReport          `json:"device"`
	DType        string                `json:"dtype"`
	Files        []loader.FileIdentity `json:"files"`
	DeviceBytes  uint64                `json:"device_bytes"`      // of the model; the holder's, not this process's
	FreeBefore   uint64                `json:"free_bytes_before"` // of the device's memory, before the model was mapped
	FreeAfter    uint64                `json:"free_bytes_after"`
	Tensors      []attachedTensor      `json:"tensors"`
	Seconds      attachSeconds         `json:"seconds"`
	Verified     bool                  `json:"verified"`
}

type attachedTensor struct {
	Name  string   `json:"name"`
	DType string   `json:"dtype"`
	Shape []uint64 `json:"shape"` // in ggml's order
	Bytes uint64   `json:"bytes"`
	Ptr   string   `json:"ptr"` // in this process, hexadecimal
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
the name that it is held under; it may be left out if there is only one.`,
		Args: cobra.MaximumNArgs(1),
	}
	fs := cmd.Flags()
	socket := socketFlag(cmd)
	verify := fs.Bool("verify", false, "read device memory back and compare it with the file")
	file := fs.String("file", "", "the model's file, if it is not where it was loaded from")
	readback := fs.String("readback", "", "write what is in device memory to this safetensors file")
	stay := fs.Bool("stay", false, "stay attached until interrupted, or until the holder has gone (which is a failure)")
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		ctx := cmd.Context()
		if *file != "" && !*verify {
			return usageErrorf("--file is for --verify")
		}
		var model string
		if len(args) > 0 {
			model = args[0]
		}
		w, err := loader.Attach(ctx, *socket, model)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, w.Close()) }()
		r, err := describeAttached(w)
		if err != nil {
			return err
		}
		if *verify {
			if err := verifyAttached(ctx, w, *file); err != nil {
				return err
			}
			r.Verified = true
		}
		if *readback != "" {
			err := writeFile(*readback, func(o *outputFile) error { return w.WriteSafetensors(ctx, o) })
			if err != nil {
				return err
			}
		}
		if *asJSON {
			err = writeJSON(cmd.OutOrStdout(), r)
		} else {
			err = r.print(cmd.OutOrStdout())
		}
		if err == nil && *stay {
			err = stayAttached(ctx, w)
		}
		return err
	}
	return cmd
}

func describeAttached(w *loader.Model) (*attachReport, error) {
	dev, report := w.Device(), w.Report()
	a, _ := w.Attachment()
	free, _, err := dev.MemInfo()
	if err != nil {
		return nil, err
	}
	r := &attachReport{
		Model: a.Name, Architecture: a.Architecture, DType: a.DType.String(), Files: a.Files,
		Device:      deviceReport{Kind: dev.Runtime().Kind(), Index: dev.Index(), Name: dev.Name()},
		DeviceBytes: report.DeviceBytes, FreeBefore: a.FreeBytes, FreeAfter: free, Tensors: []attachedTensor{},
		Seconds: attachSeconds{
			Open: a.Open.Seconds(), Connect: a.Connect.Seconds(), Map: a.Map.Seconds(), Total: report.Total.Seconds(),
		},
	}
	for _, t := range w.Tensors() {
		r.Tensors = append(r.Tensors, attachedTensor{
			Name: t.Name, DType: t.DType.String(), Shape: t.Shape, Bytes: t.Bytes, Ptr: fmt.Sprintf("%#x", uintptr(t.Ptr)),
		})
	}
	return r, nil
}

// verifyAttached compares w with its file, at path or where it was loaded from.
func verifyAttached(ctx context.Context, w *loader.Model, path string) (err error) {
	if path == "" {
		a, _ := w.Attachment()
		path = a.Files[0].Path
	}
	return verifyWith(ctx, w, path)
}

// verifyWith compares w, whose file is not open, with the one at path.
func verifyWith(ctx context.Context, w *loader.Model, path string) (err error) {
	m, err := gguf.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := w.Use(m); err != nil {
		return err
	}
	return w.Verify(ctx)
}

// stayAttached waits for the user or the holder to end it.
func stayAttached(ctx context.Context, w *loader.Model) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.Gone():
		return w.WaitAll(context.WithoutCancel(ctx)) // it has ended: this is why
	}
}

// print is the report for people.
func (r *attachReport) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "TENSOR\tDTYPE\tSHAPE\tBYTES\tPOINTER")
	for _, t := range r.Tensors {
		fmt.Fprintf(tw, "%s\t%s\t%v\t%d\t%s\n", t.Name, t.DType, t.Shape, t.Bytes, t.Ptr)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	ms := func(seconds float64) time.Duration {
		return time.Duration(seconds * float64(time.Second)).Round(10 * time.Microsecond)
	}
	_, err := fmt.Fprintf(w, "%d tensors, %s on %s, attached in %v: connecting %v, starting the device %v, mapping %v\n", len(r.Tensors),
		humanize.Bytes(r.DeviceBytes), r.Device.Name, ms(r.Seconds.Total), ms(r.Seconds.Connect), ms(r.Seconds.Open), ms(r.Seconds.Map))
	if err == nil && r.Verified {
		_, err = fmt.Fprintln(w, "verified: device memory equals the file")
	}
	return err
}
