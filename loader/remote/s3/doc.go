// Package s3 opens models in buckets of S3, of stores that speak its protocol, and of Google Cloud Storage through its
// S3 interface.
//
//	c := remote.NewClient(remote.Options{})
//	defer c.Close()
//	o, err := s3.FromEnvironment(ctx)
//	store, err := s3.New(c, o)
//	name, err := s3.Parse("s3://BUCKET/path/model.gguf")
//	file, err := store.Open(ctx, name)
//	defer file.Close()
//
// Every request is signed when it is sent, so that a signature cannot expire during a load, with credentials that are
// renewed in time. A signature is for one host. Where the store redirects to, nothing of it is sent; that a bucket of
// AWS is in another region is no redirect but a new request to that region's own host.
package s3
