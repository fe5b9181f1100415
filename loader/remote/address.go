package remote

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

// ErrAddress is matched by the errors of Open that refuse an address before anything is sent.
var ErrAddress = errors.New("unusable address")

var scheme = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://`)

// IsAddress reports whether s is an address rather than the path of a file: whether it begins with a scheme such as
// https://.
func IsAddress(s string) bool { return scheme.MatchString(s) }

// Host returns the host of an address, with the port if the address has one, in the form that [Options.Tokens] takes.
// It returns "" for what is no address or names no host.
func Host(address string) string {
	if !IsAddress(address) {
		return ""
	}
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		return ""
	}
	return strings.ToLower(u.Host)
}

// Redact returns address without what may be secret: credentials, query and fragment. What is no address is returned
// unchanged.
func Redact(address string) string {
	if !IsAddress(address) {
		return address
	}
	u, err := url.Parse(address)
	if err != nil {
		return scheme.FindString(address) + "…"
	}
	return redact(u)
}

func redact(u *url.URL) string {
	v := *u
	v.User, v.RawQuery, v.ForceQuery, v.Fragment, v.RawFragment = nil, "", false, "", ""
	s := v.String()
	if u.RawQuery != "" {
		s += "?…"
	}
	return s
}

// address says where a file is, and holds the credentials for that place.
type address struct {
	url       url.URL // without credentials
	auth      string  // the Authorization header; "" for none
	allowHTTP bool

	// What an Object says besides.

	send     func(*http.Request) (*http.Response, error) // sends requests to that place, with credentials; nil: see auth
	size     int64                                       // 0: not known
	digest   string                                      // as in Object
	check    bool                                        // compare with it
	revision string

	expected Expected // what Options.Expect says
}

// authorized reports whether credentials are known for the place.
func (a *address) authorized() bool { return a.auth != "" || a.send != nil }

// parse checks an address that a user gave, and finds the credentials for it.
func (c *Client) parse(s string) (*address, error) {
	u, err := url.Parse(s)
	if err != nil { // whose text may show secrets
		return nil, fmt.Errorf("%w %s: it cannot be parsed", ErrAddress, Redact(s))
	}
	refuse := func(format string, args ...any) (*address, error) {
		return nil, fmt.Errorf("%w %s: %s", ErrAddress, redact(u), fmt.Sprintf(format, args...))
	}
	u.Scheme = strings.ToLower(u.Scheme)
	switch {
	case u.Scheme == "file":
		return refuse("a file of this machine is named by its path alone: %s", u.Path)
	case u.Scheme != "https" && u.Scheme != "http":
		return refuse("%q is not supported: use https", u.Scheme)
	case u.Hostname() == "":
		return refuse("it names no host")
	case u.Scheme == "http" && !c.o.AllowHTTP && !loopback(u):
		return refuse("http is for this host only, as anyone on the way can read and change what it carries: " +
			"use https, or allow it")
	}
	secure := u.Scheme == "https" || loopback(u)
	if u.User != nil && !secure {
		return refuse("credentials are not sent without TLS, where anyone on the way can read them")
	}
	a := &address{url: *u, allowHTTP: c.o.AllowHTTP}
	a.url.User, a.url.Fragment, a.url.RawFragment = nil, "", ""
	if u.User != nil {
		password, _ := u.User.Password()
		a.auth = "Basic " + base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+password))
		return a, nil
	}
	if token := c.o.token(u); token != "" && secure {
		if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return refuse("the token for it holds characters that no token has")
		}
		a.auth = "Bearer " + token
	}
	return a, nil
}

// token returns the token for the host of u, or "". A token for host and port goes before one for the host alone.
func (o *Options) token(u *url.URL) string {
	hostOnly := ""
	for host, token := range o.Tokens {
		switch {
		case strings.EqualFold(host, net.JoinHostPort(u.Hostname(), port(u))):
			return token
		case strings.EqualFold(strings.Trim(host, "[]"), u.Hostname()): // in brackets: an IPv6 address
			hostOnly = token
		}
	}
	return hostOnly
}

// loopback reports whether u is on this host.
func loopback(u *url.URL) bool {
	host := u.Hostname()
	return strings.EqualFold(host, "localhost") || net.ParseIP(host).IsLoopback()
}

// name returns the name of the file.
func (a *address) name() string {
	path := a.url.EscapedPath()
	last := path[strings.LastIndexByte(path, '/')+1:]
	name, err := url.PathUnescape(last)
	if err != nil {
		return last
	}
	return name
}

// sibling returns the address of the file called name that lies beside this one.
func (a *address) sibling(name string) *address {
	if name == a.name() {
		return a
	}
	b := *a
	b.url = *a.url.ResolveReference(&url.URL{Path: name, RawPath: url.PathEscape(name)})
	b.url.RawQuery = a.url.RawQuery
	return &b
}

// locate is sibling as open wants it.
func (a *address) locate(_ context.Context, name string) (*address, error) {
	return a.sibling(name), nil
}

// authorization returns the Authorization header for a request to u. It is "" unless u is at the host and port of the
// address: credentials go nowhere else.
func (a *address) authorization(u *url.URL) string {
	if !samePlace(u, &a.url) {
		return ""
	}
	return a.auth
}

// samePlace reports whether two addresses have the same scheme, host and port.
func samePlace(u, v *url.URL) bool {
	return u.Scheme == v.Scheme && strings.EqualFold(u.Hostname(), v.Hostname()) && port(u) == port(v)
}

func port(u *url.URL) string {
	switch {
	case u.Port() != "":
		return u.Port()
	case u.Scheme == "http":
		return "80"
	}
	return "443"
}

// checkRedirect returns an error if a reply from the address must not redirect to the given one.
func (a *address) checkRedirect(to *url.URL) error {
	switch {
	case to.Scheme == "https" && to.Hostname() != "":
		return nil
	case to.Scheme == "http" && a.url.Scheme == "http" && (a.allowHTTP || loopback(to)):
		return nil
	}
	return fmt.Errorf("it redirects to %s, which is refused: only https is safe", redact(to))
}

// pageFile returns the address of the file itself, if u looks like the page of a file on a model or code host, and ""
// otherwise.
func pageFile(u *url.URL) string {
	to := "/resolve/"
	if host := strings.ToLower(u.Hostname()); host == "github.com" || host == "www.github.com" {
		to = "/raw/"
	}
	before, after, ok := strings.Cut(redactPath(u), "/blob/")
	if !ok {
		return ""
	}
	return before + to + after
}

// redactPath is redact without the sign that there was a query.
func redactPath(u *url.URL) string {
	v := *u
	v.RawQuery = ""
	return redact(&v)
}
