package remote

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var sample = filepath.Join("..", "..", "testdata", "tiny-llama.gguf")

// site is a server with one file, whatever the path. Before it answers properly it lets fault do something else.
type site struct {
	*httptest.Server
	data []byte
	// n: the request's number, from 1 on; true: it has answered
	fault func(w http.ResponseWriter, r *http.Request, n int) bool

	conns atomic.Int32
	mu    sync.Mutex
	seen  []*http.Request
}

const etag = `"v1"`

// newSite starts a server that lasts as long as the test.
func newSite(t testing.TB, data []byte) *site {
	s := &site{data: data}
	s.Server = httptest.NewUnstartedServer(s)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.conns.Add(1)
		}
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.seen = append(s.seen, r)
	n := len(s.seen)
	fault := s.fault
	s.mu.Unlock()
	if fault != nil && fault(w, r, n) {
		return
	}
	s.serve(w, r)
}

// serve answers as a good server does.
func (s *site) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("ETag", etag)
	http.ServeContent(w, r, "", time.Unix(1_700_000_000, 0), bytes.NewReader(s.data))
}

func (s *site) setFault(f func(w http.ResponseWriter, r *http.Request, n int) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.seen = f, nil
}

func (s *site) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*http.Request(nil), s.seen...)
}

// asked is the range of a request.
func asked(r *http.Request) (from, to int64) {
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
		return 0, 0
	}
	return from, to + 1
}

// hijack answers with head, its lines separated by |, and body, and then breaks the connection, with a reset or not.
// Without head it does not answer at all.
func hijack(w http.ResponseWriter, head string, body []byte, reset bool) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	if head != "" {
		fmt.Fprintf(conn, "%s\r\n\r\n", strings.ReplaceAll(head, "|", "\r\n"))
		conn.Write(body)
	}
	if tcp, ok := conn.(*net.TCPConn); ok && reset {
		time.Sleep(5 * time.Millisecond) // a reset throws away what has not been read yet
		tcp.SetLinger(0)
	}
}

// quick are options under which faults take no time.
func quick() Options {
	return Options{Pause: time.Millisecond, Attempts: 4, Stall: 10 * time.Second}
}

// newClient returns a client. It fails the test if replies are left open at its end.
func newClient(t testing.TB, o Options) *Client {
	t.Helper()
	c := NewClient(o)
	t.Cleanup(func() {
		c.Close()
		if n := c.replies.Load(); n != 0 {
			t.Errorf("%d replies are still open", n)
		}
	})
	return c
}

// openTestFile opens the file of s alone.
func openTestFile(t testing.TB, c *Client, address string) (*file, error) {
	t.Helper()
	a, err := c.parse(address)
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.openFile(t.Context(), a)
	if err == nil {
		t.Cleanup(func() { f.Close() })
	}
	return f, err
}

func mustOpen(t testing.TB, c *Client, address string) *file {
	t.Helper()
	f, err := openTestFile(t, c, address)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// readRange reads a range to its end.
func readRange(t testing.TB, f *file, off, n int64) ([]byte, error) {
	t.Helper()
	r := f.Range(t.Context(), off, n)
	defer r.Close()
	return io.ReadAll(r)
}

// wantRange wants a range to be what it should be.
func wantRange(t testing.TB, f *file, data []byte, off, n int64) {
	t.Helper()
	got, err := readRange(t, f, off, n)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data[off:off+n]) {
		t.Errorf("bytes %d to %d differ", off, off+n)
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{})
	rng.Read(b)
	return b
}

func readSample(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// trusting are the options for s with TLS.
func trusting(s *httptest.Server) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return &tls.Config{RootCAs: roots}
}

// wantError wants an *Error that matches is and has all the texts.
func wantError(t *testing.T, what string, err, is error, texts ...string) {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok || is != nil && !errors.Is(err, is) {
		t.Errorf("%s: got %v, want an *Error that matches %v", what, err, is)
		return
	}
	for _, text := range append(texts, e.URL) {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %q, want %q in it", what, err, text)
		}
	}
}

// newTLS serves s over TLS, with HTTP/2 on offer.
func newTLS(t testing.TB, s *site) *httptest.Server {
	tls := httptest.NewUnstartedServer(s)
	tls.EnableHTTP2 = true
	tls.Config.ErrorLog = log.New(io.Discard, "", 0)
	tls.StartTLS()
	t.Cleanup(tls.Close)
	return tls
}
