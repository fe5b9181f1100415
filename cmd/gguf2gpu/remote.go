package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// remoteFlags are those of commands whose MODEL may be an address.
type remoteFlags struct{ allowHTTP *bool }

func addRemoteFlags(fs *pflag.FlagSet) remoteFlags {
	return remoteFlags{fs.Bool("allow-http", false, "take a MODEL at http://, without TLS, from other hosts than this one, too")}
}

// open opens the model at path, a file or an address. The client is nil for a file; the caller must close both, the model first.
func (f remoteFlags) open(ctx context.Context, path string, log *slog.Logger) (*gguf.Model, *remote.Client, error) {
	if !remote.IsAddress(path) {
		m, err := gguf.Open(path)
		return m, nil, err
	}
	c := remote.NewClient(remote.Options{AllowHTTP: *f.allowHTTP, Logger: log})
	m, err := c.Open(ctx, path)
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return m, c, nil
}

// remoteReport is what the JSON of load has besides for a model that came from a server.
type remoteReport struct {
	RemoteBytes uint64 `json:"remote_bytes"` // of read_bytes, from a server
	Connections int    `json:"connections"`  // ranges that were read at the same time
	Requests    int64  `json:"requests"`     // that were sent, from opening the model to the end of the load
	Retries     int64  `json:"retries"`      // attempts to go on where a request had failed
}

func (r *remoteReport) print(w io.Writer) {
	if r.Requests > 0 {
		fmt.Fprintf(w, "  %d requests on up to %d connections, %d of them again after a failure\n", r.Requests, r.Connections, r.Retries)
	}
}
