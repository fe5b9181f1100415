package remote

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"strings"
)

// ErrAddress is matched by the errors of Open that refuse an address before anything is sent.
var ErrAddress = errors.New("unusable address")

var scheme = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://`)

// IsAddress reports whether s is an address rather than the path of a file: whether it begins with a scheme, such as https://.
func IsAddress(s string) bool { return scheme.MatchString(s) }

// Redact returns address without what may be secret: credentials, query and fragment. What is no address comes back as it is.
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

// TokenFromEnvironment returns the token that GGUF2GPU_TOKEN holds, or HF_TOKEN if host is huggingface.co.
func TokenFromEnvironment(host string) string {
	token := os.Getenv("GGUF2GPU_TOKEN")
	if token == "" && strings.EqualFold(host, "huggingface.co") {
		token = os.Getenv("HF_TOKEN")
	}
	return strings.TrimSpace(token)
}

// address is where a file is, and what opens the door there.
type address struct {
	url       url.URL // without credentials
	auth      string  // the Authorization header; "" for none
	allowHTTP bool
}

// parse checks an address that a user gave.
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
	case u.Scheme != "https" && u.Scheme != "http":
		return refuse("%q is not supported: use https", u.Scheme)
	case u.Hostname() == "":
		return refuse("it names no host")
	case u.Scheme == "http" && !c.o.AllowHTTP && !loopback(u):
		return refuse("http is for this host only, as anyone on the way can read and change what it carries: use https, or allow it")
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
	if secure {
		if token := c.o.Token(u.Hostname()); token != "" {
			if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
				return refuse("the token for it holds characters that no token has")
			}
			a.auth = "Bearer " + token
		}
	}
	return a, nil
}

// loopback reports whether u is on this host.
func loopback(u *url.URL) bool {
	host := u.Hostname()
	return strings.EqualFold(host, "localhost") || net.ParseIP(host).IsLoopback()
}

// name is the name of the file.
func (a *address) name() string {
	path := a.url.EscapedPath()
	last := path[strings.LastIndexByte(path, '/')+1:]
	name, err := url.PathUnescape(last)
	if err != nil {
		return last
	}
	return name
}

// sibling is the address of the file called name beside this one.
func (a *address) sibling(name string) *address {
	if name == a.name() {
		return a
	}
	b := *a
	b.url = *a.url.ResolveReference(&url.URL{Path: name, RawPath: url.PathEscape(name)})
	b.url.RawQuery = a.url.RawQuery
	return &b
}

// authorization is the header for a request to u: the credentials go to the place that was named, and nowhere else.
func (a *address) authorization(u *url.URL) string {
	if u.Scheme != a.url.Scheme || !strings.EqualFold(u.Hostname(), a.url.Hostname()) || port(u) != port(&a.url) {
		return ""
	}
	return a.auth
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

// mayRedirect says why a reply from one address must not lead to another, if so.
func (a *address) mayRedirect(to *url.URL) error {
	switch {
	case to.Scheme == "https" && to.Hostname() != "":
		return nil
	case to.Scheme == "http" && a.url.Scheme == "http" && (a.allowHTTP || loopback(to)):
		return nil
	}
	return fmt.Errorf("it redirects to %s, which is refused: only https is safe", redact(to))
}
