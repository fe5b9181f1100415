package oci

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// realRegistry is Debian's docker-registry, with a certificate of its own and one user.
type realRegistry struct {
	host  string
	trust *tls.Config // nil: it has no TLS
	http  *http.Client
}

// The user, and the password's bcrypt hash, as htpasswd -B makes it.
const (
	testUser     = "alice"
	testPassword = "open sesame"
	testHash     = "$2b$05$wBD3ZcUFIS2yb2FK8c/D8.q1NN5j33RbJN4bdgoZaLX4PCKok5D6G"
)

// startRegistry starts a registry that lasts as long as the test. Without docker-registry it skips the test, or fails
// it if GGUF2GPU_REQUIRE names registry.
func startRegistry(t *testing.T, secure bool) *realRegistry {
	t.Helper()
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("GGUF2GPU_REQUIRE"), ","), "registry") {
			t.Fatalf("GGUF2GPU_REQUIRE names registry, but: %v", err)
		}
		t.Skipf("there is no registry (Debian: docker-registry; GGUF2GPU_REQUIRE=registry makes this a failure): %v", err)
	}
	dir := t.TempDir()
	r := &realRegistry{host: freeAddress(t)}
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage:\n  filesystem: {rootdirectory: %s}\n"+
		"http:\n  addr: %s\n", filepath.Join(dir, "data"), r.host)
	transport := &http.Transport{}
	scheme := "http"
	if secure {
		cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
		r.trust = makeCertificate(t, cert, key)
		transport.TLSClientConfig = r.trust
		scheme = "https"
		users := filepath.Join(dir, "htpasswd")
		write(t, users, testUser+":"+testHash+"\n")
		config += fmt.Sprintf("  tls: {certificate: %s, key: %s}\nauth:\n  htpasswd: {realm: test, path: %s}\n", cert, key, users)
	}
	file := filepath.Join(dir, "config.yml")
	write(t, file, config)
	r.http = &http.Client{Transport: transport}
	cmd := exec.Command(path, "serve", file)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the process
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		transport.CloseIdleConnections()
	})
	for range 500 {
		if resp, err := r.http.Get(scheme + "://" + r.host + "/v2/"); err == nil {
			resp.Body.Close()
			return r
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the registry has ended: %v\n%s", err, out.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Fatal("the registry does not answer")
	return nil
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// freeAddress is an address of this host that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// makeCertificate writes a certificate for this host and its key, and returns settings that trust it.
func makeCertificate(t *testing.T, cert, key string) *tls.Config {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	write(t, cert, string(text))
	write(t, key, string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret})))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	return &tls.Config{RootCAs: roots}
}

