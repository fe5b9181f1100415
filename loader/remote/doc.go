// Package remote opens models on web servers. [Client.Open] takes an address in place of a path, and the file that it
// returns is loaded like any other.
//
//	c := remote.NewClient(remote.Options{})
//	defer c.Close()
//	file, err := c.Open(ctx, "https://example.com/models/model.gguf")
//	if err != nil {
//		return err
//	}
//	defer file.Close()
//
// The package reads ranges of a file over HTTP/1.1, with one connection for each range that is being read. If a
// connection breaks, stalls or ends early, it is made again, and reading goes on at the byte that was reached. Every
// reply is checked against what is known of the file, so that a file that changes on the server is noticed: by its ETag
// or date, its size, and, where a host redirects to other servers, by X-Linked-ETag or a digest.
//
// # Servers
//
// A server must support ranges (RFC 9110). Status 408, 425, 429 and 5xx, other than 501 and 505, count as temporary. A
// reply may hold fewer bytes than were asked for, from the right start on; the rest is asked for then.
//
// # Security
//
// Servers are taken to be hostile, as files are. A reply must be the range that was asked for, or the beginning of it;
// everything else is an error that names address, bytes and rule. Plain HTTP is for this host only, unless
// [Options.AllowHTTP] allows it. A token goes to the host that it was given for ([Options.Tokens]), credentials in an
// address go to the host and port of that address, and neither goes to where these redirect. The zero Options send no
// credentials to anybody. Errors, logs and reports show addresses without credentials and query.
package remote
