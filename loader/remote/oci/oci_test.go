package oci

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

func TestParse(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("ab", 32)
	for s, want := range map[string]Name{
		"oci://ghcr.io/o/m:q4":                 {"ghcr.io", "o/m", "q4", ""},
		"oci://ghcr.io/o/m":                    {"ghcr.io", "o/m", "", ""},
		"oci://docker.io/ai/smollm2:360M-Q4":   {"docker.io", "ai/smollm2", "360M-Q4", ""},
		"oci://docker.io/m:a":                  {"docker.io", "library/m", "a", ""},
		"oci://127.0.0.1:5000/m@" + digest:     {"127.0.0.1:5000", "m", digest, ""},
		"oci://h/a/b/c:t#dir/m-Q8_0.gguf":      {"h", "a/b/c", "t", "dir/m-Q8_0.gguf"},
		"oci://localhost:1/m@" + digest + "#x": {"localhost:1", "m", digest, "x"},
	} {
		n, err := Parse(s)
		if err != nil || n != want {
			t.Errorf("%s: got %+v, %v", s, n, err)
			continue
		}
		if again, err := Parse(n.String()); err != nil || again != n {
			t.Errorf("%s becomes %s: %+v, %v", s, n, again, err)
		}
	}
	for _, s := range []string{
		"", "oci:", "oci://", "oci://h", "oci://h/", "oci://h/UPPER", "oci://h/m:", "oci://h/m:a b", "oci://h/m@sha256:00", "oci://h/../m",
		"oci://me:secret@h/m:t", "oci://h/m:t#../x", "oci://h/m:t#/x", "oci://h/m:t#a\x1b", "https://h/m", "oci://h/m?x=1", "oci://h/m:t/x",
	} {
		if n, err := Parse(s); !errors.Is(err, remote.ErrAddress) || strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%q: got %+v, %v", s, n, err)
		}
	}
	if n, err := Parse("oci://docker.io/ai/m"); err != nil || n.host() != "registry-1.docker.io" {
		t.Error(n, err)
	}
}

// tokens is who makes tokens for a fake registry, on a server of its own.
type tokens struct {
	*fake.Server
	password string // of alice; "": everybody gets one
	valid    atomic.Int64
	made     atomic.Int64
}

func newTokens(t *testing.T, password string) *tokens {
	s := &tokens{password: password}
	s.Server = fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, p, _ := r.BasicAuth(); s.password != "" && p != s.password {
			w.WriteHeader(http.StatusUnauthorized)
			io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}`)
			return
		}
		if r.URL.Query().Get("scope") != "repository:library/m:pull" || r.URL.Query().Get("service") != "fake" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		s.made.Add(1)
		fmt.Fprintf(w, `{"token":"token-%d","expires_in":300}`, s.valid.Load())
	}))
	t.Cleanup(s.Close)
	return s
}

// protect makes a registry want tokens.
func (s *tokens) protect(registry *fake.Registry) {
	registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == fmt.Sprintf("Bearer token-%d", s.valid.Load()) {
			return false
		}
		w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="fake",scope="repository:library/m:pull"`, s.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
}

func newRegistry(t *testing.T) *fake.Registry {
	r := fake.NewRegistry()
	t.Cleanup(r.Close)
	return r
}

func connect(t testing.TB, o Options, ro remote.Options) *Registry {
	t.Helper()
	ro.Pause = time.Millisecond
	if ro.TLS == nil {
		ro.TLS = fake.Trust()
	}
	c := remote.NewClient(ro)
	t.Cleanup(c.Close)
	return New(c, o)
}

func open(t testing.TB, r *Registry, name string) (*gguf.File, error) {
	t.Helper()
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := r.Open(t.Context(), n)
	if err == nil {
		t.Cleanup(func() { f.Close() })
	}
	return f, err
}

