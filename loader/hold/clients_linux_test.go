package hold

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestClient talks to a Holder as 'hold --add' and its like do.
func TestClient(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{Memory: 14 << 20})
	ctx, c := t.Context(), Client{Socket: h.socket}
	if models, err := c.List(ctx); err != nil || len(models) != 0 {
		t.Errorf("%+v, %v", models, err)
	}
	if _, err := Attach(ctx, h.to(t, "")); !errors.Is(err, ErrUnknownModel) {
		t.Errorf("attached to nothing: %v", err)
	}
	raw := plan.Raw
	rule := plan.Rule{Name: regexp.MustCompile("norm"), Policy: plan.F32}
	models, err := c.Add(ctx, AddRequest{
		Path: sample, Name: "a", Policy: &raw, Rules: []plan.Rule{rule}, Tensors: regexp.MustCompile(`^blk\.0\.`),
	})
	if err != nil || len(models) != 1 || models[0].Name != "a" || models[0].Policy != plan.Raw ||
		!filepath.IsAbs(models[0].Path) {
		t.Fatalf("%+v, %v", models, err)
	}
	if models, err = c.Add(ctx, AddRequest{Path: sample}); err != nil || len(models) != 2 || models[1].Name != "tiny-llama" ||
		models[1].Policy != plan.F16 {
		t.Fatalf("%+v, %v", models, err)
	}
	for _, name := range []string{"a", "tiny-llama"} { // they make no room
		if models, err := c.Pin(ctx, name); err != nil || !models[0].Pinned {
			t.Fatalf("%+v, %v", models, err)
		}
	}
	garbage := filepath.Join(t.TempDir(), "garbage.gguf")
	if err := os.WriteFile(garbage, bytes.Repeat([]byte("nothing"), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		add  AddRequest
		want error
	}{
		"a name that is taken":  {AddRequest{Path: sample, Name: "a"}, ErrModelExists},
		"a file of other kind":  {AddRequest{Path: garbage}, ErrBadModel},
		"more than there is":    {AddRequest{Path: sample, Name: "b"}, loader.ErrInsufficientMemory},
		"a name of many lines":  {AddRequest{Path: sample, Name: "a\nb"}, loader.ErrBadOption},
		"a name that is long":   {AddRequest{Path: sample, Name: strings.Repeat("a", 256)}, loader.ErrBadOption},
		"a file without a name": {AddRequest{Path: "/.gguf"}, loader.ErrBadOption},
		"a file that is absent": {AddRequest{Path: filepath.Join(t.TempDir(), "x")}, nil},
		"no tensor":             {AddRequest{Path: sample, Name: "c", Tensors: regexp.MustCompile("^$")}, nil},
	} {
		_, err := c.Add(ctx, tt.add)
		if e, ok := errors.AsType[*Error](err); !ok || e.Text == "" || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := Attach(ctx, h.to(t, "")); !errors.Is(err, ErrUnknownModel) || !strings.Contains(err.Error(), `"a", "tiny-llama"`) {
		t.Errorf("attached to one of two: %v", err)
	}
	one, two := h.attach(t, "a"), h.attach(t, "tiny-llama")
	for _, x := range one.Tensors() {
		if !strings.HasPrefix(x.Name, "blk.0.") || strings.Contains(x.Name, "norm") != (x.Type == gguf.F32) {
			t.Errorf("%+v", x)
		}
	}
	f := openFile(t, sample)
	wantContents(t, one.Model, f)
	wantContents(t, two.Model, f)
	if _, err := c.Drop(ctx, "a"); !errors.Is(err, ErrAttached) {
		t.Errorf("dropped: %v", err)
	}
	if _, err := c.Drop(ctx, "b"); !errors.Is(err, ErrUnknownModel) {
		t.Errorf("dropped: %v", err)
	}
	mustClose(t, one)
	eventually(t, "it can be dropped", func() bool { models, err = c.Drop(ctx, "a"); return !errors.Is(err, ErrAttached) })
	if err != nil || len(models) != 1 || models[0].Name != "tiny-llama" || models[0].Attached != 1 {
		t.Errorf("%+v, %v", models, err)
	}
	wantContents(t, two.Model, f)
}

// TestClientLeft drops, from another process, a model whose memory a device keeps.
func TestClientLeft(t *testing.T) {
	t.Parallel()
	_, devices := openLeaky(t)
	c := tight()
	c.Stall = 100 * time.Millisecond
	h, err := New(devices, Options{Config: c})
	if err != nil {
		t.Fatal(err)
	}
	machine := soft.Of(devices[0].Runtime())
	machine.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 12, Stall: true})
	name, err := h.Add(t.Context(), "", sample)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Wait(t.Context(), name); !errors.Is(err, loader.ErrStalled) {
		t.Fatal(err)
	}
	r := errorReply(h.Drop(name))
	if err := r.err(); !errors.Is(err, loader.ErrStalled) || !strings.Contains(err.Error(), "device memory") {
		t.Errorf("told is %v", err)
	}
	if _, ok := errors.AsType[*loader.LeftError](h.Close()); !ok {
		t.Error("Close says nothing of it")
	}
	machine.ClearFaults()
}

