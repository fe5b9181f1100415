package ollama

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// maxKey and maxToken bound the bytes of a key's file and of a reply with a token.
const (
	maxKey   = 16 << 10
	maxToken = 128 << 10
)

// tokensOf names the one registry that has its tokens made by another host of its own: ollama's.
var tokensOf = map[string]string{DefaultHost: "ollama.com"}

// sender sends requests to a registry. Where that wants a token, it asks for one, as ollama does: with a request that
// is signed with the user's key.
type sender struct {
	client *remote.Client
	key    string // the path of its file

	mu    sync.Mutex
	token string // "": none yet
}

// send sends a request, and once more with a token if the registry wants another one.
func (s *sender) send(req *http.Request) (*http.Response, error) {
	s.mu.Lock()
	token := s.token
	s.mu.Unlock()
	resp, err := s.with(req, token)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	realm := tokenAddress(resp.Header.Get("Www-Authenticate"))
	if realm == nil {
		return resp, nil
	}
	_ = resp.Body.Close()
	if token, err = s.renew(req, realm, token); err != nil {
		return nil, err
	}
	return s.with(req, token)
}

// with sends a request with a token.
func (s *sender) with(req *http.Request, token string) (*http.Response, error) {
	if req = req.Clone(req.Context()); token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return s.client.RoundTrip(req)
}

// challenge matches what a registry says of its tokens.
var challenge = regexp.MustCompile(`(realm|service|scope)="([^"]*)"`)

// tokenAddress is where a token can be had, as the header of a refusal says; nil: it does not.
func tokenAddress(header string) *url.URL {
	if !strings.HasPrefix(strings.ToLower(header), "bearer ") {
		return nil
	}
	u, q := &url.URL{}, url.Values{}
	for _, m := range challenge.FindAllStringSubmatch(header, -1) {
		switch m[1] {
		case "realm":
			var err error
			if u, err = url.Parse(m[2]); err != nil {
				return nil
			}
		case "service":
			q.Set("service", m[2])
		case "scope":
			q["scope"] = strings.Fields(m[2])
		}
	}
	if u.Host == "" {
		return nil
	}
	u.RawQuery, u.Fragment = q.Encode(), ""
	return u
}

// renew returns a token that is not the old one. Those who come at the same time share it.
func (s *sender) renew(req *http.Request, realm *url.URL, old string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token != old {
		return s.token, nil
	}
	own := req.URL
	ours := realm.Host == own.Host || realm.Host == tokensOf[own.Host]
	if !ours || realm.User != nil || realm.Scheme != own.Scheme {
		return "", fmt.Errorf("%w: the registry %s wants a signature to be sent to %s://%s, which is another place",
			remote.ErrCredentials, own.Host, realm.Scheme, realm.Host)
	}
	key, err := readKey(s.key)
	if err != nil {
		return "", err
	}
	s.token, err = s.ask(req.Context(), realm, key)
	return s.token, err
}

// readKey reads the user's key.
func readKey(path string) (ed25519.PrivateKey, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", remote.ErrCredentials, err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxKey {
		return nil, fmt.Errorf("%w: %s: %w", remote.ErrCredentials, path, errKey)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", remote.ErrCredentials, err)
	}
	key, err := parseKey(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", remote.ErrCredentials, path, err)
	}
	return key, nil
}

// ask asks for a token. What is signed is the method, the address with the time and a number that is used once, and the
// SHA-256 of an empty body in hexadecimal digits and then in base64.
func (s *sender) ask(ctx context.Context, realm *url.URL, key ed25519.PrivateKey) (string, error) {
	q := realm.Query()
	q.Set("ts", strconv.FormatInt(time.Now().Unix(), 10))
	q.Set("nonce", rand.Text())
	u := *realm
	u.RawQuery = q.Encode()
	empty := base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%x", sha256.Sum256(nil)))
	signature := ed25519.Sign(key, []byte(http.MethodGet+","+u.String()+","+empty))
	text, _, err := s.client.Get(ctx, remote.Document{
		URL: u.String(), Accept: "application/json", Limit: maxToken, Send: func(req *http.Request) (*http.Response, error) {
			req.Header.Set("Authorization", publicText(key)+":"+base64.StdEncoding.EncodeToString(signature))
			return s.client.RoundTrip(req)
		},
	})
	if err != nil {
		return "", fmt.Errorf("a token for the key %s: %w", s.key, err)
	}
	var reply struct{ Token string }
	if err := json.Unmarshal(text, &reply); err != nil || reply.Token == "" ||
		strings.ContainsFunc(reply.Token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s: %w: there is no token in it", remote.Redact(u.String()), remote.ErrReply)
	}
	return reply.Token, nil
}
