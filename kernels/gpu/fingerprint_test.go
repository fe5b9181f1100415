package gpu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

var fingerprint = Key{Fingerprint: true}

// fingerprintCases are regions: where they begin, and how many bytes they have. The first column of a block, the last,
// and all that is around a word, a stripe or a batch of them, and a block are there.
func fingerprintCases() (cases []region) {
	const stripe, block = 1024, kernels.FingerprintBlock
	for _, around := range []int{0, 4, stripe, 8 * stripe, block - stripe, block, 3 * block} {
		for n := max(1, around-3); n <= around+5; n++ {
			cases = append(cases, region{n & 3, n, 0})
		}
	}
	for at := range 4 {
		cases = append(cases, region{at, 5*block + 21*stripe + 333, 0})
	}
	for i, at := range []int{
		1, 2, 3, 4, 5, 1021, 1022, 1024, 1027, 9*stripe + 7, block - 1030, block - 1024, block - 5, block - 1,
	} {
		for _, n := range []int{1, 2, 3, 6, 1023, 1024, 1025, 3000, 9 * stripe, block - 1, 2*block + stripe + 1} {
			cases = append(cases, region{i & 3, n, at}, region{at & 3, n, at})
		}
	}
	return cases
}

// compareFingerprints lets dev fingerprint many regions, and compares with the CPU.
func compareFingerprints(t *testing.T, dev *amdhip.Device, s *Set) {
	t.Helper()
	const size, most = 6*kernels.FingerprintBlock + 4096, 8
	stream, err1 := dev.NewStream()
	host, err2 := dev.HostMalloc(size + sumBytes*most)
	mem, err3 := dev.Malloc(size + sumBytes*most)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	defer closed(t, mem, host, stream)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(host.Bytes()) // never fails
	if err := stream.CopyToDevice(mem.Ptr(), host, 0, size); err != nil {
		t.Fatal(err)
	}
	out := mem.Ptr() + size
	for _, c := range fingerprintCases() {
		off, n, at := c.off, c.bytes, c.at
		want := make([]uint64, c.sums())
		whole := make([]byte, at+n) // the specification: all else is zero
		copy(whole[at:], host.Bytes()[off:][:n])
		kernels.Fingerprint(want, whole)
		err := errors.Join(
			stream.Memset(out, 0xa5, sumBytes*most),
			s.FingerprintPart(stream, out, mem.Ptr()+amdhip.DevicePtr(off), int64(n), int64(at)+7*kernels.FingerprintBlock),
			stream.CopyToHost(host, size, out, sumBytes*most), stream.Synchronize())
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		got := make([]uint64, most)
		for i := range got {
			got[i] = binary.LittleEndian.Uint64(host.Bytes()[size+sumBytes*i:])
		}
		if !slices.Equal(got[:len(want)], want) {
			t.Errorf("%+v: %#x, want %#x", c, got[:len(want)], want)
		}
		for _, rest := range got[len(want):] {
			if rest != 0xa5a5a5a5a5a5a5a5 {
				t.Errorf("%+v: more than %d fingerprints were written", c, len(want))
				break
			}
		}
	}
}

func TestFingerprintOnSoftwareDevice(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	compareFingerprints(t, dev, mustLoad(t, &Compiler{}, dev, q4kToF16, fingerprint))
}

// TestFingerprintReadsNothingElse fingerprints memory from its first to its last byte.
func TestFingerprintReadsNothingElse(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	s, b := mustLoad(t, &Compiler{}, dev, fingerprint), newBuffers(t, dev)
	const n = kernels.FingerprintBlock + 5
	mem, err := dev.Malloc(n)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, mem)
	err = errors.Join(b.stream.Memset(mem.Ptr(), 1, n), s.Fingerprint(b.stream, b.out(), mem.Ptr(), n),
		b.stream.Synchronize())
	if err != nil {
		t.Error(err)
	}
	stream, err := dev.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, stream)
	err = errors.Join(s.Fingerprint(stream, b.out(), mem.Ptr(), n+1), stream.Synchronize())
	if !errors.Is(err, amdhip.ErrIllegalAddress) {
		t.Errorf("one byte more than there is: %v", err)
	}
}

func TestFingerprintRefuses(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	s, b := mustLoad(t, &Compiler{}, dev, fingerprint), newBuffers(t, dev)
	without := mustLoad(t, &Compiler{}, dev, q4kToF16)
	launched := sw.Calls()["hipModuleLaunchKernel"]
	for name, tt := range map[string]struct {
		s     *Set
		sums  amdhip.DevicePtr
		bytes int64
		want  error
	}{
		"sums not aligned":  {s, b.out() + 4, 1, amdhip.ErrInvalidValue},
		"less than nothing": {s, b.out(), -1, amdhip.ErrInvalidValue},
		"too much":          {s, b.out(), maxFingerprinted + 1, amdhip.ErrInvalidValue},
		"nothing":           {s, b.out(), 0, nil},
		"not loaded":        {without, b.out(), 1, amdhip.ErrUnsupported},
	} {
		if err := tt.s.Fingerprint(b.stream, tt.sums, b.in(), tt.bytes); !errors.Is(err, tt.want) {
			t.Errorf("%s: error %v, want %v", name, err, tt.want)
		}
	}
	if err := s.Launch(b.stream, fingerprint, b.out(), b.in(), 1); !errors.Is(err, amdhip.ErrInvalidValue) {
		t.Errorf("launched as a conversion: %v", err)
	}
	if n := sw.Calls()["hipModuleLaunchKernel"]; n != launched {
		t.Errorf("%d launches", n-launched)
	}
	if _, err := (&Compiler{}).Load(t.Context(), dev, []Key{{From: q4kToF16.From, Fingerprint: true}}); !errors.Is(
		err, amdhip.ErrUnsupported) {
		t.Errorf("fingerprints from a type: %v", err)
	}
}

