package bench_test

import (
	"context"
	"fmt"
	"time"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
)

// What a program says of a machine, here of one that is made up.
func ExampleLoads_Measure() {
	speed := func(context.Context) (float64, error) { return 50e9, nil }
	loads := bench.Loads{
		Load: func(context.Context, bench.Setup) (bench.Result, error) {
			return bench.Result{Transfer: time.Second, UploadBytes: 45e9}, nil
		},
		Expands:   func(string) bool { return true },
		LinkSpeed: speed,
		CopySpeed: speed,
		ReadSpeed: func(ctx context.Context, _ bool) (float64, error) { return speed(ctx) },
		PeakRSS:   func() uint64 { return 0 },
		Runs:      3,
		DTypes:    []string{"f16"},
		CPU:       true,
	}
	r, err := loads.Measure(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, run := range r.Runs {
		fmt.Printf("%s %s: %.0f of %.0f GB/s\n", run.Mode, run.DType, run.GBps, r.Ceilings.H2D)
	}
	// Output:
	// sync f16: 45 of 50 GB/s
	// async f16: 45 of 50 GB/s
}
