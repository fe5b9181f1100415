package s3

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// emptyHash is the SHA-256 of nothing, which is what a GET sends.
const emptyHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

const (
	// credentialsTime limits asking for credentials: the services of an instance answer at once, or are not there.
	credentialsTime = 15 * time.Second
	// maxProblem is how many bytes of a refusal are read, for its code.
	maxProblem = 16 << 10
)

// bucket sends the requests for one bucket.
type bucket struct {
	store *Store
	name  string

	mu     sync.Mutex
	region string
	skew   time.Duration // the store's clock is ahead by so much
	denied error         // why there are no credentials
}

// send signs a request and sends it. If the store says that the region, the time or the credentials are not right any
// more, it is sent once more with what is right.
func (b *bucket) send(req *http.Request) (*http.Response, error) {
	for attempt := 0; ; attempt++ {
		again := req.Clone(req.Context())
		region, err := b.sign(again)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", remote.ErrCredentials, err)
		}
		resp, err := b.store.client.RoundTrip(again)
		if err != nil || attempt == 2 || !b.renew(resp, region) {
			return resp, err
		}
		_ = resp.Body.Close()
	}
}

// sign adds what says who asks, and returns the region that it is for.
func (b *bucket) sign(req *http.Request) (region string, err error) {
	o := &b.store.o
	b.mu.Lock()
	region, skew := b.region, b.skew
	b.mu.Unlock()
	if b.store.isAWS() { // a host that is made here, and not one that a server has named
		req.URL.Host = strings.Replace(req.URL.Host, awsHost(b.store.region), awsHost(region), 1)
		req.Host = ""
	}
	if o.RequesterPays {
		req.Header.Set("X-Amz-Request-Payer", "requester")
	}
	if o.Project != "" {
		req.Header.Set("X-Goog-User-Project", o.Project)
	}
	if o.Token != "" {
		req.Header.Set("Authorization", "Bearer "+o.Token)
		return region, nil
	}
	creds, ok := b.credentials(req.Context())
	if !ok {
		return region, nil
	}
	// What servers on the way may change, or the transport adds, is not signed.
	kept := http.Header{}
	for _, name := range []string{"Accept", "Accept-Encoding"} {
		kept[name] = req.Header[name]
		delete(req.Header, name)
	}
	req.Header.Set("X-Amz-Content-Sha256", emptyHash)
	err = b.store.signer.SignHTTP(req.Context(), creds, req, emptyHash, "s3", region, time.Now().Add(skew).UTC())
	for name, values := range kept {
		if values != nil {
			req.Header[name] = values
		}
	}
	return region, err
}

// credentials returns those that are valid now. ok is false if there are none.
func (b *bucket) credentials(ctx context.Context) (c aws.Credentials, ok bool) {
	if b.store.o.Credentials == nil {
		return c, false
	}
	ctx, cancel := context.WithTimeout(ctx, credentialsTime)
	defer cancel()
	c, err := b.store.o.Credentials.Retrieve(ctx)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.denied = err; err != nil {
		return c, false
	}
	return c, c.HasKeys()
}

// whyNone is why there are no credentials; nil: there are, or none were looked for.
func (b *bucket) whyNone() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.denied
}

var regionName = regexp.MustCompile(`^[a-z]{2}[a-z0-9-]{1,30}$`)

// renew looks at a reply, and reports whether the request is worth sending again. If it is not, the reply can be read
// as if nobody had looked.
func (b *bucket) renew(resp *http.Response, region string) bool {
	if resp.StatusCode < 300 || resp.StatusCode == http.StatusNotFound || resp.StatusCode >= 500 {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if right := resp.Header.Get("X-Amz-Bucket-Region"); right != "" && right != region && regionName.MatchString(right) {
		b.region = right
		return true
	}
	if resp.StatusCode < 400 {
		return false
	}
	var problem struct {
		Code   string
		Region string
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	resp.Body = &rest{io.MultiReader(bytes.NewReader(text), resp.Body), resp.Body}
	if err != nil || xml.Unmarshal(text, &problem) != nil {
		return false
	}
	switch problem.Code {
	case "AuthorizationHeaderMalformed", "IncorrectEndpoint", "IllegalLocationConstraintException":
		if problem.Region != "" && problem.Region != region && regionName.MatchString(problem.Region) {
			b.region = problem.Region
			return true
		}
	case "RequestTimeTooSkewed", "RequestExpired":
		if now, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			skew := time.Until(now)
			again := (skew - b.skew).Abs() > time.Minute // else the clock is not the reason
			b.skew = skew
			return again
		}
	case "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken":
		if c, ok := b.store.o.Credentials.(interface{ Invalidate() }); ok {
			c.Invalidate()
			return true
		}
	}
	return false
}

// rest is a body of which the beginning was read and put back.
type rest struct {
	io.Reader
	io.Closer
}