// TestFingerprintStandInIsStrict launches the stand-in directly, without the checks of Set.Fingerprint.
func TestFingerprintStandInIsStrict(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	s := mustLoad(t, &Compiler{}, dev, fingerprint)
	mem, err := dev.Malloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, mem)
	start := uint64(mem.Ptr())
	for name, tt := range map[string]struct {
		threads            uint32
		out, in, bytes, at uint64
		want               amdhip.Status
	}{
		"well":               {Threads, start + 4088, start + 1, 4000, 5, amdhip.Success},
		"threads":            {Threads / 2, start, start + 64, 1, 0, amdhip.ErrInvalidValue},
		"output not aligned": {Threads, start + 4, start + 64, 1, 0, amdhip.ErrInvalidValue},
		"absurd":             {Threads, start, start + 64, 1 << 63, 0, amdhip.ErrInvalidValue},
		"a block further":    {Threads, start, start + 64, 1, kernels.FingerprintBlock, amdhip.ErrInvalidValue},
		"input too short":    {Threads, start, start + 4000, 97, 0, amdhip.ErrIllegalAddress},
		"no output":          {Threads, start + 4096, start, 64, 0, amdhip.ErrIllegalAddress},
		"no second output":   {Threads, start + 4088, start, 64, kernels.FingerprintBlock - 63, amdhip.ErrIllegalAddress},
	} {
		stream, err := dev.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		f := s.kernels[fingerprint].function
		if err := stream.Launch(f, 1, tt.threads, tt.out, tt.in, tt.bytes, tt.at); err != nil {
			t.Fatal(err)
		}
		err = stream.Synchronize()
		if failed := tt.want != amdhip.Success; failed && !errors.Is(err, tt.want) || !failed && err != nil {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		closed(t, stream)
	}
}

// TestCheckFindsOneWrongFingerprint checks a kernel whose last sum has one wrong bit, and one that rounds the address
// of its input down.
func TestCheckFindsOneWrongFingerprint(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	for name, run := range map[string]func(*amdhip.KernelCall) amdhip.Status{
		"one bit": func(l *amdhip.KernelCall) amdhip.Status {
			st := fingerprintStandIn(l)
			n := kernels.Fingerprints(int64(l.Args[2]))
			if out, _ := l.Memory(amdhip.DevicePtr(l.Args[0]), uint64(n)*sumBytes); l.Args[1]%4 != 0 && len(out) > 0 {
				out[len(out)-1] ^= 0x80
			}
			return st
		},
		"alignment": func(l *amdhip.KernelCall) amdhip.Status {
			l.Args[1] &^= 3
			return fingerprintStandIn(l)
		},
	} {
		s := setOf(t, dev, fingerprint, run)
		err := s.check(t.Context(), watch.From(t.Context(), stallTime), []Key{fingerprint})
		e, ok := errors.AsType[*CheckError](err)
		if !ok || e.Key != fingerprint || len(e.Got) != sumBytes || e.Element < 2 || !strings.Contains(
			err.Error(), fmt.Sprintf("kernel fingerprint is wrong: element %d", e.Element)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFingerprintProgram looks at the name and the text of the kernel.
func TestFingerprintProgram(t *testing.T) {
	t.Parallel()
	text := fingerprint.Source()
	const kernel = "void fingerprint(u64 *out, const u8 *in, u64 bytes, u64 at)"
	if strings.Count(text, `extern "C"`) != 1 || !strings.Contains(text, kernel) {
		t.Errorf("the program has not the one kernel:\n%s", text[strings.Index(text, `extern "C"`):])
	}
	if slices.Contains(Keys(), fingerprint) || fingerprint.Name() != "fingerprint" || fingerprint.String() != "fingerprint" {
		t.Error("the kernel is among those that convert, or has another name")
	}
}

// TestFingerprintCheckCopiesNothing: a bit that is wrong in the first copy to a device is not taken for a kernel that
// computes wrongly.
func TestFingerprintCheckCopiesNothing(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	// At this byte a block has scales with which all of its bits matter.
	if err := sw.Flip(soft.Flip{Copy: 1, Byte: 300, Bit: 3}); err != nil {
		t.Fatal(err)
	}
	mustLoad(t, &Compiler{}, dev, fingerprint)
	_, err := (&Compiler{}).Load(t.Context(), dev, []Key{fingerprint, q4kToF16})
	if e, ok := errors.AsType[*CheckError](err); !ok || e.Key != q4kToF16 { // what is copied has the damage
		t.Errorf("%v, want a *CheckError of %v", err, q4kToF16)
	}
}
