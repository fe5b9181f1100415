package s3

import (
	"cmp"
	"context"
	"os"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
)

const (
	// googleEndpoint is the address of Google Cloud Storage's S3 interface.
	googleEndpoint = "https://storage.googleapis.com"
	// googleRegion is the region that signatures for it name.
	googleRegion = "auto"
	// defaultRegion is the region of AWS that answers for all buckets, if only by naming their region.
	defaultRegion = "us-east-1"
)

// Options say which store it is, and who asks. The zero value is AWS, without credentials.
type Options struct {
	Endpoint string // the address of the store; "": AWS, at the host of each bucket's region
	Region   string // of buckets, until the store says another one; "": us-east-1
	// VirtualHosts says that the bucket is part of the host's name, as AWS wants it, also with an Endpoint. Buckets with
	// dots in their names are always part of the path.
	VirtualHosts bool
	// Credentials are asked for every request, and should cache: see [aws.CredentialsCache]. Nil: requests are not signed.
	Credentials aws.CredentialsProvider
	// Token is sent as a bearer token instead of a signature, such as Google's access tokens; "": none.
	Token string
	// RequesterPays says that who asks pays for buckets that want that.
	RequesterPays bool
	// Project is the Google project that pays; "": none.
	Project string
}

// FromEnvironment returns Options as AWS's own tools find them: environment, configuration files with profiles, web
// identities, and the credentials of containers and instances. AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL name another
// store, AWS_S3_ADDRESSING_STYLE=virtual says that it takes buckets as parts of its host's name,
// AWS_NO_SIGN_REQUEST=YES that requests are not signed, and AWS_REQUEST_PAYER=requester who pays. Credentials are
// looked for when they are first needed.
func FromEnvironment(ctx context.Context) (Options, error) {
	c, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return Options{}, err
	}
	o := Options{
		Region: c.Region, Credentials: c.Credentials, Endpoint: cmp.Or(os.Getenv("AWS_ENDPOINT_URL_S3"), aws.ToString(c.BaseEndpoint)),
		VirtualHosts:  strings.EqualFold(os.Getenv("AWS_S3_ADDRESSING_STYLE"), "virtual"),
		RequesterPays: strings.EqualFold(os.Getenv("AWS_REQUEST_PAYER"), "requester"),
	}
	if isYes("AWS_NO_SIGN_REQUEST") {
		o.Credentials = nil
	}
	return o, nil
}

func isYes(name string) bool {
	switch strings.ToUpper(os.Getenv(name)) {
	case "1", "ON", "YES", "TRUE":
		return true
	}
	return false
}

// GoogleFromEnvironment returns Options for Google Cloud Storage: GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY, an HMAC
// key, or else GOOGLE_OAUTH_ACCESS_TOKEN; GS_USER_PROJECT, who pays; and GS_ENDPOINT_URL. AWS's variables have no
// effect, so that its credentials do not reach Google.
func GoogleFromEnvironment() Options {
	o := Options{
		Endpoint: cmp.Or(os.Getenv("GS_ENDPOINT_URL"), googleEndpoint), Region: googleRegion, Project: os.Getenv("GS_USER_PROJECT"),
	}
	key, secret := os.Getenv("GS_ACCESS_KEY_ID"), os.Getenv("GS_SECRET_ACCESS_KEY")
	if key == "" || secret == "" {
		o.Token = strings.TrimSpace(os.Getenv("GOOGLE_OAUTH_ACCESS_TOKEN"))
		return o
	}
	o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: key, SecretAccessKey: secret}, nil
	})
	return o
}