// openLeaky is openSoft for a test that leaves memory.
func openLeaky(t *testing.T) (*amdhip.Runtime, []*amdhip.Device) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rt.Close() })
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return rt, []*amdhip.Device{dev}
}

// dialRaw connects without speaking the protocol.
func (h *testHolder) dialRaw(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", h.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestBadClients lets clients misbehave in many ways: each loses its connection, and all others go on.
func TestBadClients(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{requestTime: 50 * time.Millisecond}, soft.Options{}).with(t, "x", sample)
	a := h.attach(t, "x")
	for what, sent := range map[string]string{
		"noise":                   "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"a length without limit":  "\xff\xff\xff\xff",
		"a length above it":       "\x00\x01\x00\x01" + strings.Repeat(" ", 100),
		"half a length":           "\x00\x00",
		"half a message":          "\x00\x00\x00\x10{\"version\"",
		"no JSON":                 "\x00\x00\x00\x03abc",
		"JSON of another kind":    "\x00\x00\x00\x04[[]]",
		"wrong kinds in it":       frameOf(t, map[string]any{"version": "2", "op": 7}),
		"another version":         frameOf(t, request{Version: 1, Op: "attach"}),
		"no version":              frameOf(t, map[string]string{"op": "attach"}),
		"an unknown operation":    frameOf(t, request{Version: wireVersion, Op: "format"}),
		"a path that is relative": frameOf(t, request{Version: wireVersion, Op: "add", Path: "x.gguf"}),
		"a bad pattern":           frameOf(t, request{Version: wireVersion, Op: "add", Path: "/x", Tensors: "("}),
		"a bad rule":              frameOf(t, request{Version: wireVersion, Op: "add", Path: "/x", Rules: []string{"x=f64"}}),
		"a bad policy":            frameOf(t, request{Version: wireVersion, Op: "add", Path: "/x", Policy: "f64"}),
		"no such model":           frameOf(t, request{Version: wireVersion, Op: "attach", Model: strings.Repeat("y", 1000)}),
	} {
		conn := h.dialRaw(t)
		if _, err := conn.Write([]byte(sent)); err != nil {
			t.Fatal(err)
		}
		var r reply
		if err := readMessage(conn, &r, maxReply); err != nil || r.Error == "" || r.Manifest != nil {
			t.Errorf("%s: %v, %+v", what, err, r)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: the connection goes on", what)
		}
	}
	attach := frameOf(t, request{Version: wireVersion, Op: "attach"})
	// Those who go at once, in the middle of a message, or after it without taking the answer.
	for _, sent := range []string{"", "\x00", "\x00\x00\x00\x10{", attach, frameOf(t, request{Version: wireVersion, Op: "list"})} {
		conn := h.dialRaw(t)
		if _, err := io.WriteString(conn, sent); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	// One that attaches and then says more than it may.
	conn := h.dialRaw(t)
	if _, err := io.WriteString(conn, attach+"more"); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); n == 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	h.wantAttached(t, 1)
	wantContents(t, a.Model, openFile(t, sample))
	var metrics bytes.Buffer
	if err := h.WriteMetrics(&metrics); err != nil || !strings.Contains(metrics.String(), "gguf2gpu_refused_total") {
		t.Error(err)
	}
}

