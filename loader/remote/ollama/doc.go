// Package ollama opens models of ollama by their names: from its local store, or else from the registry that the name
// is of.
//
//	c := remote.NewClient(remote.Options{})
//	defer c.Close()
//	store := ollama.New(c, ollama.FromEnvironment())
//	name, err := ollama.Parse("ollama:llama3.2:3b")
//	file, err := store.Open(ctx, name)
//	defer file.Close()
//
// A name is ollama:[HOST/][NAMESPACE/]MODEL[:TAG], by default of the namespace library on registry.ollama.ai with the
// tag latest. Files of the store are compared with their digests where [remote.Options] ask for it, those of a registry
// always, beside the load. No credentials are sent.
package ollama