func wantTensor(t testing.TB, f *gguf.File, i int, b []byte) {
	t.Helper()
	x := &f.Tensors()[i]
	r := f.Range(t.Context(), x, 0, x.Size)
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, b[x.Offset:x.Offset+x.Size]) {
		t.Errorf("tensor %d of %s: %d bytes, %v", i, f, len(got), err)
	}
}

func alice(password string) Options {
	return Options{Credential: func(context.Context, string) (Credential, error) {
		return Credential{Username: "alice", Password: password}, nil
	}}
}

func nameOf(registry *fake.Registry) string {
	return "oci://" + strings.TrimPrefix(registry.URL, "https://") + "/library/m"
}

// TestTokens: a token is asked for where a registry wants one, with credentials if there are any, and again when it has
// expired. Neither reaches where the blobs are.
func TestTokens(t *testing.T) {
	t.Parallel()
	for _, password := range []string{"", "open sesame"} {
		registry, by := newRegistry(t), newTokens(t, password)
		model := fake.Model(1, 6<<20)
		registry.Add("library/m/latest", model)
		by.protect(registry)
		o := Options{}
		if password != "" {
			o = alice(password)
		}
		f, err := open(t, connect(t, o, remote.Options{}), nameOf(registry))
		if err != nil {
			t.Fatal(err)
		}
		registry.Store.Expire()
		by.valid.Add(1) // the token has expired, and so has the blob's address
		wantTensor(t, f, 0, model)
		if err := f.Check(t.Context(), true); err != nil || by.made.Load() < 2 {
			t.Errorf("%v, %d tokens", err, by.made.Load())
		}
		secret := base64.StdEncoding.EncodeToString([]byte("alice:" + password))
		switch {
		case registry.Store.Saw("Authorization"):
			t.Error("a credential reached the store")
		case password != "" && (registry.Saw(secret) || !by.Saw(secret)):
			t.Error("the password must reach who makes tokens, and nobody else")
		case password == "" && by.Saw("Authorization"):
			t.Error("there are no credentials, and some were sent")
		}
	}
	registry, by := newRegistry(t), newTokens(t, "open sesame")
	registry.Add("library/m/latest", fake.Model(1, 1000))
	by.protect(registry)
	for _, o := range []Options{{}, alice("wrong")} {
		_, err := open(t, connect(t, o, remote.Options{}), nameOf(registry))
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "docker login") || strings.Contains(err.Error(), "wrong") {
			t.Errorf("got %v", err)
		}
	}
	broken := Options{Credential: func(context.Context, string) (Credential, error) { return Credential{}, errors.New("helper is broken") }}
	if _, err := open(t, connect(t, broken, remote.Options{}), nameOf(registry)); !errors.Is(err, remote.ErrCredentials) ||
		!strings.Contains(err.Error(), "helper is broken") {
		t.Errorf("got %v", err)
	}
}