func frameOf(t *testing.T, v any) string {
	t.Helper()
	b, err := frame(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestHungClient attaches during a load and reads nothing of how that goes on: it counts as attached, and hinders
// nobody.
func TestHungClient(t *testing.T) {
	t.Parallel()
	c := tight()
	c.Staging = 2 * 64 << 10
	h := hold(t, Options{Config: c, Spec: plan.Spec{Policy: plan.F32}}, soft.Options{})
	h.stalled(t, amdhip.Success)
	conn := h.dialRaw(t)
	if _, err := io.WriteString(conn, frameOf(t, request{Version: wireVersion, Op: "attach"})); err != nil {
		t.Fatal(err)
	}
	h.wantAttached(t, 1)
	a := h.attach(t, "")
	h.soft.ClearFaults()
	wantContents(t, a.Model, openFile(t, sample))
	mustClose(t, a)
	h.wantAttached(t, 1)
	if err := h.Drop(""); !errors.Is(err, ErrAttached) {
		t.Errorf("dropped under a process that hangs: %v", err)
	}
	conn.Close()
	h.wantAttached(t, 0)
	if err := h.Drop(""); err != nil {
		t.Error(err)
	}
}

// TestTooManyClients lets no more in than there are places, and again when one is free.
func TestTooManyClients(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{maxClients: 2}, soft.Options{}).with(t, "", sample)
	h.attach(t, "")
	two := h.attach(t, "")
	if _, err := Attach(t.Context(), h.to(t, "")); err == nil || !strings.Contains(err.Error(), "2 clients are connected already") {
		t.Errorf("a third one: %v", err)
	}
	mustClose(t, two)
	eventually(t, "a place is free", func() bool {
		a, err := Attach(t.Context(), h.to(t, ""))
		if err == nil {
			mustClose(t, a)
		}
		return err == nil
	})
}

// TestHundredAttachments attaches and detaches again and again, and then the Holder has nothing more than before.
func TestHundredAttachments(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{}).with(t, "", sample)
	before := h.soft.Stats()
	for range 100 {
		a, err := Attach(t.Context(), h.to(t, ""))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Tensor(a.Tensors()[0].Name); err != nil {
			t.Fatal(err)
		}
		mustClose(t, a)
	}
	h.wantAttached(t, 0)
	if now := h.soft.Stats(); now != before {
		t.Errorf("%+v, before that %+v", now, before)
	}
	var metrics bytes.Buffer
	if err := h.WriteMetrics(&metrics); err != nil || !strings.Contains(metrics.String(), "\ngguf2gpu_attachments_total 100\n") {
		t.Errorf("%v, %s", err, &metrics)
	}
}

// TestRefused: a client that is turned away learns that it is about permissions.
func TestRefused(t *testing.T) {
	t.Parallel()
	r := errorReply(allowed(peer{pid: 1}, os.Geteuid()+1, nil, true))
	if err := r.err(); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "members of group") {
		t.Errorf("told is %v", err)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{LinkBytesPerSecond: 1e12}, soft.Options{}).with(t, `a "b" \c`, sample)
	h.attach(t, "")
	var b bytes.Buffer
	if err := h.WriteMetrics(&b); err != nil {
		t.Fatal(err)
	}
	sampleLine := regexp.MustCompile(`^[a-z0-9_]+(\{([a-z]+="([^"\\\n]|\\["\\n])*",?)+\})? [0-9.e+-]+$`)
	var metrics []string
	for line := range strings.Lines(b.String()) {
		line = strings.TrimSuffix(line, "\n")
		name, _, _ := strings.Cut(line, "{")
		name, _, _ = strings.Cut(name, " ")
		switch {
		case strings.HasPrefix(line, "# HELP "):
		case strings.HasPrefix(line, "# TYPE "):
			metrics = append(metrics, strings.Fields(line)[2])
		case !sampleLine.MatchString(line) || name != metrics[len(metrics)-1]:
			t.Errorf("line %q", line)
		}
	}
	for _, name := range []string{
		"models", "model_loaded", "model_device_bytes", "model_attached", "model_load_seconds", "model_link_efficiency",
		"attachments_total", "refused_total", "link_bytes_per_second",
	} {
		if !slices.Contains(metrics, "gguf2gpu_"+name) {
			t.Errorf("no %s", name)
		}
	}
	for _, line := range []string{
		"gguf2gpu_models 1\n", `gguf2gpu_model_attached{model="a \"b\" \\c",dtype="f16"} 1` + "\n", "gguf2gpu_attachments_total 1\n",
	} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("no %s in\n%s", line, &b)
		}
	}
}

// TestAttachCancelled ends Attach's context while the other side says nothing.
func TestAttachCancelled(t *testing.T) {
	t.Parallel()
	cause := errors.New("no longer")
	ctx, cancel := context.WithCancelCause(t.Context())
	socket := answering(t, func(conn net.Conn, r request) {
		if r.Op != "attach" || r.Model != "m" || r.Version != wireVersion {
			t.Errorf("%+v", r)
		}
		cancel(cause)
		_, _ = conn.Read(make([]byte, 1)) // it ends when the other side goes
	})
	to := AttachOptions{Socket: socket, Model: "m"}
	if _, err := Attach(ctx, to); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	if _, err := Attach(ctx, to); !errors.Is(err, cause) {
		t.Errorf("from the start: %v", err)
	}
}

// answering is the socket of somebody who answers one request. The test waits until answer has returned.
func answering(t *testing.T, answer func(conn net.Conn, r request)) (socket string) {
	t.Helper()
	socket = socketIn(t)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		var r request
		if err := readMessage(conn, &r, maxRequest); err != nil {
			t.Error(err)
		}
		answer(conn, r)
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return socket
}
