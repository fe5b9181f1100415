package oci

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// helperTime limits a credential helper, which may ask a person.
const helperTime = time.Minute

// Credential is what a registry wants to see.
type Credential = auth.Credential

// Options say who asks. The zero value asks without credentials.
type Options struct {
	// Credential returns the credentials for a registry's host; the zero Credential for none. Nil: there are none.
	Credential func(ctx context.Context, host string) (Credential, error)
	// Realms are hosts that may get the credentials of any registry, to make tokens of them, beside those of the
	// registry's own domain.
	Realms []string
}

// FromEnvironment returns Options with the credentials of Docker's configuration: config.json in DOCKER_CONFIG, or in
// .docker in the user's directory, and the helpers that it names.
func FromEnvironment() (Options, error) {
	s, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return Options{}, fmt.Errorf("%w: Docker's configuration: %w", remote.ErrCredentials, err)
	}
	return Options{Credential: credentials.Credential(s)}, nil
}

// newAuth returns a client that adds credentials to requests to a registry, and what it needs for that.
func newAuth(c *remote.Client, o Options, host string) *auth.Client {
	a := &auth.Client{
		Client: &http.Client{
			Transport:     &guard{c, o.Realms, host},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		Cache:    auth.NewCache(),
		ClientID: "gguf2gpu",
		Credential: func(ctx context.Context, host string) (auth.Credential, error) {
			if o.Credential == nil {
				return auth.EmptyCredential, nil
			}
			ctx, cancel := context.WithTimeout(ctx, helperTime)
			defer cancel()
			cred, err := o.Credential(ctx, host)
			if err != nil {
				err = fmt.Errorf("%w for %s: %w", remote.ErrCredentials, host, err)
			}
			return cred, err
		},
	}
	if isLocal(host) { // its tokens may come from this host, too
		a.BlockedRealmPrefixes = []netip.Prefix{}
	}
	return a
}

// send sends a request with credentials. Errors are those that package remote knows.
func send(a *auth.Client, req *http.Request) (*http.Response, error) {
	resp, err := a.Do(req)
	if err == nil {
		return resp, nil
	}
	if refused, ok := errors.AsType[*errcode.ErrorResponse](err); ok { // by who makes tokens
		return nil, fmt.Errorf("a token from %s: %w", refused.URL.Host, &remote.StatusError{Code: refused.StatusCode, Authorized: true})
	}
	if errors.Is(err, auth.ErrBasicCredentialNotFound) {
		return nil, &remote.StatusError{Code: http.StatusUnauthorized}
	}
	if u, ok := errors.AsType[*url.Error](err); ok { // whose text may show secrets
		return nil, u.Err
	}
	return nil, err
}

// guard sends requests of an auth.Client. Nothing that gives access goes to other hosts than the registry's, and that
// of its tokens.
type guard struct {
	client *remote.Client
	realms []string
	host   string // of the registry
}

// RoundTrip sends a request.
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	secret := req.Header.Get("Authorization") != "" || req.Body != nil && req.Body != http.NoBody
	if secret && !strings.EqualFold(req.URL.Host, g.host) && !g.trusts(req.URL.Hostname()) {
		return nil, fmt.Errorf("%w: the registry %s wants its credentials to be sent to %s, which is of another domain",
			remote.ErrCredentials, g.host, req.URL.Host)
	}
	if secret && req.URL.Scheme != "https" && !isLocal(req.URL.Host) {
		return nil, fmt.Errorf("%w: they are not sent to %s without TLS", remote.ErrCredentials, req.URL.Host)
	}
	return g.client.RoundTrip(req)
}

// trusts reports whether a host may make tokens of the registry's credentials.
func (g *guard) trusts(host string) bool {
	own := hostname(g.host)
	if strings.EqualFold(own, host) || slices.ContainsFunc(g.realms, func(r string) bool {
		return strings.EqualFold(r,
			host)
	}) {
		return true
	}
	if net.ParseIP(own) != nil || net.ParseIP(host) != nil {
		return false
	}
	a, errA := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(own))
	b, errB := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(host))
	return errA == nil && errB == nil && a == b
}

// hostname is a host without its port.
func hostname(host string) string { return (&url.URL{Host: host}).Hostname() }

// isLocal reports whether a host is this one.
func isLocal(host string) bool {
	name := hostname(host)
	return strings.EqualFold(name, "localhost") || net.ParseIP(name).IsLoopback()
}
