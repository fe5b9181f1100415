package ollama

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"ollama:llama3.2":                     "registry.ollama.ai library llama3.2 latest",
		"ollama://llama3.2:3b":                "registry.ollama.ai library llama3.2 3b",
		"ollama:me/m:q4_K_M":                  "registry.ollama.ai me m q4_K_M",
		"ollama:hf.co/o/r:Q8_0":               "hf.co o r Q8_0",
		"ollama:localhost:5000/library/m":     "localhost:5000 library m latest",
		"ollama:127.0.0.1:80/library/m:a.b-c": "127.0.0.1:80 library m a.b-c",
	} {
		n, err := Parse(s)
		if got := fmt.Sprint(n.Host, " ", n.Namespace, " ", n.Model, " ", n.Tag); err != nil || got != want {
			t.Errorf("%s: got %s, %v", s, got, err)
			continue
		}
		if again, err := Parse(n.String()); err != nil || again != n {
			t.Errorf("%s becomes %s", s, n)
		}
	}
	for _, s := range []string{
		"", "ollama:", "m", "ollama:..", "ollama:m:..", "ollama:../m", "ollama:a/b/c/d", "ollama:h/../m", "ollama:m:", "ollama:m:a/b",
		"ollama:m:a:b", "ollama:me.x/m", "ollama:-m", "ollama:m\x1b",
	} {
		if n, err := Parse(s); !errors.Is(err, remote.ErrAddress) {
			t.Errorf("%q: got %+v, %v", s, n, err)
		}
	}
}

func open(t *testing.T, o Options, ro remote.Options, name string) (*gguf.File, error) {
	t.Helper()
	ro.Pause, ro.TLS = time.Millisecond, fake.Trust()
	c := remote.NewClient(ro)
	t.Cleanup(c.Close)
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(c, o).Open(t.Context(), n)
	if err == nil {
		t.Cleanup(func() { f.Close() })
	}
	return f, err
}

// wantTensor wants the tensor of f to be that of the fake model in b.
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

// newStore makes a store as ollama leaves it, with the given models by HOST/NAMESPACE/MODEL/TAG.
func newStore(t *testing.T, models map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range models {
		put(t, filepath.Join(dir, "manifests", filepath.FromSlash(name)), []byte(fake.Manifest(b)))
		put(t, blob(dir, b), b)
	}
	return dir
}

func blob(dir string, b []byte) string {
	return filepath.Join(dir, "blobs", strings.Replace(fake.Digest(b), ":", "-", 1))
}

