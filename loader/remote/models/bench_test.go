package models_test

import (
	"context"
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
// servers that send 8 MB/s on each connection. Divide by from=https of the same run.
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
					rt, err := soft.OpenRuntime(soft.Options{})
					if err != nil {
						b.Fatal(err)
					}
					defer rt.Close()
					dev, err := rt.Device(0)
					if err != nil {
						b.Fatal(err)
					}
					b.SetBytes(size)
					var check time.Duration
					for b.Loop() {
						o := places.opener(digest)
						f, err := o.Open(b.Context(), p.model)
						if err != nil {
							b.Fatal(err)
						}
						m, err := loader.Load(b.Context(), f, plan.Spec{Policy: plan.Raw}, dev)
						if err != nil {
							b.Fatal(err)
						}
						check += m.Report().Check
						m.Close()
						f.Close()
						o.Close()
					}
					b.ReportMetric(float64(check.Milliseconds())/float64(b.N), "check-ms/op")
				})
			}
		}
		places.close()
	}
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
	p.bucket = fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fake.Serve(w, r, model) }))
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
		{"https", p.bucket.URL + "/m.gguf"}, {"hf", "hf:o/r"}, {"ollama", "ollama:" + host + "/library/m"},
		{"oci", "oci://" + host + "/library/m"}, {"s3", "s3://models/m.gguf"},
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
