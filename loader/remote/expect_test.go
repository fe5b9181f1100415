package remote

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestExpected opens models of servers and of disks with a digest that the user knows, whatever Options.Digests says,
// and whatever the server says.
func TestExpected(t *testing.T) {
	t.Parallel()
	data := readSample(t)
	s := newSite(t, data)
	local := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(local, data, 0o600); err != nil {
		t.Fatal(err)
	}
	right, wrong := sha256Of(data), sha256Of(nil)
	refused := errors.New("refused")
	for name, tt := range map[string]struct {
		expected Expected
		refuse   error
		server   string // the digest that the server's list has
		open, is error  // of opening, and of Check
	}{
		"right":                       {expected: Expected{right, int64(len(data))}},
		"right, as the server says":   {expected: Expected{Digest: right}, server: right},
		"right, by another algorithm": {expected: Expected{Digest: right}, server: "sha512:" + strings.Repeat("ab", 64)},
		"wrong":                       {expected: Expected{Digest: wrong}, is: ErrDigest},
		"wrong, as the server says":   {expected: Expected{Digest: wrong}, server: wrong, is: ErrDigest},
		"not what the server says":    {expected: Expected{Digest: right}, server: wrong, open: ErrDigest},
		"size":                        {expected: Expected{right, 5}, open: ErrDigest},
		"size alone":                  {expected: Expected{Size: 5}, open: ErrDigest},
		"nothing, for this file":      {},
		"refused":                     {refuse: refused, open: refused},
	} {
		for _, from := range []string{"server", "object", "disk"} {
			if from != "object" && tt.server != "" {
				continue
			}
			o := quick()
			o.Digests = DigestsNever
			o.Expect = func(name string) (Expected, error) {
				if name != "m.gguf" {
					t.Errorf("asked for %q", name)
				}
				return tt.expected, tt.refuse
			}
			c := newClient(t, o)
			var f *gguf.File
			var err error
			switch from {
			case "server":
				f, err = c.Open(t.Context(), s.URL+"/m.gguf")
			case "object":
				f, err = c.OpenObjects(t.Context(), "sub/m.gguf", func(context.Context, string) (Object, error) {
					return Object{URL: s.URL, Digest: tt.server}, nil
				})
			default:
				f, err = c.OpenLocal(t.Context(), local, func(string) string { return wrong })
			}
			if !errors.Is(err, tt.open) || (err == nil) != (tt.open == nil) {
				t.Errorf("%s, %s: opening: %v, want %v", name, from, err, tt.open)
			}
			if err != nil {
				continue
			}
			err = f.Check(t.Context(), false) // of a share
			if !errors.Is(err, tt.is) || (err == nil) != (tt.is == nil) {
				t.Errorf("%s, %s: %v, want %v", name, from, err, tt.is)
			}
			if id, _ := Identify(f.Parts()[0]); id.Checked != (tt.is == nil && tt.expected.Digest != "") {
				t.Errorf("%s, %s: checked %t", name, from, id.Checked)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	o := quick()
	o.Expect = func(string) (Expected, error) { return Expected{Digest: "md5:00"}, nil }
	if _, err := newClient(t, o).OpenLocal(t.Context(), local, nil); err == nil || !strings.Contains(err.Error(), "no digest") {
		t.Errorf("MD5: %v", err)
	}
}

// TestExpectedOfCache: what the cache has is compared, too.
func TestExpectedOfCache(t *testing.T) {
	t.Parallel()
	data := readSample(t)
	s := newSite(t, data)
	o := quick()
	o.Cache = t.TempDir()
	o.Expect = func(string) (Expected, error) { return Expected{Digest: sha256Of(data)}, nil }
	load := func() error {
		f, err := newClient(t, o).Open(t.Context(), s.URL+"/m.gguf")
		if err != nil {
			return err
		}
		return errors.Join(f.Check(t.Context(), true), f.Close())
	}
	if err := errors.Join(load(), load()); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(o.Cache, "sha256-*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the cache has %q, %v", files, err)
	}
	damaged := bytes.Clone(data)
	damaged[len(damaged)-1] ^= 1
	if err := os.WriteFile(files[0], damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := load(); !errors.Is(err, ErrDigest) {
		t.Errorf("damaged in the cache: %v", err)
	}
}
