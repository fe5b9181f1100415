package remote

import (
	"context"
	"crypto/tls"
	"log/slog"
	"maps"
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
	// openAttempts limits the attempts at the first reply of a file: a wrong address should not take half a minute to
	// show.
	openAttempts = 4
	// dialTimeout limits connecting, if Options.Stall does not: hosts that answer do so quickly.
	dialTimeout = 10 * time.Second
	// maxPause limits the pause between two attempts, also one that the server asks for.
	maxPause = 30 * time.Second
	// maxHeader limits the headers of a reply, in bytes. Real ones are below 4 kB.
	maxHeader = 64 << 10
	// defaultMinRate is so little that no link which a model comes over is slower, with all its connections.
	defaultMinRate = 1 << 10
	// maxIdle is how many connections to each host are kept between two ranges.
	maxIdle = 256
)

// Options are the settings of a Client. The zero value is useful, and sends no credentials to anybody.
type Options struct {
	// Tokens holds a bearer token for each host that is to get one. A key is a host, such as "huggingface.co", or a
	// host with a port, such as "models.example.com:8443"; without a port it is for all ports of that host. A token is
	// sent if an address names its host, over TLS or to this host itself, and never to where that host redirects.
	// Credentials in an address take precedence.
	Tokens map[string]string
	// AllowHTTP allows addresses of other hosts without TLS, and redirects from such addresses.
	AllowHTTP bool
	// Attempts is how often a range is asked for in a row without getting a single byte, before that is an error; 0: 8.
	// Opening a file takes 4 attempts at most.
	Attempts int
	// Pause is the time before the second attempt, about. It doubles with each further one, up to 30 s. 0: 200 ms.
	Pause time.Duration
	// Stall limits connecting, waiting for a reply's header, and waiting for each byte after that; 0: 30 s.
	Stall time.Duration
	// MinRate is how many bytes a second a connection has to bring at least, over the time of Stall, before it is given
	// up and the rest is asked for again; 0: 1024, negative: any. Only the time that is spent waiting for the server
	// counts. After Attempts of that in a row, that is an error.
	MinRate int64
	TLS     *tls.Config // nil: the system's roots, or those of SSL_CERT_FILE and SSL_CERT_DIR
	// Digests says which files are compared with their digests while they are read.
	Digests Digests
	// Expect says what the file called name, without directories, has to be; an error refuses the file. The files of a
	// model are compared with that while they are read, whatever Digests says, and all of a file also if only a share of
	// the model is loaded. What differs is an error that matches ErrDigest. Nil: nothing is expected.
	Expect func(name string) (Expected, error)
	// Cache is a directory that keeps what was read, for the next time; "": nothing is written to disk. Files of an
	// Object with a digest are found again by that, others by address, size and ETag. What has neither is not kept.
	Cache  string
	Logger *slog.Logger // told of attempts that fail; nil: silent
}

// Client opens files on servers. It is safe for concurrent use. The caller must Close it after the files.
type Client struct {
	o         Options
	transport *http.Transport

	requests, retries, bytes atomic.Int64

	replies atomic.Int64 // that are open: being read, or waiting to be
}

// NewClient returns a client. It uses the proxies of the environment: HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
func NewClient(o Options) *Client {
	o.Tokens = maps.Clone(o.Tokens)
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
	if o.MinRate == 0 {
		o.MinRate = defaultMinRate
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	// HTTP/2 would put all ranges into one connection. That is slower than many, and one range that waits stops all
	// others.
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

// Open opens the file at address, an https URL, or an http URL of this host. For a split file that may be any part; the
// other parts are expected at the same address but for the number in the name. Open reads headers only; see
// [gguf.OpenSource]. ctx is for opening alone. The caller must Close the file. Errors: those that match ErrAddress,
// *Error, *[gguf.FormatError], and the cause of ctx's end.
func (c *Client) Open(ctx context.Context, address string) (*gguf.File, error) {
	a, err := c.parse(address)
	if err != nil {
		return nil, err
	}
	return c.open(ctx, a.name(), a.locate)
}

// Stats says what a Client has done so far.
type Stats struct {
	Requests int64 // that were sent, those that were redirected included
	Retries  int64 // attempts after failed ones, to go on with a range
	Bytes    int64 // of files, that were received
}

// Stats returns what the client has done so far.
func (c *Client) Stats() Stats {
	return Stats{c.requests.Load(), c.retries.Load(), c.bytes.Load()}
}

// Close closes the connections that are not in use.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// RoundTrip sends one request as it is, follows no redirect, and counts it. It is for those who make the requests of an
// [Object] or a [Document] themselves, to add credentials.
func (c *Client) RoundTrip(req *http.Request) (*http.Response, error) {
	c.requests.Add(1)
	return c.transport.RoundTrip(req)
}

// Digests says which files the client compares with their digests.
func (c *Client) Digests() Digests { return c.o.Digests }

// send sends a request for a file at address a to u, with the credentials of a if they are for u.
func (c *Client) send(
	ctx context.Context, method string, a *address, u *url.URL, header http.Header,
) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header = header.Clone()
	switch auth := a.authorization(u); {
	case a.send != nil && samePlace(u, &a.url):
		return a.send(req)
	case auth != "":
		req.Header.Set("Authorization", auth)
	}
	return c.RoundTrip(req)
}
