package remote

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"time"
)

// What servers do wrong, for errors.Is. It comes as an *[Error].
var (
	// ErrNoRanges: the server sends whole files only.
	ErrNoRanges = errors.New("the server does not support ranges")
	// ErrChanged: the file is not the one that was opened any more.
	ErrChanged = errors.New("the file has changed on the server")
	// ErrReply: a reply is not what was asked for; the message says in what.
	ErrReply = errors.New("wrong reply")
	// ErrStalled: the server sent nothing for Options.Stall.
	ErrStalled = errors.New("the server sends nothing")
)

// Error says which bytes of which file could not be had, and why.
type Error struct {
	URL      string // without credentials and query
	Offset   int64  // of the first byte that is missing
	Bytes    int64  // how many were asked for from there on
	Attempts int    // since the last byte that came
	Err      error
}

// Error returns for example: https://example.com/model.gguf, bytes 0 to 1048576: status 404 Not Found.
func (e *Error) Error() string {
	times := ""
	if e.Attempts > 1 {
		times = fmt.Sprintf(" (after %d attempts)", e.Attempts)
	}
	return fmt.Sprintf("%s, bytes %d to %d: %v%s", e.URL, e.Offset, e.Offset+e.Bytes, e.Err, times)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// StatusError is a reply with a status that means failure. 404 and 410 match [fs.ErrNotExist], 401 and 403 [fs.ErrPermission].
type StatusError struct {
	Code  int
	after time.Duration // when the server wants to be asked again; 0: it did not say
	hint  string
}

// Error returns the status with its name.
func (e *StatusError) Error() string {
	s := fmt.Sprintf("status %d %s", e.Code, http.StatusText(e.Code))
	if e.after > maxPause {
		s += fmt.Sprintf(", to be tried again in %v", e.after)
	}
	return s + e.hint
}

// Is makes it match [fs.ErrNotExist] and [fs.ErrPermission].
func (e *StatusError) Is(target error) bool {
	switch e.Code {
	case http.StatusNotFound, http.StatusGone:
		return target == fs.ErrNotExist
	case http.StatusUnauthorized, http.StatusForbidden:
		return target == fs.ErrPermission
	}
	return false
}

// transient: whether asking again may help.
func (e *StatusError) transient() bool {
	switch e.Code {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return e.after <= maxPause
	}
	return false
}

// refused: whether an address that was right a moment ago may have expired.
func (e *StatusError) refused() bool {
	return errors.Is(e, fs.ErrPermission) || errors.Is(e, fs.ErrNotExist)
}

// transient reports whether asking again may help against err, which came from a request or from a reply's body.
func transient(err error) bool {
	if s, ok := errors.AsType[*StatusError](err); ok {
		return s.transient()
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return false
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return false
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return false
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok { // it does not speak TLS at all
		return false
	}
	return !errors.Is(err, ErrNoRanges) && !errors.Is(err, ErrChanged) && !errors.Is(err, ErrReply)
}
