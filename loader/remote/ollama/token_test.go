package ollama

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// wire joins strings as SSH does: each with its length before it.
func wire(all ...string) string {
	var b []byte
	for _, s := range all {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	return string(b)
}

// sshKey is a private key in OpenSSH's format, with what one test or another changes in it.
func sshKey(key ed25519.PrivateKey, kind, cipher string) []byte {
	public := string(key.Public().(ed25519.PublicKey))
	inner := "\x01\x02\x03\x04\x01\x02\x03\x04" + wire(kind, public, string(key), "me@host") + "\x01\x02\x03"
	text := keyMagic + wire(cipher, "none", "") + "\x00\x00\x00\x01" + wire(wire(kind, public), inner)
	return pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: []byte(text)})
}

var testKey = ed25519.NewKeyFromSeed([]byte("a seed of 32 bytes for the tests"))

func TestKey(t *testing.T) {
	t.Parallel()
	good := sshKey(testKey, keyKind, "none")
	if key, err := parseKey(good); err != nil || !key.Equal(testKey) {
		t.Error(err)
	}
	block, _ := pem.Decode(good)
	for n := range len(block.Bytes) - 3 - len("me@host") - 4 { // padding and comment are not looked at
		cut := pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes[:n]})
		if _, err := parseKey(cut); err == nil {
			t.Errorf("%d bytes are a key", n)
		}
	}
	for what, text := range map[string][]byte{
		"nothing": nil, "a passphrase": sshKey(testKey, keyKind, "aes256-ctr"), "another kind": sshKey(testKey, "ssh-rsa", "none"),
		"another format": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: block.Bytes}),
	} {
		if _, err := parseKey(text); !errors.Is(err, errKey) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestKeyOfOpenSSH: what OpenSSH writes is read, and the public key is written as OpenSSH does.
func TestKeyOfOpenSSH(t *testing.T) {
	t.Parallel()
	keygen, err := exec.LookPath("ssh-keygen")
	if err != nil {
		t.Skipf("there is no OpenSSH to compare with: %v", err)
	}
	for passphrase, ok := range map[string]bool{"": true, "open sesame": false} {
		path := filepath.Join(t.TempDir(), "id_ed25519")
		if out, err := exec.Command(keygen, "-q", "-t", "ed25519", "-N", passphrase, "-f", path).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		key, err := readKey(path)
		if (err == nil) != ok || !ok && !errors.Is(err, remote.ErrCredentials) {
			t.Errorf("with the passphrase %q: %v", passphrase, err)
		}
		public, readErr := os.ReadFile(path + ".pub")
		if readErr != nil || ok && strings.Fields(string(public))[1] != publicText(key) {
			t.Error(readErr, string(public))
		}
	}
}

// private makes a registry private: it takes tokens that it makes for those who sign with testKey. The tokens are valid
// until valid changes.
func private(registry *fake.Registry, valid *atomic.Int64) {
	var seen sync.Map
	registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == fmt.Sprintf("Bearer token-%d", valid.Load()) {
			return false
		}
		if r.URL.Path != "/token" {
			w.Header().Set("Www-Authenticate", fmt.Sprintf(
				`Bearer realm="%s/token",service="fake",scope="repository:library/m:pull"`, registry.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		public, signature, _ := strings.Cut(r.Header.Get("Authorization"), ":")
		sum := base64.StdEncoding.EncodeToString([]byte(fmt.Sprintf("%x", sha256.Sum256(nil))))
		text := fmt.Sprintf("%s,%s%s,%s", r.Method, registry.URL, r.URL, sum)
		raw, err := base64.StdEncoding.DecodeString(signature)
		q := r.URL.Query()
		ours := testKey.Public().(ed25519.PublicKey)
		if err != nil || public != publicText(testKey) || !ed25519.Verify(ours, []byte(text), raw) ||
			q.Get("service") != "fake" || q.Get("scope") != "repository:library/m:pull" || q.Get("ts") == "" {
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if _, twice := seen.LoadOrStore(q.Get("nonce"), true); twice {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		fmt.Fprintf(w, `{"token":"token-%d"}`, valid.Load())
		return true
	})
}

// TestPrivate: a registry that wants to know who asks gets a signature, also when its token has expired in the midst of
// a model. Neither reaches where the blobs are.
func TestPrivate(t *testing.T) {
	t.Parallel()
	registry := fake.NewRegistry()
	defer registry.Close()
	model := fake.Model(1, 3<<20)
	registry.Add("library/m/latest", model)
	var valid atomic.Int64
	dir := t.TempDir()
	keyFile := func(name string, text []byte) string {
		put(t, filepath.Join(dir, name), text)
		return filepath.Join(dir, name)
	}
	o := Options{Endpoint: registry.URL, Key: keyFile("right", sshKey(testKey, keyKind, "none"))}
	private(registry, &valid)
	f, err := open(t, o, remote.Options{}, "ollama:m")
	if err != nil {
		t.Fatal(err)
	}
	valid.Add(1)
	registry.Store.Expire()
	wantTensor(t, f, model)
	if err := f.Check(t.Context(), true); err != nil {
		t.Error(err)
	}
	if registry.Store.Saw("Authorization") {
		t.Error("a credential reached the store")
	}
	other := ed25519.NewKeyFromSeed([]byte("another seed of 32 bytes, tested"))
	for what, tt := range map[string]struct{ key, text string }{
		"no key": {filepath.Join(dir, "none"), "no token is known"}, "another key": {keyFile("other", sshKey(other, keyKind, "none")), "a token for the key"},
		"a key with a passphrase": {keyFile("locked", sshKey(testKey, keyKind, "aes256-ctr")), "without a passphrase"},
		"no file":                 {dir, "not a private key"},
	} {
		o.Key = tt.key
		if _, err := open(t, o, remote.Options{}, "ollama:m"); err == nil || !strings.Contains(err.Error(), tt.text) ||
			!errors.Is(err, fs.ErrPermission) && !errors.Is(err, remote.ErrCredentials) {
			t.Errorf("%s: %v, want %q in it", what, err, tt.text)
		}
	}
	o.Key = filepath.Join(dir, "right")
	for what, reply := range map[string]string{"a page": "<html>", "nothing": "{}", "a line break": `{"token":"a\nb"}`} {
		registry.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/token" {
				io.WriteString(w, reply)
				return true
			}
			w.Header().Set("Www-Authenticate", `Bearer realm="`+registry.URL+`/token"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		if _, err := open(t, o, remote.Options{}, "ollama:m"); !errors.Is(err, remote.ErrReply) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestRealms: a signature goes to the registry's own host, for ollama's to the one that makes its tokens, and to no
// other.
func TestRealms(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "key")
	put(t, path, []byte("no key")) // that is noticed once the place is right
	for _, tt := range []struct {
		own, realm string
		trusted    bool
	}{
		{"registry.ollama.ai", "https://ollama.com/token", true},
		{"registry.ollama.ai", "https://registry.ollama.ai/token", true},
		{"registry.ollama.ai", "http://ollama.com/token", false},
		{"registry.ollama.ai", "https://ollama.com:444/token", false},
		{"registry.ollama.ai", "https://ollama.com.evil.com/token", false},
		{"h.example.com", "https://ollama.com/token", false},
		{"h.example.com", "https://h.example.com/token", true},
		{"h.example.com", "https://auth.example.com/token", false},
		{"h.example.com", "https://h.example.com:5000/token", false},
		{"h.example.com", "http://h.example.com/token", false},
		{"h.example.com", "https://me:secret@h.example.com/token", false},
		{"h.example.com", "https://h.example.com@evil.com/token", false},
	} {
		req, err := http.NewRequest(http.MethodGet, "https://"+tt.own+"/v2/library/m/manifests/latest", nil)
		if err != nil {
			t.Fatal(err)
		}
		s := &sender{key: path}
		_, err = s.renew(req, tokenAddress(`Bearer realm="`+tt.realm+`",service="x"`), "")
		if trusted := errors.Is(err, errKey); trusted != tt.trusted || !errors.Is(err, remote.ErrCredentials) {
			t.Errorf("%s may have a signature sent to %s: %t, %v", tt.own, tt.realm, trusted, err)
		}
	}
	for _, header := range []string{"", `Basic realm="https://h/token"`, "Bearer", `Bearer service="x"`, `Bearer realm="%zz"`, `Bearer realm="/token"`} {
		if u := tokenAddress(header); u != nil {
			t.Errorf("%s: %s", header, u)
		}
	}
}