// TestRealms: a registry cannot have credentials sent to another domain, neither by what it says nor by redirects.
func TestRealms(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		registry, realm string
		trusted         bool
	}{
		{"registry-1.docker.io", "auth.docker.io", true},
		{"ghcr.io", "ghcr.io", true},
		{"registry.gitlab.com", "gitlab.com", true},
		{"h.example.com:5000", "h.example.com", true},
		{"h.example.co.uk", "auth.example.co.uk", true},
		{"h.example.co.uk", "auth.other.co.uk", false},
		{"ghcr.io", "github.com", false},
		{"a.github.io", "b.github.io", false},
		{"127.0.0.1:5000", "127.0.0.1", true},
		{"127.0.0.1:5000", "127.0.0.2", false},
		{"10.0.0.1", "10.0.0.2", false},
		{"localhost", "evil.localhost", false},
		{"h.example.com", "example.com.evil.com", false},
		{"ghcr.io", "sso.corp.example", true},
	} {
		g := &guard{realms: []string{"sso.corp.example"}, host: tt.registry}
		if got := g.trusts(tt.realm); got != tt.trusted {
			t.Errorf("%s may send credentials to %s: %t", tt.registry, tt.realm, got)
		}
	}
	// A realm of another domain; localhost stands for it, since its certificate is not asked for before that.
	registry := newRegistry(t)
	registry.Add("library/m/latest", fake.Model(1, 1000))
	spy := fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"token":"x"}`) }))
	defer spy.Close()
	challenge := func(realm string) {
		registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s",service="fake"`, realm))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
	}
	challenge(strings.Replace(spy.URL, "127.0.0.1", "localhost", 1) + "/token")
	_, err := open(t, connect(t, alice("secret"), remote.Options{}), nameOf(registry))
	if !errors.Is(err, remote.ErrCredentials) || !strings.Contains(err.Error(), "of another domain") || len(spy.Requests()) > 0 {
		t.Errorf("another domain: %v, %d requests", err, len(spy.Requests()))
	}
	challenge("http://models.example.com/token")
	if _, err = open(t, connect(t, alice("secret"), remote.Options{}), nameOf(registry)); err == nil {
		t.Error("credentials were sent without TLS")
	}
	by := newTokens(t, "secret")
	by.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, strings.Replace(spy.URL, "127.0.0.1", "localhost", 1), http.StatusTemporaryRedirect)
		return true
	})
	challenge(by.URL + "/token")
	if _, err = open(t, connect(t, alice("secret"), remote.Options{}), nameOf(registry)); err == nil || len(spy.Requests()) > 0 {
		t.Errorf("a redirect of who makes tokens: %v, %d requests", err, len(spy.Requests()))
	}
	// What the registry itself redirects is followed without credentials.
	for _, code := range []int{301, 302, 303, 307, 308} {
		registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") == "" {
				w.Header().Set("Www-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			http.Redirect(w, r, spy.URL+r.URL.Path, code)
			return true
		})
		_, _ = open(t, connect(t, alice("secret"), remote.Options{}), nameOf(registry)) // it fails: the spy has no manifest
	}
	if len(spy.Requests()) == 0 || spy.Saw("Authorization") {
		t.Errorf("%d redirects were followed, with credentials %t", len(spy.Requests()), spy.Saw("Authorization"))
	}
}

// TestDigests: manifests are compared at once, files beside the load.
func TestDigests(t *testing.T) {
	t.Parallel()
	registry := newRegistry(t)
	model := fake.Model(1, 3<<20)
	registry.Add("library/m/latest", model)
	text := fake.Manifest(model)
	registry.SetManifest("library/m/"+fake.Digest([]byte(text)), text)
	f, err := open(t, connect(t, Options{}, remote.Options{}), nameOf(registry)+"@"+fake.Digest([]byte(text)))
	if err != nil {
		t.Fatal(err)
	}
	id, ok := remote.Identify(f.Parts()[0])
	if !ok || id.Revision != fake.Digest([]byte(text)) || id.Digest != fake.Digest(model) {
		t.Errorf("%+v", id)
	}
	registry.SetManifest("library/m/"+fake.Digest([]byte(text)), text+" ")
	if _, err := open(t, connect(t, Options{}, remote.Options{}),
		nameOf(registry)+"@"+fake.Digest([]byte(text))); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("a manifest that is another one: %v", err)
	}
	registry.Store.Replace(fake.Digest(model), fake.Model(2, 3<<20))
	if f, err = open(t, connect(t, Options{}, remote.Options{}), nameOf(registry)); err != nil {
		t.Fatal(err)
	}
	if err := f.Check(t.Context(), true); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("a file that is another one: %v", err)
	}
	for what, text := range map[string]string{"a page": "<html>", "nothing": "{}"} {
		registry.SetManifest("library/m/latest", text)
		if _, err := open(t, connect(t, Options{}, remote.Options{}), nameOf(registry)); !errors.Is(err, remote.ErrReply) {
			t.Errorf("%s: %v", what, err)
		}
	}
	registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Docker-Content-Digest", fake.Digest(nil))
		io.WriteString(w, fake.Manifest(model))
		return true
	})
	if _, err := open(t, connect(t, Options{}, remote.Options{}), nameOf(registry)); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("a digest that lies: %v", err)
	}
}

