// Package fake has servers for tests, with the shapes of replies that the real ones have: files that are redirected to,
// Hugging Face's hub, and ollama's registry. They speak TLS and keep what was sent to them.
package fake

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"
)

// Server is a server with TLS that keeps the headers of all requests.
type Server struct {
	*httptest.Server
	mu       sync.Mutex
	requests []*http.Request
	fault    func(w http.ResponseWriter, r *http.Request) bool
}

// NewServer starts a server. The caller must Close it.
func NewServer(h http.Handler) *Server {
	s := &Server{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Clone(r.Context()))
		fault := s.fault
		s.mu.Unlock()
		if fault == nil || !fault(w, r) {
			h.ServeHTTP(w, r)
		}
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	return s
}

// Requests returns the requests so far.
func (s *Server) Requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*http.Request(nil), s.requests...)
}

// Fault replaces the function that may answer first; it returns true if it has. Requests so far are forgotten.
func (s *Server) Fault(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.requests = f, nil
}

// Saw reports whether any request had text in any header or in its address.
func (s *Server) Saw(text string) bool {
	for _, r := range s.Requests() {
		all := r.URL.String()
		for k, v := range r.Header {
			all += "\n" + k + ": " + strings.Join(v, ", ")
		}
		if strings.Contains(all, text) {
			return true
		}
	}
	return false
}

// Trust returns settings that trust the servers of this package, and of package httptest.
func Trust() *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(Certificate())
	return &tls.Config{RootCAs: roots}
}

// Certificate returns the certificate that all servers of package httptest have.
func Certificate() []byte {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// Digest returns the digest of b as registries write it.
func Digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// Serve answers with b as a file server does.
func Serve(w http.ResponseWriter, r *http.Request, b []byte) {
	w.Header().Set("ETag", tag(b))
	http.ServeContent(w, r, "", time.Unix(1_700_000_000, 0), bytes.NewReader(b))
}

// tag makes an ETag of the size and of some bytes, as making one of all would take longer than sending them.
func tag(b []byte) string {
	const n = 4096
	sum := sha256.New()
	for _, off := range []int{0, len(b)/2 - n/2, len(b) - n} {
		off = max(0, off)
		sum.Write(b[off:min(len(b), off+n)])
	}
	return fmt.Sprintf(`"%d-%x"`, len(b), sum.Sum(nil))
}

// Store is the server that others redirect to: files by their digests, for those who bring the signature, which may
// expire.
type Store struct {
	*Server
	mu        sync.Mutex
	files     map[string][]byte
	signature int
}

// NewStore starts a store. The caller must Close it.
func NewStore() *Store {
	s := &Store{files: map[string][]byte{}}
	s.Server = NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		b, ok := s.files[strings.TrimPrefix(r.URL.Path, "/")]
		valid := r.URL.Query().Get("X-Amz-Signature") == fmt.Sprint("sig", s.signature)
		s.mu.Unlock()
		switch {
		case !valid:
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
		case !ok:
			w.WriteHeader(http.StatusNotFound)
		default:
			Serve(w, r, b)
		}
	}))
	return s
}

// Add keeps b, and returns its digest.
func (s *Store) Add(b []byte) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := Digest(b)
	s.files[d] = b
	return d
}

// Replace makes the file of a digest another one.
func (s *Store) Replace(digest string, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[digest] = b
}

// Has reports whether the store has the file of a digest.
func (s *Store) Has(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.files[digest]
	return ok
}

// Expire makes the addresses that were given out invalid.
func (s *Store) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.signature++
}

// Address returns an address of the file of a digest that is valid until Expire.
func (s *Store) Address(digest string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("%s/%s?X-Amz-Expires=3600&X-Amz-Signature=sig%d", s.URL, digest, s.signature)
}
