package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

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

// sampleManifest describes the sample model as a Holder would.
func sampleManifest(tb testing.TB, o Options) *manifest {
	tb.Helper()
	m := openModel(tb, sample)
	p, err := NewPlan(m, o)
	if err != nil {
		tb.Fatal(err)
	}
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { rt.Close() })
	dev, err := rt.Device(0)
	if err != nil {
		tb.Fatal(err)
	}
	files, err := identify(m)
	if err != nil {
		tb.Fatal(err)
	}
	man, err := (&Model{dev: dev, plan: p}).manifest("sample", files)
	if err != nil {
		tb.Fatal(err)
	}
	for _, n := range p.arenas {
		man.Arenas = append(man.Arenas, manifestArena{Handle: make([]byte, 64), Bytes: n})
	}
	return man
}

// TestManifest wants the plan of a manifest to be that of the model.
func TestManifest(t *testing.T) {
	for _, d := range DTypes() {
		o := Options{DType: d}
		want, err := NewPlan(openModel(t, sample), o)
		if err != nil {
			t.Fatal(err)
		}
		got, err := sampleManifest(t, o).plan()
		if err != nil {
			t.Fatal(err)
		}
		if got.DeviceBytes != want.DeviceBytes || got.ReadBytes != want.ReadBytes || got.opts.DType != d || len(got.Tensors) != len(want.Tensors) {
			t.Errorf("%+v, want %+v", got, want)
		}
		for i := range want.Tensors {
			g, w := &got.Tensors[i], &want.Tensors[i]
			if g.Name != w.Name || g.Type != w.Type || g.Target != w.Target || g.Bytes != w.Bytes || g.Size != w.Size || g.arena != w.arena ||
				g.offset != w.offset || !cmp.Equal(g.Shape, w.Shape) {
				t.Errorf("%+v, want %+v", g, w)
			}
		}
		if diff := cmp.Diff(want.cut(1<<16, 3, false), got.cut(1<<16, 3, false), cmp.AllowUnexported(chunk{}, segment{})); diff != "" {
			t.Error(diff)
		}
	}
}

