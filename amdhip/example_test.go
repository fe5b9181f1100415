package amdhip_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// Bytes go to the device and come back. With Open instead of OpenSoftware the same runs on a GPU.
func Example() {
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer rt.Close()
	dev, err := rt.Device(0)
	if err != nil {
		log.Fatal(err)
	}
	mem, err := dev.Malloc(5)
	if err != nil {
		log.Fatal(err)
	}
	defer mem.Close()
	host, err := dev.HostMalloc(10)
	if err != nil {
		log.Fatal(err)
	}
	defer host.Close()
	stream, err := dev.NewStream()
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()

	copy(host.Bytes(), "hello")
	err = errors.Join(
		stream.CopyToDevice(mem.Ptr(), host, 0, 5),
		stream.CopyToHost(host, 5, mem.Ptr(), 5),
		stream.Synchronize(),
	)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", host.Bytes()[5:])
	// Output: hello
}

// A kernel is compiled, loaded and launched. With Open instead of OpenSoftware, and without Offer, the same runs on a GPU.
func ExampleSoftware_Offer() {
	const source = `extern "C" __global__ void fill(unsigned char *p, unsigned long long n, unsigned long long v) {
		for (unsigned long long i = threadIdx.x; i < n; i += blockDim.x) p[i] = v;
	}`
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer rt.Close()
	rt.Software().Offer("fill", 3, func(l *amdhip.SoftLaunch) amdhip.Status {
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
