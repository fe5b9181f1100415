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
// always, beside the load.
//
// A registry that wants to know who asks gets a request for a token that is signed with the user's key, as ollama makes
// it. That goes to the registry's own host, over TLS or on this host, for registry.ollama.ai to ollama.com; the token
// goes to the registry alone, and not to where that redirects. Keys with a passphrase, and of an agent, are not used.
package ollama
