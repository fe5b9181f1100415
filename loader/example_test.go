package loader_test

import (
	"context"
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

// A model on one device. With a GPU, amdhip.Default opens the device.
func ExampleLoad() {
	ctx := context.Background()
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	model, err := loader.Load(ctx, file, plan.Spec{Policy: plan.F16}, dev)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	q, err := model.Tensor("blk.0.attn_q.weight")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(model.Tensors()), "tensors;", q.Name, q.Type, q.Shape, q.Bytes, "bytes")
	// Output: 40 tensors; blk.0.attn_q.weight F16 [256 256] 131072 bytes
}

// A stream of one's own waits, on the device, for a tensor that is still on its way.
func ExampleModel_WaitStream() {
	ctx := context.Background()
	dev, err := soft.Open(soft.Options{LinkBytesPerSecond: 1e9})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	l, err := loader.New([]*amdhip.Device{dev}, loader.Config{Streams: 4, Threads: 8})
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	p, err := l.Plan(file, plan.Spec{Policy: plan.BF16})
	if err != nil {
		log.Fatal(err)
	}
	model, err := l.Start(ctx, p, loader.Request{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	compute, err := dev.NewStream()
	if err != nil {
		log.Fatal(err)
	}
	defer compute.Close()
	if err := model.WaitStream(ctx, compute, "blk.0.attn_q.weight"); err != nil {
		log.Fatal(err)
	}
	// Kernels that are enqueued on compute from here on find the tensor in place.
	if err := compute.Synchronize(); err != nil {
		log.Fatal(err)
	}
	if err := model.WaitAll(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println("all", p.Len(), "tensors have arrived")
	// Output: all 40 tensors have arrived
}

// Whole layers on each of two devices. Each tensor says where it is.
func ExampleLoad_severalDevices() {
	ctx := context.Background()
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2})
	if err != nil {
		log.Fatal(err)
	}
	defer rt.Close()
	var devices []*amdhip.Device
	for i := range 2 {
		dev, err := rt.Device(i)
		if err != nil {
			log.Fatal(err)
		}
		devices = append(devices, dev)
	}
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	spec := plan.Spec{Policy: plan.Raw, Split: plan.Split{By: plan.SplitLayers, Ratio: []float64{1, 1}}}
	model, err := loader.Load(ctx, file, spec, devices...)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	for _, name := range []string{"token_embd.weight", "blk.3.ffn_up.weight"} {
		t, err := model.Tensor(name)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(t.Name, "is on device", t.Device.Index())
	}
	result, err := readback.Verify(ctx, model, file)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("verified:", result)
	// Output:
	// token_embd.weight is on device 0
	// blk.3.ffn_up.weight is on device 1
	// verified: 40 of 40 tensors
}

// One tensor's bytes are read back by one call.
func ExampleModel_readOneBack() {
	ctx := context.Background()
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	model, err := loader.Load(ctx, file, plan.Spec{Policy: plan.F32}, dev)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	norm, err := readback.Tensor(ctx, model, "output_norm.weight")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(norm), "bytes")
	// Output: 1024 bytes
}
