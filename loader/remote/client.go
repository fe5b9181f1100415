// Package remote opens models on web servers: [Client.Open] takes an address in place of a path, and the model that it returns
// is loaded like any other.
//
//	c := remote.NewClient(remote.Options{})
//	defer c.Close()
//	model, err := c.Open(ctx, "https://example.com/models/model.gguf")
//	if err != nil {
//		return err
//	}
//	defer model.Close()
//	weights, err := loader.Load(ctx, dev, model, loader.Options{})
//
// Files are read by ranges, over HTTP/1.1 and a connection for each range that is being read. Connections that break, stall or end
// early are made again and go on from the byte that was reached. A file that changes on the server is noticed by its ETag, its
// date or its size in every reply.
//
// # Security
//
// Servers are taken to be hostile, as files are. A reply has to be exactly the range that was asked for; everything else is an
// error that names address, bytes and rule. Plain HTTP is for this host only, unless [Options.AllowHTTP] says otherwise.
// Credentials go to the host that the address names, at that port, and nowhere else: not to where it redirects. Errors, logs and
// reports show addresses without credentials and query.
package remote

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const (
	defaultAttempts = 8
	defaultPause    = 200 * time.Millisecond
	defaultStall    = 30 * time.Second
	// openAttempts is the most for the first reply of a file: an address that is wrong should not take half a minute to show it.
	openAttempts = 4
	// dialTimeout bounds connecting, if Options.Stall does not: hosts that answer do so quickly.
	dialTimeout = 10 * time.Second
	// maxPause bounds a pause between two attempts, also one that the server asks for.
	maxPause = 30 * time.Second
	// maxHeader bounds the headers of a reply in bytes; real ones are below 4 kB.
	maxHeader = 64 << 10
	// maxIdle is how many connections are kept for each host between two ranges.
	maxIdle = 256
)

// Options describes a Client. The zero value is useful.
type Options struct {
	// Token returns the bearer token for a host, "" for none. Nil: TokenFromEnvironment. It is asked for the host that an address
	// names, and what it returns is sent there over TLS, or to this host itself, only. Credentials in an address go first.
	Token func(host string) string
	// AllowHTTP allows addresses, and redirects from such ones, without TLS to other hosts than this one.
	AllowHTTP bool
	// Attempts is how often a range is asked for without a single byte coming before it is given up; 0: 8. Opening a file takes 4
	// at most.
	Attempts int
	// Pause is the time before the second attempt, about; it doubles with each further one up to half a minute. 0: 200 ms.
	Pause time.Duration
	// Stall is how long connecting, a reply's header, and each byte after that may take; 0: half a minute.
	Stall  time.Duration
	TLS    *tls.Config  // nil: the system's roots, or those of SSL_CERT_FILE and SSL_CERT_DIR
	Logger *slog.Logger // told of attempts that fail; nil: silent
}

// Client opens models on servers. It is safe for concurrent use. The caller must Close it after the models.
type Client struct {
	o         Options
	transport *http.Transport

	requests, retries, bytes atomic.Int64
}

// NewClient returns a client. Proxies are those of the environment: HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
func NewClient(o Options) *Client {
	if o.Token == nil {
		o.Token = TokenFromEnvironment
	}
	if o.Attempts <= 0 {
		o.Attempts = defaultAttempts
	}
	if o.Pause <= 0 {
		o.Pause = defaultPause
	}
	o.Pause = min(o.Pause, maxPause) // so that doubling it does not overflow
	if o.Stall <= 0 {
		o.Stall = defaultStall
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	// HTTP/2 would put all ranges into one connection, which is slower than many, and stops for all when one of them waits.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &Client{o: o, transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: min(o.Stall, dialTimeout)}).DialContext,
		TLSClientConfig:        o.TLS,
		TLSHandshakeTimeout:    min(o.Stall, dialTimeout),
		ResponseHeaderTimeout:  o.Stall,
		IdleConnTimeout:        3 * o.Stall,
		MaxIdleConnsPerHost:    maxIdle,
		MaxResponseHeaderBytes: maxHeader,
		Protocols:              protocols,
	}}
}

// Open opens the model at address, an https URL, or an http one of this host. Of a split model that may be any part; the others are
// looked for under the same address but for the number in the name. Only headers are read; see [gguf.OpenSource]. ctx is for
// opening alone. The caller must Close the model. Errors: those that match ErrAddress, *Error, *[gguf.FormatError], and the cause
// of ctx's end.
func (c *Client) Open(ctx context.Context, address string) (*gguf.Model, error) {
	a, err := c.parse(address)
	if err != nil {
		return nil, err
	}
	return gguf.OpenSource(ctx, a.name(), func(ctx context.Context, name string) (gguf.Source, error) {
		return c.openFile(ctx, a.sibling(name))
	})
}

// Stats says what a Client has done so far.
type Stats struct {
	Requests int64 // that were sent, redirected ones included
	Retries  int64 // attempts after ones that failed, to go on with a range
	Bytes    int64 // of files, that were received
}

// Stats returns what the client has done so far.
func (c *Client) Stats() Stats {
	return Stats{c.requests.Load(), c.retries.Load(), c.bytes.Load()}
}

// Close closes the connections that are not in use.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// send sends one request, with the credentials where they belong.
func (c *Client) send(ctx context.Context, a *address, u *url.URL, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header = header.Clone()
	if auth := a.authorization(u); auth != "" {
		req.Header.Set("Authorization", auth)
	}
	c.requests.Add(1)
	return c.transport.RoundTrip(req)
}
