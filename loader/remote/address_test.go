package remote

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func TestAddresses(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{
		"https://h/m.gguf": true, "HTTP://h": true, "s3://b/k": true, "m.gguf": false, "/m.gguf": false, "./https://h": false,
		"C:\\m.gguf": false, "": false, "https:/h": false,
	} {
		if got := IsAddress(s); got != want {
			t.Errorf("%q is an address: %t", s, got)
		}
	}
	for s, want := range map[string]string{
		"m.gguf":           "m.gguf",
		"https://h/m.gguf": "https://h/m.gguf",
		"https://me:secret@h:8/a%2Fb/m.gguf?sig=1#x": "https://h:8/a%2Fb/m.gguf?…",
		"https://secret@h/m?":                        "https://h/m",
		"https://h/\x1b[31m":                         "https://…",
		"https://h/%zz?secret":                       "https://…",
		"https://h/\u202e":                           "https://h/%E2%80%AE",
	} {
		if got := Redact(s); got != want {
			t.Errorf("%q becomes %q, want %q", s, got, want)
		}
	}
}

func TestRefusedAddresses(t *testing.T) {
	t.Parallel()
	tokens := map[string]string{"h": "t", "example.com": "t"}
	for s, want := range map[string]string{
		"http://example.com/m.gguf?secret":     "http is for this host only",
		"http://127.0.0.1.example.com/?secret": "http is for this host only",
		"http://secret@10.0.0.1/":              "http is for this host only",
		"ftp://h/m.gguf?secret":                `"ftp" is not supported`,
		"s3://bucket/secret/../m.gguf?secret":  `"s3" is not supported`,
		"https:///m.gguf?secret":               "names no host",
		"https://secret:secret@/m.gguf":        "names no host",
		"https://h:secret/":                    "cannot be parsed",
	} {
		c := newClient(t, Options{Tokens: tokens})
		_, err := c.Open(t.Context(), s)
		if !errors.Is(err, ErrAddress) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") &&
			!strings.HasPrefix(s, "s3") {
			t.Errorf("%s: got %v, want an error with %q", s, err, want)
		}
	}
	for _, s := range []string{
		"http://localhost/", "http://LocalHost:8080/", "http://127.0.0.1/", "http://127.9.9.9:1/",
		"http://[::1]:80/", "https://h/",
	} {
		if _, err := newClient(t, Options{}).parse(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	if _, err := newClient(t, Options{AllowHTTP: true}).parse("http://example.com/"); err != nil {
		t.Error(err)
	}
	if _, err := newClient(t, Options{AllowHTTP: true}).parse("http://me:secret@example.com/"); !errors.Is(err,
		ErrAddress) ||
		strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "without TLS") {
		t.Errorf("credentials in the clear: %v", err)
	}
	bad := map[string]string{"h": "a\r\nX: y"}
	if _, err := newClient(t, Options{Tokens: bad}).parse("https://h/"); !errors.Is(err, ErrAddress) {
		t.Errorf("a token with a line break: %v", err)
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	c := newClient(t, Options{})
	for s, want := range map[string][2]string{
		"https://h/a/m-00001-of-00003.gguf": {
			"m-00001-of-00003.gguf",
			"https://h/a/m-00002-of-00003.gguf",
		},
		"https://h/m-00001-of-00003.gguf?download=true#frag": {
			"m-00001-of-00003.gguf",
			"https://h/m-00002-of-00003.gguf?download=true",
		},
		"https://h/g%2Fp/raw/a%20b-00001-of-00003.gguf": {
			"a b-00001-of-00003.gguf",
			"https://h/g%2Fp/raw/a%20b-00002-of-00003.gguf",
		},
		"https://h/..%2F-00001-of-00003.gguf": {
			"../-00001-of-00003.gguf",
			"https://h/..%2F-00002-of-00003.gguf",
		},
		"https://h/x:y-00001-of-00003.gguf": {
			"x:y-00001-of-00003.gguf",
			"https://h/x:y-00002-of-00003.gguf",
		},
		"https://h:1/a//b/-00001-of-00003.gguf?q=m.gguf&r=%2F": {
			"-00001-of-00003.gguf",
			"https://h:1/a//b/-00002-of-00003.gguf?q=m.gguf&r=%2F",
		},
	} {
		a, err := c.parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if a.name() != want[0] {
			t.Errorf("%s is called %q, want %q", s, a.name(), want[0])
		}
		b := a.sibling(strings.Replace(a.name(), "00001", "00002", 1))
		if b.url.String() != want[1] {
			t.Errorf("beside %s is %s, want %s", s, &b.url, want[1])
		}
		if a.sibling(a.name()) != a {
			t.Errorf("%s is not its own sibling", s)
		}
	}
	if a, err := c.parse("https://h"); err != nil || a.name() != "" {
		t.Errorf("no path: %v", err)
	}
}

func TestHost(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"https://HuggingFace.co/a/m.gguf": "huggingface.co", "https://me:pw@h:8443/m.gguf?x": "h:8443",
		"http://[::1]:80/": "[::1]:80",
		"m.gguf":           "", "https:///m.gguf": "", "https://%zz": "", "": "",
	} {
		if got := Host(s); got != want {
			t.Errorf("the host of %q is %q, want %q", s, got, want)
		}
	}
}

// TestAuthorization: credentials go to the place that was named, and only if nobody can listen.
func TestAuthorization(t *testing.T) {
	t.Parallel()
	tokens := map[string]string{
		"h": "for-h", "localhost": "for-localhost", "far": "for-far", "P:8443": "for-p-8443", "p": "for-p", "[::1]": "for-1",
		"other": "for-other", "sub.h": "for-sub", "127.0.0.1:8": "for-127-8",
	}
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("me:pw"))
	for _, tt := range []struct{ named, to, want string }{
		{"https://h/m", "https://h/x", "Bearer for-h"},
		{"https://h/m", "https://H:443/x", "Bearer for-h"},
		{"https://h/m", "https://h:444/x", ""},
		{"https://h/m", "https://sub.h/x", ""},
		{"https://h/m", "http://h/x", ""},
		{"https://h/m", "https://other/x", ""},
		{"https://me:pw@h/m", "https://h/x", basic},
		{"https://me:pw@h/m", "https://sub.h/x", ""},
		{"https://p:8443/m", "https://p:8443/x", "Bearer for-p-8443"},
		{"https://p/m", "https://p/x", "Bearer for-p"},
		{"http://[::1]:5/m", "http://[::1]:5/x", "Bearer for-1"},
		{"http://127.0.0.1:8/m", "http://127.0.0.1:8/x", "Bearer for-127-8"},
		{"http://127.0.0.1:9/m", "http://127.0.0.1:9/x", ""},
		{"https://x.h/m", "https://x.h/x", ""},
		{"https://hh/m", "https://hh/x", ""},
		{"https://unknown/m", "https://unknown/x", ""},
		{"http://localhost/m", "http://localhost/m", "Bearer for-localhost"},
		{"http://localhost/m", "http://localhost:81/m", ""},
		{"http://far/m", "http://far/m", ""}, // in the clear
		{"http://me:pw@localhost/m", "http://localhost/m", basic},
	} {
		a, err := newClient(t, Options{Tokens: tokens, AllowHTTP: true}).parse(tt.named)
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(tt.to)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.authorization(u); got != tt.want {
			t.Errorf("%s, a request to %s: %q, want %q", tt.named, tt.to, got, tt.want)
		}
	}
}

