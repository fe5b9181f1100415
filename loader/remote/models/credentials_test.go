package models_test

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/hf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/oci"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/ollama"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/s3"
)

// place is a server that has a model as every kind of place has it, and keeps all that it is sent.
type place struct {
	*httptest.Server
	model []byte
	// attack may answer a request first. Nil: nobody does.
	attack func(w http.ResponseWriter, r *http.Request) bool

	mu   sync.Mutex
	seen strings.Builder
}

func newPlace(t *testing.T, model []byte, secure bool) *place {
	p := &place{model: model}
	p.Server = httptest.NewUnstartedServer(p)
	p.Config.ErrorLog = log.New(io.Discard, "", 0)
	if secure {
		p.StartTLS()
	} else {
		p.Start()
	}
	t.Cleanup(p.Close)
	return p
}

// saw returns everything that was sent since the last call.
func (p *place) saw() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.seen.Reset()
	return p.seen.String()
}

// minted is the token that places make.
const minted = "minted-token"

func (p *place) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	fmt.Fprintf(&p.seen, "%s %s %s\n", r.Method, r.Host, r.URL)
	_ = r.Header.Write(&p.seen) // memory does not fail
	_, _ = io.Copy(&p.seen, r.Body)
	p.mu.Unlock()
	if p.attack != nil && p.attack(w, r) {
		return
	}
	switch path := r.URL.Path; {
	case path == "/token":
		fmt.Fprintf(w, `{"token":%q,"access_token":%[1]q}`, minted)
	case strings.Contains(path, "/manifests/"):
		io.WriteString(w, fake.Manifest(p.model))
	case strings.HasSuffix(path, "/tags/list"):
		io.WriteString(w, `{"tags":["latest"]}`)
	case strings.HasPrefix(path, "/api/models/"):
		fmt.Fprintf(w, `{"sha":%q,"siblings":[{"rfilename":"m.gguf","size":%d}]}`, fake.Commit, len(p.model))
	case r.URL.Query().Has("list-type"):
		io.WriteString(w, "<ListBucketResult><Contents><Key>m.gguf</Key><Size>1</Size></Contents></ListBucketResult>")
	default:
		fake.Serve(w, r, p.model)
	}
}

// private is a kind of name with credentials.
type private struct {
	kind, model, list string // names of a model and of a list; "": there is none
	options           models.Options
	secrets           []string // what may be sent to the victim alone
	challenge         string   // of a request without credentials, in front of the realm; "": they are sent at once
	ports             bool     // realms on other ports of the host are trusted
}

