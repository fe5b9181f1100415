package gpu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

var (
	q4kToF16 = Key{To: gguf.F16, From: gguf.Q4_K}
	q80ToF32 = Key{To: gguf.F32, From: gguf.Q8_0}
	someKeys = []Key{q4kToF16, q80ToF32, {To: gguf.BF16, From: gguf.F16}}
)

// openSoft opens a software device and fails the test if anything is left on it at the end.
func openSoft(t *testing.T) (*amdhip.Device, *soft.Software) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Memory: 64 << 20, Devices: 2, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nothingLeft(t, soft.Of(rt))
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return dev, soft.Of(rt)
}

func nothingLeft(t *testing.T, sw *soft.Software) {
	t.Helper()
	if s := sw.Stats(); s.Allocations+s.HostAllocations+s.Registrations+s.Streams+s.Events+s.Modules != 0 {
		t.Errorf("left on the device: %+v", s)
	}
}

// mustLoad loads kernels, and unloads them at the end of the test.
func mustLoad(t testing.TB, c *Compiler, dev *amdhip.Device, keys ...Key) *Set {
	t.Helper()
	s, err := c.Load(t.Context(), dev, keys)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s) })
	return s
}

func closed(t testing.TB, all ...interface{ Close() error }) {
	t.Helper()
	for _, c := range all {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// buffers are a stream and memory to convert in: input from 256 on, output from 32 KiB on.
type buffers struct {
	*testing.T
	stream *amdhip.Stream
	host   *amdhip.HostMemory
	mem    *amdhip.Memory
}

const inAt, outAt, bufferBytes = 256, 32 << 10, 256 << 10

func newBuffers(t *testing.T, dev *amdhip.Device) *buffers {
	t.Helper()
	stream, err1 := dev.NewStream()
	host, err2 := dev.HostMalloc(bufferBytes)
	mem, err3 := dev.Malloc(bufferBytes)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, stream, host, mem) })
	return &buffers{t, stream, host, mem}
}

func (b *buffers) in() amdhip.DevicePtr  { return b.mem.Ptr() + inAt }
func (b *buffers) out() amdhip.DevicePtr { return b.mem.Ptr() + outAt }

// TestLoadedKernelsConvert loads all kernels and lets each convert some blocks.
func TestLoadedKernelsConvert(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	s := mustLoad(t, &Compiler{}, dev, Keys()...)
	if got := s.Stats(); got.Compiled != len(Keys()) || got.Cached != 0 || got.Compiling <= 0 || got.Loading <= 0 {
		t.Errorf("the work was %+v, want %d kernels compiled", got, len(Keys()))
	}
	if n := sw.Stats().Modules; n != len(Keys()) {
		t.Errorf("%d modules for %d kernels", n, len(Keys()))
	}
	cpu, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	b := newBuffers(t, dev)
	for _, k := range Keys() {
		const blocks = 37
		src := make([]byte, blocks*k.inBytes())
		_, _ = rand.NewChaCha8([32]byte{1}).Read(src) // never fails
		want := make([]byte, blocks*k.outBytes())
		copy(b.host.Bytes(), src)
		err := errors.Join(
			b.stream.CopyToDevice(b.in(), b.host, 0, len(src)),
			b.stream.Memset(b.out(), 0xa5, bufferBytes-outAt),
			s.Launch(b.stream, k, b.out(), b.in(), blocks),
			b.stream.CopyToHost(b.host, 0, b.out(), bufferBytes-outAt), b.stream.Synchronize(),
			cpu.Dequantize(want, k.To, src, k.From))
		if err != nil {
			t.Fatalf("%v: %v", k, err)
		}
		got := b.host.Bytes()[:bufferBytes-outAt]
		if err := same(k, got[:len(want)], want); err != nil {
			t.Error(err)
		}
		if rest := got[len(want):]; bytes.Count(rest, []byte{0xa5}) != len(rest) {
			t.Errorf("%v wrote beyond its output", k)
		}
	}
}

func TestLoadSameKernelTwice(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	s := mustLoad(t, &Compiler{}, dev, q4kToF16, q80ToF32, q4kToF16)
	if n := sw.Stats().Modules; n != 2 || s.Stats().Compiled != 2 {
		t.Errorf("%d modules, %d compiled, want 2", n, s.Stats().Compiled)
	}
}

func TestLoadNothing(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	s := mustLoad(t, &Compiler{}, dev)
	if got := s.Stats(); got.Compiled+got.Cached != 0 {
		t.Errorf("the work was %+v", got)
	}
}

