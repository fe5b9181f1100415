package soft_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// A copy fails on the device, as it may on a GPU: the stream reports it later.
func ExampleSoftware_Inject() {
	dev, err := soft.Open(soft.Options{Memory: 1 << 20})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	sw := soft.Of(dev.Runtime())
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 2, Code: amdhip.ErrECCNotCorrectable, Async: true})

	stream, err1 := dev.NewStream()
	mem, err2 := dev.Malloc(64)
	host, err3 := dev.HostMalloc(64)
	if err := errors.Join(err1, err2, err3); err != nil {
		log.Fatal(err)
	}
	for i := range 2 {
		err := errors.Join(stream.CopyToDevice(mem.Ptr(), host, 0, 64), stream.Synchronize())
		fmt.Println(i, errors.Is(err, amdhip.ErrECCNotCorrectable))
	}
	fmt.Println(sw.Calls()["hipMemcpyAsync"], "copies,", sw.Stats().DeviceBytes, "bytes on the device")
	if err := errors.Join(mem.Close(), host.Close(), stream.Close()); err != nil {
		log.Fatal(err)
	}
	// Output:
	// 0 false
	// 1 true
	// 2 copies, 64 bytes on the device
}

// A machine with two devices, whose links move 25 GB per second each.
func ExampleOpenRuntime() {
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2, Memory: 1 << 30, LinkBytesPerSecond: 25e9})
	if err != nil {
		log.Fatal(err)
	}
	defer rt.Close()
	n, err := rt.DeviceCount()
	if err != nil {
		log.Fatal(err)
	}
	for i := range n {
		dev, err := rt.Device(i)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(dev.Name(), dev.TotalMemory())
	}
	// Output:
	// Software device 0 1073741824
	// Software device 1 1073741824
}

// A kernel is compiled, loaded and launched. With amdhip.Open instead of soft.OpenRuntime, and without Offer, the same
// runs on a GPU.
func ExampleSoftware_Offer() {
	const source = `extern "C" __global__ void fill(unsigned char *p, unsigned long long n, unsigned long long v) {
		for (unsigned long long i = threadIdx.x; i < n; i += blockDim.x) p[i] = v;
	}`
	rt, err := soft.OpenRuntime(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer rt.Close()
	soft.Of(rt).Offer("fill", 3, func(l *amdhip.KernelCall) amdhip.Status {
		mem, st := l.Memory(amdhip.DevicePtr(l.Args[0]), l.Args[1])
		for i := range mem {
			mem[i] = byte(l.Args[2])
		}
		return st
	})
	if err := run(rt, source); err != nil {
		log.Fatal(err)
	}
	// Output: 77777
}

func run(rt *amdhip.Runtime, source string) error {
	dev, err := rt.Device(0)
	if err != nil {
		return err
	}
	code, err := rt.Compile("fill.hip", source, "--gpu-architecture="+dev.Arch())
	if err != nil {
		return err
	}
	module, err := dev.LoadModule(code)
	if err != nil {
		return err
	}
	defer module.Close()
	fill, err := module.Function("fill")
	if err != nil {
		return err
	}
	mem, err := dev.Malloc(5)
	if err != nil {
		return err
	}
	defer mem.Close()
	host, err := dev.HostMalloc(5)
	if err != nil {
		return err
	}
	defer host.Close()
	stream, err := dev.NewStream()
	if err != nil {
		return err
	}
	defer stream.Close()
	err = errors.Join(
		stream.Launch(fill, 1, 64, uint64(mem.Ptr()), 5, '7'),
		stream.CopyToHost(host, 0, mem.Ptr(), 5),
		stream.Synchronize(),
	)
	fmt.Printf("%s\n", host.Bytes())
	return err
}
