//go:build unix

package oci

import (
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
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// docker makes a configuration of Docker's in a directory of its own, with helpers, by name, that are shell scripts.
func docker(t *testing.T, config any, helpers map[string]string) {
	t.Helper()
	dir := t.TempDir()
	text, err := json.Marshal(config)
	if s, ok := config.(string); ok {
		text = []byte(s)
	}
	err = errors.Join(err, os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600))
	for name, script := range helpers {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o700))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

// answers is a helper that gives a name and a secret to whoever names the registry's host, and to nobody else.
func answers(host, name, secret string) string {
	return fmt.Sprintf(`read host; [ "$1" = get ] && [ "$host" = '%s' ] || { echo 'credentials not found in native keychain'; exit 1; }
echo '{"ServerURL":"x","Username":"%s","Secret":"%s"}'
`, host, name, secret)
}

// TestHelpers: whatever gives the credentials, they open a private registry, and what fails to give them is named. A
// public registry can be read all the same. No error shows a secret.
func TestHelpers(t *testing.T) {
	public, private := newRegistry(t), newRegistry(t)
	model := fake.Model(1, 2000)
	public.Add("library/m/latest", model)
	private.Add("library/m/latest", model)
	newTokens(t, "").protect(public)
	// Who makes tokens takes alice's password, and a token that stands for it.
	by := newTokens(t, "open sesame")
	by.protect(private)
	by.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		if err := r.ParseForm(); err != nil || r.PostForm.Get("grant_type") != "refresh_token" ||
			r.PostForm.Get("refresh_token") != "identity" || r.PostForm.Get("scope") != "repository:library/m:pull" {
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		io.WriteString(w, `{"access_token":"token-0"}`)
		return true
	})
	host := strings.TrimPrefix(private.URL, "https://")
	type entry struct {
		Auth     string `json:"auth,omitempty"`
		Identity string `json:"identitytoken,omitempty"`
		Registry string `json:"registrytoken,omitempty"`
	}
	encoded := base64.StdEncoding.EncodeToString([]byte("alice:open sesame"))
	auths := func(e entry) any { return map[string]any{"auths": map[string]entry{host: e}} }
	store := map[string]any{"credsStore": "x", "auths": map[string]entry{host: {}}}
	for _, tt := range []struct {
		what    string
		config  any
		helpers map[string]string
		refused string // what the error says; "": there is none
	}{
		{"the file", auths(entry{Auth: encoded}), nil, ""},
		{"an identity token in the file", auths(entry{Identity: "identity"}), nil, ""},
		{"a registry token in the file", auths(entry{Registry: "token-0"}), nil, ""},
		{"a store", store, map[string]string{"x": answers(host, "alice", "open sesame")}, ""},
		{"an identity token of a store", store, map[string]string{"x": answers(host, "<token>", "identity")}, ""},
		{
			"a helper goes before the store",
			map[string]any{"credsStore": "x", "credHelpers": map[string]string{host: "y"}},
			map[string]string{"x": "exit 1", "y": answers(host, "alice", "open sesame")},
			"",
		},
		{
			"a helper of another registry",
			map[string]any{"credHelpers": map[string]string{"h.example.com": "x"}},
			map[string]string{"x": "exit 1"},
			"no token is known for this host",
		},
		{"nothing in the store", store, map[string]string{"x": answers("h.example.com", "alice", "open sesame")}, "docker login"},
		{"a wrong identity token", store, map[string]string{"x": answers(host, "<token>", "secret")}, "401"},
		{"a helper that says why not", store, map[string]string{"x": "echo 'the keychain is locked'; exit 1"}, "the keychain is locked"},
		{"a helper that says nothing", store, map[string]string{"x": "exit 3"}, "exit status 3"},
		{"a helper that is missing", store, nil, `"docker-credential-x": executable file not found`},
		{"a helper that answers nonsense", store, map[string]string{"x": "echo secret"}, "invalid character"},
		{
			"an entry that cannot be decoded", auths(entry{Auth: base64.StdEncoding.EncodeToString([]byte("secret"))}), nil,
			"its entry in Docker's configuration cannot be read",
		},
	} {
		t.Run(tt.what, func(t *testing.T) {
			docker(t, tt.config, tt.helpers)
			o, err := FromEnvironment()
			if err != nil {
				t.Fatal(err)
			}
			r := connect(t, o, remote.Options{})
			if _, err := open(t, r, nameOf(public)); err != nil {
				t.Errorf("what is public: %v", err)
			}
			_, err = open(t, r, nameOf(private))
			switch {
			case tt.refused == "" && err != nil:
				t.Error(err)
			case tt.refused != "" && (!errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), tt.refused) ||
				strings.Contains(err.Error(), "secret")):
				t.Errorf("got %v, want %q in it", err, tt.refused)
			}
		})
	}
	docker(t, `{"auths":`, nil)
	if _, err := FromEnvironment(); !errors.Is(err, remote.ErrCredentials) {
		t.Errorf("a file that is cut off: %v", err)
	}
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("HOME", "")
	if o, err := FromEnvironment(); err != nil || o.Credential != nil {
		t.Errorf("without a directory: %+v, %v", o, err)
	}
}

// TestHelperHangs: a helper that gives no answer is not waited for, whatever it leaves behind, and a load that is ended
// does not wait for it at all.
func TestHelperHangs(t *testing.T) {
	t.Parallel()
	registry := newRegistry(t)
	registry.Add("library/m/latest", fake.Model(1, 2000))
	newTokens(t, "open sesame").protect(registry)
	never := make(chan struct{})
	defer close(never)
	asked := make(chan struct{}, 1)
	o := Options{wait: time.Millisecond, Credential: func(context.Context, string) (Credential, error) {
		asked <- struct{}{}
		<-never
		return Credential{}, nil
	}}
	if _, err := open(t, connect(t, o, remote.Options{}), nameOf(registry)); !errors.Is(err, fs.ErrPermission) ||
		!errors.Is(err, remote.ErrCredentials) || !strings.Contains(err.Error(), "no answer within 1ms") {
		t.Errorf("got %v", err)
	}
	<-asked
	o.wait = 0
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	n, err := Parse(nameOf(registry))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, o, remote.Options{}).Open(ctx, n); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
