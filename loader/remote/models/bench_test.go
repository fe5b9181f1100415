package models_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/hf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/oci"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/ollama"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/s3"
)

// BenchmarkFrom loads a model as it is, from every kind of place on this host over TLS, as fast as that goes and from
// servers that send 8 MB/s on each connection. Before each load there is one from plain https, so that a machine that
// others use, too, is as busy for both: %https is what the rate is of that one's, and differs from 100 for https itself
// by chance only. check-ms is how long after the load its digest was known.
func BenchmarkFrom(b *testing.B) {
	const size = 256 << 20
	for _, rate := range []int{0, 8 << 20} {
		places := newPlaces(b, fake.Model(1, size), rate)
		for _, p := range places.list {
			for _, digest := range []remote.Digests{remote.DigestsNever, remote.DigestsAlways} {
				if p.name == "https" && digest == remote.DigestsAlways {
					continue // there is none
				}
				b.Run(fmt.Sprintf("paced=%t/from=%s/digest=%v", rate > 0, p.name, digest), func(b *testing.B) {
					b.SetBytes(size)
					var plain, own, check time.Duration
					n := 0
					for b.Loop() {
						b.StopTimer()
						took, _ := places.load(b, places.list[0].model, remote.DigestsNever)
						plain += took
						b.StartTimer()
						took, late := places.load(b, p.model, digest)
						own, check, n = own+took, check+late, n+1
					}
					b.ReportMetric(100*plain.Seconds()/own.Seconds(), "%https")
					b.ReportMetric(check.Seconds()*1e3/float64(n), "check-ms/op")
				})
			}
		}
		places.close()
	}
}

// load loads a model, and returns how long that took, and how long of it was between the end of the transfer and that
// of comparing the digest.
func (p *places) load(b *testing.B, model string, digest remote.Digests) (took, check time.Duration) {
	rt, err := soft.OpenRuntime(soft.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer rt.Close()
	dev, err := rt.Device(0)
	if err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	o := p.opener(digest)
	defer o.Close()
	f, err := o.Open(b.Context(), model)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	m, err := loader.Load(b.Context(), f, plan.Spec{Policy: plan.Raw}, dev)
	if err != nil {
		b.Fatal(err)
	}
	took = time.Since(began)
	defer m.Close()
	if id, ok := remote.Identify(f.Parts()[0]); digest == remote.DigestsAlways && (!ok || !id.Checked) {
		b.Fatalf("%s: the digest was not compared: %+v", model, id)
	}
	return took, m.Report().Check
}

// places are servers that have the same model.
type places struct {
	list     []struct{ name, model string }
	hub      *fake.Hub
	registry *fake.Registry
	bucket   *fake.Server
}

// newPlaces starts servers that have a model, and send so many bytes each second on each connection; 0: as many as can
// be.
func newPlaces(t testing.TB, model []byte, rate int) *places {
	t.Helper()
	p := &places{hub: fake.NewHub(), registry: fake.NewRegistry()}
	sum := sha256.Sum256(model)
	p.bucket = fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Amz-Checksum-Mode") == "ENABLED" {
			w.Header().Set("X-Amz-Checksum-Sha256", base64.StdEncoding.EncodeToString(sum[:]))
		}
		fake.Serve(w, r, model)
	}))
	p.hub.Add("o/r", "m-Q4_K_M.gguf", model)
	p.registry.Add("library/m/latest", model)
	if rate > 0 {
		slow := func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			fake.Serve(&paced{ResponseWriter: w, rate: rate}, r, model)
			return true
		}
		p.bucket.Fault(slow)
		p.hub.Store.Fault(slow)
		p.registry.Store.Fault(slow)
	}
	host := p.registry.URL[len("https://"):]
	for _, x := range [][2]string{
		{"https", p.bucket.URL + "/m.gguf"},
		{"hf", "hf:o/r"},
		{"ollama", "ollama:" + host + "/library/m"},
		{"oci", "oci://" + host + "/library/m"},
		{"s3", "s3://models/m.gguf"},
	} {
		p.list = append(p.list, struct{ name, model string }{x[0], x[1]})
	}
	return p
}

func (p *places) close() {
	p.hub.Close()
	p.registry.Close()
	p.bucket.Close()
}

// opener opens models of these places.
func (p *places) opener(d remote.Digests) *models.Opener { return p.with(remote.Options{Digests: d}) }

// with is opener with other options.
func (p *places) with(r remote.Options) *models.Opener {
	r.TLS = fake.Trust()
	credentials := aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: "AKIATEST", SecretAccessKey: "secret"}, nil
	})
	return models.New(models.Options{
		Remote: r, HF: &hf.Options{Endpoint: p.hub.URL},
		Ollama: &ollama.Options{},
		OCI:    &oci.Options{}, S3: &s3.Options{Endpoint: p.bucket.URL, Credentials: credentials},
	})
}

// paced is a reply that does not come faster than so many bytes each second.
type paced struct {
	http.ResponseWriter
	rate  int
	once  sync.Once
	start time.Time
	sent  int
}

// Write sends b in time.
func (p *paced) Write(b []byte) (n int, err error) {
	p.once.Do(func() { p.start = time.Now() })
	for len(b) > 0 && err == nil {
		k := min(len(b), 64<<10)
		p.sent += k
		time.Sleep(time.Until(p.start.Add(time.Duration(float64(p.sent) / float64(p.rate) * float64(time.Second)))))
		if k, err = p.ResponseWriter.Write(b[:k]); k > 0 {
			n, b = n+k, b[k:]
		}
	}
	return n, err
}

// ReadFrom hides that of the reply, which does not know the pace.
func (p *paced) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{p}, r)
}
