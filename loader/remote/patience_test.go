package remote

import (
	"bytes"
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// TestPatience: with few cores, who brings bytes for which there is no room waits until there is, but not for long if
// hashing does not go on, and not if they are of another place of the file. With many, nobody waits.
func TestPatience(t *testing.T) {
	t.Parallel()
	data := random(32 * pieceBytes)
	for _, x := range []struct {
		name             string
		patient, arrives bool // arrives: the piece that hashing waits for
		piece            int64
		waits            time.Duration
	}{
		{"until there is room", true, true, 6, time.Second},
		{"not for long", true, false, 6, patience},
		{"for what is elsewhere", true, false, 20, 0},
		{"with many cores", false, false, 6, 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := &served{data: data}
				d := newDigester(s, sha256Of(data), new(failure))
				defer d.close()
				d.patient, d.limit = x.patient, 4*pieceBytes
				d.reading[&watched{end: int64(len(data))}] = struct{}{}
				add := func(i int64) {
					b := pieces.Get().(*[pieceBytes]byte)
					copy(b[:], data[i*pieceBytes:])
					d.add(piece{i * pieceBytes, b[:]})
				}
				add(0)
				synctest.Wait()
				for i := range int64(4) {
					add(2 + i)
				}
				start := time.Now()
				if x.arrives {
					time.AfterFunc(time.Second, func() { add(1) })
				}
				add(x.piece)
				if took := time.Since(start); took != x.waits {
					t.Errorf("waited for %v, not %v", took, x.waits)
				}
				synctest.Wait()
				if at := d.at / pieceBytes; x.arrives != (at == 7) {
					t.Errorf("%d pieces are hashed", at)
				}
				if err := d.check(t.Context()); err != nil {
					t.Error(err)
				}
				if fetched := d.fetched / pieceBytes; x.arrives && fetched != 25 || !x.arrives && fetched < 26 {
					t.Errorf("%d pieces were fetched", fetched)
				}
			})
		})
	}
}

// served is a source in memory.
type served struct{ data []byte }

func (s *served) Path() string { return "served" }
func (s *served) Size() int64  { return int64(len(s.data)) }
func (s *served) Close() error { return nil }
func (s *served) Range(_ context.Context, off, n int64) io.ReadCloser {
	return io.NopCloser(bytes.NewReader(s.data[off : off+n]))
}