func put(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestLocal(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 1<<20)
	dir := newStore(t, map[string][]byte{
		"registry.ollama.ai/library/m/latest": model, "registry.ollama.ai/me/m/q8_0": fake.Model(2, 1000), "hf.co/o/r/Q4_K_M": model,
	})
	o := Options{Stores: []string{filepath.Join(dir, "none"), dir}, Offline: true}
	for name, want := range map[string][]byte{
		"ollama:m": model, "ollama:me/m:q8_0": fake.Model(2, 1000), "ollama:hf.co/o/r:Q4_K_M": model,
	} {
		f, err := open(t, o, remote.Options{}, name)
		if err != nil || f.Remote() {
			t.Fatal(name, f, err)
		}
		wantTensor(t, f, want)
	}
	l, err := New(nil, o).List()
	var names []string
	for _, e := range l.Entries {
		names = append(names, e.Name)
		if e.Bytes == 0 || !e.Local {
			t.Errorf("%+v", e)
		}
	}
	if want := []string{"ollama:hf.co/o/r:Q4_K_M", "ollama:m:latest", "ollama:me/m:q8_0"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("got %q, %v", names, err)
	}
	if _, err := open(t, o, remote.Options{}, "ollama:other"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}

	// The digest is checked where that is asked for.
	always := remote.Options{Digests: remote.DigestsAlways}
	f, err := open(t, o, always, "ollama:m")
	if err != nil || f.Check(t.Context(), true) != nil {
		t.Error(err, f.Check(t.Context(), true))
	}
	put(t, blob(dir, model), fake.Model(3, 1<<20))
	if f, err = open(t, o, always, "ollama:m"); err != nil || !errors.Is(f.Check(t.Context(), true), remote.ErrDigest) {
		t.Error(err)
	}
	// What is wrong with the store is the model's fault.
	for what, breakIt := range map[string]func(){
		"a blob that is too short": func() { put(t, blob(dir, model), model[:1<<19]) },
		"no manifest": func() {
			put(t, filepath.Join(dir, "manifests", DefaultHost, "library", "m", "latest"), []byte("{"))
		},
		"another kind": func() {
			put(t, filepath.Join(dir, "manifests", DefaultHost, "library", "m", "latest"),
				[]byte(strings.Replace(fake.Manifest(model), "image.model", "image.tensor", 1)))
		},
	} {
		breakIt()
		_, err := open(t, o, remote.Options{}, "ollama:m")
		if _, ok := errors.AsType[*gguf.FormatError](err); !ok {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 3<<20)
	server := fake.NewRegistry()
	defer server.Close()
	server.Add("library/m/latest", model)
	server.Add("me/m/q8_0", fake.Model(2, 1000))
	dir := newStore(t, map[string][]byte{"registry.ollama.ai/library/gone/latest": model})
	if err := os.Remove(blob(dir, model)); err != nil {
		t.Fatal(err)
	}
	server.Add("library/gone/latest", model)
	o := Options{Endpoint: server.URL, Stores: []string{dir}}
	for name, want := range map[string][]byte{"ollama:m": model, "ollama:me/m:q8_0": fake.Model(2, 1000), "ollama:gone": model} {
		f, err := open(t, o, remote.Options{}, name)
		if err != nil {
			t.Fatal(name, err)
		}
		server.Store.Expire()
		wantTensor(t, f, want)
		if err := f.Check(t.Context(), true); err != nil {
			t.Error(name, err)
		}
		if id, ok := remote.Identify(f.Parts()[0]); !ok || !id.Checked || id.Digest != fake.Digest(want) {
			t.Errorf("%s: %+v", name, id)
		}
	}
	server.Store.Replace(fake.Digest(model), fake.Model(7, 3<<20))
	f, err := open(t, o, remote.Options{}, "ollama:m")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Check(t.Context(), true); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("a digest that lies: %v", err)
	}
	// A name that has the host in it leads to that host.
	host := strings.TrimPrefix(server.URL, "https://")
	if _, err := open(t, Options{}, remote.Options{}, "ollama:"+host+"/me/m:q8_0"); err != nil {
		t.Error(err)
	}
	if _, err := open(t, o, remote.Options{}, "ollama:none"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no such model") {
		t.Error(err)
	}
	server.Fault(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(401); return true })
	if _, err := open(t, o, remote.Options{}, "ollama:m"); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "oci://") {
		t.Error(err)
	}
	server.Fault(nil)
	for what, text := range map[string]string{
		"a page": "<html>", "nothing": "{}", "a digest that leads out": strings.Replace(fake.Manifest(model), fake.Digest(model), "../x", 1),
		"no model": strings.Replace(fake.Manifest(model), "image.model", "image.tensor", 1),
	} {
		server.SetManifest("library/m/latest", text)
		if _, err := open(t, o, remote.Options{}, "ollama:m"); !errors.Is(err, remote.ErrReply) {
			t.Errorf("%s: %v", what, err)
		}
	}
	server.SetManifest("library/m/latest", strings.Replace(fake.Manifest(model), fmt.Sprint(len(model)), "7", 1))
	if _, err := open(t, o, remote.Options{}, "ollama:m"); !errors.Is(err, remote.ErrReply) {
		t.Errorf("a wrong size: %v", err)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("OLLAMA_MODELS", "/m")
	if o := FromEnvironment(); len(o.Stores) != 1 || o.Stores[0] != "/m" || !strings.HasSuffix(o.Key, filepath.Join(".ollama", "id_ed25519")) {
		t.Errorf("%+v", o)
	}
	t.Setenv("OLLAMA_MODELS", "")
	if o := FromEnvironment(); len(o.Stores) == 0 || !strings.HasSuffix(o.Stores[0], filepath.Join(".ollama", "models")) {
		t.Errorf("%+v", o)
	}
}
