package hold

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// hostile are messages that a hostile Holder may send: JSON of about so many bytes.
func hostile(t *testing.T, size int) map[string]string {
	t.Helper()
	m, _ := manifestOf(t, plan.Spec{Policy: plan.F16}, 1)
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	good := strings.Replace(string(text), fmt.Sprintf(`"model_tensors":%d`, m.ModelTensors), `"model_tensors":1000000`, 1)
	many := func(head, piece, tail string) string {
		n := (size - len(head) - len(tail)) / len(piece)
		return head + strings.TrimSuffix(strings.Repeat(piece, n), ",") + tail
	}
	tensor, err := json.Marshal(m.Groups[0].Tensors[0])
	if err != nil {
		t.Fatal(err)
	}
	// Half of the message is a manifest of one device with many allocations, which groups are then to have, too.
	var ipc manifest
	if err := json.Unmarshal(text, &ipc); err != nil {
		t.Fatal(err)
	}
	ipc.Share, ipc.Groups = ShareIPC, nil
	ipc.Allocations = slices.Repeat([]manifestAllocation{{Handle: make([]byte, handleBytes)}}, size/2/130)
	text, err = json.Marshal(reply{Version: wireVersion, Manifest: &ipc})
	if err != nil {
		t.Fatal(err)
	}
	halves := strings.Replace(string(text), `"groups":[]}}`, `"groups":[`, 1)
	halves = strings.Replace(halves, `"groups":null}}`, `"groups":[`, 1)
	return map[string]string{
		"empty tensors":     many(`{"version":2,"manifest":{"groups":[{"tensors":[`, `{},`, `]}]}}`),
		"short tensors":     many(`{"version":2,"manifest":{"groups":[{"tensors":[`, `{"name":"x"},`, `]}]}}`),
		"the same tensor":   many(`{"version":2,"manifest":`+strings.TrimSuffix(good, "]}]}")+",", string(tensor)+",", `]}]}}`),
		"tensors, padded":   many(`{"version":2,"manifest":{"groups":[{"tensors":[`, `{"y":"`+strings.Repeat("y", 72)+`"},`, `]}]}}`),
		"empty groups":      many(`{"version":2,"manifest":{"groups":[`, `{},`, `]}}`),
		"empty devices":     many(`{"version":2,"manifest":{"devices":[`, `{},`, `]}}`),
		"empty models":      many(`{"version":2,"models":[`, `{},`, `]}`),
		"models, padded":    many(`{"version":2,"models":[`, `{"y":"`+strings.Repeat("y", 72)+`"},`, `]}`),
		"dimensions":        many(`{"version":2,"manifest":{"groups":[{"tensors":[{"shape":[`, `1,`, `]}]}]}}`),
		"long dimensions":   many(`{"version":2,"manifest":{"groups":[{"tensors":[{"shape":[`, `1000,`, `]}]}]}}`),
		"ranges":            many(`{"version":2,"manifest":{"groups":[{"tensors":[{"slice":{"ranges":[`, `[],`, `]}}]}]}}`),
		"long ranges":       many(`{"version":2,"manifest":{"groups":[{"tensors":[{"slice":{"ranges":[`, `[10000000,99],`, `]}}]}]}}`),
		"a number":          many(`{"version":`, `9`, `}`),
		"an error":          many(`{"version":2,"error":"`, `x`, `"}`),
		"a name":            many(`{"version":2,"manifest":{"name":"`, `x`, `"}}`),
		"escapes":           many(`{"version":2,"manifest":{"name":"`, `\u0001`, `"}}`),
		"nesting":           many(``, `[`, ``),
		"unknown objects":   many(`{"version":2,"x":[`, `{"a":{}},`, `]}`),
		"a group's devices": many(halves+`{"devices":[`, `0000,`, `]}]}}`),
		"groups of devices": many(halves, `{"devices":[0],"y":"`+strings.Repeat("y", 70)+`"},`, `]}}`),
		"long texts":        many(strings.TrimSuffix(good, "}")+`,"architecture":"`, `x`, `"}`),
		"the same manifest": many(`{"version":2,`, `"manifest":`+good+`,`, `}`),
		"no JSON":           many(``, "\x00", ``),
		"a string open":     many(`{"version":2,"manifest":"`, `\"`, ``),
	}
}