// TestRedirects: a server elsewhere gets the range, and nothing that was meant for the one that was named. Later ranges
// go there at once.
func TestRedirects(t *testing.T) {
	t.Parallel()
	data := random(2 << 20)
	there := newSite(t, data)
	here := newSite(t, nil)
	here.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.URL.Path == "/m.gguf" {
			http.Redirect(w, r, "/moved", http.StatusMovedPermanently)
			return true
		}
		http.Redirect(w, r, there.URL+"/blob?signature=secret", http.StatusFound)
		return true
	})
	o := quick()
	o.Tokens = map[string]string{"127.0.0.1": "secret"} // which is also where the other server is, at another port
	c := newClient(t, o)
	f := mustOpen(t, c, here.URL+"/m.gguf?q=secret")
	wantRange(t, f, data, 0, firstBytes)
	wantRange(t, f, data, 77, 1<<20)
	for _, r := range here.requests() {
		if r.Header.Get("Authorization") != "Bearer secret" {
			t.Errorf("%s got the header %q", r.URL, r.Header.Get("Authorization"))
		}
	}
	if len(here.requests()) != 2 || len(there.requests()) != 2 {
		t.Errorf("%d and %d requests, want 2 and 2", len(here.requests()), len(there.requests()))
	}
	for _, r := range there.requests() {
		if r.Header.Get("Authorization") != "" || r.Header.Get("Referer") != "" || r.Header.Get("Cookie") != "" ||
			r.Header.Get("Range") == "" {
			t.Errorf("elsewhere got the headers %v", r.Header)
		}
	}
	// Where requests were redirected to expires: the way there is asked for again.
	here.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		http.Redirect(w, r, there.URL+"/blob?signature=new", http.StatusTemporaryRedirect)
		return true
	})
	for _, code := range []int{401, 403, 404, 410} {
		there.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n == 1 {
				w.WriteHeader(code)
			}
			return n == 1
		})
		wantRange(t, f, data, 99, 1<<20)
	}
	if n := len(here.requests()); n != 4 {
		t.Errorf("%d requests for the way, want 4", n)
	}
	there.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool { w.WriteHeader(403); return true })
	_, err := readRange(t, f, 99, 1<<20)
	wantError(t, "refused for good", err, nil, "403 Forbidden", "not accepted")
	if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "new") {
		t.Error(err)
	}
	if c.Stats().Retries != 0 {
		t.Errorf("%+v", c.Stats())
	}
	// It is gone altogether.
	there.setFault(nil)
	wantRange(t, f, data, 99, 1<<20)
	there.Server.Close()
	moved := newSite(t, data)
	here.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		http.Redirect(w, r, moved.URL, http.StatusPermanentRedirect)
		return true
	})
	wantRange(t, f, data, 99, 1<<20)
}

