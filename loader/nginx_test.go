package loader

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sync/errgroup"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// nginx is a real server: under / the files of a directory, under /slow the same over a slow link, under /whole without
// ranges, under /moved by a redirect, under /paced with 26 MB/s for each connection.
type nginx struct {
	address string // without a path
	master  int    // its process
}

const nginxConfig = `
daemon off;
%s
worker_processes 2;
pid nginx.pid;
error_log error.log;
events { worker_connections 256; }
http {
	access_log off;
	sendfile on;
	default_type application/octet-stream;
	gzip on;
	gzip_types *;
	gzip_min_length 1;
	client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
	server {
		listen %s;
		root %q;
		location /slow/ { alias %[3]q; limit_rate 800k; limit_rate_after 100k; }
		location /paced/ { alias %[3]q; limit_rate 25m; }
		location /whole/ { alias %[3]q; max_ranges 0; }
		location /moved/ { rewrite ^/moved/(.*)$ /$1 redirect; }
	}
}
`

// startNginx serves dir. Without nginx it skips the test, or fails it if GGUF2GPU_REQUIRE names nginx.
func startNginx(t testing.TB, dir string) *nginx {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil { // not on the path of ordinary users
		program, err = exec.LookPath("/usr/sbin/nginx")
	}
	switch {
	case err == nil:
	case strings.Contains(os.Getenv("GGUF2GPU_REQUIRE"), "nginx"):
		t.Fatalf("GGUF2GPU_REQUIRE names nginx, but: %v", err)
	default:
		t.Skipf("there is no nginx (Debian: nginx-light; set GGUF2GPU_REQUIRE=nginx to make this a failure): %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // finds a free port
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	user := ""
	if os.Getuid() == 0 { // workers would become somebody who cannot read temporary files
		user = "user root;"
	}
	if dir, err = filepath.Abs(dir); err != nil {
		t.Fatal(err)
	}
	prefix := t.TempDir()
	config := filepath.Join(prefix, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, nginxConfig, user, address, dir+"/"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(program, "-p", prefix, "-c", config, "-e", "error.log")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	for range 500 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return &nginx{"http://" + address, cmd.Process.Pid}
		}
		time.Sleep(10 * time.Millisecond)
	}
	log, _ := os.ReadFile(filepath.Join(prefix, "error.log"))
	t.Fatalf("nginx does not listen:\n%s%s", out.Bytes(), log)
	return nil
}

// TestNginx loads from a real server in every way, and compares with the file.
func TestNginx(t *testing.T) {
	t.Parallel()
	n := startNginx(t, filepath.Dir(sample))
	dev, _ := openDevice(t, soft.Options{})
	c := remoteClient(t)
	local := openModel(t, sample)
	for _, path := range []string{"/", "/slow/", "/moved/"} {
		far := openRemote(t, c, n.address+path+filepath.Base(sample))
		for _, o := range []options{{Policy: plan.F32}, {Policy: plan.Raw, Hash: true}, remoteTight(plan.F16)} {
			if path == "/slow/" && o.Policy != plan.F32 { // once takes long enough
				continue
			}
			w, err := load(t.Context(), far, o, dev)
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			same(t, w.Plan(), contents(t, w), wanted(t, local, o))
			mustClose(t, w)
		}
	}
	if st := c.Stats(); st.Retries != 0 {
		t.Errorf("%+v", st)
	}
	if _, err := c.Open(t.Context(), n.address+"/whole/"+filepath.Base(sample)); !errors.Is(err, remote.ErrNoRanges) {
		t.Errorf("without ranges: %v", err)
	}
	if _, err := c.Open(t.Context(), n.address+"/none.gguf"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that does not exist: %v", err)
	}
}

func TestNginxSplit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	names := splitSample(t, dir)
	n := startNginx(t, dir)
	dev, _ := openDevice(t, soft.Options{})
	far := openRemote(t, remoteClient(t), n.address+"/"+names[1])
	w, err := load(t.Context(), far, options{}, dev)
	if err != nil {
		t.Fatal(err)
	}
	same(t, w.Plan(), contents(t, w), wanted(t, openModel(t, filepath.Join(dir, names[0])), options{}))
	if err := verify(t.Context(), w, far); err != nil {
		t.Error(err)
	}
	mustClose(t, w)
}

// TestNginxResets: every connection is reset after some bytes, in the midst of a reply.
func TestNginxResets(t *testing.T) {
	t.Parallel()
	n := startNginx(t, filepath.Dir(sample))
	dev, _ := openDevice(t, soft.Options{})
	proxy := startResetting(t, strings.TrimPrefix(n.address, "http://"), 150_000)
	c := remoteClient(t)
	local, far := openModel(t, sample), openRemote(t, c, "http://"+proxy+"/"+filepath.Base(sample))
	for _, o := range []options{{Policy: plan.BF16}, {Policy: plan.Raw}} {
		w, err := load(t.Context(), far, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		same(t, w.Plan(), contents(t, w), wanted(t, local, o))
		mustClose(t, w)
	}
	if st := c.Stats(); st.Retries < 10 {
		t.Errorf("%+v", st)
	}
}

// TestNginxMemory: HTTP takes no memory worth mentioning besides.
func TestNginxMemory(t *testing.T) {
	t.Parallel()
	if !alone(t) {
		return
	}
	path := sparse(t, 8, 8<<20) // 128 MiB
	n := startNginx(t, filepath.Dir(path))
	dev, _ := openDevice(t, soft.Options{})
	m := openRemote(t, remoteClient(t), n.address+"/"+filepath.Base(path))
	for _, d := range []plan.Policy{plan.Raw, plan.BF16} {
		boundedMemory(t, dev, m, options{Policy: d})
	}
}

// startResetting forwards connections to another address and resets each when so many bytes have come back. It returns
// where it listens.
func startResetting(t *testing.T, to string, after int64) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			all.Go(func() { io.Copy(server, client); server.Close() })
			all.Go(func() {
				if got, _ := io.CopyN(client, server, after); got == after {
					time.Sleep(5 * time.Millisecond) // a reset throws away what has not been read yet
					client.(*net.TCPConn).SetLinger(0)
				}
				client.Close()
				server.Close()
			})
		}
	})
	return l.Addr().String()
}

