package main

import (
	"fmt"
	"io"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

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
	r.remoteReport.print(w, r.Shard != nil || r.Tensors < r.ModelTensors, r.ReadBytes, r.FileBytes)
	if r.Verified {
		fmt.Fprintf(w, "  verified: %d of %d tensors\n", r.VerifiedCount, r.ModelTensors)
	}
	if r.Proved {
		fmt.Fprintf(w, "  proved: %d of %d tensors, %s\n", r.ProvedCount, r.Tensors, humanize.Bytes(r.ProvedBytes))
	} else if r.Unproved != "" && r.Device.Kind == "hip" && r.RemoteBytes > 0 { // of a file nobody would expect it
		fmt.Fprintf(w, "  not proved: %s\n", term.Safe(r.Unproved))
	}
	if r.Checked {
		fmt.Fprintln(w, "  checked: every value is finite")
	}
	if r.AsExpected {
		fmt.Fprintf(w, "  as expected: %s\n", r.expected)
	}
}
