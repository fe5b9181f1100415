package hf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

const token = "hf_secret"

func TestParse(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]Name{
		"hf:o/r":                                {Repo: "o/r"},
		"hf://o/r":                              {Repo: "o/r"},
		"hf:o/r/":                               {Repo: "o/r"},
		"hf:o/r:Q4_K_M":                         {Repo: "o/r", Quant: "Q4_K_M"},
		"hf:o/r.x-y_z/a/b.gguf":                 {Repo: "o/r.x-y_z", File: "a/b.gguf"},
		"hf:o/r@v1":                             {Repo: "o/r", Revision: "v1"},
		"hf:o/r@v1:q8_0":                        {Repo: "o/r", Revision: "v1", Quant: "q8_0"},
		"hf://o/r@v1/b.gguf":                    {Repo: "o/r", Revision: "v1", File: "b.gguf"},
		"hf:o/r@refs/pr/1/b.gguf":               {Repo: "o/r", Revision: "refs/pr/1", File: "b.gguf"},
		"hf:o/r@refs%2Fpr%2F1:Q2_K":             {Repo: "o/r", Revision: "refs/pr/1", Quant: "Q2_K"},
		"hf:o/r:Q2_K@refs/pr/1":                 {Repo: "o/r", Revision: "refs/pr/1", Quant: "Q2_K"},
		"hf:o/r/b.gguf@v1":                      {Repo: "o/r", Revision: "v1", File: "b.gguf"},
		"hf:o/r@" + fake.Commit + ":UD-Q4_K_XL": {Repo: "o/r", Revision: fake.Commit, Quant: "UD-Q4_K_XL"},
	} {
		n, err := Parse(s)
		if err != nil || n != want {
			t.Errorf("%s: got %+v, %v", s, n, err)
			continue
		}
		if again, err := Parse(n.String()); err != nil || again != n {
			t.Errorf("%s becomes %s and then %+v, %v", s, n, again, err)
		}
	}
	for _, s := range []string{
		"", "hf:", "hf:r", "hf://r", "hf:o//x", "hf:../r", "hf:o/..", "hf:o/r/../x", "hf:o/r/a//b", "hf:o/r:a b", "hf:o/r:", "hf:o/r@",
		"hf:o/r@/b.gguf", "hf:o/r@a..b", "hf:o/r@%2e%2e", "hf:o/r@%zz", "hf:o/r/a\x1b.gguf", "hf:o r/x", "hf:o/r@/x", "m.gguf", "hf:/o/r",
		"hf:o/r/" + strings.Repeat("x", 2000),
	} {
		if n, err := Parse(s); !errors.Is(err, remote.ErrAddress) {
			t.Errorf("%q: got %+v, %v", s, n, err)
		}
	}
}

