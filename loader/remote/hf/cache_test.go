package hf

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

const oldCommit = "fedcba9876543210fedcba9876543210fedcba98"

// newCache makes a cache as the hub's own tools leave it: files of the repository o/r at a commit that is main's.
func newCache(t *testing.T, commit string, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "models--o--r")
	write := func(path string, b []byte) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(root, "refs", "main"), []byte(commit))
	write(filepath.Join(root, "blobs", "0123.incomplete"), nil)
	for name, b := range files {
		blob := filepath.Join(root, "blobs", strings.TrimPrefix(fake.Digest(b), "sha256:"))
		write(blob, b)
		link := filepath.Join(root, "snapshots", commit, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
			t.Fatal(err)
		}
		to, err := filepath.Rel(filepath.Dir(link), blob)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, link); err != nil {
			t.Skip("this system makes no symbolic links: ", err)
		}
	}
	return dir
}

// TestCache: what the cache has for certain is opened without a request; otherwise the hub is asked what it is, and the
// cache used if it has just that.
func TestCache(t *testing.T) {
	t.Parallel()
	q2, q4 := fake.Model(2, 3<<20), fake.Model(4, 3<<20)
	for _, tt := range []struct {
		what, name, commit string
		files              map[string][]byte
		local              bool // it is opened from the cache
		requests           bool // the hub is asked
	}{
		{"the default", "hf:o/r", oldCommit, map[string][]byte{"m-Q4_K_M.gguf": q4}, true, false},
		{"a quantization", "hf:o/r:q2_k", oldCommit, map[string][]byte{"m-Q2_K.gguf": q2}, true, false},
		{"a file", "hf:o/r/m-Q2_K.gguf", oldCommit, map[string][]byte{"m-Q2_K.gguf": q2}, true, false},
		{"a commit", "hf:o/r@" + fake.Commit, fake.Commit, map[string][]byte{"m-Q4_K_M.gguf": q4}, true, false},
		{"a split", "hf:o/r:Q8_0", fake.Commit, fake.Split("m-Q8_0", 3, 1<<20), true, false},
		{"another quantization", "hf:o/r", fake.Commit, map[string][]byte{"m-Q2_K.gguf": q2}, false, true},
		{"one that is not there", "hf:o/r:Q4_K_M", fake.Commit, map[string][]byte{"m-Q2_K.gguf": q2}, false, true},
		{"a revision that the cache does not know", "hf:o/r@v1", fake.Commit, map[string][]byte{"m-Q4_K_M.gguf": q4}, true, true},
		{"an old commit", "hf:o/r@v1", oldCommit, map[string][]byte{"m-Q4_K_M.gguf": q4}, false, true},
		{"a part of a split", "hf:o/r:Q8_0", fake.Commit, map[string][]byte{
			"Q8_0/m-Q8_0-00001-of-00003.gguf": fake.Split("m-Q8_0", 3, 1<<20)["m-Q8_0-00001-of-00003.gguf"],
		}, false, true},
		{"a file of another size", "hf:o/r@v1", fake.Commit, map[string][]byte{"m-Q4_K_M.gguf": q4[:3<<20-1]}, false, true},
		{"a file with another digest", "hf:o/r@v1", fake.Commit, map[string][]byte{"m-Q4_K_M.gguf": fake.Model(9, 3<<20)}, false, true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Parallel()
			server, h := newHub(t, Options{Cache: newCache(t, tt.commit, tt.files)})
			f, err := open(t, h, tt.name)
			if err != nil {
				t.Fatal(err)
			}
			if f.Remote() == tt.local || (len(server.Requests()) > 0) != tt.requests {
				t.Errorf("remote %t, %d requests", f.Remote(), len(server.Requests()))
			}
			if !strings.Contains(tt.name, "Q8_0") {
				want := q4
				if strings.Contains(strings.ToLower(tt.name), "q2_k") {
					want = q2
				}
				wantTensor(t, f, 0, want)
			} else if len(f.Parts()) != 3 {
				t.Errorf("%d parts", len(f.Parts()))
			}
		})
	}
}

// TestOffline: without the hub the cache counts as the repository.
func TestOffline(t *testing.T) {
	t.Parallel()
	dir := newCache(t, oldCommit, map[string][]byte{"m-Q2_K.gguf": fake.Model(2, 3<<20)})
	for _, offline := range []bool{true, false} {
		server, h := newHub(t, Options{Cache: dir, Offline: offline})
		if !offline {
			server.Close() // nobody answers
		}
		f, err := open(t, h, "hf:o/r")
		if err != nil || f.Remote() {
			t.Fatalf("offline %t: %v, %v", offline, f, err)
		}
		wantTensor(t, f, 0, fake.Model(2, 3<<20))
		l, err := h.List(t.Context(), Name{Repo: "o/r"})
		if err != nil || len(l.Entries) != 1 || !l.Entries[0].Local || l.Revision != oldCommit {
			t.Errorf("offline %t: %+v, %v", offline, l, err)
		}
		if _, err := open(t, h, "hf:o/none"); err == nil || offline && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("offline %t: %v", offline, err)
		}
		if offline && len(server.Requests()) > 0 {
			t.Error("the hub was asked")
		}
	}
	// A hub that refuses is no reason to use what is in the cache.
	server, h := newHub(t, Options{Cache: dir})
	server.Fault(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(403); return true })
	if _, err := open(t, h, "hf:o/r"); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
}

// TestCachedDigests: files of the cache are compared with the names of their blobs, if that is asked for.
func TestCachedDigests(t *testing.T) {
	t.Parallel()
	dir := newCache(t, oldCommit, map[string][]byte{"m-Q4_K_M.gguf": fake.Model(4, 1<<20)})
	server, _ := newHub(t, Options{})
	h := connect(t, Options{Endpoint: server.URL, Cache: dir}, remote.Options{Digests: remote.DigestsAlways})
	for _, right := range []bool{true, false} {
		if !right {
			blob := filepath.Join(dir, "models--o--r", "blobs", strings.TrimPrefix(fake.Digest(fake.Model(4, 1<<20)), "sha256:"))
			if err := os.WriteFile(blob, fake.Model(5, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		f, err := open(t, h, "hf:o/r")
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Check(t.Context(), true); right && err != nil || !right && !errors.Is(err, remote.ErrDigest) {
			t.Errorf("right %t: %v", right, err)
		}
		f.Close()
	}
}

func TestEnvironment(t *testing.T) {
	home := t.TempDir()
	for _, name := range []string{"HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"} {
		t.Setenv(name, "")
	}
	t.Setenv("HF_HOME", home)
	if o := FromEnvironment(); o != (Options{Cache: filepath.Join(home, "hub")}) {
		t.Errorf("%+v", o)
	}
	if err := os.WriteFile(filepath.Join(home, "token"), []byte("hf_file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if o := FromEnvironment(); o.Token != "hf_file" {
		t.Errorf("%+v", o)
	}
	t.Setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
	t.Setenv("HF_ENDPOINT", "https://h")
	t.Setenv("HF_HUB_CACHE", "/c")
	t.Setenv("HF_HUB_OFFLINE", "1")
	if o := FromEnvironment(); o != (Options{Endpoint: "https://h", Cache: "/c", Offline: true}) {
		t.Errorf("%+v", o)
	}
	t.Setenv("HF_TOKEN", "hf_env ")
	if o := FromEnvironment(); o.Token != "hf_env" {
		t.Errorf("%+v", o)
	}
}
