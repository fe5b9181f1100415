package remote

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func sha256Of(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// openChecked opens the file of s with the given digest.
func openChecked(t testing.TB, s *site, o Options, digest string) (*checked, *failure) {
	t.Helper()
	c := newClient(t, o)
	a, err := c.object(&Object{URL: s.URL + "/m.gguf", Digest: digest, Check: true, Size: int64(len(s.data))})
	if err != nil {
		t.Fatal(err)
	}
	fails := new(failure)
	src, err := c.source(t.Context(), a, fails)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return src.(*checked), fails
}

// readSpan reads n bytes at off through s and compares them.
func readSpan(t *testing.T, s gguf.Source, data []byte, off, n int64) {
	t.Helper()
	r := s.Range(t.Context(), off, n)
	got, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[off:off+n]) {
		t.Errorf("bytes %d to %d: got %d, %v", off, off+n, len(got), err)
	}
}

// TestDigest: whatever is read in whatever order, the digest is that of the whole file, and what was not read is
// fetched.
func TestDigest(t *testing.T) {
	t.Parallel()
	data := random(9<<20 + 77)
	s := newSite(t, data)
	cases := map[string]func(t *testing.T, src *checked){
		"nothing":  func(*testing.T, *checked) {},
		"in order": func(t *testing.T, src *checked) { readSpan(t, src, data, 0, src.Size()) },
		"backwards": func(t *testing.T, src *checked) {
			for off := src.Size() - 1<<20; off > 0; off -= 1 << 20 {
				readSpan(t, src, data, off, 1<<20)
			}
		},
		"at the same time, with small holes": func(t *testing.T, src *checked) {
			var wg sync.WaitGroup
			for off := int64(0); off+1<<20 < src.Size(); off += 1 << 20 {
				wg.Go(func() { readSpan(t, src, data, off+7, 1<<20-20) })
			}
			wg.Wait()
		},
		"overlapping": func(t *testing.T, src *checked) {
			for off := int64(0); off+3<<20 < src.Size(); off += 1 << 19 {
				readSpan(t, src, data, off, 3<<20)
			}
		},
		"a range that is given up": func(t *testing.T, src *checked) {
			r := src.Range(t.Context(), 1<<20, 4<<20)
			if _, err := io.CopyN(io.Discard, r, 1<<20+5); err != nil {
				t.Error(err)
			}
			r.Close()
			readSpan(t, src, data, 6<<20, 1<<20)
		},
	}
	for name, read := range cases {
		for _, limit := range []int{maxKept, 1 << 20} {
			t.Run(fmt.Sprintf("%s, %d bytes kept", name, limit), func(t *testing.T) {
				t.Parallel()
				for i, digest := range []string{sha256Of(data), fmt.Sprintf("sha512:%x", sha512.Sum512(data)), sha256Of(data[1:])} {
					src, fails := openChecked(t, s, quick(), digest)
					src.digest.limit, src.digest.patient = limit, i%2 == 0
					read(t, src)
					err := src.Check(t.Context(), true)
					if right := digest != sha256Of(data[1:]); right && err != nil || !right && !errors.Is(err, ErrDigest) {
						t.Errorf("%.12s: %v", digest, err)
					} else if again := src.Check(t.Context(), true); !errors.Is(again, err) {
						t.Errorf("a second check says %v", again)
					} else if id := src.Identity(); id.Checked != right || (fails.get() == nil) != right {
						t.Errorf("%+v, %v", id, fails.get())
					}
					if n := src.digest.bytes; n != 0 || len(src.digest.kept) != 0 {
						t.Errorf("%d bytes are still kept", n)
					}
				}
			})
		}
	}
}

