package s3

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// keys are credentials that the store knows.
type keys struct{ id, secret, session string }

var (
	alice = keys{"AKIAALICE", "alice's secret", ""}
	role  = keys{"ASIAROLE", "the role's secret", "session-1"}
)

func (k keys) provider() aws.CredentialsProvider {
	return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: k.id, SecretAccessKey: k.secret, SessionToken: k.session}, nil
	})
}

// store is a real S3 server in this process, behind TLS and a check of signatures.
type store struct {
	*fake.Server
	region  string
	valid   atomic.Pointer[[]keys] // who may read; nil: everybody, without a signature
	clock   atomic.Int64           // seconds that its clock is ahead
	refused atomic.Int64
}

const bucketOfTests = "models"

// newStore starts a store with some models. Without keys it is open to everybody.
func newStore(t testing.TB, valid ...keys) *store {
	t.Helper()
	backend := s3mem.New()
	if err := backend.CreateBucket(bucketOfTests); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{
		"a/m-Q4_K_M.gguf": fake.Model(4, 3<<20), "top.gguf": fake.Model(1, 1000), "README.md": []byte("x"),
		"a/b c+d=é&%.gguf": fake.Model(2, 2000),
	}
	for name, b := range fake.Split("m", 3, 1<<20) {
		files["split/"+name] = b
	}
	for key, b := range files {
		if _, err := backend.PutObject(bucketOfTests, key, nil, bytes.NewReader(b), int64(len(b)), nil); err != nil {
			t.Fatal(err)
		}
	}
	h := gofakes3.New(backend, gofakes3.WithTimeSkewLimit(0)).Server()
	s := &store{region: "eu-west-1"}
	if len(valid) > 0 {
		s.valid.Store(&valid)
	}
	s.Server = fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if code := s.check(r); code != "" {
			s.refused.Add(1)
			w.Header().Set("Content-Type", "application/xml")
			w.Header().Set("Date", time.Now().Add(time.Duration(s.clock.Load())*time.Second).UTC().Format(http.TimeFormat))
			status := http.StatusForbidden
			if code == "AuthorizationHeaderMalformed" || code == "ExpiredToken" {
				status = http.StatusBadRequest
			}
			w.WriteHeader(status)
			fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>no</Message><Region>%s</Region></Error>`,
				code, s.region)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// check checks the signature of a request, as AWS describes it (Signature Version 4), and returns the code of what is
// wrong.
func (s *store) check(r *http.Request) string {
	valid := s.valid.Load()
	if valid == nil {
		return ""
	}
	auth, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	if !ok {
		return "AccessDenied"
	}
	fields := map[string]string{}
	for f := range strings.SplitSeq(auth, ", ") {
		k, v, _ := strings.Cut(f, "=")
		fields[k] = v
	}
	scope := strings.Split(fields["Credential"], "/")
	if len(scope) != 5 || scope[3] != "s3" || scope[4] != "aws4_request" {
		return "AuthorizationHeaderMalformed"
	}
	if scope[2] != s.region {
		return "AuthorizationHeaderMalformed"
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if now := time.Now().Add(time.Duration(s.clock.Load()) * time.Second); err != nil ||
		now.Sub(at).Abs() > 15*time.Minute {
		return "RequestTimeTooSkewed"
	}
	i := slices.IndexFunc(*valid, func(k keys) bool { return k.id == scope[0] })
	switch {
	case i < 0:
		return "InvalidAccessKeyId"
	case (*valid)[i].session != r.Header.Get("X-Amz-Security-Token"):
		return "ExpiredToken"
	}
	signed := strings.Split(fields["SignedHeaders"], ";")
	canonical := r.Method + "\n" + r.URL.EscapedPath() + "\n" + canonicalQuery(r.URL.RawQuery) + "\n"
	for _, name := range signed {
		v := strings.Join(r.Header.Values(name), ",")
		if name == "host" {
			v = r.Host
		}
		canonical += name + ":" + strings.TrimSpace(v) + "\n"
	}
	canonical += "\n" + fields["SignedHeaders"] + "\n" + r.Header.Get("X-Amz-Content-Sha256")
	text := fmt.Sprintf("AWS4-HMAC-SHA256\n%s\n%s\n%x", r.Header.Get("X-Amz-Date"), strings.Join(scope[1:], "/"),
		sha256.Sum256([]byte(canonical)))
	key := []byte("AWS4" + (*valid)[i].secret)
	for _, part := range append(scope[1:], text) {
		h := hmac.New(sha256.New, key)
		io.WriteString(h, part)
		key = h.Sum(nil)
	}
	if hex.EncodeToString(key) != fields["Signature"] || !slices.Contains(signed, "host") {
		return "SignatureDoesNotMatch"
	}
	return ""
}

func canonicalQuery(raw string) string {
	pairs := strings.Split(raw, "&")
	slices.Sort(pairs)
	return strings.Join(pairs, "&")
}

func connect(t testing.TB, o Options, ro remote.Options) *Store {
	t.Helper()
	ro.Pause, ro.TLS = time.Millisecond, fake.Trust()
	c := remote.NewClient(ro)
	t.Cleanup(c.Close)
	s, err := New(c, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func open(t testing.TB, s *Store, name string) (*gguf.File, error) {
	t.Helper()
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.Open(t.Context(), n)
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