// peak is how much memory f takes from the system at most, as far as looking at it again and again shows.
func peak(f func()) (most uint64) {
	taken := func() uint64 {
		s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
		metrics.Read(s)
		return s[0].Value.Uint64() - s[1].Value.Uint64()
	}
	debug.FreeOSMemory()
	before := taken()
	ended, looked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(looked)
		for {
			most = max(most, taken())
			select {
			case <-ended:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	f()
	close(ended)
	<-looked
	return most - min(before, most)
}

// TestHostileMessages wants a message of many MiB to cost at most eight times its size, whatever is in it, and what is
// said about it to be short. It looks at the memory of the process, so that no other test may run meanwhile.
func TestHostileMessages(t *testing.T) {
	size := maxReply / 4 // the whole takes several seconds, and costs as much for its size
	if testing.Short() {
		size >>= 3
	}
	for name, text := range hostile(t, size) {
		message := framed([]byte(text))
		var failed error
		cost := peak(func() {
			var r reply
			if failed = readMessage(bytes.NewReader(message), &r, maxReply); failed == nil {
				failed = r.err()
			}
			if failed == nil && r.Manifest != nil {
				_, failed = r.Manifest.plan()
			}
		})
		if most := uint64(8 * len(message)); cost > most {
			t.Errorf("%s: %d bytes cost %d more, which is %.1f times as many: %v", name, len(message), cost,
				float64(cost)/float64(len(message)), failed)
		}
		t.Logf("%s: %.1f times its size", name, float64(cost)/float64(len(message)))
		if failed != nil && len(failed.Error()) > 2*maxErrorText {
			t.Errorf("%s: an error of %d bytes", name, len(failed.Error()))
		}
	}
}

// TestRejoinRefuses: what a process says that takes the socket of a Holder changes nothing for who is attached, whose
// memory stays: an error, another model, another manifest under the same residence, descriptors that nobody asked for.
func TestRejoinRefuses(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{Share: ShareFD}, soft.Options{}).with(t, "", sample)
	held, err := h.find("")
	if err != nil {
		t.Fatal(err)
	}
	socket := socketIn(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	other := *held.now.manifest
	other.Residence = newID()
	same := *held.now.manifest
	same.Groups, same.Files, same.Devices = nil, nil, nil
	answers := []reply{
		{Error: "no", Kind: "memory"}, {Manifest: &other, Loaded: true}, {}, {Loaded: true}, {Ending: true}, {Manifest: &same},
	}
	files := held.now.memory.files()
	read, write, err := os.Pipe() // one end goes with each answer: when nobody has it any more, the other one ends
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	served, last := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(served)
		for n := 0; ; n++ {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			var q request
			if err := readMessage(conn, &q, maxRequest); err != nil {
				t.Error(err)
			}
			r, with := reply{Version: wireVersion, Manifest: held.now.manifest, Loaded: true}, files
			if n > 0 {
				r = answers[min(n, len(answers))-1]
				r.Version, with = wireVersion, []*os.File{write}
			}
			err = writeWithFiles(conn, r, with)
			if err == nil && n == 0 {
				err = writeMessage(conn, reply{Version: wireVersion, Error: "no more", Kind: "memory"})
			}
			if err != nil {
				t.Error(err)
			}
			if n == len(answers) {
				close(last)
				_, _ = conn.Read(make([]byte, 1)) // until the other side goes
				conn.Close()
				return
			}
			conn.Close()
		}
	}()
	rt, err := opener(t)("soft", 1)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	a, err := Attach(t.Context(), AttachOptions{Socket: socket, Devices: []*amdhip.Device{dev}})
	if err != nil {
		t.Fatal(err)
	}
	<-last
	eventually(t, "it has found the last one", func() bool { return !a.Alone() })
	wantContents(t, a.Model, openFile(t, sample))
	write.Close()
	if n, err := read.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) { // before the test's time is over
		t.Errorf("the descriptors that came with answers: %v", err)
	}
	select {
	case <-a.Gone():
		t.Error("the model is gone")
	default:
	}
	mustClose(t, a)
	<-served
	l.Close()
}

