package loader

import (
	"context"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// slowSource is a pickySource whose ranges take a while each.
type slowSource struct {
	pickySource
	takes time.Duration
}

func (s *slowSource) Range(ctx context.Context, off, n int64) io.ReadCloser {
	r := s.pickySource.Range(ctx, off, n)
	time.Sleep(s.takes)
	return r
}

// TestTurns: where ranges that are read at the same time have to be close, groups are read in the order of the file, by
// all workers. A group that waits for its turn does not stand still, and one that starts over gets its turn again.
func TestTurns(t *testing.T) {
	t.Parallel()
	faults := append([]soft.Fault{{}}, expandFaults...)
	for _, n := range []int{2, 3} {
		for name, o := range map[string]options{
			"raw": {Policy: plan.Raw, Connections: 4}, "f16": {Connections: 4, Threads: 2}, "more devices than connections": {Connections: 1},
			"little memory": {Connections: 8, Staging: 256 << 10}, "hashes": {Connections: 4, Hash: true}, "proved": {Connections: 4, Prove: ProveOn},
			"gpu": {Connections: 4, autoAlways: true},
		} {
			for _, f := range faults {
				if faulty := f != (soft.Fault{}); faulty && name != "gpu" {
					continue
				}
				t.Run(fmt.Sprintf("%s on %d, fault %s", name, n, faultName(f)), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						const short = 64 << 10
						s := &slowSource{pickySource: pickySource{reading: gguf.Reading{MaxRange: short}}}
						openPicky(t, sample, &s.pickySource)
						file, err := gguf.OpenSource(t.Context(), "m.gguf", func(context.Context, string) (gguf.Source, error) { return s, nil })
						if err != nil {
							t.Fatal(err)
						}
						defer file.Close()
						s.ranges, s.takes = nil, time.Second
						devs, sw := openDevices(t, n, soft.Options{})
						if f != (soft.Fault{}) {
							sw.Inject(f)
						}
						o := o
						o.Stall = 3 * time.Second
						m, err := load(t.Context(), file, o, devs...)
						if err != nil {
							t.Fatal(err)
						}
						defer mustClose(t, m)
						sw.ClearFaults()
						s.takes = 0
						same(t, m.Plan(), contents(t, m), wanted(t, openModel(t, sample), o))
						far, slack := int64(0), int64(2*short*max(n, o.Connections))
						for _, r := range s.ranges {
							if far = max(far, r[0]); r[0] < far-slack && f == (soft.Fault{}) && !o.Hash {
								t.Errorf("byte %d is read after byte %d", r[0], far)
							}
						}
						if c := m.Report().Connections; c != o.Connections {
							t.Errorf("%d connections", c)
						}
					})
				})
			}
		}
	}
}