// TestChoose: the model is the one that llama.cpp's -hf takes.
func TestChoose(t *testing.T) {
	t.Parallel()
	split := []string{"Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"}
	for _, tt := range []struct {
		name, want string
		files      []string
	}{
		{"hf:o/r", "m-Q4_K_M.gguf", []string{"README.md", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"}},
		{"hf:o/r", "m.q4_k_m.gguf", []string{"m.q2_k.gguf", "m.q4_k_m.gguf"}},
		{"hf:o/r", "m-Q2_K.gguf", []string{"mmproj-F16.gguf", "m.imatrix.gguf", "m-Q2_K.gguf", "m-Q8_0.gguf"}},
		{"hf:o/r:q8_0", split[0], append([]string{"mmproj-Q8_0.gguf", "m-Q4_K_M.gguf"}, split...)},
		{"hf:o/r", split[0], split},
		{"hf:o/r:Q4_0", "m-Q4_0.gguf", []string{"m-IQ4_0.gguf", "m-Q4_0.gguf"}},
		{"hf:o/r:Q4_0", "m-IQ4_0.gguf", []string{"m-IQ4_0.gguf"}},
		{"hf:o/r:Q4_K", "", []string{"m-Q4_K_M.gguf"}},
		{"hf:o/r:a.b", "", []string{"m-aXb.gguf"}},
		{"hf:o/r/x/mmproj-F16.gguf", "x/mmproj-F16.gguf", []string{"x/mmproj-F16.gguf"}},
		{"hf:o/r/none.gguf", "", []string{"m-Q4_K_M.gguf"}},
		{"hf:o/r", "", []string{"model.safetensors"}},
		{"hf:o/r", "", nil},
	} {
		r := &repo{}
		for _, f := range tt.files {
			r.files = append(r.files, file{path: f})
		}
		n, err := Parse(tt.name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.choose(n)
		if got != tt.want || (err == nil) != (tt.want != "") || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of %q: got %q, %v; want %q", tt.name, tt.files, got, err, tt.want)
		}
	}
}

// newHub starts a hub with some models, and returns it with a client for it.
func newHub(t testing.TB, o Options) (*fake.Hub, *Hub) {
	t.Helper()
	server := fake.NewHub()
	t.Cleanup(server.Close)
	server.Add("o/r", "README.md", []byte("# a model"))
	server.Add("o/r", "m-Q2_K.gguf", fake.Model(2, 3<<20))
	server.Add("o/r", "m-Q4_K_M.gguf", fake.Model(4, 3<<20))
	server.Add("o/r", "mmproj-F16.gguf", fake.Model(5, 2000))
	parts := fake.Split("m-Q8_0", 3, 1<<20)
	for i := range 3 {
		name := fmt.Sprintf("m-Q8_0-%05d-of-00003.gguf", i+1)
		server.Add("o/r", "Q8_0/"+name, parts[name])
	}
	server.Add("o/empty", "config.json", []byte("{}"))
	if o.Endpoint == "" {
		o.Endpoint = server.URL
	}
	return server, connect(t, o, remote.Options{})
}

// connect returns a client of a hub.
func connect(t testing.TB, o Options, ro remote.Options) *Hub {
	t.Helper()
	ro.Pause, ro.TLS = time.Millisecond, fake.Trust()
	c := remote.NewClient(ro)
	t.Cleanup(c.Close)
	h, err := New(c, o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func open(t testing.TB, h *Hub, name string) (*gguf.File, error) {
	t.Helper()
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := h.Open(t.Context(), n)
	if err == nil {
		t.Cleanup(func() { f.Close() })
	}
	return f, err
}

// wantTensor wants tensor i of f to be that of the fake model in b.
func wantTensor(t testing.TB, f *gguf.File, i int, b []byte) {
	t.Helper()
	x := &f.Tensors()[i]
	want := b[x.Offset : x.Offset+x.Size]
	if !f.Remote() {
		if !bytes.Equal(f.Data(x), want) {
			t.Errorf("tensor %d of %s differs", i, f)
		}
		return
	}
	r := f.Range(t.Context(), x, 0, x.Size)
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Errorf("tensor %d of %s: %d bytes, %v", i, f, len(got), err)
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	server, h := newHub(t, Options{})
	for name, want := range map[string][]byte{
		"hf:o/r":                 fake.Model(4, 3<<20),
		"hf://o/r@main":          fake.Model(4, 3<<20),
		"hf:o/r:q2_k":            fake.Model(2, 3<<20),
		"hf:o/r@v1/m-Q2_K.gguf":  fake.Model(2, 3<<20),
		"hf:o/r:Q2_K@refs/pr/1":  fake.Model(2, 3<<20),
		"hf:o/r@refs/pr/1":       fake.Model(4, 3<<20),
		"hf:o/r@" + fake.Commit:  fake.Model(4, 3<<20),
		"hf:o/r/mmproj-F16.gguf": fake.Model(5, 2000),
	} {
		f, err := open(t, h, name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		wantTensor(t, f, 0, want)
		id, ok := remote.Identify(f.Parts()[0])
		if !ok || id.Revision != fake.Commit || id.Digest != fake.Digest(want) || id.Size != int64(len(want)) {
			t.Errorf("%s is %+v", name, id)
		}
	}
	parts := fake.Split("m-Q8_0", 3, 1<<20)
	for _, name := range []string{"hf:o/r:Q8_0", "hf:o/r/Q8_0/m-Q8_0-00002-of-00003.gguf"} {
		f, err := open(t, h, name)
		if err != nil || len(f.Parts()) != 3 {
			t.Fatalf("%s: %v, %v", name, f, err)
		}
		for i := range 3 {
			wantTensor(t, f, i, parts[fmt.Sprintf("m-Q8_0-%05d-of-00003.gguf", i+1)])
		}
	}
	if server.Saw("Authorization") {
		t.Error("a token was sent, though none is known")
	}
	for name, text := range map[string]string{
		"hf:o/r:Q5_K_M": "it has Q2_K, Q4_K_M, Q8_0", "hf:o/r/none.gguf": "no such file", "hf:o/r@v2": "no such repository or revision",
		"hf:o/none": "no such repository", "hf:o/empty": "no GGUF files",
	} {
		if _, err := open(t, h, name); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %q in it", name, err, text)
		}
	}
}

// TestPrivate: the token opens a private repository, and reaches the hub alone, also when the address of the store
// expires while the model is read, and when the hub redirects its list.
func TestPrivate(t *testing.T) {
	t.Parallel()
	server, h := newHub(t, Options{})
	server.Token = token
	if _, err := open(t, h, "hf:o/r"); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "HF_TOKEN") {
		t.Errorf("without a token: %v", err)
	}
	if _, err := open(t, connect(t, Options{Endpoint: server.URL, Token: "hf_wrong"}, remote.Options{}),
		"hf:o/r"); !errors.Is(err, fs.ErrPermission) ||
		!strings.Contains(err.Error(), "does not give access") || strings.Contains(err.Error(), "hf_wrong") {
		t.Errorf("with a wrong token: %v", err)
	}
	h = connect(t, Options{Endpoint: server.URL, Token: token}, remote.Options{})
	f, err := open(t, h, "hf:o/r")
	if err != nil {
		t.Fatal(err)
	}
	server.Store.Expire()
	wantTensor(t, f, 0, fake.Model(4, 3<<20))
	if !server.Saw(token) || server.Store.Saw(token) || server.Store.Saw("Authorization") {
		t.Error("the token must reach the hub, and not the store")
	}
	spy := fake.NewServer(http.NotFoundHandler())
	defer spy.Close()
	for _, code := range []int{301, 302, 303, 307, 308} {
		server.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, spy.URL+r.URL.Path, code)
			return true
		})
		if _, err := open(t, h, "hf:o/r"); err == nil {
			t.Error("the list came from elsewhere")
		}
	}
	if len(spy.Requests()) == 0 || spy.Saw(token) {
		t.Error("the token followed a redirect of the list")
	}
}

