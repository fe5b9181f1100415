package gpu_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// Compile a kernel, load it, and launch it on one block of Q8_0. The software device stands in for a GPU here; on a GPU
// the Compiler would need a Run or InProcess.
func Example() {
	rt, err := soft.OpenRuntime(soft.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer rt.Close()
	dev, err := rt.Device(0)
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := convert(context.Background(), dev); err != nil {
		fmt.Println(err)
	}
	// Output:
	// kernel dequantize_q8_0_f32 is ready
	// -8 -7.5 ... 7.5
}

func convert(ctx context.Context, dev *amdhip.Device) (err error) {
	key := gpu.Key{To: gguf.F32, From: gguf.Q8_0}
	var compiler gpu.Compiler
	set, err := compiler.Load(ctx, dev, []gpu.Key{key})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, set.Close()) }()
	fmt.Println("kernel", key.Name(), "is ready")

	// One piece of memory on each side: padding, the block, padding, and from byte 256 on the 32 outputs.
	const in, out, outBytes = gpu.Padding, 256, 32 * 4
	host, err := dev.HostMalloc(out + outBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	mem, err := dev.Malloc(out + outBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()
	stream, err := dev.NewStream()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()

	block := host.Bytes()[in : in+gguf.Q8_0.BlockBytes()]
	binary.LittleEndian.PutUint16(block, 0x3800) // the scale 0.5 as a binary16
	for i := range 32 {
		block[2+i] = byte(i - 16)
	}
	err = errors.Join(
		stream.CopyToDevice(mem.Ptr()+in, host, in, len(block)),
		set.Launch(stream, key, mem.Ptr()+out, mem.Ptr()+in, 1),
		stream.CopyToHost(host, out, mem.Ptr()+out, outBytes),
		stream.Synchronize())
	if err != nil {
		return err
	}
	x := func(i int) float32 { return math.Float32frombits(binary.LittleEndian.Uint32(host.Bytes()[out+4*i:])) }
	fmt.Println(x(0), x(1), "...", x(31))
	return nil
}

// A program compiles in a child process, which is the program itself with the argument "compile-kernel".
func ExampleChild() {
	if len(os.Args) == 2 && os.Args[1] == "compile-kernel" {
		if err := gpu.ServeChild(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Println(err)
		return
	}
	compiler := gpu.Compiler{Run: gpu.Child(self, "compile-kernel")}
	fmt.Println(compiler.Run != nil)
	// Output: true
}
