package read

import (
	"fmt"
	"os"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// copying is a sink that has no rooms, and copies what it gets.
type copying struct{ summing }

func (s *copying) AsIs(*plan.Segment) bool { return false }
func (s *copying) Put(seg *plan.Segment, src []byte) error {
	room, err := s.Room(seg)
	copy(room, src)
	return err
}

// fitting is a sink whose rooms suit direct reads.
type fitting struct{ summing }

func (s *fitting) Room(seg *plan.Segment) ([]byte, error) {
	if len(s.room) < seg.DstBytes+directAlign {
		s.room = AlignedBytes(seg.DstBytes + directAlign)
	}
	at, _ := s.group.Tensors[seg.Tensor].Span(seg.Src, int64(seg.SrcBytes))
	return s.room[at%directAlign:][:seg.DstBytes], nil
}

// BenchmarkDirect reads a model with direct reads: GGUF2GPU_BENCH_MODEL, which should be larger than 1 GB and on a
// disk. The metric cpu-s/GB is the processor's time.
func BenchmarkDirect(b *testing.B) {
	path := os.Getenv("GGUF2GPU_BENCH_MODEL")
	if path == "" {
		b.Skip("GGUF2GPU_BENCH_MODEL is not set")
	}
	f, err := gguf.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p, err := plan.New(f, plan.Spec{Policy: plan.Raw}, []uint64{1 << 40})
	if err != nil {
		b.Fatal(err)
	}
	g := &p.Groups[0]
	chunks := g.Cut(plan.CutOptions{Bytes: 4<<20 - directAlign})
	for name, sink := range map[string]Sink{
		"copied": &copying{summing{group: g}}, "in place": &fitting{summing{group: g}},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(g.ReadBytes))
			before := cpuSeconds(b)
			for b.Loop() {
				src, err := Open(f, g, chunks, Options{Mode: Direct})
				if err != nil {
					b.Fatal(err)
				}
				r := src.Reader(sink, "worker 0")
				for i := range chunks {
					if err := r.Read(b.Context(), chunks[i].Segs, nil); err != nil {
						b.Fatal(err)
					}
				}
				src.Close()
			}
			b.ReportMetric((cpuSeconds(b)-before)/float64(b.N)/float64(g.ReadBytes)*1e9, "cpu-s/GB")
		})
	}
}

func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(fmt.Errorf("getrusage: %w", err))
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
