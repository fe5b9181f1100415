package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]Name{
		"s3://models/m.gguf":                   {Bucket: "models", Key: "m.gguf"},
		"gs://my.models_1/a//b c+d%20.gguf":    {Google: true, Bucket: "my.models_1", Key: "a//b c+d%20.gguf"},
		"s3://models/a/":                       {Bucket: "models", Key: "a/"},
		"s3://models/":                         {Bucket: "models"},
		"s3://models/m.gguf?versionId=3/L4k?q": {Bucket: "models", Key: "m.gguf", Version: "3/L4k?q"},
		"s3://models/m?x.gguf":                 {Bucket: "models", Key: "m?x.gguf"},
	} {
		n, err := Parse(s)
		if err != nil || n != want || n.String() != s {
			t.Errorf("%s: got %+v (%s), %v", s, n, n, err)
		}
	}
	if n, err := Parse("s3://models"); err != nil || !n.IsDirectory() {
		t.Error(n, err)
	}
	for _, s := range []string{
		"", "m.gguf", "s3:/b/k", "s3://", "s3:///k", "s3://B/k", "s3://a@b/k", "s3://me:secret@b/k", "s3://b..c/k", "s3://models/../k",
		"s3://models//k", "s3://models/./k", "s3://models/a\nb", "s3://models/k?versionId=", "https://h/k", "s3://models/" + strings.Repeat("x", 1025),
	} {
		if n, err := Parse(s); !errors.Is(err, remote.ErrAddress) {
			t.Errorf("%q: got %+v, %v", s, n, err)
		}
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	server := newStore(t, alice, role)
	for who, k := range map[string]keys{"a user": alice, "a role": role} {
		s := connect(t, Options{Endpoint: server.URL, Region: "eu-west-1", Credentials: k.provider(), RequesterPays: true},
			remote.Options{})
		for name, want := range map[string][]byte{
			"s3://models/a/m-Q4_K_M.gguf": fake.Model(4, 3<<20), "s3://models/top.gguf": fake.Model(1, 1000),
			"s3://models/a/b c+d=é&%.gguf": fake.Model(2, 2000),
		} {
			f, err := open(t, s, name)
			if err != nil {
				t.Errorf("%s, %s: %v", who, name, err)
				continue
			}
			wantTensor(t, f, 0, want)
			if id, ok := remote.Identify(f.Parts()[0]); !ok || id.ETag == "" {
				t.Errorf("%s: %+v", name, id)
			}
		}
		parts := fake.Split("m", 3, 1<<20)
		f, err := open(t, s, "s3://models/split/m-00002-of-00003.gguf")
		if err != nil || len(f.Parts()) != 3 {
			t.Fatal(who, f, err)
		}
		for i := range 3 {
			wantTensor(t, f, i, parts[fmt.Sprintf("m-%05d-of-00003.gguf", i+1)])
		}
		for name, is := range map[string]error{"s3://models/none.gguf": fs.ErrNotExist, "s3://models/a/": remote.ErrAddress} {
			if _, err := open(t, s, name); !errors.Is(err, is) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if n := server.refused.Load(); n != 0 {
		t.Errorf("%d requests were refused", n)
	}
	for _, r := range server.Requests() {
		if r.Header.Get("X-Amz-Request-Payer") != "requester" {
			t.Error("who pays was not said")
		}
	}
	_, err := open(t, connect(t, Options{Endpoint: server.URL, Region: "eu-west-1"}, remote.Options{}), "s3://models/top.gguf")
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "there are no credentials") {
		t.Errorf("without credentials: %v", err)
	}
	wrong := keys{alice.id, "wrong secret", ""}
	_, err = open(t, connect(t, Options{Endpoint: server.URL, Region: "eu-west-1", Credentials: wrong.provider()}, remote.Options{}),
		"s3://models/top.gguf")
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "SignatureDoesNotMatch") || strings.Contains(err.Error(), "wrong secret") {
		t.Errorf("with a wrong secret: %v", err)
	}
}

// TestAnonymous: a public bucket needs no credentials, also if there are none to be found.
func TestAnonymous(t *testing.T) {
	t.Parallel()
	server := newStore(t)
	none := aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{},
			errors.New("none here")
	})
	for _, o := range []Options{{Endpoint: server.URL}, {Endpoint: server.URL, Credentials: none}} {
		f, err := open(t, connect(t, o, remote.Options{}), "s3://models/top.gguf")
		if err != nil {
			t.Fatal(err)
		}
		wantTensor(t, f, 0, fake.Model(1, 1000))
	}
	if server.Saw("Authorization") {
		t.Error("something was signed")
	}
	private := newStore(t, alice)
	_, err := open(t, connect(t, Options{Endpoint: private.URL, Credentials: none}, remote.Options{}), "s3://models/top.gguf")
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "none here") {
		t.Errorf("got %v", err)
	}
}

