package hold

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

// TestSeveralDevices holds a model on two devices and attaches to it, with devices of its own and with those of the
// caller.
func TestSeveralDevices(t *testing.T) {
	t.Parallel()
	for _, by := range []plan.SplitBy{plan.SplitLayers, plan.SplitNone} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			h := hold(t, Options{Spec: plan.Spec{Split: plan.Split{By: by}}}, soft.Options{Devices: 2}).with(t, "x", sample)
			a := h.attach(t, "x")
			f := openFile(t, sample)
			wantContents(t, a.Model, f)
			held, err := h.Model("x")
			if err != nil {
				t.Fatal(err)
			}
			wantSameTensors(t, held, a.Model)
			if r, err := readback.Verify(t.Context(), a.Model, f); err != nil || r.Tensors != len(f.Tensors()) {
				t.Errorf("verified %v, %v", r, err)
			}
			_, theirs := openSoft(t, soft.Options{Devices: 3})
			mine := []*amdhip.Device{theirs[2], theirs[1], theirs[0]}
			b, err := Attach(t.Context(), AttachOptions{Socket: h.socket, Devices: mine})
			if err != nil {
				t.Fatal(err)
			}
			if all := b.Devices(); len(all) != 2 || all[0] != theirs[0] || all[1] != theirs[1] {
				t.Errorf("it is on %v", all)
			}
			wantContents(t, b.Model, f)
			mustClose(t, b)
			_, err = Attach(t.Context(), AttachOptions{Socket: h.socket, Devices: mine[1:2]})
			if !errors.Is(err, amdhip.ErrInvalidDevice) {
				t.Errorf("without one of the devices: %v", err)
			}
			m := h.Models()[0]
			if m.Bytes != held.Plan().DeviceBytes() || m.Tensors != len(f.Tensors()) || m.links != 2 {
				t.Errorf("%+v", m)
			}
		})
	}
}

// TestMoreDevicesThanLayers holds a model on so many devices that some get nothing.
func TestMoreDevicesThanLayers(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{Devices: 9}).with(t, "", sample)
	a := h.attach(t, "")
	empty := 0
	for i := range a.Plan().Groups {
		if len(a.Plan().Groups[i].Tensors) == 0 {
			empty++
		}
	}
	if empty == 0 {
		t.Error("every device has something")
	}
	wantContents(t, a.Model, openFile(t, sample))
}

// TestShard holds one rank's slices.
func TestShard(t *testing.T) {
	t.Parallel()
	for rank := range 2 {
		for _, by := range []plan.ShardBy{plan.ShardTensors, plan.ShardLayers} {
			t.Run(by.String(), func(t *testing.T) {
				t.Parallel()
				s := plan.Spec{Policy: plan.F16, Shard: plan.Shard{By: by, Rank: rank, World: 2}}
				path := sample
				if by == plan.ShardTensors {
					s.Shard.Rules = []plan.ShardRule{{Name: regexp.MustCompile("^type"), As: plan.DivideColumns}}
					path = "../../testdata/gguf/all-types.gguf"
				}
				h := hold(t, Options{Spec: s}, soft.Options{}).with(t, "", path)
				held, err := h.Model("")
				if err != nil {
					t.Fatal(err)
				}
				a := h.attach(t, "")
				wantSameTensors(t, held, a.Model)
				if got := a.Plan().Spec.Shard; got.By != by || got.Rank != rank || got.World != 2 {
					t.Errorf("%+v", got)
				}
				pieces := 0
				for _, x := range a.Plan().Tensors() {
					if x.Pieces() {
						pieces++
					}
				}
				if by == plan.ShardTensors && pieces == 0 {
					t.Error("no slice is in several pieces in the file")
				}
				r, err := readback.Verify(t.Context(), a.Model, openFile(t, path))
				if err != nil || r.Tensors != len(held.Tensors()) {
					t.Errorf("verified %v, %v", r, err)
				}
			})
		}
	}
}

// TestOpaque holds a tensor of a type that ggml does not have: its bytes stay what they are.
func TestOpaque(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	w := gguf.NewWriter(&b, gguf.WriterOptions{})
	const q8x4 = 99 // ik_llama.cpp's Q8_2_X4: 512 elements are 576 bytes
	data := bytes.Repeat([]byte("opaque.."), 576/8)
	err := errors.Join(w.AddTensor("opaque", gguf.I8, 576), w.AddTensor("plain", gguf.F32, 4), w.WriteHeader(),
		w.WriteTensor("opaque", data), w.WriteTensor("plain", make([]byte, 16)), w.Close())
	if err != nil {
		t.Fatal(err)
	}
	// In the file a tensor's name is followed by the number of dimensions, 4 bytes, each dimension, 8 bytes, and the type.
	at := b.Bytes()[bytes.Index(b.Bytes(), []byte("opaque"))+len("opaque"):]
	binary.LittleEndian.PutUint64(at[4:], 512)
	binary.LittleEndian.PutUint32(at[12:], q8x4)
	path := filepath.Join(t.TempDir(), "m.gguf")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	h := hold(t, Options{Spec: plan.Spec{Policy: plan.Raw}}, soft.Options{}).with(t, "", path)
	a := h.attach(t, "")
	if x, err := a.Tensor("opaque"); err != nil || x.Type != q8x4 || x.Bytes != uint64(len(data)) {
		t.Errorf("%+v, %v", x, err)
	}
	if got := contents(t, a.Model)[place{0, "opaque"}]; !bytes.Equal(got, data) {
		t.Errorf("%d bytes on the device", len(got))
	}
}