// TestDigestFetchesOnlyWhatIsMissing: what was read in order is not fetched a second time, nor what came too early.
func TestDigestFetchesOnlyWhatIsMissing(t *testing.T) {
	t.Parallel()
	data := random(8 << 20)
	s := newSite(t, data)
	src, _ := openChecked(t, s, quick(), sha256Of(data))
	var wg sync.WaitGroup
	for off := int64(0); off < 8<<20; off += 2 << 20 {
		wg.Go(func() { readSpan(t, src, data, off, 2<<20-100) })
	}
	wg.Wait()
	if err := src.Check(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	// Which range comes first is open, so that one of the gaps may be asked for twice.
	if n := src.digest.fetched; n < 400 || n > 800 {
		t.Errorf("%d bytes were fetched for the digest, 400 were missing", n)
	}
}

// TestWrongDigestEndsReading: the wrong digest of one part ends reading the others.
func TestWrongDigestEndsReading(t *testing.T) {
	t.Parallel()
	s := newSite(t, random(3<<20))
	a, fails := openChecked(t, s, quick(), sha256Of(s.data))
	b := newChecked(a.Source, sha256Of(nil), fails)
	r := a.Range(t.Context(), 0, 3<<20)
	defer r.Close()
	if _, err := io.CopyN(io.Discard, r, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(t.Context(), true); !errors.Is(err, ErrDigest) {
		t.Fatal(err)
	}
	b.digest.close()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, ErrDigest) {
		t.Errorf("reading the other part says %v", err)
	}
}

// TestCheckFails: what fails or ends while the rest is fetched is an error, and no wrong digest. A later check goes on.
func TestCheckFails(t *testing.T) {
	t.Parallel()
	data := random(5 << 20)
	s := newSite(t, data)
	src, fails := openChecked(t, s, quick(), sha256Of(data))
	s.setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool { w.WriteHeader(404); return true })
	if err := src.Check(t.Context(), true); err == nil || errors.Is(err, ErrDigest) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		cancel(io.EOF)
		<-r.Context().Done()
		return true
	})
	if err := src.Check(ctx, true); err != io.EOF {
		t.Errorf("cancelled: %v", err)
	}
	s.setFault(nil)
	if err := errors.Join(src.Check(t.Context(), true), fails.get()); err != nil {
		t.Error(err)
	}
	if err := src.Check(t.Context(), false); err != nil {
		t.Error(err)
	}
}

// TestShareIsNotCompleted: the digest of a model of which a share is loaded is not worth fetching the rest, unless it
// is asked for.
func TestShareIsNotCompleted(t *testing.T) {
	t.Parallel()
	s := newSite(t, random(3<<20))
	o := quick()
	src, _ := openChecked(t, s, o, sha256Of(nil))
	if err := src.Check(t.Context(), false); err != nil || src.Identity().Checked {
		t.Error(err)
	}
	o.Digests = DigestsAlways
	src, _ = openChecked(t, s, o, sha256Of(nil))
	if err := src.Check(t.Context(), false); !errors.Is(err, ErrDigest) {
		t.Error(err)
	}
	o.Digests = DigestsNever
	c := newClient(t, o)
	a, err := c.object(&Object{URL: s.URL, Digest: sha256Of(nil), Check: true})
	if err != nil {
		t.Fatal(err)
	}
	plain, err := c.source(t.Context(), a, new(failure))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, ok := plain.(gguf.CheckedSource); ok {
		t.Error("the digest is checked")
	}
}

// TestSizes: a file of another size than was announced is refused.
func TestSizes(t *testing.T) {
	t.Parallel()
	s := newSite(t, random(1000))
	c := newClient(t, quick())
	locate := func(o Object) func(context.Context, string) (Object, error) {
		return func(context.Context, string) (Object, error) { return o, nil }
	}
	_, err := c.OpenObjects(t.Context(), "m.gguf", locate(Object{URL: s.URL, Size: 999}))
	wantError(t, "size", err, ErrReply, "1000 bytes", "999")
	for _, digest := range []string{"sha256:12", "md5:" + strings.Repeat("a", 32), "sha256:" + strings.Repeat("A", 64)} {
		_, err = c.OpenObjects(t.Context(), "m.gguf", locate(Object{URL: s.URL, Digest: digest}))
		if !errors.Is(err, ErrAddress) || !strings.Contains(err.Error(), "no digest") {
			t.Errorf("%s: %v", digest, err)
		}
	}
}

