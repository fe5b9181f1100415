package read

import (
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestConvertersTakeTurns: when as many convert as there are threads, another waits before it does; copying needs no
// turn.
func TestConvertersTakeTurns(t *testing.T) {
	t.Parallel()
	path := written(t, 2<<20)
	for d, waits := range map[plan.Policy]bool{plan.BF16: true, plan.Raw: false} {
		synctest.Test(t, func(t *testing.T) {
			f, _ := openServed(t, path)
			g := group(t, f, plan.Spec{Policy: d})
			chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
			src, err := Open(f, g, chunks, Options{Threads: 2, Connections: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			for range 2 {
				src.converting <- struct{}{}
			}
			done := false
			go func() {
				r := src.Reader(newSink(newTaken(g)), "")
				defer r.Close()
				for i := range chunks {
					if err := r.Read(t.Context(), chunks[i].Segs, nil); err != nil {
						t.Error(err)
					}
				}
				done = true
			}()
			synctest.Wait()
			if done == waits {
				t.Errorf("%v: done %t while all threads convert", d, done)
			}
			<-src.converting
			synctest.Wait()
			if !done || len(src.converting) != 1 {
				t.Errorf("%v: done %t when a turn is free, %d are taken", d, done, len(src.converting))
			}
		})
	}
}