// TestLargeMessage: a message of a real model with many tensors, as large as they come, is no hostile one.
func TestLargeMessage(t *testing.T) {
	t.Parallel()
	for devices, spec := range specs() {
		m, _ := manifestOf(t, spec, devices)
		group := &m.Groups[0]
		for i := range 20000 {
			x := group.Tensors[i%40%len(group.Tensors)]
			x.Name = fmt.Sprintf("blk.%d.attn_q.weight", i)
			x.Slice = &manifestSlice{Dim: 1, Ranges: [][2]uint64{{0, 64}, {128, 192}}}
			group.Tensors = append(group.Tensors, x)
		}
		b, err := frame(reply{Version: wireVersion, Manifest: m})
		if err != nil {
			t.Fatal(err)
		}
		var r reply
		if err := readMessage(bytes.NewReader(b), &r, maxReply); err != nil {
			t.Errorf("%d devices: %v", devices, err)
		}
	}
}

// TestMappedSize refuses memory that is smaller than the Holder says: what is behind it belongs to nobody.
func TestMappedSize(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{}).with(t, "", sample)
	held, err := h.find("")
	if err != nil {
		t.Fatal(err)
	}
	m := *held.now.manifest
	m.Allocations = append([]manifestAllocation(nil), m.Allocations...)
	m.Allocations[0].Bytes += 4 << 20 // more than the allocation is rounded up to
	to := AttachOptions{Open: opener(t), Socket: answering(t, func(conn net.Conn, _ request) {
		_, _ = io.WriteString(conn, frameOf(t, reply{Version: 2, Manifest: &m, Loaded: true}))
	})}
	a, err := Attach(t.Context(), to)
	if err == nil || !strings.Contains(err.Error(), "bytes are mapped") {
		t.Errorf("%v, want the sizes", err)
	}
	if err == nil {
		mustClose(t, a)
	}
}

// TestSilentHolder gives up on a Holder that takes a connection and says nothing.
func TestSilentHolder(t *testing.T) {
	t.Parallel()
	to := AttachOptions{
		Open: opener(t), silentTime: 50 * time.Millisecond,
		Socket: answering(t, func(conn net.Conn, _ request) { _, _ = conn.Read(make([]byte, 1)) }),
	}
	if _, err := Attach(t.Context(), to); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want that the deadline was exceeded", err)
	}
}

// TestGroupMember takes every place that other users have, with attachments of one member of the group. The owner still
// lists, drops and attaches.
func TestGroupMember(t *testing.T) {
	t.Parallel()
	var member atomic.Bool // who connects
	const places = 64
	h := hold(t, Options{AllowGroup: true, maxClients: places, peer: func(conn *net.UnixConn, group bool) (peer, error) {
		from, err := checkPeer(conn, group)
		from.owner = !member.Load()
		return from, err
	}}, soft.Options{}).with(t, "a", sample).with(t, "b", sample)
	member.Store(true)
	var conns []net.Conn
	for range places + 10 {
		conn, err := net.Dial("unix", h.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
		err = writeMessage(conn, request{Version: wireVersion, Op: "attach", Model: "a"})
		if err != nil && !errors.Is(err, syscall.EPIPE) { // one that is refused may be answered before it asks
			t.Fatal(err)
		}
	}
	refused := 0
	for _, conn := range conns {
		var r reply
		if err := readMessage(conn, &r, maxReply); err != nil {
			t.Fatal(err)
		}
		if r.Error != "" {
			refused++
		}
	}
	if refused != 10 {
		t.Errorf("%d of %d are refused, want 10", refused, len(conns))
	}
	member.Store(false)
	c := Client{Socket: h.socket}
	models, err := c.List(context.Background())
	if err != nil || len(models) != 2 || models[0].Attached != places {
		t.Errorf("list: %v, %+v", err, models)
	}
	if _, err := c.Drop(context.Background(), "b"); err != nil {
		t.Errorf("drop: %v", err)
	}
	h.attach(t, "a")
}

// TestIPCNeeds: only HIP 7 wants what HIP 7 wants; the command's TestIPCOfHIP7 has that.
func TestIPCNeeds(t *testing.T) {
	t.Parallel()
	_, devices := openSoft(t, soft.Options{})
	if got := ipcNeeds(devices[0]); got != inContainers {
		t.Errorf("on the software device: %q", got)
	}
}
