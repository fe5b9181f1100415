// Package hf opens models of Hugging Face's hub, or of a server with the same interface, by their names.
//
//	c := remote.NewClient(remote.Options{})
//	defer c.Close()
//	hub, err := hf.New(c, hf.FromEnvironment())
//	name, err := hf.Parse("hf:ORG/REPO:Q4_K_M")
//	file, err := hub.Open(ctx, name)
//	defer file.Close()
//
// # Names
//
//	hf:ORG/REPO              the quantization Q4_K_M, or else the first model of the repository, as llama.cpp's -hf does
//	hf:ORG/REPO:QUANT        the first model with this quantization in its name; upper and lower case are the same
//	hf:ORG/REPO/PATH.gguf    this file
//	hf:ORG/REPO@REV…         all of these of a branch, tag or commit; it may also come last
//
// hf:// is the same as hf:. Of a split model, all parts are opened. The revision is looked up once, so that all files
// are of one commit.
//
// # The local cache
//
// What Hugging Face's own tools have put into their cache is opened from there, without asking the hub, if the revision
// and the file are known there: with a file or quantization in the name, or with Q4_K_M in the cache. Otherwise the hub
// says which file it is, and the cache is used if it has that file, complete, of that commit. Without the hub, what is
// in the cache counts as the repository.
//
// # Credentials
//
// The token goes to the host of Options.Endpoint, and to no other: not to where that redirects to. The zero Options
// send none.
package hf
