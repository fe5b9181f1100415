package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
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

	wait time.Duration // how long Credential is waited for; 0: helperTime
}

// FromEnvironment returns Options with the credentials of Docker's configuration: config.json in DOCKER_CONFIG, or in
// .docker in the user's directory, and the helpers that it names. Where neither directory is known there are none.
func FromEnvironment() (Options, error) {
	if _, err := os.UserHomeDir(); err != nil && os.Getenv("DOCKER_CONFIG") == "" {
		return Options{}, nil
	}
	s, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return Options{}, fmt.Errorf("%w: Docker's configuration: %w", remote.ErrCredentials, err)
	}
	ask := credentials.Credential(s)
	return Options{Credential: func(ctx context.Context, host string) (Credential, error) {
		c, err := ask(ctx, host)
		return c, withoutSecret(err)
	}}, nil
}

// withoutSecret is an error of Docker's configuration without what the file says, which is quoted where an entry cannot
// be decoded. Errors of helpers stay: these are the helper's own words, or those of the system that did not start it.
func withoutSecret(err error) error {
	_, start := errors.AsType[*exec.Error](err)
	if err == nil || start || errors.Unwrap(err) == nil {
		return err
	}
	return errors.New("its entry in Docker's configuration cannot be read")
}

// asker asks for the credentials of a registry.
type asker struct {
	o Options

	mu     sync.Mutex
	failed error // why there are none, of the last time; nil: there was an answer
	known  bool  // there are some
}

// credential returns the credentials for a host, and none if what gives them fails: much can be read without any. Why
// it failed is for the error of a registry that refuses this.
func (a *asker) credential(ctx context.Context, host string) (Credential, error) {
	if a.o.Credential == nil {
		return auth.EmptyCredential, nil
	}
	cred, err := a.ask(ctx, host)
	if ctx.Err() != nil {
		return auth.EmptyCredential, context.Cause(ctx)
	}
	if err != nil {
		cred, err = auth.EmptyCredential, fmt.Errorf("%w for %s: %w", remote.ErrCredentials, host, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failed, a.known = err, cred != auth.EmptyCredential
	return cred, nil
}

// ask waits for an answer as long as that may take. A helper that was ended may have left a process behind which keeps
// its output open, and what waits for that goes on then.
func (a *asker) ask(ctx context.Context, host string) (Credential, error) {
	wait := cmp.Or(a.o.wait, helperTime)
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	type answer struct {
		cred Credential
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		cred, err := a.o.Credential(ctx, host)
		got <- answer{cred, err}
	}()
	select {
	case x := <-got:
		if x.err == nil || ctx.Err() == nil {
			return x.cred, x.err
		}
	case <-ctx.Done():
	}
	return auth.EmptyCredential, fmt.Errorf("no answer within %v", wait)
}

// last says what came of asking: whether there are credentials, and why not; nil: there was an answer, or nobody was
// asked.
func (a *asker) last() (known bool, failed error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known, a.failed
}

// newAuth returns a client that adds credentials to requests to a registry, and what it needs for that.
func newAuth(c *remote.Client, by *asker, host string) *auth.Client {
	a := &auth.Client{
		Client: &http.Client{
			Transport:     &guard{c, by.o.Realms, host},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		Cache:      auth.NewCache(),
		ClientID:   "gguf2gpu",
		Credential: by.credential,
	}
	if isLocal(host) { // its tokens may come from this host, too
		a.BlockedRealmPrefixes = []netip.Prefix{}
	}
	return a
}

// send sends a request with credentials. Errors are those that package remote knows.
func (h *host) send(req *http.Request) (*http.Response, error) {
	resp, err := h.auth.Do(req)
	if err == nil {
		return resp, nil
	}
	if refused, ok := errors.AsType[*errcode.ErrorResponse](err); ok { // by who makes tokens
		known, _ := h.asker.last()
		return nil, fmt.Errorf("a token from %s: %w", refused.URL.Host, &remote.StatusError{Code: refused.StatusCode, Authorized: known})
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
	if req.URL.User != nil { // none of the user's: a name with credentials in it is refused
		return nil, fmt.Errorf("%w: the registry %s wants others to be used at %s", remote.ErrCredentials, g.host, req.URL.Host)
	}
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
