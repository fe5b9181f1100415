package remote

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
)

func TestRanges(t *testing.T) {
	t.Parallel()
	data := random(3 << 20)
	s := newSite(t, data)
	c := newClient(t, quick())
	f := mustOpen(t, c, s.URL+"/dir/m.gguf")
	if f.Size() != int64(len(data)) || f.Path() != s.URL+"/dir/m.gguf" {
		t.Errorf("%d bytes at %s", f.Size(), f.Path())
	}
	wantRange(t, f, data, 0, firstBytes)
	for _, r := range [][2]int64{{0, 1}, {0, firstBytes}, {12345, 1 << 20}, {int64(len(data)) - 1, 1}, {
		1,
		int64(len(data)) - 1,
	}, {0, int64(len(data))}} {
		wantRange(t, f, data, r[0], r[1])
	}
	if n := s.conns.Load(); n != 1 {
		t.Errorf("%d connections for ranges one after the other, want 1", n)
	}
	if got, want := c.Stats(), (Stats{
		Requests: 7,
		Bytes:    firstBytes + 1 + firstBytes + 1<<20 + 1 + 2*int64(len(data)) - 1,
	}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if r := f.Range(t.Context(), 5, 0); true {
		if b, err := io.ReadAll(r); len(b) != 0 || err != nil {
			t.Errorf("an empty range: %d bytes, %v", len(b), err)
		}
		r.Close()
		if _, err := r.Read(make([]byte, 1)); err == nil {
			t.Error("a closed reader reads")
		}
	}
}

// TestFirstRangeIsUsed: the first reply's body is the beginning that is read next, also when only a part of it is.
func TestFirstRangeIsUsed(t *testing.T) {
	t.Parallel()
	data := random(firstBytes + 1000)
	s := newSite(t, data)
	for _, n := range []int64{1, 1000, firstBytes} {
		c := newClient(t, quick())
		f := mustOpen(t, c, s.URL)
		wantRange(t, f, data, 0, n)
		if got := c.Stats().Requests; got != 1 {
			t.Errorf("%d requests for %d bytes", got, n)
		}
	}
	c := newClient(t, quick())
	f := mustOpen(t, c, s.URL)
	wantRange(t, f, data, 0, firstBytes+1)
}

// TestParallel reads ranges at the same time, each on a connection of HTTP/1.1, though the server speaks HTTP/2 as
// well.
func TestParallel(t *testing.T) {
	t.Parallel()
	data := random(4 << 20)
	s := newSite(t, data)
	s.Server.Close()
	tls := newTLS(t, s)
	o := quick()
	o.TLS = trusting(tls)
	c := newClient(t, o)
	f := mustOpen(t, c, tls.URL)
	var all sync.WaitGroup
	for i := range int64(8) {
		all.Go(func() {
			for k := range int64(4) {
				wantRange(t, f, data, i<<19+k<<17, 1<<17)
			}
		})
	}
	all.Wait()
	for _, r := range s.requests() {
		if r.Proto != "HTTP/1.1" {
			t.Fatalf("%s is spoken", r.Proto)
		}
	}
}

func TestEmptyFile(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		w.Header().Set("Content-Range", "bytes */0")
		w.WriteHeader(416)
		return true
	})
	c := newClient(t, quick())
	_, err := c.Open(t.Context(), s.URL+"/m.gguf")
	if err == nil || !strings.Contains(err.Error(), "it is empty") {
		t.Errorf("got %v", err)
	}
}
