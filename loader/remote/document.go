package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"
)

// maxDocument is the default of Document.Limit.
const maxDocument = 4 << 20

// Document is a short text on a server, such as a list of files or a manifest.
type Document struct {
	URL    string
	Accept string // the Accept header; "": anything
	Limit  int64  // the greatest size in bytes; 0: 4 MiB
	Head   bool   // only the header is wanted: the body is empty
	// Send sends the request, as Object.Send does.
	Send func(*http.Request) (*http.Response, error)
}

// Get fetches a document. It asks again where that may help, as for files, and follows redirects without credentials.
// The header is that of the last reply. Errors match ErrAddress, are an *Error, or the cause of ctx's end.
func (c *Client) Get(ctx context.Context, d Document) ([]byte, http.Header, error) {
	a, err := c.object(&Object{URL: d.URL, Send: d.Send})
	if err != nil {
		return nil, nil, err
	}
	for attempt := 1; ; attempt++ {
		body, header, err := c.fetch(ctx, a, d)
		if err == nil {
			return body, header, nil
		}
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		if !transient(err) || attempt >= min(c.o.Attempts, openAttempts) {
			return nil, nil, &Error{URL: redact(&a.url), Attempts: attempt, Err: err}
		}
		pause := min(c.o.Pause<<min(attempt-1, 20), maxPause)
		pause = pause/2 + rand.N(pause/2+1)
		if s, ok := errors.AsType[*StatusError](err); ok {
			pause = max(pause, s.after)
		}
		c.retries.Add(1)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

// fetch is one attempt of Get.
func (c *Client) fetch(ctx context.Context, a *address, d Document) ([]byte, http.Header, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(c.o.Stall, func() { cancel(ErrStalled) })
	defer watch.Stop()
	header := http.Header{"Accept": {d.Accept}, "User-Agent": {"gguf2gpu"}, "Accept-Encoding": {"identity"}}
	if d.Accept == "" {
		header.Set("Accept", "*/*")
	}
	method := http.MethodGet
	if d.Head {
		method = http.MethodHead
	}
	at := &a.url
	for range maxRedirects + 1 {
		resp, err := c.send(ctx, method, a, at, header)
		if err != nil {
			return nil, nil, stalled(ctx, err)
		}
		if redirects(resp.StatusCode) {
			at, err = resp.Location()
			_ = resp.Body.Close()
			if err != nil {
				return nil, nil, fmt.Errorf("%w: a redirect to nowhere", ErrReply)
			}
			if err := a.checkRedirect(at); err != nil {
				return nil, nil, fmt.Errorf("%w: %w", ErrReply, err)
			}
			continue
		}
		body, err := document(resp, a, d.Limit, c.o.Stall)
		return body, resp.Header, stalled(ctx, err)
	}
	return nil, nil, fmt.Errorf("%w: more than %d redirects", ErrReply, maxRedirects)
}

// stalled is err, or says that the server took too long.
func stalled(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), ErrStalled) {
		return ErrStalled
	}
	return err
}

// document reads a reply.
func document(resp *http.Response, a *address, limit int64, stall time.Duration) ([]byte, error) {
	defer resp.Body.Close()
	if limit == 0 {
		limit = maxDocument
	}
	if resp.StatusCode != http.StatusOK {
		return nil, &StatusError{
			Code: resp.StatusCode, Authorized: a.authorized(), Reason: reason(resp, stall),
			after: retryAfter(resp.Header.Get("Retry-After"), time.Now()),
		}
	}
	if enc := resp.Header.Values("Content-Encoding"); encoded(enc) {
		return nil, fmt.Errorf("%w: it is encoded as %.100q, though that was not accepted", ErrReply, enc)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("%w: it has more than %d bytes", ErrReply, limit)
	}
	return body, nil
}