// TestTags: all pages of a list are read, as long as they are of this list and on this host.
func TestTags(t *testing.T) {
	t.Parallel()
	registry, spy := newRegistry(t), fake.NewServer(http.NotFoundHandler())
	defer spy.Close()
	for _, tag := range []string{"latest", "q4", "q8", "f16", "q2"} {
		registry.Add("library/m/"+tag, fake.Model(1, 1000))
	}
	registry.Add("library/mm/other", fake.Model(1, 1000))
	n, err := Parse(nameOf(registry))
	if err != nil {
		t.Fatal(err)
	}
	r := connect(t, alice("secret"), remote.Options{})
	l, err := r.List(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, e := range l.Entries {
		got += strings.TrimPrefix(e.Name, nameOf(registry)+":") + " "
	}
	if got != "f16 latest q2 q4 q8 " {
		t.Errorf("got %q", got)
	}
	for link, want := range map[string]string{
		spy.URL + "/v2/library/m/tags/list?last=a": "another place", "//" + spy.Listener.Addr().String() + "/v2/library/m/tags/list": "another place",
		"http://" + spy.Listener.Addr().String(): "another place", "/v2/library/other/tags/list": "another place",
		strings.Replace(registry.URL, "https://", "https://me:secret@", 1) + "/v2/library/m/tags/list": "another place",
		"%zz": "another place", "?last=z": "more than",
	} {
		registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/tags/list") {
				return false
			}
			w.Header().Set("Link", "<"+link+`>; rel="next"`)
			io.WriteString(w, `{"tags":["a","..","b c"]}`)
			return true
		})
		if _, err := r.List(t.Context(), n); !errors.Is(err, remote.ErrReply) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", link, err)
		}
	}
	if len(spy.Requests()) > 0 {
		t.Error("the list was asked for elsewhere")
	}
}

// TestDockerConfiguration: credentials are found in the file, and given by helpers.
func TestDockerConfiguration(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	write := func(config any) {
		t.Helper()
		text, err := json.Marshal(config)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ask := func(host string) Credential {
		t.Helper()
		o, err := FromEnvironment()
		if err != nil {
			t.Fatal(err)
		}
		c, err := o.Credential(t.Context(), host)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	type entry struct {
		Auth string `json:"auth"`
	}
	write(map[string]any{"auths": map[string]entry{
		"h.example.com:5000":          {base64.StdEncoding.EncodeToString([]byte("me:pass:word"))},
		"https://index.docker.io/v1/": {base64.StdEncoding.EncodeToString([]byte("hub:secret"))},
	}})
	if c := ask("h.example.com:5000"); c.Username != "me" || c.Password != "pass:word" {
		t.Errorf("%+v", c)
	}
	if c := ask("registry-1.docker.io"); c.Username != "hub" {
		t.Errorf("%+v", c)
	}
	if c := ask("other.example.com"); c != (Credential{}) {
		t.Errorf("%+v", c)
	}
	if err := os.Remove(filepath.Join(dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	if c := ask("h.example.com:5000"); c != (Credential{}) {
		t.Errorf("without a file: %+v", c)
	}
	if runtime.GOOS == "windows" {
		return // helpers are programs there, and not scripts
	}
	helper := "#!/bin/sh\nread host\necho '{\"ServerURL\":\"x\",\"Username\":\"of '$host'\",\"Secret\":\"by helper\"}'\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(helper), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	write(map[string]any{"credHelpers": map[string]string{"h.example.com": "test"}})
	if c := ask("h.example.com"); c.Username != "of h.example.com" || c.Password != "by helper" {
		t.Errorf("%+v", c)
	}
}
