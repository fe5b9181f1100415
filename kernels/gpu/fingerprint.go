package gpu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// sumBytes is the size of a fingerprint.
const sumBytes = 8

// maxFingerprinted bounds how many bytes a call fingerprints: more than the memory of a device, and small enough that
// nothing overflows.
const maxFingerprinted = 1 << 50

// Fingerprint enqueues on stream the kernel that computes the fingerprints of bytes bytes at in, and returns. It writes
// kernels.Fingerprints(bytes) numbers of 8 bytes to sums, the same as [kernels.Fingerprint]. It is FingerprintPart at
// 0.
func (s *Set) Fingerprint(stream *amdhip.Stream, sums, in amdhip.DevicePtr, bytes int64) error {
	return s.FingerprintPart(stream, sums, in, bytes, 0)
}

// FingerprintPart enqueues on stream the kernel that computes what bytes bytes at in contribute to the fingerprints of
// something that they are a part of, and returns. The part begins at byte at of the whole. For each block that it
// touches the kernel writes a number of 8 bytes to sums, the same as [kernels.AddFingerprint] adds.
//
// The address sums must be a multiple of 8; in may have any alignment, and the kernel is quickest when in is as far
// from a multiple of 4 as at. The kernel reads those bytes and nothing else but the rest of the words, at multiples of
// 4, that some of them are in. The memory must stay allocated until the stream is done with it. Errors: *amdhip.Error,
// amdhip.ErrInvalidValue for an address that is not aligned, a negative number or more than 2^50, and
// amdhip.ErrUnsupported if Key{Fingerprint: true} was not loaded.
func (s *Set) FingerprintPart(stream *amdhip.Stream, sums, in amdhip.DevicePtr, bytes, at int64) error {
	f, ok := s.kernels[Key{Fingerprint: true}]
	switch {
	case !ok:
		return fmt.Errorf("gpu: kernel %v was not loaded: %w", Key{Fingerprint: true}, amdhip.ErrUnsupported)
	case sums%sumBytes != 0:
		return fmt.Errorf("gpu: fingerprints to %#x: the address must be a multiple of %d: %w",
			sums, sumBytes, amdhip.ErrInvalidValue)
	case bytes < 0 || bytes > maxFingerprinted || at < 0 || at > maxFingerprinted:
		return fmt.Errorf("gpu: fingerprints of %d bytes at %d: must be 0 to 2^50: %w", bytes, at, amdhip.ErrInvalidValue)
	case bytes == 0:
		return nil
	}
	at %= kernels.FingerprintBlock
	grid := min(kernels.Fingerprints(at+bytes), maxGrid)
	return stream.Launch(f.function, uint32(grid), Threads, uint64(sums), uint64(in), uint64(bytes), uint64(at))
}

// fingerprintProgram writes the constants and the kernel of a program that has common.hip already.
func fingerprintProgram(b *strings.Builder) {
	keys := kernels.KeysOfFingerprint()
	array(b, "u64", "word_keys", keys.Words[:])
	array(b, "u64", "stripe_keys", keys.Stripes[:])
	b.WriteString(source("fingerprint"))
	fmt.Fprintf(b, "extern \"C\" __global__ __launch_bounds__(%d) ", Threads)
	fmt.Fprintf(b, "void %s(u64 *out, const u8 *in, u64 bytes, u64 at) { fingerprints(out, in, bytes, at); }\n",
		Key{Fingerprint: true}.Name())
}

// fingerprintStandIn does on the CPU what the kernel does on a GPU. It refuses arguments that Set.Fingerprint must not
// pass to a kernel.
func fingerprintStandIn(l *amdhip.KernelCall) amdhip.Status {
	out, in, bytes, at := amdhip.DevicePtr(l.Args[0]), amdhip.DevicePtr(l.Args[1]), l.Args[2], l.Args[3]
	if l.Block.X != Threads || out%sumBytes != 0 || bytes > maxFingerprinted || at >= kernels.FingerprintBlock {
		return amdhip.ErrInvalidValue
	}
	src, st := l.Memory(in, bytes)
	if st != amdhip.Success {
		return st
	}
	dst, st := l.Memory(out, uint64(kernels.Fingerprints(int64(at+bytes)))*sumBytes)
	if st == amdhip.Success {
		putSums(dst, src, int64(at))
	}
	return st
}

// putSums writes what src at byte at of something contributes to its fingerprints to dst, as the kernel writes it.
func putSums(dst, src []byte, at int64) {
	sums := make([]uint64, kernels.Fingerprints(at+int64(len(src))))
	kernels.AddFingerprint(sums, at, src)
	for i, sum := range sums {
		binary.LittleEndian.PutUint64(dst[sumBytes*i:], sum)
	}
}

// region is what the check fingerprints: so many bytes at an offset of its input, which are part of something.
type region struct{ off, bytes, at int }

// sums returns how many fingerprints it has a part in.
func (r region) sums() int { return int(kernels.Fingerprints(int64(r.at + r.bytes))) }

// checkRegions are what the check fingerprints: whole blocks, whole stripes and words, and a rest. In the second region
// no word is at a multiple of 4; the third begins within a word, a stripe and a block.
var checkRegions = []region{
	{0, kernels.FingerprintBlock + 9*1024 + 777, 0},
	{1, 2*kernels.FingerprintBlock + 1023, 0},
	{0, kernels.FingerprintBlock + 777, 5*1024 + 42},
}

// checkPeriod is after how many bytes the input of the check repeats: no common divisor with anything in the function,
// so that neighbours in rows and columns differ, and few enough to be set one by one.
const checkPeriod = 31

// checkBytes are the bytes that repeat.
var checkBytes = func() (b [checkPeriod]byte) {
	_, _ = rand.NewChaCha8([32]byte{}).Read(b[:]) // never fails
	return b
}()

// fingerprintTrial is the check of the fingerprint kernel. Its input is made on the device: what the kernel is there to
// find, bytes that a copy has damaged, must not be taken for a kernel that computes wrongly.
func fingerprintTrial() (t trial) {
	t.key.Fingerprint = true
	for _, r := range checkRegions {
		t.src = max(t.src, r.off+r.bytes)
		t.dst += sumBytes * r.sums()
	}
	size := t.src
	t.fill = func(b []byte) error {
		for n := copy(b, checkBytes[:]); n < len(b); n *= 2 {
			copy(b[n:], b[:n])
		}
		return nil
	}
	t.make = func(stream *amdhip.Stream, in amdhip.DevicePtr) (err error) {
		for i, x := range checkBytes {
			err = errors.Join(err, stream.Memset(in+amdhip.DevicePtr(i), x, 1))
		}
		for n := checkPeriod; n < size; n *= 2 {
			err = errors.Join(err, stream.CopyDevice(in+amdhip.DevicePtr(n), in, uint64(min(n, size-n))))
		}
		return err
	}
	t.launch = func(s *Set, stream *amdhip.Stream, out, in amdhip.DevicePtr) error {
		for _, r := range checkRegions {
			err := s.FingerprintPart(stream, out, in+amdhip.DevicePtr(r.off), int64(r.bytes), int64(r.at))
			if err != nil {
				return err
			}
			out += amdhip.DevicePtr(sumBytes * r.sums())
		}
		return nil
	}
	t.want = func(dst, src []byte) error {
		for _, r := range checkRegions {
			putSums(dst, src[r.off:][:r.bytes], int64(r.at))
			dst = dst[sumBytes*r.sums():]
		}
		return nil
	}
	return t
}