// TestZeroOptionsSendNoToken: without tokens in the options, nothing in the environment makes a client send one.
func TestZeroOptionsSendNoToken(t *testing.T) {
	t.Setenv("GGUF2GPU_TOKEN", "secret")
	t.Setenv("HF_TOKEN", "secret")
	s := newSite(t, random(1000))
	mustOpen(t, newClient(t, Options{}), s.URL+"/m.gguf")
	for _, r := range s.requests() {
		if auth := r.Header.Get("Authorization"); auth != "" {
			t.Errorf("the server got the header %q", auth)
		}
	}
}

func TestRefusedRedirects(t *testing.T) {
	t.Parallel()
	data := random(1000)
	plain := newSite(t, data)
	s := newSite(t, data)
	tls := newTLS(t, s)
	for _, tt := range []struct{ from, to, want string }{
		{tls.URL, plain.URL + "/?secret", "which is refused"},
		{tls.URL, "ftp://h/?secret", "which is refused"},
		{s.URL, "http://example.com/?secret", "which is refused"},
		{s.URL, "file:///etc/passwd?secret", "which is refused"},
		{s.URL, "", "a redirect to nowhere"},
		{s.URL, "https://%zz/?secret", "a redirect to nowhere"},
		{s.URL, s.URL + "/?secret", "more than 10 redirects"},
	} {
		s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if tt.to != "" {
				w.Header().Set("Location", tt.to)
			}
			w.WriteHeader(302)
			return true
		})
		o := quick()
		o.TLS = trusting(tls)
		_, err := openTestFile(t, newClient(t, o), tt.from+"/m.gguf")
		wantError(t, tt.to, err, ErrReply, tt.want)
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Error(err)
		}
	}
	if n := len(plain.requests()); n != 0 {
		t.Errorf("%d requests without TLS", n)
	}
}

