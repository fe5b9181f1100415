package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// listen returns the socket that systemd passed, or makes one at path, "" for the usual place. remove is to be called
// in the end; it does nothing about systemd's.
func listen(path string, group bool, passed []net.Listener) (l *net.UnixListener, remove func() error, err error) {
	if len(passed) == 0 {
		return hold.Listen(path, group)
	}
	l, ok := passed[0].(*net.UnixListener)
	if !ok || len(passed) > 1 {
		for _, p := range passed {
			_ = p.Close()
		}
		return nil, nil, fmt.Errorf("systemd passed %d sockets, want one, a Unix stream socket (ListenStream= with a path)", len(passed))
	}
	return l, func() error { return nil }, nil
}

const (
	// metricsConnections bounds the connections of those who ask for metrics. Others wait until one ends.
	metricsConnections = 64
	// metricsTime bounds how long one may take to ask, and to take the answer.
	metricsTime = 10 * time.Second
)

// listenTCP listens on an address. For 0.0.0.0 that is IPv4 alone, which net.Listen takes for all addresses of IPv6,
// too.
func listenTCP(addr string) (net.Listener, error) {
	network := "tcp"
	host, _, err := net.SplitHostPort(addr)
	if ip, parsed := netip.ParseAddr(host); err == nil && parsed == nil && ip.Is4() {
		network = "tcp4"
	}
	return net.Listen(network, addr)
}

// serveMetrics serves h's metrics on addr until the function that it returns is called, and whether it is ready on
// /healthz. An empty address: it does nothing.
func serveMetrics(addr string, h *hold.Holder, ready *atomic.Bool, log *slog.Logger) (stop func(), err error) {
	if addr == "" {
		return func() {}, nil
	}
	l, err := listenTCP(addr)
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
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "loading, or ending", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n")) // who asked may have gone
	})
	server := &http.Server{
		Handler: mux, ReadTimeout: metricsTime, WriteTimeout: metricsTime, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	} // else it writes past what makes text harmless
	server.SetKeepAlivesEnabled(false) // so that nobody keeps a connection
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Serve(netutil.LimitListener(l, metricsConnections)); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the metrics are served no more", "error", err)
		}
	}()
	log.Info("metrics", "address", l.Addr())
	return func() {
		_ = server.Close()
		<-ended
	}, nil
}