// TestLoadRefuses asks for a kernel that does not exist, and loads on a device of unknown architecture.
func TestLoadRefuses(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	_, err := new(Compiler).Load(t.Context(), dev, []Key{q4kToF16, {To: gguf.F16, From: gguf.F64}})
	if !errors.Is(err, amdhip.ErrUnsupported) || !strings.Contains(err.Error(), "F64 to F16") {
		t.Errorf("a kernel that does not exist: %v", err)
	}

	rt, err := soft.OpenRuntime(soft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	soft.Of(rt).Inject(soft.Fault{Func: "hipGetDevicePropertiesR0600", Code: amdhip.ErrUnknown})
	nameless, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = new(Compiler).Load(t.Context(), nameless, someKeys)
	if !errors.Is(err, amdhip.ErrUnsupported) || !strings.Contains(err.Error(), "architecture") {
		t.Errorf("a device of unknown architecture: %v", err)
	}
}

// TestLoadMeetsEveryFailure lets each call of the runtime that Load makes fail, one in each run.
func TestLoadMeetsEveryFailure(t *testing.T) {
	t.Parallel()
	keys := someKeys[:2]
	dev, sw := openSoft(t)
	before := sw.Calls()
	mustLoad(t, &Compiler{}, dev, keys...)
	calls := sw.Calls()
	for call, n := range calls {
		n -= before[call]
		if call == "hipStreamQuery" {
			n = 1 // how often it is called is not always the same
		}
		for i := 1; i <= n; i++ {
			t.Run(fmt.Sprintf("%s %d", call, i), func(t *testing.T) { failNth(t, keys, call, i) })
		}
	}
	if len(calls) < 15 {
		t.Errorf("a load calls %v only", calls)
	}
}

// failNth loads keys while the nth call of a function fails.
func failNth(t *testing.T, keys []Key, call string, n int) {
	rt, err := soft.OpenRuntime(soft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	soft.Of(rt).Inject(soft.Fault{Func: call, N: n, Code: 6})
	s, err := new(Compiler).Load(t.Context(), dev, keys)
	if strings.HasPrefix(call, "hiprtcGetProgramLog") { // there is nothing to know from the log
		if err != nil {
			t.Fatal(err)
		}
		closed(t, s)
		return
	}
	if err == nil || !errors.Is(err, amdhip.Status(6)) && !errors.Is(err, amdhip.RTCStatus(6)) {
		t.Fatalf("error %v", err)
	}
	switch call {
	case "hipFree", "hipHostFree", "hipStreamDestroy", "hipModuleUnload", "hipGetDevice":
		// What cannot be freed stays allocated. hipGetDevice is called before every call that frees.
	default:
		nothingLeft(t, soft.Of(rt))
	}
}

// TestLoadMeetsFailuresOnTheDevice lets enqueued work fail when the device executes it.
func TestLoadMeetsFailuresOnTheDevice(t *testing.T) {
	t.Parallel()
	for _, f := range []soft.Fault{
		{Func: "hipModuleLaunchKernel", N: 1, Code: amdhip.ErrIllegalAddress, Async: true},
		{Func: "hipModuleLaunchKernel", N: 3, Code: amdhip.ErrLaunchFailure, Async: true},
		{Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrECCNotCorrectable, Async: true},
		{Func: "hipMemcpyAsync", N: 2, Code: amdhip.ErrIllegalAddress, Async: true},
	} {
		t.Run(fmt.Sprint(f.Func, f.N), func(t *testing.T) {
			dev, sw := openSoft(t)
			sw.Inject(f)
			if _, err := new(Compiler).Load(t.Context(), dev, someKeys); !errors.Is(err, f.Code) {
				t.Errorf("error %v, want %v", err, f.Code)
			}
		})
	}
}

// TestCompileErrorsHaveTheLog compiles a kernel that the software device does not know.
func TestCompileErrorsHaveTheLog(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	b, err := new(Compiler).begin(dev)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.codes(t.Context(), []Key{q4kToF16})
	e, ok := errors.AsType[*amdhip.CompileError](err)
	if !ok || !strings.Contains(e.Log, "dequantize_q4_k_f16") {
		t.Errorf("error %v, want a *CompileError with the compiler's log", err)
	}
	if !strings.Contains(err.Error(), "compiling Q4_K to F16 for "+dev.Arch()) {
		t.Errorf("%v does not say what was compiled, and for what", err)
	}
}

// TestLoadEndsWithItsContext cancels the context before a load, and while the load waits for another compilation to
// end.
func TestLoadEndsWithItsContext(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	inProcess.Lock()
	done := make(chan error)
	go func() {
		_, err := new(Compiler).Load(ctx, dev, someKeys)
		done <- err
	}()
	cancel(cause)
	inProcess.Unlock()
	for _, err := range []error{<-done, func() error { _, err := new(Compiler).Load(ctx, dev, someKeys); return err }()} {
		if !errors.Is(err, cause) {
			t.Errorf("error %v, want the cause of the context's end", err)
		}
	}
	if n := sw.Calls()["hipModuleLoadData"]; n != 0 {
		t.Errorf("%d modules were loaded", n)
	}
}

// TestLoadGivesUpOnAHangingKernel checks that there is an error, and that nothing is freed that the device may still
// use.
func TestLoadGivesUpOnAHangingKernel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		rt, err := soft.OpenRuntime(soft.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer rt.Close()
		dev, err := rt.Device(0)
		if err != nil {
			t.Fatal(err)
		}
		soft.Of(rt).Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: 2, Stall: true})
		_, err = new(Compiler).Load(t.Context(), dev, someKeys)
		if err == nil || !strings.Contains(err.Error(), "have not ended after 10s") {
			t.Errorf("error %v", err)
		}
		s := soft.Of(rt).Stats()
		if s.Modules != len(someKeys) || s.Allocations != 1 || s.HostAllocations != 1 || s.Streams != 1 {
			t.Errorf("freed while the device may use it: %+v", s)
		}
	})
}

// TestLoadCancelledDuringTheCheck ends the context while a kernel runs, which ends later in one case and never in the
// other.
func TestLoadCancelledDuringTheCheck(t *testing.T) {
	t.Parallel()
	for _, ends := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			rt, err := soft.OpenRuntime(soft.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer rt.Close()
			sw := soft.Of(rt)
			dev, err := rt.Device(0)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: 1, Stall: true})
			if ends {
				time.AfterFunc(1500*time.Millisecond, sw.ClearFaults)
			}
			if _, err := new(Compiler).Load(ctx, dev, someKeys); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
			if ends {
				nothingLeft(t, sw)
			} else if sw.Stats().Modules != len(someKeys) {
				t.Errorf("unloaded while running: %+v", sw.Stats())
			}
		})
	}
}
