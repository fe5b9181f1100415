package hold

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const sample = "../../testdata/tiny-llama.gguf"

// openFile opens a model and closes it in the end.
func openFile(tb testing.TB, path string) *gguf.File {
	tb.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	return f
}

// framed is a message of these bytes.
func framed(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// allocates is what f allocates, in bytes.
func allocates(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// manifestOf is what a Holder would say of the sample model on so many devices.
func manifestOf(tb testing.TB, s plan.Spec, devices int) (*manifest, *plan.Plan) {
	tb.Helper()
	f := openFile(tb, sample)
	p, err := plan.New(f, s, make([]uint64, devices))
	if err != nil {
		tb.Fatal(err)
	}
	files, err := identify(f, "")
	if err != nil {
		tb.Fatal(err)
	}
	m := &manifest{
		Name: "sample", Policy: s.Policy, Files: files, FileBytes: p.FileBytes, ModelTensors: p.ModelTensors, Split: s.Split.By,
		Shard: manifestShard{By: p.Spec.Shard.By, Rank: p.Spec.Shard.Rank, World: p.Spec.Shard.World}, Residence: "0a",
		Share: ShareIPC,
	}
	for d := range devices {
		m.Devices = append(m.Devices, manifestDevice{Kind: "soft", Index: d, UUID: fmt.Sprint(d)})
		for _, n := range p.GroupOf(d).Arenas {
			m.Allocations = append(m.Allocations, manifestAllocation{Device: d, Handle: make([]byte, handleBytes), Bytes: n})
		}
	}
	for i := range p.Groups {
		g := manifestGroup{Devices: p.Groups[i].Devices}
		for j := range p.Groups[i].Tensors {
			t, err := describeTensor(&p.Groups[i].Tensors[j])
			if err != nil {
				tb.Fatal(err)
			}
			g.Tensors = append(g.Tensors, t)
		}
		m.Groups = append(m.Groups, g)
	}
	if err := m.fits(); err != nil {
		tb.Fatal(err)
	}
	return m, p
}

// specs are the ways to hold the sample model that are tested, by number of devices.
func specs() map[int]plan.Spec {
	return map[int]plan.Spec{
		1: {Policy: plan.Raw, Shard: plan.Shard{By: plan.ShardLayers, World: 2}},
		2: {Policy: plan.F16},
		3: {Policy: plan.F32, Split: plan.Split{By: plan.SplitNone}},
	}
}

// TestManifest wants the plan of a manifest to be that of the model, and to be cut in the same way.
func TestManifest(t *testing.T) {
	t.Parallel()
	for devices, s := range specs() {
		m, want := manifestOf(t, s, devices)
		got, err := m.plan()
		if err != nil {
			t.Fatal(err)
		}
		if got.DeviceBytes() != want.DeviceBytes() || got.ReadBytes() != want.ReadBytes() || got.Len() != want.Len() ||
			got.FileBytes != want.FileBytes || got.ModelTensors != want.ModelTensors || got.Devices != devices {
			t.Errorf("%+v, want %+v", got, want)
		}
		all := want.Tensors()
		for i, g := range got.Tensors() {
			w := all[i]
			if g.Target != w.Target || g.Bytes != w.Bytes || g.Arena != w.Arena || g.DeviceOffset != w.DeviceOffset ||
				!cmp.Equal(w.Tensor, g.Tensor) {
				t.Errorf("%+v, want %+v", g, w)
			}
		}
		o := plan.CutOptions{Bytes: 1 << 16, Ramp: 3}
		for i := range want.Groups {
			if diff := cmp.Diff(want.Groups[i].Cut(o), got.Groups[i].Cut(o)); diff != "" {
				t.Error(diff)
			}
		}
	}
}

// FuzzReply reads what a Holder sends. Whatever it is, nothing panics, no tensor is outside of its allocation or over
// another one, memory is bounded by the message, and reading back would not leave the allocations either.
func FuzzReply(f *testing.F) {
	for devices, s := range specs() {
		m, _ := manifestOf(f, s, devices)
		good, err := frame(reply{Version: wireVersion, Manifest: m, Ready: 3})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(good[4:])
	}
	file := `"name":"m","files":[{"path":"/m","size":1000,"header_sha256":"` + strings.Repeat("00", 32) + `"}],"file_bytes":1000,` +
		`"model_tensors":9,"share":"ipc","devices":[{"kind":"soft"}],`
	handle := `"handle":"` + strings.Repeat("A", 86) + `=="`
	for _, s := range []string{
		``, `{}`, `[]`, `null`, `{"version":3,"error":"x","kind":"memory"}`, `{"ready":-1,"loaded":true}`, `{"models":[{},{},{}]}`,
		`{"manifest":{` + file + `"policy":"raw","allocations":[{"bytes":512,` + handle + `},{"bytes":256,` + handle + `}],` +
			`"groups":[{"devices":[0],"tensors":[` +
			`{"name":"a","type":"Q8_0","target":"Q8_0","shape":[32,2],"size":68,"bytes":68,"allocation":0,"at":0},` +
			`{"name":"b","type":"F32","target":"F16","shape":[0],"size":0,"bytes":0,"allocation":0,"at":512},` +
			`{"name":"c","type":"F32","target":"F32","shape":[4,4],"slice":{"dim":0,"ranges":[[0,1],[2,3]]},` +
			`"size":64,"bytes":32,"allocation":1,"at":0}]}]}}`,
		`{"waiting":"x","ending":true,"manifest":{` + strings.Replace(file, `"ipc"`, `"fd"`, 1) + `"residence":"0f","allocations":[` +
			`{"bytes":512,"size":2097152,"address":4096}],"groups":[{"devices":[0],"tensors":[` +
			`{"name":"a","type":"Q8_0","target":"Q8_0","shape":[32,2],"size":68,"bytes":68}]}]}}`,
		`{"manifest":{` + file + `"allocations":[{"bytes":18446744073709551615},{"bytes":2}],"groups":[{"tensors":[` +
			`{"name":"a","type":"F32","target":"F16","shape":[9223372036854775807,2],"size":-4,"bytes":18446744073709551614,"at":2}]}]}}`,
		`{"manifest":{` + file + `"groups":[{"devices":[0],"tensors":[` + strings.Repeat(`{},`, 500) + `{}]}]}}`,
		`{"manifest":{` + file + `"groups":[` + strings.Repeat(`{},`, 500) + `{}]}}`,
		`{"manifest":{"devices":[` + strings.Repeat(`{},`, 500) + `{}]}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r reply
		var p *plan.Plan
		var err error
		n := allocates(func() {
			if err = readMessage(bytes.NewReader(framed(b)), &r, maxReply); err == nil && r.Manifest != nil {
				p, err = r.Manifest.plan()
			}
		})
		if limit := uint64(2<<20 + 600*len(b)); n > limit {
			t.Errorf("%d bytes make it allocate %d", len(b), n)
		}
		if e := r.err(); e != nil && e.Error() != r.Error {
			t.Errorf("error %q became %q", r.Error, e)
		}
		if err != nil || p == nil {
			return
		}
		seen := make(map[string]bool)
		for i := range p.Groups {
			checkGroup(t, &p.Groups[i], seen)
		}
	})
}

// checkGroup wants every tensor in its place, and every chunk that is read back, too.
func checkGroup(t *testing.T, g *plan.Group, seen map[string]bool) {
	ends := make([]uint64, len(g.Arenas))
	for i := range g.Tensors {
		x := &g.Tensors[i]
		if seen[x.Name] {
			t.Fatalf("tensor %q is there twice", x.Name)
		}
		seen[x.Name] = true
		if x.DeviceOffset < ends[x.Arena] || x.DeviceOffset%plan.Align != 0 || x.DeviceOffset+x.Bytes < x.DeviceOffset ||
			x.DeviceOffset+x.Bytes > g.Arenas[x.Arena] {
			t.Fatalf("tensor %q is at %d to %d of %d bytes, after %d", x.Name, x.DeviceOffset, x.DeviceOffset+x.Bytes, g.Arenas[x.Arena],
				ends[x.Arena])
		}
		ends[x.Arena] = x.DeviceOffset + x.Bytes
	}
	size := int(max(plan.MinChunk, (g.DeviceBytes/512+plan.MinChunk-1)/plan.MinChunk*plan.MinChunk))
	bytes := make([]uint64, len(g.Tensors))
	for _, c := range g.Cut(plan.CutOptions{Bytes: size}) {
		if c.Bytes > size || c.Offset+uint64(c.Bytes) > g.Arenas[c.Arena] {
			t.Fatalf("a chunk of %d bytes at %d of %d", c.Bytes, c.Offset, g.Arenas[c.Arena])
		}
		for _, s := range c.Segs {
			x := &g.Tensors[s.Tensor]
			if s.Dst < 0 || s.DstBytes <= 0 || s.Dst+s.DstBytes > c.Bytes || s.Src < 0 || s.Src+int64(s.SrcBytes) > x.Size ||
				c.Offset+uint64(s.Dst) != x.DeviceOffset+g.TensorOffset(&s) {
				t.Fatalf("segment %+v of %+v", s, x)
			}
			if lo, hi := x.Span(s.Src, int64(s.SrcBytes)); lo < 0 || hi < lo {
				t.Fatalf("segment %+v of %+v is at %d to %d of its file", s, x, lo, hi)
			}
			bytes[s.Tensor] += uint64(s.DstBytes)
		}
	}
	for i, n := range bytes {
		if n != g.Tensors[i].Bytes {
			t.Fatalf("%d bytes of tensor %q are read, of %d", n, g.Tensors[i].Name, g.Tensors[i].Bytes)
		}
	}
}

// FuzzRequest reads what a client sends.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"version":3,"op":"attach","model":"m"}`, `{"version":3,"op":"list","later":[1]}`,
		`{"version":3,"op":"add","path":"/m-00001-of-00002.gguf","policy":"raw","rules":["norm=f32","(=f16"],"tensors":"^blk"}`,
		`{"version":3,"op":"attach","rank":1,"world":4}`, `{"version":3,"op":"attach","rank":-1,"world":-1}`,
		`{"version":3,"op":"attach","residence":"0f"}`, `{"version":3,"op":"sleep","model":"m"}`,
		`{"op":"add","model":"\u0000","tensors":"((a{1000}){1000}){1000}"}`, `{"rules":["","",""]}`,
	} {
		f.Add(framed([]byte(s)))
	}
	f.Add([]byte{0, 1, 0, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, '{'})
	h := new(Holder)
	f.Fuzz(func(t *testing.T, b []byte) {
		var r request
		var err error
		n := allocates(func() { err = readMessage(bytes.NewReader(b), &r, maxRequest) })
		if n > uint64(1<<20+100*len(b)) {
			t.Errorf("%d bytes make it allocate %d", len(b), n)
		}
		if err != nil {
			return
		}
		if len(b) > 4+maxRequest && binary.BigEndian.Uint32(b) > maxRequest {
			t.Error("a message above the limit was read")
		}
		if s, err := h.specOf(&r); err == nil && len(s.Rules) != len(r.Rules) {
			t.Errorf("%d rules of %d", len(s.Rules), len(r.Rules))
		}
		m, err := newHeld(r.Model, r.Path, false)
		if err == nil && (len(m.name) > maxName || m.name == "" || strings.ContainsAny(m.name, "\x00\n\x1b")) {
			t.Errorf("a model is called %q", m.name)
		}
	})
}

// TestWireErrors takes each error over the wire.
func TestWireErrors(t *testing.T) {
	t.Parallel()
	for _, e := range wireErrors {
		r := errorReply(errors.Join(errors.New("before"), e.holder))
		if err := r.err(); !errors.Is(err, e.client) || err.Error() != "before\n  "+e.holder.Error() {
			t.Errorf("%v became %v", e.holder, err)
		}
	}
	r := errorReply(&gguf.FormatError{Path: "x", Err: gguf.ErrTruncated})
	if err := r.err(); !errors.Is(err, ErrBadModel) {
		t.Error(err)
	}
	r = errorReply(io.ErrUnexpectedEOF)
	if err := r.err(); err == nil || errors.Unwrap(err) != nil {
		t.Errorf("an error of no kind became %v", err)
	}
}
