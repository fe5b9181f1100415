package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// listen returns the socket that systemd passed, or makes one at path, "" for the usual place, that only this user, or this
// group, may connect to. made is where it must be removed in the end, "" if it is systemd's.
func listen(path string, group bool) (l *net.UnixListener, made string, err error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, "", fmt.Errorf("sockets from systemd: %w", err)
	}
	if len(passed) > 0 {
		l, ok := passed[0].(*net.UnixListener)
		if !ok || len(passed) > 1 {
			return nil, "", fmt.Errorf("systemd passed %d sockets, want one, a Unix stream socket", len(passed))
		}
		l.SetUnlinkOnClose(false)
		return l, "", nil
	}
	if path == "" {
		path = loader.SocketPath()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, "", err
		}
	}
	if err := free(path); err != nil {
		return nil, "", err
	}
	// Made under another name, so that nobody can connect before the permissions are right.
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, "", err
	}
	l.SetUnlinkOnClose(false)
	mode := os.FileMode(0o600)
	if group {
		mode = 0o660
	}
	err = os.Chmod(temporary, mode)
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return nil, "", errors.Join(err, l.Close(), os.Remove(temporary))
	}
	return l, path, nil
}

// free sees that path may be taken: there is nothing, or a socket that nobody listens on any more.
func free(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("%s exists and is no socket: choose another place with --socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return nil // left behind by a process that was killed
	}
	_ = conn.Close()
	return fmt.Errorf("another process holds models on %s: --add gives it one more, --socket chooses another place", path)
}

// serveMetrics serves h's metrics on addr until the function that it returns is called. An empty address: it does nothing.
func serveMetrics(addr string, h *loader.Holder, log *slog.Logger) (stop func(), err error) {
	if addr == "" {
		return func() {}, nil
	}
	if addr, err = metricsAddress(addr); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var b bytes.Buffer
		if err := h.WriteMetrics(&b); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(b.Bytes()) // who asked may have gone
	})
	server := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the metrics are served no more", "error", err)
		}
	}()
	log.Info("metrics", "address", l.Addr())
	return func() {
		_ = server.Close()
		<-ended
	}, nil
}
