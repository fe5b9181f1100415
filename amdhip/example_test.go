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
