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
	// ErrPage: the server sends a web page instead of a file, such as one about the file, or one to log in.
	ErrPage = errors.New("this is a web page, not a file")
	// ErrChanged: the file is not the one any more that was opened.
	ErrChanged = errors.New("the file has changed on the server")
	// ErrReply: a reply is not what was asked for. The message says in what it differs.
	ErrReply = errors.New("wrong reply")
	// ErrStalled: the server sent nothing for Options.Stall.
	ErrStalled = errors.New("the server sends nothing")
	// ErrSlow: the server sent less than Options.MinRate.
	ErrSlow = errors.New("the server is too slow")
	// ErrDigest: the bytes of a file are not those that its digest is of.
	ErrDigest = errors.New("wrong digest")
	// ErrCredentials: what should give the credentials for a request does not, or they would have to go to another host.
	ErrCredentials = errors.New("no usable credentials")
)

// Error says which bytes of which file could not be read, and why.
type Error struct {
	URL      string // without credentials and query
	Offset   int64  // of the first byte that is missing
	Bytes    int64  // how many were asked for from there on; 0: this is not about a file, but about a Document
	Attempts int    // since the last byte that came
	Err      error
}

// Error returns for example: https://example.com/model.gguf, bytes 0 to 1048576: status 404 Not Found.
func (e *Error) Error() string {
	times := ""
	if e.Attempts > 1 {
		times = fmt.Sprintf(" (after %d attempts)", e.Attempts)
	}
	if e.Bytes == 0 && e.Offset == 0 { // not of a file
		return fmt.Sprintf("%s: %v%s", e.URL, e.Err, times)
	}
	return fmt.Sprintf("%s, bytes %d to %d: %v%s", e.URL, e.Offset, e.Offset+e.Bytes, e.Err, times)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// StatusError is a reply with a status that means failure. 404 and 410 match [fs.ErrNotExist], 401 and 403
// [fs.ErrPermission].
type StatusError struct {
	Code int
	// Authorized reports whether credentials were known for the host of the address. With 401 and 403 it tells wrong
	// ones from missing ones.
	Authorized bool
	// Reason is what the server says of it in a form that programs read, such as "NoSuchKey" or "TOOMANYREQUESTS", or "".
	Reason string

	after time.Duration // when the server wants to be asked again; 0: it did not say
}

// Error returns the status with its name, and what follows from it.
func (e *StatusError) Error() string {
	s := fmt.Sprintf("status %d %s", e.Code, http.StatusText(e.Code))
	if e.Reason != "" {
		s += " (" + e.Reason + ")"
	}
	switch {
	case e.after > maxPause:
		s += fmt.Sprintf(", to be tried again in %v", e.after)
	case !errors.Is(e, fs.ErrPermission):
	case e.Authorized:
		s += "; the credentials were not accepted"
	default:
		s += "; no token is known for this host"
	}
	return s
}

// Is makes the error match [fs.ErrNotExist] and [fs.ErrPermission].
func (e *StatusError) Is(target error) bool {
	switch e.Code {
	case http.StatusNotFound, http.StatusGone:
		return target == fs.ErrNotExist
	case http.StatusUnauthorized, http.StatusForbidden:
		return target == fs.ErrPermission
	}
	return false
}

// transient reports whether asking again may help.
func (e *StatusError) transient() bool {
	switch e.Code {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return false
	default:
		if e.Code < 500 || e.Code > 599 {
			return false
		}
	}
	return e.after <= maxPause
}

// refused reports whether the address may have expired that was right a moment ago.
func (e *StatusError) refused() bool {
	return errors.Is(e, fs.ErrPermission) || errors.Is(e, fs.ErrNotExist)
}

// transient reports whether asking again may help. err came from a request, or from reading a reply's body.
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
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok { // the server does not speak TLS at all
		return false
	}
	for _, final := range []error{ErrNoRanges, ErrPage, ErrChanged, ErrReply, ErrDigest, ErrAddress, ErrCredentials} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}