// FuzzReply reads what a Holder sends. Whatever it is, nothing panics, no tensor is outside its arena or over another, memory is
// bounded by the message, and reading back would not leave the arenas either.
func FuzzReply(f *testing.F) {
	for _, d := range []DType{F16, Raw} {
		good, err := frame(reply{Version: 1, Manifest: sampleManifest(f, Options{DType: d}), Ready: 3})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(good[4:])
	}
	for _, s := range []string{
		``, `{}`, `[]`, `null`, `{"version":1,"error":"x","kind":"memory"}`, `{"ready":-1,"loaded":true}`, `{"models":[{},{},{}]}`,
		`{"manifest":{"dtype":"raw","arenas":[{"bytes":512},{"bytes":256}],"tensors":[` +
			`{"name":"a","type":"Q8_0","dtype":"Q8_0","shape":[32,2],"size":68,"bytes":68,"arena":0,"offset":0},` +
			`{"name":"b","type":"F32","dtype":"F16","shape":[0],"size":0,"bytes":0,"arena":0,"offset":512},` +
			`{"name":"c","type":"I8","dtype":"I8","shape":[256],"size":256,"bytes":256,"arena":1,"offset":0}]}}`,
		`{"manifest":{"dtype":"f16","arenas":[{"bytes":18446744073709551615},{"bytes":2}],"tensors":[` +
			`{"name":"a","type":"F32","dtype":"F16","shape":[9223372036854775807,2],"size":-4,"bytes":18446744073709551614,"offset":2}]}}`,
		`{"manifest":{"tensors":[` + strings.Repeat(`{},`, 500) + `{}]}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r reply
		var plan *Plan
		var err error
		n := allocates(func() {
			if err = readMessage(bytes.NewReader(framed(b)), &r, maxReply); err == nil && r.Manifest != nil {
				plan, err = r.Manifest.plan()
			}
		})
		if limit := uint64(2<<20 + 600*len(b)); n > limit {
			t.Errorf("%d bytes make it allocate %d", len(b), n)
		}
		if e := r.err(); e != nil && e.Error() != r.Error {
			t.Errorf("error %q became %q", r.Error, e)
		}
		if err != nil || plan == nil {
			return
		}
		checkPlanned(t, plan)
	})
}

// checkPlanned wants every tensor in its place, and every chunk that is read back, too.
func checkPlanned(t *testing.T, p *Plan) {
	ends := make([]uint64, len(p.arenas))
	seen := map[string]bool{}
	for i := range p.Tensors {
		x := &p.Tensors[i]
		if seen[x.Name] {
			t.Fatalf("tensor %q is there twice", x.Name)
		}
		seen[x.Name] = true
		if x.offset < ends[x.arena] || x.offset%deviceAlign != 0 || x.offset+x.Bytes < x.offset || x.offset+x.Bytes > p.arenas[x.arena] {
			t.Fatalf("tensor %q is at %d to %d of %d bytes, after %d", x.Name, x.offset, x.offset+x.Bytes, p.arenas[x.arena], ends[x.arena])
		}
		ends[x.arena] = x.offset + x.Bytes
	}
	size := int(max(minChunk, alignUp(p.DeviceBytes/512, minChunk)))
	bytes := make([]uint64, len(p.Tensors))
	for _, c := range p.cut(size, 0, false) {
		if c.bytes > size || c.off+uint64(c.bytes) > p.arenas[c.arena] {
			t.Fatalf("a chunk of %d bytes at %d of %d", c.bytes, c.off, p.arenas[c.arena])
		}
		for _, s := range c.segs {
			x := &p.Tensors[s.tensor]
			if s.dst < 0 || s.dstBytes <= 0 || s.dst+s.dstBytes > c.bytes || s.src < 0 || s.src+int64(s.srcBytes) > x.Size ||
				c.off+uint64(s.dst) != x.offset+p.tensorOffset(&s) {
				t.Fatalf("segment %+v of %+v", s, x)
			}
			bytes[s.tensor] += uint64(s.dstBytes)
		}
	}
	for i, n := range bytes {
		if n != p.Tensors[i].Bytes {
			t.Fatalf("%d bytes of tensor %q are read, of %d", n, p.Tensors[i].Name, p.Tensors[i].Bytes)
		}
	}
}

// FuzzRequest reads what a client sends.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"version":1,"op":"attach","model":"m"}`, `{"version":1,"op":"list","later":[1]}`,
		`{"version":1,"op":"add","model":"/m-00001-of-00002.gguf","dtype":"raw","rules":["norm=f32","(=f16"],"tensors":"^blk"}`,
		`{"op":"add","name":"\u0000","tensors":"((a{1000}){1000}){1000}"}`, `{"rules":["","",""]}`,
	} {
		f.Add(framed([]byte(s)))
	}
	f.Add([]byte{0, 1, 0, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, '{'})
	h := NewHolder(nil, HolderOptions{})
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
		if o, err := h.options(&r); err == nil && len(o.Rules) != len(r.Rules) {
			t.Errorf("%d rules of %d", len(o.Rules), len(r.Rules))
		}
		if m, err := newHeld(r.Name, r.Model); err == nil && (len(m.name) > maxName || strings.ContainsAny(m.name, "\x00\n\x1b")) {
			t.Errorf("a model is called %q", m.name)
		}
	})
}

// TestWireErrors takes each error over the wire.
func TestWireErrors(t *testing.T) {
	for _, e := range wireErrors {
		r := errorReply(errors.Join(errors.New("before"), e.err))
		if err := r.err(); !errors.Is(err, e.err) || err.Error() != "before\n"+e.err.Error() {
			t.Errorf("%v became %v", e.err, err)
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