// request sends a request to the registry and returns the reply's header.
func (r *realRegistry) request(t *testing.T, method, address, kind string, body []byte) http.Header {
	t.Helper()
	if strings.HasPrefix(address, "/") {
		scheme := "http"
		if r.trust != nil {
			scheme = "https"
		}
		address = scheme + "://" + r.host + address
	}
	req, err := http.NewRequest(method, address, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	if r.trust != nil {
		req.SetBasicAuth(testUser, testPassword)
	}
	resp, err := r.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode >= 300 {
		t.Fatalf("%s %s: %s", method, address, resp.Status)
	}
	return resp.Header
}

// layer is a layer to push.
type layer struct {
	kind, key, path string
	data            []byte
}

// push pushes an artifact, and returns its digest.
func (r *realRegistry) push(t *testing.T, repository, tag, config string, layers ...layer) string {
	t.Helper()
	blob := func(b []byte) string {
		at := r.request(t, "POST", "/v2/"+repository+"/blobs/uploads/", "", nil).Get("Location")
		separator := "?"
		if strings.Contains(at, "?") {
			separator = "&"
		}
		r.request(t, "PUT", at+separator+"digest="+fake.Digest(b), "application/octet-stream", b)
		return fake.Digest(b)
	}
	var all []string
	for _, l := range layers {
		all = append(all, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"annotations":{%q:%q}}`,
			l.kind, blob(l.data), len(l.data), l.key, l.path))
	}
	const kind = "application/vnd.oci.image.manifest.v1+json"
	text := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[%s]}`,
		kind, config, blob([]byte("{}")), strings.Join(all, ","))
	return r.request(t, "PUT", "/v2/"+repository+"/manifests/"+tag, kind, []byte(text)).Get("Docker-Content-Digest")
}

// TestRealRegistry: artifacts of all kinds are opened from a real registry with TLS and a password.
func TestRealRegistry(t *testing.T) {
	t.Parallel()
	r := startRegistry(t, true)
	model := fake.Model(1, 5<<20)
	parts := fake.Split("m", 3, 1<<20)
	part := func(i int) []byte { return parts[fmt.Sprintf("m-%05d-of-00003.gguf", i)] }
	const pathKey = "org.cncf.model.filepath"
	docker := r.push(t, "ai/docker", "q4", "application/vnd.docker.ai.model.config.v0.1+json",
		layer{"application/vnd.docker.ai.gguf.v3", "x", "y", model}, layer{"application/vnd.docker.ai.license", "x", "y", []byte("MIT")})
	r.push(t, "pack", "latest", "application/vnd.cncf.model.config.v1+json",
		layer{"application/vnd.cncf.model.weight.v1.raw", pathKey, "w/m-00002-of-00003.gguf", part(2)},
		layer{"application/vnd.cncf.model.weight.v1.raw", pathKey, "w/m-00001-of-00003.gguf", part(1)},
		layer{"application/vnd.cncf.model.weight.v1.raw", pathKey, "w/m-00003-of-00003.gguf", part(3)},
		layer{"application/vnd.cncf.model.doc.v1.raw", pathKey, "README.md", []byte("# m")})
	r.push(t, "library/ollama", "latest", "application/vnd.docker.container.image.v1+json",
		layer{"application/vnd.ollama.image.model", "x", "y", model}, layer{"application/vnd.ollama.image.params", "x", "y", []byte("{}")})
	r.push(t, "several", "v1", "application/vnd.oci.empty.v1+json",
		layer{"application/octet-stream", "org.opencontainers.image.title", "a-Q2_K.gguf", fake.Model(2, 1000)},
		layer{"application/octet-stream", "org.opencontainers.image.title", "a-Q8_0.gguf", fake.Model(8, 1000)})
	r.push(t, "packed", "v1", "application/vnd.cncf.model.config.v1+json",
		layer{"application/vnd.cncf.model.weight.v1.tar+gzip", pathKey, "m.gguf", []byte("gzip")})
	r.push(t, "unnamed", "v1", "application/vnd.docker.ai.model.config.v0.1+json",
		layer{"application/vnd.docker.ai.gguf.v3", "x", "y", part(1)}, layer{"application/vnd.docker.ai.gguf.v3", "x", "y", part(2)},
		layer{"application/vnd.docker.ai.gguf.v3", "x", "y", part(3)})

	reg := connect(t, alice(testPassword), remote.Options{TLS: r.trust})
	name := func(s string) string { return "oci://" + r.host + "/" + s }
	for s, want := range map[string][]byte{
		"ai/docker:q4": model, "ai/docker@" + docker: model, "library/ollama": model, "several:v1#a-Q8_0.gguf": fake.Model(8, 1000),
		"pack": part(1), "pack:latest#w/m-00002-of-00003.gguf": part(1), "unnamed:v1": part(1),
	} {
		f, err := open(t, reg, name(s))
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		wantTensor(t, f, 0, want)
		if strings.HasPrefix(s, "pack") || s == "unnamed:v1" {
			if len(f.Parts()) != 3 {
				t.Errorf("%s: %d parts", s, len(f.Parts()))
				continue
			}
			wantTensor(t, f, 2, part(3))
		}
		if err := f.Check(t.Context(), true); err != nil {
			t.Errorf("%s: %v", s, err)
		}
		if id, ok := remote.Identify(f.Parts()[0]); !ok || !id.Checked || !strings.HasPrefix(id.Revision, "sha256:") {
			t.Errorf("%s: %+v", s, id)
		}
	}
	for s, tt := range map[string]struct {
		is   error
		text string
	}{
		"several:v1": {fs.ErrNotExist, "a-Q2_K.gguf"}, "several:v1#none.gguf": {fs.ErrNotExist, "no such file"},
		"packed:v1": {nil, "are packed"}, "none": {fs.ErrNotExist, "MANIFEST_UNKNOWN"}, "ai/docker:v9": {fs.ErrNotExist, "404"},
	} {
		if _, err := open(t, reg, name(s)); err == nil || tt.is != nil && !errors.Is(err, tt.is) ||
			!strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want %q in it", s, err, tt.text)
		}
	}
	for who, o := range map[string]Options{"nobody": {}, "a wrong password": alice("wrong")} {
		if _, err := open(t, connect(t, o, remote.Options{TLS: r.trust}), name("ai/docker:q4")); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s: %v", who, err)
		}
	}
	for s, want := range map[string]string{
		"several:v1": name("several:v1#a-Q2_K.gguf") + " " + name("several:v1#a-Q8_0.gguf"), "ai/docker": name("ai/docker:q4"),
		"ai/docker:q4": name("ai/docker:q4"),
	} {
		n, err := Parse(name(s))
		if err != nil {
			t.Fatal(err)
		}
		l, err := reg.List(t.Context(), n)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		var got []string
		for _, e := range l.Entries {
			got = append(got, e.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %q", s, got)
		}
	}
}

// TestPlainRegistry: a registry of this host may have no TLS.
func TestPlainRegistry(t *testing.T) {
	t.Parallel()
	r := startRegistry(t, false)
	model := fake.Model(1, 3<<20)
	r.push(t, "m", "latest", "application/vnd.docker.ai.model.config.v0.1+json",
		layer{"application/vnd.docker.ai.gguf.v3", "x", "y", model})
	f, err := open(t, connect(t, Options{}, remote.Options{}), "oci://"+r.host+"/m")
	if err != nil {
		t.Fatal(err)
	}
	wantTensor(t, f, 0, model)
	if err := f.Check(t.Context(), true); err != nil {
		t.Error(err)
	}
}
