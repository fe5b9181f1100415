package loader

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"golang.org/x/sys/unix"
)

// BenchmarkGrowthLoad loads sparse models onto a software device: all that a load does, however large the model, but
// for what disks and links do. The device's memory is thrown away while it is written, so that a terabyte fits. Bytes
// are not compared.
func BenchmarkGrowthLoad(b *testing.B) {
	for _, gb := range []uint64{4, 41, 1000} {
		b.Run(fmt.Sprintf("GB=%d", gb), func(b *testing.B) {
			f := openModel(b, sparse(b, 1_000, gb*500_000))
			dev, _ := openDevice(b, soft.Options{Memory: 2 << 40})
			l := newLoader(b, options{}, dev)
			b.SetBytes(int64(gb * 1e9))
			end := make(chan struct{})
			defer close(end)
			go forget(end, 3e9)
			for b.Loop() {
				p, err := l.Plan(f, plan.Spec{Policy: plan.Raw})
				if err != nil {
					b.Fatal(err)
				}
				m, err := l.Start(b.Context(), p, Request{})
				if err != nil {
					b.Fatal(err)
				}
				if err := m.WaitAll(b.Context()); err != nil {
					b.Fatal(err)
				}
				if r := m.Report(); r.ReadBytes != gb*1e9 {
					b.Fatalf("%d bytes were read", r.ReadBytes)
				}
				mustClose(b, m)
			}
		})
	}
}

// forget lets the kernel forget, again and again, what is in anonymous memory of least bytes or more in one piece.
func forget(end chan struct{}, least uint64) {
	for {
		select {
		case <-end:
			return
		case <-time.After(20 * time.Millisecond):
		}
		maps, err := os.Open("/proc/self/maps")
		if err != nil {
			return
		}
		for lines := bufio.NewScanner(maps); lines.Scan(); {
			var lo, hi uint64
			var rights string
			n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &lo, &hi, &rights)
			if n == 3 && rights == "rw-p" && hi-lo >= least && strings.HasSuffix(lines.Text(), " 00:00 0 ") {
				_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(lo), uintptr(hi-lo), unix.MADV_DONTNEED)
			}
		}
		maps.Close()
	}
}
