package amdhip_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"math"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// A GPU if there is one, else the software device.
func ExampleDefault() {
	dev, err := amdhip.Default()
	if errors.Is(err, amdhip.ErrNoLibrary) || errors.Is(err, amdhip.ErrNoDevice) {
		log.Print("no GPU, going on without: ", err)
		dev, err = soft.Open(soft.Options{})
	}
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	log.Printf("%s with %d bytes", dev.Name(), dev.TotalMemory())
}

// Bytes go to the device and come back. With amdhip.Default instead of soft.Open the same runs on a GPU.
func Example() {
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
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

// scaleSource is a kernel of one's own.
const scaleSource = `extern "C" __global__ void scale(float *p, int n, float by) {
	int i = blockIdx.x * blockDim.x + threadIdx.x;
	if (i < n) p[i] *= by;
}`

// offerScale gives the software device a Go function that does what the kernel does. A GPU needs none.
func offerScale(rt *amdhip.Runtime) {
	if s, ok := rt.Backend().(amdhip.StandIns); ok {
		s.OfferKernel("scale", []int{8, 4, 4}, func(c *amdhip.KernelCall) amdhip.Status {
			n, by := int(c.Args[1]), math.Float32frombits(uint32(c.Args[2]))
			mem, st := c.Memory(amdhip.DevicePtr(c.Args[0]), uint64(4*n))
			for i := range len(mem) / 4 {
				v := math.Float32frombits(binary.LittleEndian.Uint32(mem[4*i:]))
				binary.LittleEndian.PutUint32(mem[4*i:], math.Float32bits(v*by))
			}
			return st
		})
	}
}

// One stream copies numbers to the device. Another runs a kernel on them: it waits for the copy on the device, by an
// event, while the host goes on. With amdhip.Default instead of soft.Open the same runs on a GPU.
func ExampleStream_LaunchKernel() {
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	rt := dev.Runtime()
	defer rt.Close()
	offerScale(rt)

	code, err := rt.Compile("scale.hip", scaleSource, "--gpu-architecture="+dev.Arch())
	if err != nil {
		log.Fatal(err)
	}
	module, err := dev.LoadModule(code)
	if err != nil {
		log.Fatal(err)
	}
	defer module.Close()
	scale, err1 := module.Function("scale")
	upload, err2 := dev.NewStream()
	work, err3 := dev.NewStream()
	uploaded, err4 := dev.NewEvent(amdhip.EventOptions{})
	mem, err5 := dev.Malloc(4 * 4)
	host, err6 := dev.HostMalloc(4 * 4)
	if err := errors.Join(err1, err2, err3, err4, err5, err6); err != nil {
		log.Fatal(err)
	}

	for i := range 4 {
		binary.LittleEndian.PutUint32(host.Bytes()[4*i:], math.Float32bits(float32(i)))
	}
	config := amdhip.LaunchConfig{Grid: amdhip.Dim3{X: 1}, Block: amdhip.Dim3{X: 64}}
	err = errors.Join(
		upload.CopyToDevice(mem.Ptr(), host, 0, host.Len()),
		upload.Record(uploaded),

		work.Wait(uploaded),
		work.LaunchKernel(scale, config, mem.Ptr(), int32(4), float32(2.5)),
		work.CopyToHost(host, 0, mem.Ptr(), host.Len()),
		work.Synchronize(),
	)
	if err != nil {
		log.Fatal(err)
	}
	for i := range 4 {
		fmt.Println(math.Float32frombits(binary.LittleEndian.Uint32(host.Bytes()[4*i:])))
	}
	if err := errors.Join(upload.Close(), work.Close(), uploaded.Close(), mem.Close(), host.Close()); err != nil {
		log.Fatal(err)
	}
	// Output:
	// 0
	// 2.5
	// 5
	// 7.5
}

// Work is recorded once and done twice.
func ExampleStream_Capture() {
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	stream, err1 := dev.NewStream()
	mem, err2 := dev.Malloc(4)
	host, err3 := dev.HostMalloc(4)
	if err := errors.Join(err1, err2, err3); err != nil {
		log.Fatal(err)
	}
	graph, err := stream.Capture(func() error {
		return errors.Join(
			stream.CopyToDevice(mem.Ptr(), host, 0, 4),
			stream.Memset(mem.Ptr(), '!', 1),
			stream.CopyToHost(host, 0, mem.Ptr(), 4),
		)
	})
	if err != nil {
		log.Fatal(err)
	}
	exec, err := graph.Instantiate()
	if err != nil {
		log.Fatal(err)
	}
	for _, word := range []string{"abcd", "efgh"} {
		copy(host.Bytes(), word)
		if err := errors.Join(stream.LaunchGraph(exec), stream.Synchronize()); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s\n", host.Bytes())
	}
	if err := errors.Join(exec.Close(), graph.Close(), stream.Close(), mem.Close(), host.Close()); err != nil {
		log.Fatal(err)
	}
	// Output:
	// !bcd
	// !fgh
}

// Memory is unmapped and mapped again: it keeps its bytes and its address.
func ExampleDevice_MapMemory() {
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	_, granularity, err := dev.Granularity()
	if err != nil {
		log.Fatal(err) // it matches ErrUnsupported on a device without virtual memory
	}
	physical, err := dev.CreatePhysical(granularity, amdhip.PhysicalOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer physical.Close()
	mem, err := dev.MapMemory(physical, 0)
	if err != nil {
		log.Fatal(err)
	}
	address := mem.Ptr()
	if err := mem.Close(); err != nil {
		log.Fatal(err)
	}
	mem, err = dev.MapMemory(physical, address)
	if err != nil {
		log.Fatal(err)
	}
	defer mem.Close()
	fmt.Println(mem.Ptr() == address)
	// Output: true
}