// TestRenewed: the region, the clock and the credentials are put right when the store says that they are wrong, also in
// the midst of a model.
func TestRenewed(t *testing.T) {
	t.Parallel()
	server := newStore(t, role)
	current := role
	made := 0
	cache := aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		made++
		return aws.Credentials{
			AccessKeyID: current.id, SecretAccessKey: current.secret, SessionToken: current.session,
			CanExpire: true,
			Expires:   time.Now().Add(time.Hour),
		}, nil
	}))
	s := connect(t, Options{Endpoint: server.URL, Region: "us-west-2", Credentials: cache}, remote.Options{})
	f, err := open(t, s, "s3://models/a/m-Q4_K_M.gguf")
	if err != nil || server.refused.Load() != 1 {
		t.Fatalf("another region: %v, %d refused", err, server.refused.Load())
	}
	current.session = "session-2"
	server.valid.Store(&[]keys{current})
	wantTensor(t, f, 0, fake.Model(4, 3<<20))
	if made != 2 {
		t.Errorf("credentials were made %d times", made)
	}
	server.clock.Store(3600)
	f, err = open(t, s, "s3://models/a/m-Q4_K_M.gguf")
	if err != nil {
		t.Fatalf("a clock that is wrong: %v", err)
	}
	wantTensor(t, f, 0, fake.Model(4, 3<<20))
	if n := server.refused.Load(); n > 4 {
		t.Errorf("%d requests were refused", n)
	}
	server.valid.Store(&[]keys{{role.id, role.secret, "session-3"}}) // what is renewed is still not right
	if _, err := open(t, s, "s3://models/top.gguf"); err == nil || !strings.Contains(err.Error(), "ExpiredToken") {
		t.Errorf("got %v", err)
	}
}

// TestRedirects: a redirect is followed without anything that says who asks.
func TestRedirects(t *testing.T) {
	t.Parallel()
	server, spy := newStore(t, role), fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fake.Serve(w, r, fake.Model(4, 3<<20))
	}))
	defer spy.Close()
	for _, code := range []int{301, 302, 303, 307, 308} {
		server.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("X-Amz-Bucket-Region", "eu-central-1")
			if len(server.Requests()) < 2 {
				w.Header().Del("X-Amz-Bucket-Region")
			}
			http.Redirect(w, r, spy.URL+"/x", code)
			return true
		})
		s := connect(t, Options{Endpoint: server.URL, Region: "eu-west-1", Credentials: role.provider()}, remote.Options{})
		f, err := open(t, s, "s3://models/a/m-Q4_K_M.gguf")
		if err != nil {
			t.Fatal(code, err)
		}
		wantTensor(t, f, 0, fake.Model(4, 3<<20))
	}
	if len(spy.Requests()) == 0 || spy.Saw(role.session) || spy.Saw(role.id) || spy.Saw("Authorization") || spy.Saw("X-Amz") {
		t.Error("what says who asks followed a redirect")
	}
}

// TestAWSHosts: requests go to hosts of AWS that are made here. What a reply names as the region cannot lead elsewhere.
func TestAWSHosts(t *testing.T) {
	t.Parallel()
	s := connect(t, Options{Credentials: alice.provider()}, remote.Options{})
	for _, tt := range []struct{ bucket, want string }{
		{"models", "https://models.s3.us-east-1.amazonaws.com/a/b%20c%2B.gguf"},
		{"my.models", "https://s3.us-east-1.amazonaws.com/my.models/a/b%20c%2B.gguf"},
	} {
		if got := s.address(tt.bucket, "a/b c+.gguf"); got != tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
	b := s.bucket("models")
	for region, host := range map[string]string{
		"eu-west-1": "models.s3.eu-west-1.amazonaws.com", "cn-north-1": "models.s3.cn-north-1.amazonaws.com.cn",
		"evil.example.com/": "", "a.b": "", "": "", "eu-west-1@evil": "", strings.Repeat("x", 99): "",
	} {
		resp := &http.Response{
			StatusCode: 400, Header: http.Header{"X-Amz-Bucket-Region": {region}},
			Body: io.NopCloser(strings.NewReader("<Error><Code>AuthorizationHeaderMalformed</Code><Region>" + region + "</Region></Error>")),
		}
		b.region = "us-east-1"
		if got := b.renew(resp, "us-east-1"); got != (host != "") {
			t.Errorf("%q: another attempt %t", region, got)
			continue
		}
		req := httptest.NewRequest("GET", "https://models.s3.us-east-1.amazonaws.com/k", nil)
		if _, err := b.sign(req); err != nil || host != "" && req.URL.Host != host || host == "" && req.URL.Host != "models.s3.us-east-1.amazonaws.com" {
			t.Errorf("%q leads to %s, %v", region, req.URL.Host, err)
		}
	}
	c := remote.NewClient(remote.Options{})
	defer c.Close()
	for _, o := range []Options{{Region: "x/y"}, {Endpoint: "h"}, {Endpoint: "https://me:secret@h"}, {Endpoint: "ftp://h"}} {
		if _, err := New(c, o); !errors.Is(err, remote.ErrAddress) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: %v", o, err)
		}
	}
	// Without TLS, and not on this host, nothing is signed.
	if _, err := open(t, connect(t, Options{Endpoint: "http://minio.example.com:9000", Credentials: alice.provider()}, remote.Options{}),
		"s3://models/top.gguf"); !errors.Is(err, remote.ErrAddress) {
		t.Error(err)
	}
}