// privates returns every kind of name with credentials for the victim.
func privates(t *testing.T, victim *place) []private {
	host := strings.TrimPrefix(victim.URL, "https://")
	basic := base64.StdEncoding.EncodeToString([]byte("alice:open sesame"))
	key := ed25519.NewKeyFromSeed([]byte("a seed of 32 bytes for the tests"))
	keyFile := filepath.Join(t.TempDir(), "id_ed25519")
	if err := os.WriteFile(keyFile, sshKey(key), 0o600); err != nil {
		t.Fatal(err)
	}
	credential := func(c oci.Credential) *oci.Options {
		return &oci.Options{Credential: func(context.Context, string) (oci.Credential, error) { return c, nil }}
	}
	signing := &s3.Options{Endpoint: victim.URL, RequesterPays: true, Credentials: aws.CredentialsProviderFunc(
		func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "AKIAALICE", SecretAccessKey: "secret", SessionToken: "session"}, nil
		})}
	artifact := "oci://" + host + "/library/m"
	return []private{
		{"https with a token", victim.URL + "/m.gguf", "", models.Options{
			Remote: remote.Options{Tokens: map[string]string{host: "alices-token"}},
		}, []string{"alices-token"}, "", false},
		{"https with a password", "https://alice:open%20sesame@" + host + "/m.gguf", "", models.Options{}, []string{basic}, "", false},
		{"hf", "hf:o/r", "hf:o/r", models.Options{HF: &hf.Options{Endpoint: victim.URL, Token: "hf_alice"}}, []string{"hf_alice"}, "", false},
		{
			"ollama", "ollama:m", "",
			models.Options{Ollama: &ollama.Options{Endpoint: victim.URL, Key: keyFile}},
			[]string{minted, "AAAAC3NzaC1lZDI1NTE5"},
			"Bearer ", false,
		},
		{"oci with a password", artifact, artifact, models.Options{
			OCI: credential(oci.Credential{Username: "alice", Password: "open sesame"}),
		}, []string{basic}, "Basic ", true},
		{"oci with tokens", artifact, artifact, models.Options{
			OCI: credential(oci.Credential{Username: "alice", Password: "open sesame"}),
		}, []string{basic, minted}, "Bearer ", true},
		{"oci with an identity token", artifact, artifact, models.Options{
			OCI: credential(oci.Credential{RefreshToken: "alices-identity"}),
		}, []string{"alices-identity", minted}, "Bearer ", true},
		{"oci with a registry token", artifact, artifact, models.Options{
			OCI: credential(oci.Credential{AccessToken: "alices-access"}),
		}, []string{"alices-access"}, "Bearer ", true},
		{"s3", "s3://models/m.gguf", "s3://models/", models.Options{S3: signing}, []string{"AKIAALICE", "session"}, "", false},
		{"gs with a key", "gs://models/m.gguf", "gs://models/", models.Options{Google: signing}, []string{"AKIAALICE", "session"}, "", false},
		{"gs with a token", "gs://models/m.gguf", "gs://models/", models.Options{
			Google: &s3.Options{Endpoint: victim.URL, Token: "ya29.alice", Project: "alices-project"},
		}, []string{"ya29.alice", "alices-project"}, "", false},
	}
}

// sshKey is a private key in OpenSSH's format.
func sshKey(key ed25519.PrivateKey) []byte {
	wire := func(all ...string) (s string) {
		for _, x := range all {
			s += string(binary.BigEndian.AppendUint32(nil, uint32(len(x)))) + x
		}
		return s
	}
	public := string(key.Public().(ed25519.PublicKey))
	inner := "\x00\x00\x00\x00\x00\x00\x00\x00" + wire("ssh-ed25519", public, string(key), "")
	text := "openssh-key-v1\x00" + wire("none", "none", "") + "\x00\x00\x00\x01" + wire(wire("ssh-ed25519", public), inner)
	return pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: []byte(text)})
}