// TestNginxWorkersDie: all connections end at once, in the midst of a load, and new ones go on.
func TestNginxWorkersDie(t *testing.T) {
	t.Parallel()
	n := startNginx(t, filepath.Dir(sample))
	if len(n.workers()) == 0 {
		t.Skip("this kernel does not tell who nginx's workers are (/proc/PID/task/PID/children)")
	}
	dev, _ := openDevice(t, soft.Options{})
	c := remoteClient(t)
	local, far := openModel(t, sample), openRemote(t, c, n.address+"/slow/"+filepath.Base(sample))
	var once sync.Once
	o := remoteTight(plan.F16)
	o.Progress = func(int64, int64) {
		once.Do(func() {
			for _, pid := range n.workers() {
				worker, err := os.FindProcess(pid)
				if err == nil {
					err = worker.Kill()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	w, err := load(t.Context(), far, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	same(t, w.Plan(), contents(t, w), wanted(t, local, o))
	mustClose(t, w)
	if st := c.Stats(); st.Retries == 0 {
		t.Errorf("%+v", st)
	}
}

// workers are the processes that answer requests.
func (n *nginx) workers() (pids []int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", n.master, n.master))
	if err != nil {
		return nil
	}
	for s := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(s); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestNginxChanges: nginx's ETag tells that a file was replaced.
func TestNginxChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	put := func(data []byte, age time.Duration) {
		tmp, path := filepath.Join(dir, "tmp"), filepath.Join(dir, "m.gguf")
		at := time.Now().Add(-age)
		if err := errors.Join(os.WriteFile(tmp, data, 0o600), os.Chtimes(tmp, at, at), os.Rename(tmp, path)); err != nil {
			t.Fatal(err)
		}
	}
	put(data, time.Hour)
	n := startNginx(t, dir)
	dev, sw := openDevice(t, soft.Options{})
	far := openRemote(t, remoteClient(t), n.address+"/slow/m.gguf")
	var once sync.Once
	o := remoteTight(plan.F16)
	o.Connections = 1
	o.Progress = func(int64, int64) { once.Do(func() { put(data, 2*time.Hour) }) }
	w, err := load(t.Context(), far, o, dev)
	if w != nil || !errors.Is(err, remote.ErrChanged) || sw.Stats().Allocations != 0 {
		t.Errorf("got %v, %+v", err, sw.Stats())
	}
}

// BenchmarkRemote compares loads over loopback with a plain download of the same bytes over as many connections: at the
// pace of a server, and as fast as it goes. In the latter the software device's copies, which a GPU makes by itself,
// compete with all the rest for the CPU.
func BenchmarkRemote(b *testing.B) {
	const connections = 16
	path := sparse(b, 16, 16<<20) // 512 MiB
	n := startNginx(b, filepath.Dir(path))
	dev, _ := openDevice(b, soft.Options{})
	for _, at := range []string{"/paced/", "/"} {
		address := n.address + at + filepath.Base(path)
		m := openRemote(b, remoteClient(b), address)
		for _, what := range []string{"download", "keep"} {
			b.Run("at="+at+"/what="+what, func(b *testing.B) {
				b.SetBytes(int64(m.Size()))
				for b.Loop() {
					if err := download(address, int64(m.Size()), connections, what == "keep"); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		for _, d := range []plan.Policy{plan.Raw, plan.BF16} {
			b.Run("at="+at+"/what=load/dtype="+d.String(), func(b *testing.B) {
				b.SetBytes(int64(m.Size()))
				var transfer time.Duration
				for b.Loop() {
					w, err := load(b.Context(), m, options{Policy: d, Connections: connections}, dev)
					if err != nil {
						b.Fatal(err)
					}
					transfer += w.Report().Transfer
					w.Close()
				}
				b.ReportMetric(float64(m.Size())*float64(b.N)/transfer.Seconds()/1e6, "transfer-MB/s")
			})
		}
	}
}

// download fetches size bytes with requests of maxRange over so many connections. It keeps them in memory of their own,
// copied out of its buffers as a device has to, or does nothing with them.
func download(address string, size int64, connections int, keep bool) error {
	var kept mmap.MMap
	if keep {
		var err error
		if kept, err = mmap.MapRegion(nil, int(size), mmap.RDWR, mmap.ANON, 0); err != nil {
			return err
		}
		defer kept.Unmap()
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}
	defer client.CloseIdleConnections()
	var next atomic.Int64
	var all errgroup.Group
	for range connections {
		all.Go(func() error {
			buf := make([]byte, maxRange)
			for off := next.Add(maxRange) - maxRange; off < size; off = next.Add(maxRange) - maxRange {
				end := min(off+maxRange, size)
				req, err := http.NewRequest(http.MethodGet, address, nil)
				if err != nil {
					return err
				}
				req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, end-1))
				resp, err := client.Do(req)
				if err != nil {
					return err
				}
				_, err = io.ReadFull(resp.Body, buf[:end-off])
				if keep {
					copy(kept[off:end], buf)
				}
				if err = errors.Join(err, resp.Body.Close()); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return all.Wait()
}
