package main

import (
	"bytes"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
)

// hubToken is what the hub of startHubs wants for its private repository.
const hubToken = "hf_open_sesame"

// startBucket starts an S3 server that has the given files in a bucket called models, and returns its address.
func startBucket(t *testing.T, files map[string][]byte) string {
	t.Helper()
	backend := s3mem.New()
	err := backend.CreateBucket("models")
	for key, b := range files {
		_, put := backend.PutObject("models", key, nil, bytes.NewReader(b), int64(len(b)), nil)
		err = errors.Join(err, put)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewTLSServer(gofakes3.New(backend).Server())
	t.Cleanup(s.Close)
	return s.URL
}

// startHubs starts servers as those that models are on, with the sample model on them, and returns environment
// variables for scripts: HF_ENDPOINT and PRIVATE_HUB, OLLAMA_HOSTNAME of a registry, and the certificate to trust.
func startHubs(t *testing.T, sample string) [][2]string {
	t.Helper()
	model, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	hub, private, registry := fake.NewHub(), fake.NewHub(), fake.NewRegistry()
	t.Cleanup(func() { hub.Close(); private.Close(); registry.Close() })
	private.Token = hubToken
	for _, h := range []*fake.Hub{hub, private} {
		h.Add("org/tiny", "tiny-Q2_K.gguf", fake.Model(1, 4096))
		h.Add("org/tiny", "tiny-Q4_K_M.gguf", model)
		for name, b := range fake.Split("tiny-Q8_0", 2, 4096) {
			h.Add("org/tiny", name, b)
		}
	}
	registry.Add("library/tiny/latest", model)
	registry.Add("library/liar/latest", model[:len(model)-1])
	lie := append([]byte(nil), model...)
	lie[len(lie)-1] ^= 1
	registry.Add("library/liar/latest", lie)
	registry.Store.Replace(fake.Digest(lie), model)
	bucket := startBucket(t, map[string][]byte{"m/tiny.gguf": model, "m/other-Q8_0.gguf": fake.Model(2, 4096)})
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	store := filepath.Join(dir, "models")
	blob := filepath.Join(store, "blobs", strings.Replace(fake.Digest(model), ":", "-", 1))
	manifest := filepath.Join(store, "manifests", "registry.ollama.ai", "library", "tiny", "latest")
	err = errors.Join(
		os.WriteFile(ca, fake.Certificate(), 0o600), os.MkdirAll(filepath.Dir(blob), 0o700),
		os.MkdirAll(filepath.Dir(manifest), 0o700),
		os.WriteFile(blob, model, 0o600), os.WriteFile(manifest, []byte(fake.Manifest(model)), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	return [][2]string{
		{"SSL_CERT_FILE", ca},
		{"HF_ENDPOINT", hub.URL},
		{"HF_HOME", dir},
		{"HF_TOKEN", ""},
		{"PRIVATE_HUB", private.URL},
		{"AWS_ENDPOINT_URL", bucket},
		{"AWS_ACCESS_KEY_ID", "AKIATEST"},
		{"AWS_SECRET_ACCESS_KEY", "aws-secret"},
		{"AWS_REGION", "eu-west-1"},
		{"AWS_CONFIG_FILE", filepath.Join(dir, "none")},
		{"GS_ENDPOINT_URL", bucket},
		{"AWS_SHARED_CREDENTIALS_FILE", filepath.Join(dir, "none")},
		{"HUB_TOKEN", hubToken},
		{"REGISTRY", strings.TrimPrefix(registry.URL, "https://")},
		{"OLLAMA_MODELS", store},
	}
}