// TestCredentialsStay: whatever a server says, its credentials reach no other one: not by redirects, not by the place
// that it names for tokens, and not by the next page of a list. That is so for every kind of name.
func TestCredentialsStay(t *testing.T) {
	t.Parallel()
	model := fake.Model(1, 2000)
	for i := range privates(t, newPlace(t, model, true)) {
		victim, other, plain := newPlace(t, model, true), newPlace(t, model, true), newPlace(t, model, false)
		x := privates(t, victim)[i]
		t.Run(x.kind, func(t *testing.T) {
			t.Parallel()
			port := other.URL                                                    // another port of the host
			elsewhere := strings.Replace(other.URL, "127.0.0.1", "localhost", 1) // another host
			hosts := strings.TrimPrefix(victim.URL, "https://") + "@" + strings.TrimPrefix(other.URL, "https://")
			for _, a := range []struct {
				what, redirect, tokens, realm, next string
				reaches                             *place // who is to be asked then, without credentials; nil: nobody
			}{
				{what: "nothing"},
				{what: "a redirect to another port", redirect: port, reaches: other},
				{what: "a redirect to another host", redirect: elsewhere, reaches: other},
				{what: "a redirect without TLS", redirect: plain.URL},
				{what: "a redirect with a password", redirect: "https://me:mine@" + strings.TrimPrefix(other.URL, "https://"), reaches: other},
				{what: "a redirect that looks like the host", redirect: "https://" + hosts, reaches: other},
				{what: "a redirect of who makes tokens", tokens: port},
				{what: "a redirect of who makes tokens to another host", tokens: elsewhere},
				{what: "a redirect of who makes tokens without TLS", tokens: plain.URL},
				{what: "a realm on another port", realm: port},
				{what: "a realm on another host", realm: elsewhere},
				{what: "a realm without TLS", realm: plain.URL},
				{what: "a realm that looks like the host", realm: "https://" + hosts},
				{what: "a page on another port", next: port},
				{what: "a page on another host", next: elsewhere},
				{what: "a page without TLS", next: plain.URL},
			} {
				for _, late := range []bool{false, true} {
					victim.attack = func(w http.ResponseWriter, r *http.Request) bool {
						authorized := r.Header.Get("Authorization") != ""
						now := !late || r.Header.Get("Range") != ""
						switch {
						case r.URL.Path == "/token":
							if a.tokens == "" {
								return false
							}
							http.Redirect(w, r, a.tokens+r.URL.RequestURI(), http.StatusTemporaryRedirect)
						case a.realm != "" && now:
							for _, scheme := range []string{"Bearer ", "Basic "} {
								if x.challenge == "" || x.challenge == scheme {
									w.Header().Add("Www-Authenticate", scheme+`realm="`+a.realm+`/token",service="x"`)
								}
							}
							w.WriteHeader(http.StatusUnauthorized)
						case x.challenge != "" && !authorized:
							w.Header().Set("Www-Authenticate", x.challenge+`realm="`+victim.URL+`/token",service="x"`)
							w.WriteHeader(http.StatusUnauthorized)
						case a.redirect != "" && now:
							http.Redirect(w, r, a.redirect+r.URL.RequestURI(), http.StatusTemporaryRedirect)
						default:
							if a.next != "" {
								w.Header().Set("Link", "<"+a.next+r.URL.RequestURI()+`>; rel="next"`)
							}
							return false
						}
						return true
					}
					said := fmt.Sprint(x.use(t))
					mine, theirs := victim.saw(), other.saw()+plain.saw()
					trusted := x.ports && a.realm == port
					for _, secret := range append(x.secrets, "open sesame", "open%20sesame", "me:mine") {
						if strings.Contains(said, secret) {
							t.Errorf("%s, late %t: an error shows %s: %s", a.what, late, secret, said)
						}
					}
					for _, secret := range x.secrets {
						if strings.Contains(theirs, secret) && !trusted {
							t.Errorf("%s, late %t: %s was sent to another place:\n%s", a.what, late, secret, theirs)
						}
						if a.what == "nothing" && !strings.Contains(mine, secret) {
							t.Errorf("%s was not used", secret)
						}
					}
					if strings.Contains(theirs, "Authorization:") && !trusted {
						t.Errorf("%s, late %t: something was sent to another place:\n%s", a.what, late, theirs)
					}
					// A redirect is followed without credentials. Nobody else is asked, but for a token by some.
					if (theirs != "") != (a.reaches != nil) && !trusted && a.tokens == "" {
						t.Errorf("%s, late %t: others were asked: %t", a.what, late, theirs != "")
					}
				}
			}
		})
	}
}

// use opens and reads the model, and lists what there is. Whether that works is no matter.
func (x *private) use(t *testing.T) (err error) {
	o := x.options
	o.Remote.TLS = &tls.Config{InsecureSkipVerify: true} // the certificate of the tests is not for all names of the host
	o.Remote.Pause, o.Remote.Attempts = time.Millisecond, 2
	opener := models.New(o)
	defer opener.Close()
	f, err := opener.Open(t.Context(), x.model)
	if err == nil {
		r := f.Range(t.Context(), &f.Tensors()[0], 0, f.Tensors()[0].Size)
		_, read := io.Copy(io.Discard, r)
		err = errors.Join(read, r.Close(), f.Close())
	}
	if x.list != "" {
		_, list := opener.List(t.Context(), x.list)
		err = errors.Join(err, list)
	}
	return err
}