// TestCertificates: a server that cannot prove who it is is refused at once.
func TestCertificates(t *testing.T) {
	t.Parallel()
	s := newSite(t, random(1000))
	tls := newTLS(t, s)
	_, err := openTestFile(t, newClient(t, quick()), tls.URL+"/m.gguf")
	wantError(t, "unknown authority", err, nil, "certificate")
	o := quick()
	o.TLS = trusting(tls)
	o.TLS.ServerName = "other.test"
	_, err = openTestFile(t, newClient(t, o), tls.URL+"/m.gguf")
	wantError(t, "another name", err, nil, "certificate")
	_, err = openTestFile(t, newClient(t, o), strings.Replace(s.URL, "http:", "https:", 1)+"/m.gguf")
	wantError(t, "no TLS", err, nil, "")
	if e, _ := errors.AsType[*Error](err); e == nil || e.Attempts != 1 || len(s.requests()) != 0 {
		t.Errorf("%v, %d requests", err, len(s.requests()))
	}
}

// TestOpen opens whole models: one file, and one of three parts from any of them.
func TestOpen(t *testing.T) {
	t.Parallel()
	s := newSite(t, readSample(t))
	c := newClient(t, quick())
	m, err := c.Open(t.Context(), s.URL+"/tiny-llama.gguf?token=secret")
	if err != nil {
		t.Fatal(err)
	}
	local, err := gguf.Open(sample)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if !m.Remote() || m.Size() != local.Size() || len(m.Tensors()) != len(local.Tensors()) ||
		m.Parts()[0].Path != s.URL+"/tiny-llama.gguf?…" {
		t.Errorf("%+v", m.Parts()[0])
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	s.data = []byte("<!doctype html>")
	if _, err := c.Open(t.Context(), s.URL+"/m.gguf?token=secret"); err == nil ||
		!strings.Contains(err.Error(), "/m.gguf?…: offset 0x0: not a GGUF file: an HTML") {
		t.Errorf("got %v", err)
	}
}

func TestOpenSplit(t *testing.T) {
	t.Parallel()
	files := map[string][]byte{}
	for i := range 3 {
		var b strings.Builder
		w := gguf.NewWriter(&b, gguf.WriterOptions{})
		w.Set("split.no", uint16(i))
		w.Set("split.count", uint16(3))
		w.AddTensor(fmt.Sprint("t", i), gguf.I8, 5)
		w.WriteHeader()
		w.WriteTensor(fmt.Sprint("t", i), []byte("hello"))
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		files[fmt.Sprintf("/d/m-%05d-of-00003.gguf", i+1)] = []byte(b.String())
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := files[r.URL.Path]
		if !ok || r.URL.RawQuery != "key=secret" || r.Header.Get("Authorization") != "Bearer t" {
			w.WriteHeader(404)
			return
		}
		(&site{data: data}).serve(w, r)
	}))
	defer s.Close()
	o := quick()
	o.Tokens = map[string]string{"127.0.0.1": "t"}
	for i := range 3 {
		c := newClient(t, o)
		m, err := c.Open(t.Context(), fmt.Sprintf("%s/d/m-%05d-of-00003.gguf?key=secret", s.URL, i+1))
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Parts()) != 3 || len(m.Tensors()) != 3 {
			t.Errorf("%d parts, %d tensors", len(m.Parts()), len(m.Tensors()))
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	delete(files, "/d/m-00002-of-00003.gguf")
	_, err := newClient(t, o).Open(t.Context(), s.URL+"/d/m-00001-of-00003.gguf?key=secret")
	if !errors.Is(err, gguf.ErrSplit) || !strings.Contains(err.Error(), "/d/m-00002-of-00003.gguf?…") ||
		strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}
