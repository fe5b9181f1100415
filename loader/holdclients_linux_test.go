package loader

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// TestHolderClient talks to a Holder as 'hold --add' and its like do.
func TestHolderClient(t *testing.T) {
	h := hold(t, HolderOptions{Load: Options{DType: F16}}, amdhip.SoftwareOptions{Memory: 14 << 20})
	ctx, c := t.Context(), HolderClient{Socket: h.socket}
	if models, err := c.List(ctx); err != nil || len(models) != 0 {
		t.Errorf("%+v, %v", models, err)
	}
	if _, err := Attach(ctx, h.socket, ""); !errors.Is(err, ErrUnknownModel) {
		t.Errorf("attached to nothing: %v", err)
	}
	raw := Raw
	rule := Rule{Name: regexp.MustCompile("norm"), DType: F32}
	models, err := c.Add(ctx, AddRequest{Path: sample, Name: "a", DType: &raw, Rules: []Rule{rule}, Tensors: regexp.MustCompile(`^blk\.0\.`)})
	if err != nil || len(models) != 1 || models[0].Name != "a" || models[0].DType != "raw" || !filepath.IsAbs(models[0].Path) {
		t.Fatalf("%+v, %v", models, err)
	}
	if models, err = c.Add(ctx, AddRequest{Path: sample}); err != nil || len(models) != 2 || models[1].Name != "tiny-llama" || models[1].DType != "f16" {
		t.Fatalf("%+v, %v", models, err)
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
		"more than there is":    {AddRequest{Path: sample, Name: "b"}, ErrInsufficientMemory},
		"a name of many lines":  {AddRequest{Path: sample, Name: "a\nb"}, ErrBadOption},
		"a name that is long":   {AddRequest{Path: sample, Name: strings.Repeat("a", 256)}, ErrBadOption},
		"a file that is absent": {AddRequest{Path: filepath.Join(t.TempDir(), "x")}, nil},
		"no tensor":             {AddRequest{Path: sample, Name: "c", Tensors: regexp.MustCompile("^$")}, nil},
	} {
		_, err := c.Add(ctx, tt.add)
		if e, ok := errors.AsType[*HolderError](err); !ok || e.Text == "" || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := Attach(ctx, h.socket, ""); !errors.Is(err, ErrUnknownModel) || !strings.Contains(err.Error(), `"a", "tiny-llama"`) {
		t.Errorf("attached to one of two: %v", err)
	}
	one, two := h.attach(t, "a"), h.attach(t, "tiny-llama")
	for _, x := range one.Tensors() {
		if !strings.HasPrefix(x.Name, "blk.0.") || strings.Contains(x.Name, "norm") != (x.DType.String() == "F32") {
			t.Errorf("%+v", x)
		}
	}
	m := openModel(t, sample)
	if err := errors.Join(one.Use(m), one.Verify(ctx), two.Use(m), two.Verify(ctx)); err != nil {
		t.Error(err)
	}
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
	if err := two.Verify(ctx); err != nil {
		t.Errorf("the other model: %v", err)
	}
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

// TestBadClients lets clients misbehave in every way: each loses its connection, and all others go on.
func TestBadClients(t *testing.T) {
	h := hold(t, HolderOptions{requestTime: 50 * time.Millisecond}, amdhip.SoftwareOptions{}).with(t, "x", sample)
	w := h.attach(t, "x")
	for what, sent := range map[string]string{
		"noise":                   "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"a length without limit":  "\xff\xff\xff\xff",
		"a length above it":       "\x00\x01\x00\x01" + strings.Repeat(" ", 100),
		"half a length":           "\x00\x00",
		"half a message":          "\x00\x00\x00\x10{\"version\"",
		"no JSON":                 "\x00\x00\x00\x03abc",
		"JSON of another kind":    "\x00\x00\x00\x04[[]]",
		"wrong kinds in it":       frameOf(t, map[string]any{"version": "1", "op": 7}),
		"another version":         frameOf(t, request{Version: 2, Op: "attach"}),
		"no version":              frameOf(t, map[string]string{"op": "attach"}),
		"an unknown operation":    frameOf(t, request{Version: 1, Op: "format"}),
		"a path that is relative": frameOf(t, request{Version: 1, Op: "add", Model: "x.gguf"}),
		"a bad pattern":           frameOf(t, request{Version: 1, Op: "add", Model: "/x", Tensors: "("}),
		"a bad rule":              frameOf(t, request{Version: 1, Op: "add", Model: "/x", Rules: []string{"x=f64"}}),
		"a bad dtype":             frameOf(t, request{Version: 1, Op: "add", Model: "/x", DType: "f64"}),
		"no such model":           frameOf(t, request{Version: 1, Op: "attach", Model: strings.Repeat("y", 1000)}),
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
	// Those who go at once, in the middle of a message, or after it without taking the answer.
	for _, sent := range []string{"", "\x00", "\x00\x00\x00\x10{", frameOf(t, request{Version: 1, Op: "attach"}), frameOf(t, request{Version: 1, Op: "list"})} {
		conn := h.dialRaw(t)
		if _, err := io.WriteString(conn, sent); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	// Those who attach and then talk: they are done.
	conn := h.dialRaw(t)
	if _, err := io.WriteString(conn, frameOf(t, request{Version: 1, Op: "attach"})+"more"); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); n == 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	h.wantAttached(t, 1)
	if err := errors.Join(w.Use(openModel(t, sample)), w.Verify(t.Context())); err != nil {
		t.Errorf("who was attached: %v", err)
	}
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

// TestHungClient attaches during a load and takes no word of it: it counts as attached, and hinders nobody.
func TestHungClient(t *testing.T) {
	o := tight
	o.Chunk, o.Staging, o.DType = 64<<10, 2*64<<10, F32
	h := hold(t, HolderOptions{Load: o}, amdhip.SoftwareOptions{})
	h.stalled(t, amdhip.Success)
	conn := h.dialRaw(t)
	if _, err := io.WriteString(conn, frameOf(t, request{Version: 1, Op: "attach"})); err != nil {
		t.Fatal(err)
	}
	h.wantAttached(t, 1)
	w := h.attach(t, "")
	h.soft.ClearFaults()
	if err := errors.Join(w.WaitAll(t.Context()), w.Use(openModel(t, sample)), w.Verify(t.Context())); err != nil {
		t.Error(err)
	}
	mustClose(t, w)
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
	h := hold(t, HolderOptions{maxClients: 2}, amdhip.SoftwareOptions{}).with(t, "", sample)
	h.attach(t, "")
	two := h.attach(t, "")
	if _, err := Attach(t.Context(), h.socket, ""); err == nil || !strings.Contains(err.Error(), "2 clients are connected already") {
		t.Errorf("a third one: %v", err)
	}
	mustClose(t, two)
	eventually(t, "a place is free", func() bool {
		w, err := Attach(t.Context(), h.socket, "")
		if err == nil {
			mustClose(t, w)
		}
		return err == nil
	})
}

// TestHundredAttachments attaches and detaches again and again, and then nothing more is in use than before.
func TestHundredAttachments(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{}).with(t, "", sample)
	cycle := func() {
		w, err := Attach(t.Context(), h.socket, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Tensor(w.Tensors()[0].Name); err != nil {
			t.Fatal(err)
		}
		mustClose(t, w)
	}
	for range 3 { // what is made once is there now
		cycle()
	}
	h.wantAttached(t, 0)
	before := measure(h.soft)
	for range 100 {
		cycle()
	}
	h.wantAttached(t, 0)
	wantBack(t, h.soft, before)
	var metrics bytes.Buffer
	if err := h.WriteMetrics(&metrics); err != nil || !strings.Contains(metrics.String(), "\ngguf2gpu_attachments_total 103\n") {
		t.Errorf("%v, %s", err, &metrics)
	}
}

// TestAttachCancelled ends Attach's context while the other side says nothing.
func TestAttachCancelled(t *testing.T) {
	before := measure(nil)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("no longer")
	ctx, cancel := context.WithCancelCause(t.Context())
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
		if err := readMessage(conn, &r, maxRequest); err != nil || r.Op != "attach" || r.Model != "m" || r.Version != 1 {
			t.Errorf("%+v, %v", r, err)
		}
		cancel(cause)
		_, _ = conn.Read(make([]byte, 1))
	}()
	if _, err := Attach(ctx, l.Addr().String(), "m"); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	<-ended
	if _, err := Attach(ctx, l.Addr().String(), "m"); !errors.Is(err, cause) {
		t.Errorf("from the start: %v", err)
	}
	l.Close()
	wantBack(t, nil, before)
}

// TestBadHolder lets the other side answer attach with what no Holder should.
func TestBadHolder(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{}).with(t, "", sample)
	held, err := h.find("")
	if err != nil {
		t.Fatal(err)
	}
	good := frameOf(t, reply{Version: 1, Manifest: held.manifest, Loaded: true})
	change := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the manifest has no %s", old)
		}
		changed := strings.Replace(good[4:], old, new, 1)
		return string([]byte{byte(len(changed) >> 24), byte(len(changed) >> 16), byte(len(changed) >> 8), byte(len(changed))}) + changed
	}
	before := measure(h.soft)
	for what, tt := range map[string]struct{ sent, want string }{
		"nothing":             {"", "gone"},
		"half a message":      {good[:100], "unexpected EOF"},
		"no manifest":         {frameOf(t, reply{Version: 1}), "no manifest"},
		"too long a message":  {"\x7f\x00\x00\x00", "limit"},
		"an error":            {frameOf(t, errorReply(ErrAttached)), ErrAttached.Error()},
		"a handle of no size": {change(`"handle":"`, `"handle":"AAAA`), "IPC handle"},
		"a handle of nothing": {change(`"handle":"c29mdGd`, `"handle":"c29mdGe`), "hipIpcOpenMemHandle"},
		"another device":      {change(`"kind":"soft"`, `"kind":"cuda"`), "unknown kind"},
		"no such device":      {change(`"uuid":"`, `"uuid":"x`), "does not see the device"},
		"too many devices":    {change(`"index":0`, `"index":64`), "devices"},
		"another dtype":       {change(`"dtype":"f16"`, `"dtype":"f15"`), "unknown dtype"},
		"another type":        {change(`"dtype":"F16"`, `"dtype":"F15"`), "unknown tensor type"},
		"another arena":       {change(`"arena":0`, `"arena":1`), "not in allocation"},
		"no arena":            {change(`"arena":0`, `"arena":-1`), "not in allocation"},
		"an odd offset":       {change(`"offset":0`, `"offset":1`), "no multiple"},
		"a wrong order":       {change(`"offset":0`, `"offset":512`), "before the end"},
		"another shape":       {change(`"shape":[`, `"shape":[2,`), "elements"},
		"a huge shape":        {change(`"shape":[`, `"shape":[9223372036854775807,`), "overflows"},
	} {
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
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
			_, _ = io.WriteString(conn, tt.sent)
		}()
		w, err := Attach(t.Context(), l.Addr().String(), "")
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", what, err, tt.want)
		}
		if err == nil {
			mustClose(t, w)
		}
		<-ended
		l.Close()
	}
	wantBack(t, h.soft, before)
}
