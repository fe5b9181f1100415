package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a network in memory, so that tests can have time of their own.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.closed); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// inBubble runs test with a site in memory and time of its own, in which nothing takes longer than it waits.
func inBubble(t *testing.T, data []byte, test func(t *testing.T, s *site, client func(o Options) *Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
		s := &site{data: data, Server: &httptest.Server{URL: "http://localhost"}}
		server := &http.Server{Handler: s}
		go server.Serve(p) // until it is closed
		t.Cleanup(func() { server.Close() })
		test(t, s, func(o Options) *Client {
			c := newClient(t, o)
			c.transport.DialContext = p.dial
			return c
		})
	})
}

// TestTemporaryStatus: after a status that may pass, a range is asked for again, when the server wants it.
func TestTemporaryStatus(t *testing.T) {
	t.Parallel()
	data := random(2 << 20)
	for _, code := range []int{408, 425, 429, 500, 502, 503, 504, 507, 508, 520, 524, 530, 599} {
		for _, after := range []time.Duration{0, time.Second, 25 * time.Second} {
			inBubble(t, data, func(t *testing.T, s *site, client func(o Options) *Client) {
				s.setFault(func(w http.ResponseWriter, _ *http.Request, n int) bool {
					if n > 2 {
						return false
					}
					if after > 0 {
						w.Header().Set("Retry-After", fmt.Sprint(after.Seconds()))
					}
					w.WriteHeader(code)
					return true
				})
				c := client(quick())
				began := time.Now()
				f := mustOpen(t, c, s.URL)
				wantRange(t, f, data, 0, firstBytes)
				if c.Stats().Retries != 2 {
					t.Errorf("%d: %+v", code, c.Stats())
				}
				if took := time.Since(began); took < 2*after || took > 2*after+time.Second {
					t.Errorf("%d, to be tried after %v: two pauses took %v", code, after, took)
				}
			})
		}
	}
}

// TestFinalStatus: a status that does not pass is an error at once.
func TestFinalStatus(t *testing.T) {
	t.Parallel()
	for _, code := range []int{400, 401, 403, 404, 405, 410, 418, 451, 501, 505, 600} {
		inBubble(t, nil, func(t *testing.T, s *site, client func(o Options) *Client) {
			s.setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool { w.WriteHeader(code); return true })
			_, err := openTestFile(t, client(quick()), s.URL)
			if e, ok := errors.AsType[*StatusError](err); !ok || e.Code != code || len(s.requests()) != 1 {
				t.Errorf("%d: got %v after %d requests", code, err, len(s.requests()))
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	for s, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "-1": 0, "x": 0, "99999999999999": 0,
		now.Add(time.Minute).UTC().Format(http.TimeFormat):  time.Minute,
		now.Add(-time.Minute).UTC().Format(http.TimeFormat): 0,
	} {
		if got := retryAfter(s, now); got != want {
			t.Errorf("Retry-After %q is %v, want %v", s, got, want)
		}
	}
}

// TestStalls: a server that stops sending, before its header, at its beginning or in the middle, is left and tried
// again.
func TestStalls(t *testing.T) {
	t.Parallel()
	for _, after := range []int{-1, 0, 5000} {
		inBubble(t, random(2<<20), func(t *testing.T, s *site, client func(o Options) *Client) {
			testStall(t, s, client, after)
		})
	}
}

// testStall lets replies stop after so many bytes; -1: before the header.
func testStall(t *testing.T, s *site, client func(o Options) *Client, after int) {
	o := quick()
	o.MinRate = -1 // a few bytes are enough
	c := client(o)
	f := mustOpen(t, c, s.URL)
	wantRange(t, f, s.data, 0, firstBytes)
	stall := func(w http.ResponseWriter, r *http.Request) {
		from, to := asked(r)
		if after >= 0 {
			w.Header().Set("ETag", etag)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(s.data)))
			w.Header().Set("Content-Length", strconv.FormatInt(to-from, 10))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(s.data[from : from+int64(after)])
			w.(http.Flusher).Flush()
		}
		<-r.Context().Done()
	}
	s.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n == 1 {
			stall(w, r)
		}
		return n == 1
	})
	began := time.Now()
	wantRange(t, f, s.data, 500, 1<<20)
	if got := c.Stats().Retries; got != 1 {
		t.Errorf("stalled after %d bytes: %d retries", after, got)
	}
	if took := time.Since(began); took < c.o.Stall || took > c.o.Stall+time.Second {
		t.Errorf("stalled after %d bytes: it took %v", after, took)
	}
	s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool { stall(w, r); return true })
	_, err := readRange(t, f, 500, 100_000)
	if after == 0 {
		wantError(t, "stalls for good", err, ErrStalled, "for 10s")
	}
	if (err == nil) != (after == 5000) { // then every attempt brings something
		t.Errorf("stalled after %d bytes: %v", after, err)
	}
}