// TestLocalDigests: files on disks are compared where that is asked for, also all parts of a split.
func TestLocalDigests(t *testing.T) {
	t.Parallel()
	data := readSample(t)
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		digests Digests
		digest  string
		remote  bool
		is      error
	}{
		{DigestsAuto, sha256Of(nil), false, nil},
		{DigestsAlways, "", true, nil},
		{DigestsAlways, sha256Of(data), true, nil},
		{DigestsAlways, sha256Of(nil), true, ErrDigest},
	} {
		o := quick()
		o.Digests = tt.digests
		f, err := newClient(t, o).OpenLocal(t.Context(), path, func(string) string { return tt.digest })
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Check(t.Context(), false); !errors.Is(err, tt.is) || f.Remote() != tt.remote {
			t.Errorf("%+v: remote %t, %v", tt, f.Remote(), err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestIdentity: what was stored of a file tells whether it is the same later.
func TestIdentity(t *testing.T) {
	t.Parallel()
	a := Identity{URL: "https://h/m", Size: 5, ETag: `"1"`}
	b := Identity{URL: "https://edge/m", Size: 5, Digest: "sha256:aa", ETag: `"2"`}
	for _, tt := range []struct {
		was, now Identity
		text     string // of the error; "": the same
	}{
		{a, a, ""},
		{a, Identity{URL: a.URL, Size: 6, ETag: a.ETag}, "6 bytes"},
		{a, Identity{URL: a.URL, Size: 5, ETag: `"2"`}, "ETag"},
		{a, Identity{URL: a.URL, Size: 5}, "ETag"},
		{a, b, "nothing is known"},
		{b, Identity{URL: "elsewhere", Size: 5, Digest: "sha256:aa"}, ""},
		{b, Identity{URL: b.URL, Size: 5, Digest: "sha256:bb", ETag: b.ETag}, "digest"},
		{Identity{URL: "x", Size: 1, Modified: "now"}, Identity{URL: "x", Size: 1, Modified: "later"}, "date"},
		{Identity{URL: "x", Size: 1, Modified: "now"}, Identity{URL: "x", Size: 1, Modified: "now"}, ""},
		{Identity{URL: "x", Size: 1}, Identity{URL: "x", Size: 1}, "nothing is known"},
	} {
		err := tt.was.Same(tt.now)
		if (err == nil) != (tt.text == "") || err != nil && (!errors.Is(err, gguf.ErrReplaced) || !strings.Contains(err.Error(),
			tt.text)) {
			t.Errorf("%+v, %+v: %v, want %q", tt.was, tt.now, err, tt.text)
		}
	}
	s := newSite(t, readSample(t))
	f, err := newClient(t, quick()).Open(t.Context(), s.URL+"/m.gguf?secret")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := Identity{URL: s.URL + "/m.gguf?…", Size: int64(len(s.data)), ETag: etag}
	if id, ok := Identify(f.Parts()[0]); !ok || id != want {
		t.Errorf("got %+v, want %+v", id, want)
	}
}

// TestCache: a second opening finds what the first has read, without asking the server for it.
func TestCache(t *testing.T) {
	t.Parallel()
	data := readSample(t)
	for _, digest := range []string{"", sha256Of(data)} {
		s := newSite(t, data)
		o := quick()
		o.Cache = filepath.Join(t.TempDir(), "new", "cache")
		open := func() *gguf.File {
			t.Helper()
			f, err := newClient(t, o).OpenObjects(t.Context(), "m.gguf", func(context.Context, string) (Object, error) {
				return Object{URL: s.URL, Digest: digest, Check: true}, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		read := func(f *gguf.File) {
			t.Helper()
			for _, x := range f.Tensors() {
				got, err := io.ReadAll(f.Range(t.Context(), &x, 0, x.Size))
				if err != nil || !bytes.Equal(got, data[x.Offset:x.Offset+x.Size]) {
					t.Errorf("%s: %d bytes, %v", x.Name, len(got), err)
				}
			}
		}
		files := func() int {
			all, err := os.ReadDir(o.Cache)
			if err != nil {
				t.Error(err)
			}
			return len(all)
		}
		f := open() // a share is not kept
		if err := errors.Join(f.Check(t.Context(), false), f.Close()); err != nil || files() != 0 {
			t.Fatal(err, files())
		}
		f = open()
		read(f)
		if err := errors.Join(f.Check(t.Context(), true), f.Close()); err != nil || files() != 1 {
			t.Fatal(err, files())
		}
		s.setFault(nil)
		f = open()
		read(f)
		if err := errors.Join(f.Check(t.Context(), true), f.Close()); err != nil || files() != 1 {
			t.Fatal(err, files())
		}
		if n := len(s.requests()); digest != "" && n != 0 || digest == "" && n != 1 {
			t.Errorf("digest %q: %d requests for what is in the cache", digest, n)
		}
		if digest != "" {
			continue
		}
		s.setFault(changing(s, func(h http.Header, _ int) { h.Set("ETag", `"new"`) }))
		f = open()
		if err := errors.Join(f.Check(t.Context(), true), f.Close()); err != nil || files() != 2 {
			t.Fatal(err, files())
		}
	}
	s := newSite(t, data) // what is wrong is not kept
	o := quick()
	o.Cache = t.TempDir()
	f, err := newClient(t, o).OpenObjects(t.Context(), "m.gguf", func(context.Context, string) (Object, error) {
		return Object{URL: s.URL, Digest: sha256Of(nil), Check: true}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Check(t.Context(), true); !errors.Is(err, ErrDigest) {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if all, err := os.ReadDir(o.Cache); err != nil || len(all) != 0 {
		t.Errorf("the cache has %v, %v", all, err)
	}
}

// TestSpans: spans that touch are joined, in whatever order they come.
func TestSpans(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var all []span
		var have [60]bool
		for range rng.IntN(30) {
			off := rng.Int64N(50)
			s := span{off, off + 1 + rng.Int64N(9)}
			for i := s.off; i < s.end; i++ {
				have[i] = true
			}
			all = addSpan(all, s)
		}
		last := int64(-2)
		var got [60]bool
		for _, s := range all {
			if s.off <= last || s.off >= s.end {
				t.Fatalf("%v", all)
			}
			last = s.end
			for i := s.off; i < s.end; i++ {
				got[i] = true
			}
		}
		if got != have {
			t.Fatalf("%v", all)
		}
	}
}

// TestDocuments: short texts are bounded, asked for again where that helps, and no credential leaves its host.
func TestDocuments(t *testing.T) {
	t.Parallel()
	elsewhere := newSite(t, []byte("moved"))
	s := newSite(t, nil)
	s.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
		switch r.URL.Path {
		case "/busy":
			if n == 1 {
				w.WriteHeader(503)
				return true
			}
			io.WriteString(w, "ok")
		case "/long":
			io.WriteString(w, strings.Repeat("x", 101))
		case "/moved":
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		case "/round":
			http.Redirect(w, r, "/round", http.StatusFound)
		case "/plain":
			w.Header().Set("Location", "ftp://h/x")
			w.WriteHeader(302)
		default:
			w.WriteHeader(404)
		}
		return true
	})
	c := newClient(t, quick())
	sent := 0
	send := func(r *http.Request) (*http.Response, error) {
		sent++
		r.Header.Set("Authorization", "secret")
		return c.RoundTrip(r)
	}
	for path, want := range map[string]string{
		"/busy": "", "/long": "more than 100 bytes", "/moved": "", "/round": "redirects", "/plain": "refused", "/none": "404 Not Found",
	} {
		if path == "/busy" {
			s.mu.Lock()
			s.seen = nil
			s.mu.Unlock()
		}
		got, _, err := c.Get(t.Context(), Document{URL: s.URL + path, Limit: 100, Send: send})
		if want == "" && (err != nil || len(got) == 0) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	if sent == 0 {
		t.Error("no request went through Send")
	}
	for _, r := range elsewhere.requests() {
		if r.Header.Get("Authorization") != "" {
			t.Error("a credential reached another host")
		}
	}
}
