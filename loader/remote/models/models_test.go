package models_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

func wantTensor(t testing.TB, f *gguf.File, b []byte) {
	t.Helper()
	x := &f.Tensors()[0]
	got := f.Data(x)
	if f.Remote() {
		r := f.Range(t.Context(), x, 0, x.Size)
		defer r.Close()
		var err error
		if got, err = io.ReadAll(r); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(got, b[x.Offset:x.Offset+x.Size]) {
		t.Errorf("the tensor of %s differs", f)
	}
}

func TestKinds(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]struct{ path, stream bool }{
		"m.gguf": {true, false}, "/a/b": {true, false}, "./-": {true, false}, "./fd:1": {true, false}, "C:\\m.gguf": {true, false},
		"": {true, false}, "hf": {true, false}, "-": {false, true}, "fd:3": {false, true}, "fd:x": {false, true}, "hf:o/r": {false, false},
		"ollama:m": {false, false}, "oci://h/m": {false, false}, "s3://b/k": {false, false}, "gs://b/k": {false, false},
		"https://h/m": {false, false}, "ftp://h/m": {false, false},
	} {
		if models.IsPath(name) != want.path || models.IsStream(name) != want.stream {
			t.Errorf("%q is a path: %t, a stream: %t", name, models.IsPath(name), models.IsStream(name))
		}
	}
}