// TestCancel: a reader that waits, for a connection, a reply, a byte or the next attempt, ends with its context.
func TestCancel(t *testing.T) {
	t.Parallel()
	gone := errors.New("gone")
	for _, where := range []string{"reply", "body", "pause"} {
		inBubble(t, random(2<<20), func(t *testing.T, s *site, client func(o Options) *Client) {
			o := quick()
			o.Pause, o.Stall = time.Hour, time.Hour
			f := mustOpen(t, client(o), s.URL)
			wantRange(t, f, s.data, 0, firstBytes)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
				from, to := asked(r)
				switch where {
				case "body":
					w.Header().Set("ETag", etag)
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(s.data)))
					w.WriteHeader(http.StatusPartialContent)
					w.(http.Flusher).Flush()
				case "pause":
					w.WriteHeader(503)
					return true
				}
				<-r.Context().Done()
				return true
			})
			time.AfterFunc(time.Second, func() { cancel(gone) })
			began := time.Now()
			r := f.Range(ctx, 0, 1000)
			if _, err := io.ReadAll(r); !errors.Is(err, gone) || time.Since(began) != time.Second {
				t.Errorf("%s: got %v after %v", where, err, time.Since(began))
			}
			r.Close()
		})
	}
}

// TestCancelledBefore: with a context that has ended already, nothing is sent.
func TestCancelledBefore(t *testing.T) {
	t.Parallel()
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	c := newClient(t, quick())
	if f, err := c.Open(ctx, "https://localhost/m.gguf"); f != nil || !errors.Is(err, gone) || c.Stats().Requests != 0 {
		t.Errorf("got %v, %+v", err, c.Stats())
	}
}

// TestSlow: a server that sends a few bytes again and again, or gives a few bytes in each reply, is left and tried
// again, and given up when it stays so. One that is slow, but not that slow, is read to the end, and so is one that is
// slow for once.
func TestSlow(t *testing.T) {
	t.Parallel()
	const size = 64 << 10
	for name, tt := range map[string]struct {
		pause  time.Duration // before each piece
		piece  int
		short  bool // each piece is a reply of its own
		slow   int  // requests that are answered like that, the others at once
		rate   int64
		fails  bool
		before time.Duration // it is given up; at least the half of it has to have passed
	}{
		"a drip":               {time.Second, 10, false, 1 << 30, 0, true, 50 * time.Second},
		"a drip that is taken": {9 * time.Second, 4096, false, 1 << 30, -1, false, 0},
		"short replies":        {time.Second, 10, true, 1 << 30, 0, true, 50 * time.Second},
		"a drip for once":      {time.Second, 10, false, 1, 0, false, 0},
		"slow":                 {time.Second, 1100, false, 1 << 30, 0, false, 0},
		"a rate of one's own":  {time.Second, 1100, false, 1 << 30, 2000, true, 50 * time.Second},
	} {
		inBubble(t, random(2<<20), func(t *testing.T, s *site, client func(o Options) *Client) {
			o := quick()
			o.MinRate = tt.rate
			f := mustOpen(t, client(o), s.URL)
			wantRange(t, f, s.data, 0, firstBytes)
			s.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if n > tt.slow {
					return false
				}
				from, to := asked(r)
				if tt.short {
					to = min(to, from+int64(tt.piece))
				}
				w.Header().Set("ETag", etag)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(s.data)))
				w.Header().Set("Content-Length", strconv.FormatInt(to-from, 10))
				w.WriteHeader(http.StatusPartialContent)
				for ; from < to; from += int64(tt.piece) {
					select {
					case <-time.After(tt.pause):
					case <-r.Context().Done():
						return true
					}
					if _, err := w.Write(s.data[from:min(to, from+int64(tt.piece))]); err != nil {
						break
					}
					w.(http.Flusher).Flush()
				}
				return true
			})
			began := time.Now()
			got, err := readRange(t, f, 500, size)
			took := time.Since(began)
			switch {
			case !tt.fails && (err != nil || !bytes.Equal(got, s.data[500:500+size])):
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			case tt.fails && (!errors.Is(err, ErrSlow) || took < tt.before/2 || took > tt.before):
				t.Errorf("%s: %v after %v", name, err, took)
			}
		})
	}
}
