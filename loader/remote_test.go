package loader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// fileServer serves the files of a directory. Before the nth request, from 1 on, is answered, fault may answer it.
type fileServer struct {
	*httptest.Server
	requests atomic.Int64
	conns    atomic.Int64 // that are open
	fault    atomic.Pointer[func(w http.ResponseWriter, r *http.Request, n int64) bool]
}

func serveFiles(t testing.TB, dir string) *fileServer {
	s := &fileServer{}
	files := http.FileServer(http.Dir(dir))
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := s.requests.Add(1)
		if f := s.fault.Load(); f != nil && (*f)(w, r, n) {
			return
		}
		files.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.conns.Add(1)
		case http.StateClosed:
			s.conns.Add(-1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// set makes f answer from now on, and counts anew.
func (s *fileServer) set(f func(w http.ResponseWriter, r *http.Request, n int64) bool) {
	s.fault.Store(&f)
	s.requests.Store(0)
}

// wantNoConnections ends the test when a connection stays open although the client was closed.
func (s *fileServer) wantNoConnections(t *testing.T) {
	t.Helper()
	for wait := 100 * time.Microsecond; wait < 2*time.Second; wait += wait / 2 {
		if s.conns.Load() == 0 {
			return
		}
		time.Sleep(wait)
	}
	t.Fatalf("%d connections are open still", s.conns.Load())
}

// breakOff is a fault: a reply that ends after n bytes.
func breakOff(w http.ResponseWriter, r *http.Request, dir string, n int) {
	rec := httptest.NewRecorder()
	http.FileServer(http.Dir(dir)).ServeHTTP(rec, r)
	maps.Copy(w.Header(), rec.Header())
	w.WriteHeader(rec.Code)
	w.Write(rec.Body.Bytes()[:min(n, rec.Body.Len())])
	panic(http.ErrAbortHandler)
}

// remoteClient is one that does not wait long.
func remoteClient(t testing.TB) *remote.Client {
	c := remote.NewClient(remote.Options{Pause: time.Millisecond})
	t.Cleanup(c.Close)
	return c
}

func openRemote(t testing.TB, c *remote.Client, address string) *gguf.File {
	t.Helper()
	m, err := c.Open(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// TestRemote: what is loaded from a server is what is loaded from the file, bit for bit.
func TestRemote(t *testing.T) {
	t.Parallel()
	small := tight
	small.Connections, small.Hash, small.Check = 3, true, true
	one := options{Connections: 1, Chunk: 64 << 10, Staging: 128 << 10, Threads: 1}
	ways := map[string]options{"default": {}, "small": small, "one": one}
	dir := filepath.Join("..", "testdata", "gguf")
	names := []string{"all-types.gguf", "align64.gguf", "../tiny-llama.gguf"}
	s := serveFiles(t, filepath.Dir(dir))
	for _, integrated := range []bool{false, true} {
		dev, _ := openDevice(t, soft.Options{Integrated: integrated})
		c := remoteClient(t)
		for _, name := range names {
			local := openModel(t, filepath.Join(dir, name))
			far := openRemote(t, c, s.URL+"/"+filepath.ToSlash(filepath.Join("gguf", name)))
			for _, d := range plan.Policies() {
				for way, o := range ways {
					o.Policy = d
					if o.Check { // their values are random bits
						o.Check = name == "../tiny-llama.gguf"
					}
					w, err := load(t.Context(), far, o, dev)
					if err != nil {
						t.Fatalf("%s as %v, %s: %v", name, d, way, err)
					}
					same(t, w.Plan(), contents(t, w), wanted(t, local, o))
					r := w.Report()
					if r.RemoteBytes != r.ReadBytes || r.MappedBytes+r.DirectBytes != 0 || r.Connections < 1 ||
						o.Connections > 0 && r.Connections > o.Connections {
						t.Errorf("%s as %v, %s: %+v", name, d, way, r)
					}
					for _, h := range w.Hashes() {
						x, _ := local.Tensor(h.Name)
						if h.Sum != sha256.Sum256(local.Data(x)) {
							t.Errorf("%s: %s has another hash", name, h.Name)
						}
					}
					if err := verify(t.Context(), w, far); err != nil {
						t.Error(err)
					}
					mustClose(t, w)
				}
			}
			w, err := loadSync(t.Context(), far, options{Policy: plan.F32, Hash: true}, dev)
			if err != nil {
				t.Fatal(err)
			}
			same(t, w.Plan(), contents(t, w), wanted(t, local, options{Policy: plan.F32}))
			if r := w.Report(); r.RemoteBytes != r.ReadBytes || r.MappedBytes != 0 {
				t.Errorf("%+v", r)
			}
			mustClose(t, w)
		}
	}
}

// TestRemoteSplit loads a model of three files, and a part of it.
func TestRemoteSplit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	names := splitSample(t, dir)
	s := serveFiles(t, dir)
	dev, _ := openDevice(t, soft.Options{})
	c := remoteClient(t)
	local := openModel(t, filepath.Join(dir, names[0]))
	far := openRemote(t, c, s.URL+"/"+names[2])
	if len(far.Parts()) != 3 {
		t.Fatalf("%d parts", len(far.Parts()))
	}
	for _, o := range []options{{Policy: plan.F32}, {Policy: plan.Raw}, {
		Policy:  plan.F16,
		Tensors: regexp.MustCompile(`^b`),
	}, tight} {
		w, err := load(t.Context(), far, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		same(t, w.Plan(), contents(t, w), wanted(t, local, o))
		mustClose(t, w)
	}
}

// splitSample writes the sample model in three parts and returns their names.
func splitSample(t *testing.T, dir string) (names []string) {
	m := openModel(t, sample)
	all := m.Tensors()
	for i := range 3 {
		names = append(names, fmt.Sprintf("s-%05d-of-00003.gguf", i+1))
		f, err := os.Create(filepath.Join(dir, names[i]))
		if err != nil {
			t.Fatal(err)
		}
		w := gguf.NewWriter(f, gguf.WriterOptions{})
		w.Set("split.no", uint16(i))
		w.Set("split.count", uint16(3))
		part := all[i*len(all)/3 : (i+1)*len(all)/3]
		for _, x := range part {
			w.AddTensor(x.Name, x.Type, x.Shape...)
		}
		w.WriteHeader()
		for _, x := range part {
			w.WriteTensor(x.Name, m.Data(&x))
		}
		if err := errors.Join(w.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// remoteTight is a load of the sample with many small requests.
func remoteTight(d plan.Policy) options {
	o := tight
	o.Policy, o.Connections = d, 3
	return o
}

// TestRemoteFaults: connections that break now and then change nothing but the number of requests.
func TestRemoteFaults(t *testing.T) {
	t.Parallel()
	dir := filepath.Dir(sample)
	s := serveFiles(t, dir)
	dev, _ := openDevice(t, soft.Options{})
	c := remoteClient(t)
	local, far := openModel(t, sample), openRemote(t, c, s.URL+"/"+filepath.Base(sample))
	for _, d := range []plan.Policy{plan.Raw, plan.F32} {
		before := c.Stats()
		s.set(func(w http.ResponseWriter, r *http.Request, n int64) bool {
			switch n % 5 {
			case 0:
				panic(http.ErrAbortHandler)
			case 1:
				breakOff(w, r, dir, int(10_007*(n%7)))
			case 2:
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			}
			return false
		})
		o := remoteTight(d)
		w, err := load(t.Context(), far, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		same(t, w.Plan(), contents(t, w), wanted(t, local, o))
		mustClose(t, w)
		if st := c.Stats(); st.Retries-before.Retries < 2 || uint64(st.Bytes-before.Bytes) < w.Report().ReadBytes {
			t.Errorf("%+v, %+v before", st, before)
		}
	}
}

// TestEveryRequestFails lets each single request of a load fail for good, before and after its first bytes.
func TestEveryRequestFails(t *testing.T) {
	t.Parallel()
	dir := filepath.Dir(sample)
	s := serveFiles(t, dir)
	dev, sw := openDevice(t, soft.Options{})
	count := func(o options) int64 {
		c := remoteClient(t)
		defer c.Close()
		far := openRemote(t, c, s.URL+"/"+filepath.Base(sample))
		s.set(func(http.ResponseWriter, *http.Request, int64) bool { return false })
		w, err := load(t.Context(), far, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, w)
		return s.requests.Load()
	}
	for _, d := range []plan.Policy{plan.Raw, plan.F16} {
		o := remoteTight(d)
		o.Tensors = regexp.MustCompile(`blk\.[01]|output`) // with gaps, so that there are some requests
		requests := count(o)
		if requests < 2 {
			t.Errorf("%d requests", requests)
		}
		for n := range requests {
			for _, after := range []int{0, 1000} {
				c := remoteClient(t)
				far := openRemote(t, c, s.URL+"/"+filepath.Base(sample))
				s.set(func(w http.ResponseWriter, r *http.Request, i int64) bool {
					switch {
					case i == n+1 && after > 0:
						breakOff(w, r, dir, after)
					case i > n:
						w.WriteHeader(http.StatusForbidden)
						return true
					}
					return false
				})
				w, err := load(t.Context(), far, o, dev)
				if e, ok := errors.AsType[*remote.Error](err); w != nil || !ok || !strings.Contains(err.Error(), s.URL+"/tiny-llama.gguf, bytes ") {
					t.Errorf("request %d fails: %v, %v", n+1, err, e)
				}
				if x, ok := errors.AsType[*TensorError](err); !ok || x.Op != "read" || x.Tensor == "" {
					t.Errorf("request %d fails: %v, want a *TensorError", n+1, err)
				}
				far.Close()
				c.Close()
				s.wantNoConnections(t)
				s.set(func(http.ResponseWriter, *http.Request, int64) bool { return false })
				wantBack(t, sw, resources{})
			}
		}
	}
}

// TestRemoteCancel ends loads at each request, while the server holds its reply back.
func TestRemoteCancel(t *testing.T) {
	t.Parallel()
	s := serveFiles(t, filepath.Dir(sample))
	dev, sw := openDevice(t, soft.Options{})
	gone := errors.New("gone")
	o := remoteTight(plan.F16)
	o.Tensors = regexp.MustCompile(`blk\.[01]|output`)
	for n := range int64(3) {
		c := remoteClient(t)
		far := openRemote(t, c, s.URL+"/"+filepath.Base(sample))
		ctx, cancel := context.WithCancelCause(t.Context())
		s.set(func(_ http.ResponseWriter, r *http.Request, i int64) bool {
			if i <= n {
				return false
			}
			cancel(gone)
			<-r.Context().Done()
			return true
		})
		if w, err := load(ctx, far, o, dev); w != nil || !errors.Is(err, gone) {
			t.Errorf("cancelled at request %d: %v", n+1, err)
		}
		cancel(nil)
		far.Close()
		c.Close()
		s.wantNoConnections(t)
		s.set(func(http.ResponseWriter, *http.Request, int64) bool { return false })
		wantBack(t, sw, resources{})
	}
}

// TestRemoteChanges: a file that is replaced while it is loaded is an error, not a mixture.
func TestRemoteChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "m.gguf")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s := serveFiles(t, dir)
	dev, sw := openDevice(t, soft.Options{})
	far := openRemote(t, remoteClient(t), s.URL+"/m.gguf")
	other := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, other, other); err != nil {
		t.Fatal(err)
	}
	w, err := load(t.Context(), far, options{}, dev)
	if w != nil || !errors.Is(err, remote.ErrChanged) || sw.Stats().Allocations != 0 {
		t.Errorf("got %v, %+v", err, sw.Stats())
	}
	if w, err := loadSync(t.Context(), far, options{}, dev); w != nil || !errors.Is(err, remote.ErrChanged) {
		t.Errorf("LoadSync: %v", err)
	}
}

func TestRemoteOptions(t *testing.T) {
	t.Parallel()
	s := serveFiles(t, filepath.Dir(sample))
	dev, _ := openDevice(t, soft.Options{})
	far := openRemote(t, remoteClient(t), s.URL+"/"+filepath.Base(sample))
	for _, o := range []options{{IO: IOMapped}, {IO: IODirect}, {Connections: -1}, {Connections: 257}} {
		if _, err := load(t.Context(), far, o, dev); !errors.Is(err, ErrBadOption) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestRemoteExpanded: chunks that the device converts hold the file's blocks, each segment in its place.
func TestRemoteExpanded(t *testing.T) {
	t.Parallel()
	local := openModel(t, sample)
	s := serveFiles(t, filepath.Dir(sample))
	far := openRemote(t, remoteClient(t), s.URL+"/"+filepath.Base(sample))
	g := &planned(t, far, options{Policy: plan.F32}).Groups[0]
	expand := make([]bool, len(g.Tensors))
	for i := range g.Tensors {
		expand[i] = g.Tensors[i].Target != g.Tensors[i].Type
	}
	chunks := g.Cut(plan.CutOptions{Bytes: 64 << 10, Expand: expand})
	src, err := read.Open(far, g, chunks, read.Options{Threads: 1, Connections: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	ker, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	fill := filler{group: g, kernels: ker}
	r := src.Reader(&fill, "")
	defer r.Close()
	buf, expanded := make([]byte, 64<<10), 0
	for i := range chunks {
		c := &chunks[i]
		fill.begin(buf[:c.Bytes], c.Expand, nil)
		if err := r.Read(t.Context(), c.Segs, chunks[i+1:]); err != nil {
			t.Fatal(err)
		}
		for _, s := range c.Segs {
			x, _ := local.Tensor(g.Tensors[s.Tensor].Name)
			if !c.Expand {
				continue
			}
			expanded++
			if !bytes.Equal(buf[s.Dst:s.Dst+s.DstBytes], local.Data(x)[s.Src:s.Src+int64(s.SrcBytes)]) {
				t.Errorf("%s differs", x.Name)
			}
		}
	}
	if n := s.requests.Load(); expanded == 0 || n > 3 {
		t.Errorf("%d segments were expanded, %d requests", expanded, n)
	}
}

// BenchmarkConnections loads from a server that takes 50 ms for each reply, as one on another continent does.
func BenchmarkConnections(b *testing.B) {
	path := sparse(b, 16, 8<<20) // 256 MiB
	s := serveFiles(b, filepath.Dir(path))
	s.set(func(http.ResponseWriter, *http.Request, int64) bool { time.Sleep(50 * time.Millisecond); return false })
	dev, _ := openDevice(b, soft.Options{})
	m := openRemote(b, remoteClient(b), s.URL+"/"+filepath.Base(path))
	for _, n := range []int{1, 2, 4, 8, 16, 32} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			b.SetBytes(int64(m.Size()))
			for b.Loop() {
				w, err := load(b.Context(), m, options{Policy: plan.BF16, Connections: n}, dev)
				if err != nil {
					b.Fatal(err)
				}
				w.Close()
			}
		})
	}
}
