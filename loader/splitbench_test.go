package loader

import (
	"fmt"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// BenchmarkSplit loads layers onto software devices, each behind a modelled link of its own, and copies onto as many. The bytes are
// those that arrive on all of them: with two links, twice as many per second as with one.
func BenchmarkSplit(b *testing.B) {
	var all []made
	for l := range 16 {
		all = append(all, made{fmt.Sprintf("blk.%d.x", l), gguf.F16, []uint64{4096, 1024}})
	}
	m := makeModel(b, nil, all)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		for _, n := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("split=%v/devices=%d", by, n), func(b *testing.B) {
				rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{Devices: n, LinkBytesPerSecond: 200e6})
				if err != nil {
					b.Fatal(err)
				}
				defer rt.Close()
				devs := make([]*amdhip.Device, n)
				for i := range devs {
					if devs[i], err = rt.Device(i); err != nil {
						b.Fatal(err)
					}
				}
				for b.Loop() {
					w, err := LoadSplit(b.Context(), devs, m, Options{DType: Raw, Chunk: 1 << 20, Staging: 16 << 20}, Split{By: by})
					if err != nil {
						b.Fatal(err)
					}
					b.SetBytes(int64(w.Report().UploadBytes))
					if err := w.Close(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
