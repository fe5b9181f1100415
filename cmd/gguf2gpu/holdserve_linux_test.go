package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestMetricsAddresses: an address of IPv4 is that alone, also where it stands for all of them.
func TestMetricsAddresses(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]string{"0.0.0.0:0": "0.0.0.0", "127.0.0.1:0": "127.0.0.1", "localhost:0": ""} {
		l, err := listenTCP(addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Addr().(*net.TCPAddr).IP.String(); want != "" && got != want {
			t.Errorf("%s listens on %s", addr, got)
		}
		l.Close()
	}
}

// TestMetricsConnections opens many connections to the metrics that say nothing. The process serves a bounded number
// of them at a time, and who asks properly is answered when they have gone.
func TestMetricsConnections(t *testing.T) {
	t.Parallel()
	var ready atomic.Bool
	ready.Store(true)
	var addr string
	log := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		if _, after, found := strings.Cut(string(b), "address="); found {
			addr = strings.TrimSpace(after)
		}
		return len(b), nil
	}), nil))
	stop, err := serveMetrics("127.0.0.1:0", nil, &ready, log) // a Holder is asked for /metrics only
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	var silent []net.Conn
	for range 3 * metricsConnections {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
	}
	until(t, "the places are taken", func() bool { return accepted(t, port) >= metricsConnections })
	for range 20 { // none comes in beyond that
		if n := accepted(t, port); n > metricsConnections {
			t.Fatalf("%d connections are open, the limit is %d", n, metricsConnections)
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, conn := range silent {
		conn.Close()
	}
	answer, err := http.Get("http://" + addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK || !answer.Close {
		t.Errorf("%s, to be closed: %v", answer.Status, answer.Close)
	}
}

// accepted counts the connections to a port of this host that this process has accepted: those of its descriptors that
// are sockets with that local port.
func accepted(t *testing.T, port string) (n int) {
	t.Helper()
	var number int
	if _, err := fmt.Sscan(port, &number); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	inodes := make(map[string]bool)
	for line := range strings.Lines(string(table)) {
		// number, local and remote address, state (01: established) and others, the tenth is the socket's inode
		f := strings.Fields(line)
		if len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", number)) && f[3] == "01" {
			inodes["socket:["+f[9]+"]"] = true
		}
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && inodes[to] {
			n++
		}
	}
	return n
}
