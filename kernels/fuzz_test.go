package kernels

import (
	"bytes"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// FuzzTiers decodes arbitrary blocks with every tier of this CPU and compares the bits with those of the generic code.
func FuzzTiers(f *testing.F) {
	for _, from := range gguf.Types() {
		for out := range numOutputs {
			f.Add(uint8(from), uint8(out), randomBlocks(4, from, 2))
		}
	}
	f.Fuzz(func(t *testing.T, fromByte, outByte uint8, src []byte) {
		from, out := gguf.Type(fromByte), output(outByte)%numOutputs
		if !from.Valid() {
			t.Skip("not a tensor type")
		}
		to := outputs[out]
		src = src[:len(src)/from.BlockBytes()*from.BlockBytes()]
		want := make([]byte, len(src)/from.BlockBytes()*from.BlockElems()*to.BlockBytes())
		generic(want, out, src, from)
		canonical(want, to)
		for _, isa := range Supported() {
			k, err := For(isa)
			if err != nil {
				t.Fatal(err)
			}
			for mode, run := range modes {
				got := aligned(len(want), 0)
				if err := run(k, got, to, src, from); err != nil {
					t.Fatal(err)
				}
				if i := firstDifference(canonical(got, to), want); i >= 0 {
					t.Errorf("%v to %v, %v, %s: byte %d: got % x, want % x", from, to, isa, mode, i,
						element(got, i, to), element(want, i, to))
				}
			}
		}
	})
}

// FuzzFingerprint compares the fingerprints of every tier of this CPU, and what it copies, with the formula. The bytes
// are those of b, repeated, from a place on.
func FuzzFingerprint(f *testing.F) {
	for _, n := range []int{0, 1, 3, 4, 1023, 1024, 1028, 5000} {
		f.Add(noise(byte(n), n), uint16(3), uint8(1), uint8(0))
		f.Add(noise(byte(n), n), uint16(70), uint8(0), uint8(33))
	}
	f.Fuzz(func(t *testing.T, b []byte, times uint16, at, dstAt uint8) {
		const most = FingerprintBlock + 5*stripeBytes
		src := bytes.Repeat(b, min(int(times), most/max(1, len(b))))
		src = src[min(int(at), len(src)):]
		for _, isa := range Supported() {
			k, err := For(isa)
			if err != nil {
				t.Fatal(err)
			}
			compareSums(t, k, src, int(dstAt)%streamAlign)
		}
	})
}
