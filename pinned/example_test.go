package pinned_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// arrivals prints which pieces have arrived.
type arrivals chan string

func (a arrivals) Done(tag int, _ time.Duration, err error) {
	a <- fmt.Sprintln("piece", tag, "has arrived:", err == nil)
}

// Three pieces go to the device through two buffers: the third waits until one of them is free again.
func Example() {
	rt, err := soft.OpenRuntime(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer rt.Close()
	dev, err := rt.Device(0)
	if err != nil {
		log.Fatal(err)
	}
	const size = pinned.MinBufferBytes
	pool, err := pinned.New(dev, pinned.Options{Budget: 2 * size, BufferBytes: size})
	if err != nil {
		log.Fatal(err)
	}
	stream, err := dev.NewStream()
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()
	mem, err := dev.Malloc(3 * size)
	if err != nil {
		log.Fatal(err)
	}
	defer mem.Close()

	told := make(arrivals, 3)
	for i := range 3 {
		b, err := pool.Acquire(context.Background())
		if err != nil {
			log.Fatal(err)
		}
		copy(b.Bytes(), fmt.Sprintf("piece %d", i))
		if err := b.CopyToDevice(stream, mem.Ptr()+amdhip.DevicePtr(i*size), size); err != nil {
			log.Fatal(err)
		}
		if err := b.ReleaseAfter(stream, told, i); err != nil {
			log.Fatal(err)
		}
	}
	for range 3 {
		fmt.Print(<-told)
	}

	// A device that hangs must not keep the program from ending.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = pool.CloseContext(ctx)
	if left, ok := errors.AsType[*pinned.LeftError](err); ok {
		fmt.Println("bytes left:", left.Bytes)
	}
	fmt.Println("closed:", err == nil)
	// Output:
	// piece 0 has arrived: true
	// piece 1 has arrived: true
	// piece 2 has arrived: true
	// closed: true
}