// TestOpen: a model is opened by every kind of name.
func TestOpen(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 2<<20)
	p := newPlaces(t, model, 0)
	t.Cleanup(p.close)
	o := p.opener(remote.DigestsAuto)
	defer o.Close()
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, model, 0o600); err != nil {
		t.Fatal(err)
	}
	names := []string{path}
	for _, x := range p.list {
		names = append(names, x.model)
	}
	for _, name := range names {
		f, err := o.Open(t.Context(), name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		wantTensor(t, f, model)
		if err := errors.Join(f.Check(t.Context(), true), f.Close()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if o.Opens(name) != f.Remote() {
			t.Errorf("%s is elsewhere: %t", name, o.Opens(name))
		}
	}
	if o.Stats().Requests == 0 {
		t.Error("nothing was counted")
	}
	for _, name := range []string{"hf:x", "ollama:", "oci://h", "s3://", "gs://B/k", "fd:", "fd:-1", "fd:99999", "ftp://h/m", "-"} {
		if _, err := o.Open(t.Context(), name); !errors.Is(err, remote.ErrAddress) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestNothingOnDisk: no kind of place leaves anything on a disk, unless a cache is asked for.
func TestNothingOnDisk(t *testing.T) {
	model := fake.Model(1, 2<<20)
	p := newPlaces(t, model, 0)
	defer p.close()
	dir := t.TempDir()
	for _, name := range []string{"TMPDIR", "TMP", "TEMP", "HOME", "USERPROFILE", "XDG_CACHE_HOME", "LocalAppData", "HF_HOME", "OLLAMA_MODELS"} {
		t.Setenv(name, dir)
	}
	t.Chdir(dir)
	for _, cache := range []string{"", filepath.Join(t.TempDir(), "kept")} {
		for _, x := range p.list {
			o := p.with(remote.Options{Digests: remote.DigestsAlways, Cache: cache})
			f, err := o.Open(t.Context(), x.model)
			if err != nil {
				t.Fatal(x.name, err)
			}
			wantTensor(t, f, model)
			if err := errors.Join(f.Check(t.Context(), true), f.Close()); err != nil {
				t.Error(x.name, err)
			}
			o.Close()
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) > 0 {
			t.Errorf("cache %q: %v, %v", cache, left, err)
		}
		kept, _ := os.ReadDir(cache)
		if (len(kept) > 0) != (cache != "") {
			t.Errorf("cache %q: %v", cache, kept)
		}
	}
}

// TestExpect: the digest that a user expects is compared for every kind of name.
func TestExpect(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 2<<20)
	p := newPlaces(t, model, 0)
	t.Cleanup(p.close)
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, model, 0o600); err != nil {
		t.Fatal(err)
	}
	names := []string{path}
	for _, x := range p.list {
		names = append(names, x.model)
	}
	for _, right := range []bool{true, false} {
		want := fake.Digest(model)
		if !right {
			want = fake.Digest(nil)
		}
		expect := func(string) (remote.Expected, error) { return remote.Expected{Digest: want}, nil }
		o := p.with(remote.Options{Expect: expect})
		defer o.Close()
		for _, name := range names {
			f, err := o.Open(t.Context(), name)
			if err == nil {
				err = errors.Join(f.Check(t.Context(), false), f.Close())
			}
			if right && err != nil || !right && !errors.Is(err, remote.ErrDigest) {
				t.Errorf("%s, the right digest %t: %v", name, right, err)
			}
		}
		for what, stdin := range map[string]io.Reader{"a stream": bytes.NewReader(model), "a file": openFile(t, path, 0)} {
			asked := ""
			r := remote.Options{Expect: func(name string) (remote.Expected, error) {
				asked = name
				return expect(name)
			}}
			o := models.New(models.Options{Stdin: stdin, Remote: r})
			f, err := o.Open(t.Context(), "-")
			if err != nil {
				t.Fatal(what, err)
			}
			wantTensor(t, f, model)
			err = f.Check(t.Context(), false)
			if asked != "-" || right && err != nil || !right && !errors.Is(err, remote.ErrDigest) {
				t.Errorf("%s called %q, the right digest %t: %v", what, asked, right, err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			o.Close()
		}
	}
}

// TestStandardInput: it is read as a file where it is one, any number of times, and else as a stream, once.
func TestStandardInput(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 2<<20)
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, append([]byte("x"), model...), 0o600); err != nil {
		t.Fatal(err)
	}
	whole := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(whole, model, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		open func() io.Reader
		once bool
	}{
		"bytes":                                  {func() io.Reader { return bytes.NewReader(model) }, true},
		"a file":                                 {func() io.Reader { return openFile(t, whole, 0) }, false},
		"a file that somebody has begun to read": {func() io.Reader { return openFile(t, path, 1) }, true},
		"a pipe": {func() io.Reader {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			go func() { w.Write(model); w.Close() }()
			return r
		}, true},
	} {
		o := models.New(models.Options{Stdin: tt.open()})
		f, err := o.Open(t.Context(), "-")
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if f.Reading().Once != tt.once {
			t.Errorf("%s comes once: %t", what, f.Reading().Once)
		}
		wantTensor(t, f, model)
		switch again, err := o.Open(t.Context(), "-"); {
		case tt.once && !errors.Is(err, remote.ErrAddress), !tt.once && err != nil:
			t.Errorf("%s, again: %v", what, err)
		case err == nil:
			wantTensor(t, again, model)
			if err := again.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		o.Close()
	}
}

func openFile(t *testing.T, path string, at int64) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err == nil {
		_, err = f.Seek(at, io.SeekStart)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestComplete(t *testing.T) {
	t.Parallel()
	p := newPlaces(t, fake.Model(1, 2000), 0)
	t.Cleanup(p.close)
	p.hub.Add("o/r", "m-Q8_0.gguf", fake.Model(2, 2000))
	p.registry.Add("library/m/q8", fake.Model(2, 2000))
	layer := func(name string) string {
		return fmt.Sprintf(`{"mediaType":"application/octet-stream","digest":%q,"size":1,"annotations":{"org.opencontainers.image.title":%q}}`,
			fake.Digest(nil), name)
	}
	p.registry.SetManifest("library/m/two", `{"layers":[`+layer("a-Q2_K.gguf")+","+layer("b-Q8_0.gguf")+`]}`)
	o := p.opener(remote.DigestsAuto)
	defer o.Close()
	artifact := "oci://" + p.registry.URL[len("https://"):] + "/library/m"
	for prefix, want := range map[string][]string{
		"hf:o/r": {"hf:o/r:Q4_K_M", "hf:o/r:Q8_0"}, "hf:o/r:Q8": {"hf:o/r:Q8_0"}, "hf:o/r:Q9": nil, "hf:o": nil, "hf:": nil, "m": nil,
		"hf:o/r:": {"hf:o/r:Q4_K_M", "hf:o/r:Q8_0"}, "hf://o/r:Q8": {"hf://o/r:Q8_0"}, "hf:o/r@v1:Q8": {"hf:o/r@v1:Q8_0"},
		"hf:o/r/": {"hf:o/r/m-Q4_K_M.gguf", "hf:o/r/m-Q8_0.gguf"}, "hf://o/r@v1/m-Q8": {"hf://o/r@v1/m-Q8_0.gguf"}, "hf:o/r/x": nil,
		artifact: {artifact + ":latest", artifact + ":q8", artifact + ":two"}, artifact + ":q": {artifact + ":q8"},
		artifact + ":two#": {artifact + ":two#a-Q2_K.gguf", artifact + ":two#b-Q8_0.gguf"}, artifact + ":two#b": {artifact + ":two#b-Q8_0.gguf"},
		artifact + ":q8#": nil, artifact + ":none#": nil,
		"https://h/": nil, "s3://": nil, "oci://": nil, "oci://h": nil, "hf:o/none:": nil,
	} {
		if got := o.Complete(t.Context(), prefix); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", prefix, got, want)
		}
	}
	for _, name := range []string{"hf:o/r:Q8_0", "ollama:m", "s3://models/k", "oci://h/m:t", "https://h/m", "m.gguf", "-"} {
		if l, err := o.List(t.Context(), name); l != nil || err != nil {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}