func TestGoogle(t *testing.T) {
	t.Parallel()
	server := newStore(t, alice)
	server.region = googleRegion
	s := connect(t, Options{Endpoint: server.URL, Region: googleRegion, Credentials: alice.provider(), Project: "p1"},
		remote.Options{})
	f, err := open(t, s, "gs://models/a/m-Q4_K_M.gguf")
	if err != nil {
		t.Fatal(err)
	}
	wantTensor(t, f, 0, fake.Model(4, 3<<20))
	server.valid.Store(nil)
	server.Fault(nil)
	if f, err = open(t, connect(t, Options{Endpoint: server.URL, Token: "ya29.secret"}, remote.Options{}), "gs://models/top.gguf"); err != nil {
		t.Fatal(err)
	}
	wantTensor(t, f, 0, fake.Model(1, 1000))
	if !server.Saw("Bearer ya29.secret") {
		t.Error("the token was not sent")
	}
	spy := fake.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fake.Serve(w, r, fake.Model(1, 1000))
	}))
	defer spy.Close()
	server.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, spy.URL+"/x", http.StatusTemporaryRedirect)
		return true
	})
	for _, o := range []Options{{Token: "ya29.secret", Project: "p1"}, {Credentials: alice.provider()}} {
		o.Endpoint = server.URL
		if f, err = open(t, connect(t, o, remote.Options{Digests: remote.DigestsAlways}), "gs://models/top.gguf"); err != nil {
			t.Fatal(err)
		}
		wantTensor(t, f, 0, fake.Model(1, 1000))
	}
	if len(spy.Requests()) == 0 || spy.Saw("ya29") || spy.Saw(alice.id) || spy.Saw("Authorization") || spy.Saw("X-Goog-User") {
		t.Error("what says who asks followed a redirect")
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	server := newStore(t, alice)
	s := connect(t, Options{Endpoint: server.URL, Region: "eu-west-1", Credentials: alice.provider()}, remote.Options{})
	for prefix, want := range map[string][]string{
		"s3://models":        {"s3://models/a/b c+d=é&%.gguf 1", "s3://models/a/m-Q4_K_M.gguf 1", "s3://models/split/m-00001-of-00003.gguf 3", "s3://models/top.gguf 1"},
		"s3://models/split/": {"s3://models/split/m-00001-of-00003.gguf 3"},
		"s3://models/none/":  nil,
	} {
		n, err := Parse(prefix)
		if err != nil {
			t.Fatal(err)
		}
		l, err := s.List(t.Context(), n)
		if err != nil {
			t.Errorf("%s: %v", prefix, err)
			continue
		}
		var got []string
		for _, e := range l.Entries {
			got = append(got, fmt.Sprint(e.Name, " ", e.Files))
			if _, err := open(t, s, e.Name); err != nil || e.Bytes == 0 {
				t.Errorf("%+v: %v", e, err)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", prefix, got, want)
		}
	}
	server.Fault(func(w http.ResponseWriter, _ *http.Request) bool { io.WriteString(w, "<html>"); return true })
	if _, err := s.List(t.Context(), Name{Bucket: "models"}); !errors.Is(err, remote.ErrReply) {
		t.Error(err)
	}
	server.Fault(func(w http.ResponseWriter, r *http.Request) bool { // a list without an end
		io.WriteString(w, "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>a+/=</NextContinuationToken></ListBucketResult>")
		return true
	})
	if _, err := s.List(t.Context(), Name{Bucket: "models"}); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
	if q := server.Requests()[1].URL.RawQuery; q != "continuation-token=a%2B%2F%3D&list-type=2&prefix=" {
		t.Error(q)
	}
}

// TestEnvironment: credentials come from the environment, from files, and from the service of an instance, which renews
// them.
func TestEnvironment(t *testing.T) {
	for _, name := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL",
		"AWS_ENDPOINT_URL_S3", "AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER", "AWS_S3_ADDRESSING_STYLE", "AWS_ROLE_ARN",
		"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
	} {
		t.Setenv(name, "")
	}
	dir := t.TempDir()
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", dir+"/credentials")
	t.Setenv("AWS_CONFIG_FILE", dir+"/config")
	server := newStore(t, alice, role)
	load := func(what string, want keys) {
		t.Helper()
		o, err := FromEnvironment(t.Context())
		if err != nil {
			t.Fatal(what, err)
		}
		if o.Endpoint != server.URL || o.Region != "eu-west-1" {
			t.Errorf("%s: %+v", what, o)
		}
		server.Fault(nil)
		f, err := open(t, connect(t, o, remote.Options{}), "s3://models/top.gguf")
		if err != nil {
			t.Fatal(what, err)
		}
		wantTensor(t, f, 0, fake.Model(1, 1000))
		if !server.Saw(want.id) {
			t.Errorf("%s: the request is not signed by %s", what, want.id)
		}
	}
	t.Run("environment", func(t *testing.T) {
		t.Setenv("AWS_ACCESS_KEY_ID", alice.id)
		t.Setenv("AWS_SECRET_ACCESS_KEY", alice.secret)
		t.Setenv("AWS_REGION", "eu-west-1")
		t.Setenv("AWS_ENDPOINT_URL", server.URL)
		load("environment", alice)
		t.Setenv("AWS_ENDPOINT_URL", "https://other.example.com")
		t.Setenv("AWS_ENDPOINT_URL_S3", server.URL)
		load("its own endpoint", alice)
		t.Setenv("AWS_NO_SIGN_REQUEST", "YES")
		t.Setenv("AWS_REQUEST_PAYER", "requester")
		t.Setenv("AWS_S3_ADDRESSING_STYLE", "virtual")
		if o, err := FromEnvironment(t.Context()); err != nil || o.Credentials != nil || !o.RequesterPays || !o.VirtualHosts {
			t.Errorf("%+v, %v", o, err)
		}
	})
	t.Run("files", func(t *testing.T) {
		put(t, dir+"/credentials", fmt.Sprintf("[work]\naws_access_key_id = %s\naws_secret_access_key = %s\n", alice.id, alice.secret))
		put(t, dir+"/config", fmt.Sprintf("[profile work]\nregion = eu-west-1\nendpoint_url = %s\n", server.URL))
		t.Setenv("AWS_PROFILE", "work")
		load("files", alice)
	})
	t.Run("instance", func(t *testing.T) {
		var given atomic.Int64
		instance := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
				w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
				io.WriteString(w, "metadata-token")
			case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "metadata-token":
				w.WriteHeader(http.StatusUnauthorized)
			case strings.HasSuffix(r.URL.Path, "/security-credentials/"):
				io.WriteString(w, "the-role")
			case strings.HasSuffix(r.URL.Path, "/security-credentials/the-role"):
				given.Add(1)
				fmt.Fprintf(w, `{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z","Type":"AWS-HMAC","AccessKeyId":%q,`+
					`"SecretAccessKey":%q,"Token":%q,"Expiration":%q}`, role.id, role.secret, role.session,
					time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
			default:
				w.WriteHeader(http.StatusNotFound)
			}
		}))
		defer instance.Close()
		t.Setenv("AWS_EC2_METADATA_DISABLED", "false")
		t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", instance.URL)
		t.Setenv("AWS_REGION", "eu-west-1")
		t.Setenv("AWS_ENDPOINT_URL", server.URL)
		put(t, dir+"/credentials", "")
		put(t, dir+"/config", "")
		load("instance", role)
		if given.Load() == 0 {
			t.Error("the instance was not asked")
		}
	})
	for name, v := range map[string]string{
		"GS_ACCESS_KEY_ID": alice.id, "GS_SECRET_ACCESS_KEY": "", "GOOGLE_OAUTH_ACCESS_TOKEN": "t",
		"GS_USER_PROJECT": "p", "GS_ENDPOINT_URL": "",
	} {
		t.Setenv(name, v)
	}
	if o := GoogleFromEnvironment(); o.Token != "t" || o.Credentials != nil || o.Project != "p" || o.Endpoint != googleEndpoint {
		t.Errorf("%+v", o)
	}
	t.Setenv("GS_SECRET_ACCESS_KEY", alice.secret)
	o := GoogleFromEnvironment()
	c, err := o.Credentials.Retrieve(t.Context())
	if err != nil || c.AccessKeyID != alice.id || o.Token != "" {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestEscape: keys are escaped as signatures want it, so that both sides sign the same.
func TestEscape(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"a b", "a+b", "é/x", "a%20b", "~-_.", "q?x=1&y#z", "=@:,;$"} {
		u, err := url.Parse("https://h/" + escape(key))
		if err != nil || u.Path != "/"+key || u.EscapedPath() != "/"+escape(key) {
			t.Errorf("%q becomes %s: %q, %v", key, escape(key), u.Path, err)
		}
	}
}