// TestWrongReplies: what is wrong with a list or a file is an error.
func TestWrongReplies(t *testing.T) {
	t.Parallel()
	server, h := newHub(t, Options{})
	list := func(text string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasPrefix(r.URL.Path, "/api/") {
				io.WriteString(w, text)
				return true
			}
			return false
		}
	}
	sha := `"sha":"` + fake.Commit + `",`
	model := fake.Model(4, 3<<20)
	for _, tt := range []struct {
		name, text string
		fault      func(w http.ResponseWriter, r *http.Request) bool
	}{
		{"a page", "cannot be read", list("<html>")},
		{"no commit", "as the commit", list(`{"siblings":[]}`)},
		{"a commit that leads out", "as the commit", list(`{"sha":"../../x","siblings":[]}`)},
		{"a path that leads out", "lists the file", list(`{` + sha + `"siblings":[{"rfilename":"../m-Q4_K_M.gguf"}]}`)},
		{"an absolute path", "lists the file", list(`{` + sha + `"siblings":[{"rfilename":"/etc/m-Q4_K_M.gguf"}]}`)},
		{"a negative size", "lists the file", list(`{` + sha + `"siblings":[{"rfilename":"m-Q4_K_M.gguf","size":-1}]}`)},
		{"another size", "should have 5", list(`{` + sha + `"siblings":[{"rfilename":"m-Q4_K_M.gguf","size":5}]}`)},
		{"another digest", "X-Linked-ETag", list(fmt.Sprintf(
			`{%s"siblings":[{"rfilename":"m-Q4_K_M.gguf","lfs":{"sha256":"%064d","size":%d}}]}`, sha, 1, len(model)))},
		{"no digest", "no digest", list(fmt.Sprintf(
			`{%s"siblings":[{"rfilename":"m-Q4_K_M.gguf","lfs":{"sha256":"%064s","size":%d}}]}`, sha, "z", len(model)))},
		{"broken", "500", func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }},
		{"gone", "404", func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasPrefix(r.URL.Path, "/api/") {
				return false
			}
			w.WriteHeader(404)
			return true
		}},
	} {
		server.Fault(tt.fault)
		if _, err := open(t, h, "hf:o/r"); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want %q in it", tt.name, err, tt.text)
		}
	}
	server.Fault(nil)
	server.Store.Replace(fake.Digest(model), fake.Model(9, 3<<20)) // of the same size
	f, err := open(t, connect(t, Options{Endpoint: server.URL}, remote.Options{Digests: remote.DigestsAlways}), "hf:o/r")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Check(t.Context(), true); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("a file that is another one: %v", err)
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	server, h := newHub(t, Options{})
	l, err := h.List(t.Context(), Name{Repo: "o/r"})
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(fake.Model(4, 3<<20)))
	var split int64
	for _, b := range fake.Split("m-Q8_0", 3, 1<<20) {
		split += int64(len(b))
	}
	want := []remote.Entry{
		{Name: "hf:o/r:Q2_K", File: "m-Q2_K.gguf", Quant: "Q2_K", Files: 1, Bytes: size},
		{Name: "hf:o/r:Q4_K_M", File: "m-Q4_K_M.gguf", Quant: "Q4_K_M", Files: 1, Bytes: size, Default: true},
		{Name: "hf:o/r:Q8_0", File: "Q8_0/m-Q8_0-00001-of-00003.gguf", Quant: "Q8_0", Files: 3, Bytes: split},
	}
	if l.Name != "hf:o/r" || l.Revision != fake.Commit || !slices.Equal(l.Entries, want) {
		t.Errorf("got %+v", l)
	}
	for _, e := range l.Entries { // every name opens what it says
		f, err := open(t, h, e.Name)
		if err != nil || int64(f.Size()) != e.Bytes || len(f.Parts()) != e.Files {
			t.Errorf("%s: %v, %v", e.Name, f, err)
		}
	}
	server.Close()
	if _, err := h.List(t.Context(), Name{Repo: "o/r"}); err == nil {
		t.Error("a list came from nowhere")
	}
}

func TestEndpoints(t *testing.T) {
	t.Parallel()
	c := remote.NewClient(remote.Options{})
	defer c.Close()
	for _, e := range []string{"huggingface.co", "ftp://h", "https://", "https://me:secret@h", "https://h?x=1", "https://%zz"} {
		if _, err := New(c, Options{Endpoint: e}); !errors.Is(err, remote.ErrAddress) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", e, err)
		}
	}
	if _, err := New(c, Options{Token: "a\nb"}); !errors.Is(err, remote.ErrAddress) {
		t.Error(err)
	}
	h, err := New(c, Options{Endpoint: "http://models.example.com/hub/", Token: token})
	if err != nil {
		t.Fatal(err)
	}
	if got := h.address("o", "r", "a b"); got != "http://models.example.com/hub/o/r/a%20b" {
		t.Error(got)
	}
	_, err = open(t, h, "hf:o/r") // without TLS nothing is asked, so no token can be seen
	if !errors.Is(err, remote.ErrAddress) {
		t.Error(err)
	}
}
