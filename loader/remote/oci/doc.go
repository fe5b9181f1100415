// Package oci opens models of registries that speak OCI's distribution protocol: artifacts of CNCF ModelPack, of
// Docker's model runner and of ollama, and files that were pushed with their names.
//
//	c := remote.NewClient(remote.Options{})
//	defer c.Close()
//	o, err := oci.FromEnvironment()
//	registry, err := oci.New(c, o)
//	name, err := oci.Parse("oci://docker.io/ai/smollm2:latest")
//	file, err := registry.Open(ctx, name)
//	defer file.Close()
//
// A layer must be a GGUF file as it is, since ranges of it are read; archives and compressed layers are refused. Its
// digest is checked beside the load: tensors can be used before, and a wrong one fails the load.
//
// # Credentials
//
// They are those of Docker's configuration, with its helpers. They go to the registry, over TLS or on this host, and to
// the host that the registry names for tokens if both are of one domain, as registry-1.docker.io and auth.docker.io
// are; see Options.Realms for others. Blobs are often elsewhere; nothing goes there. Tokens are renewed when the
// registry refuses them. What fails to give credentials is no error where none are needed; where some are, the error
// says what failed.
package oci
