package loader_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"math"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// computeSource are the kernels of a program that computes with a model: a matrix times a vector, added to another
// vector, and the RMS norm of a vector.
const computeSource = `
extern "C" __global__ void mat_vec(float *y, const float *w, const float *x, const float *add, int rows, int cols) {
	int row = blockIdx.x * blockDim.x + threadIdx.x;
	if (row >= rows) return;
	float sum = add ? add[row] : 0.0f;
	for (int i = 0; i < cols; i++) sum += w[(unsigned long long)row * cols + i] * x[i];
	y[row] = sum;
}

extern "C" __global__ void rms_norm(float *y, const float *x, const float *w, int n, float eps) {
	float sum = 0.0f;
	for (int i = 0; i < n; i++) sum += x[i] * x[i];
	float scale = 1.0f / sqrtf(sum / n + eps);
	for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i] * scale * w[i];
}`

// floats32 are numbers as a device has them.
type floats32 []byte

func (f floats32) at(i int) float32 { return math.Float32frombits(binary.LittleEndian.Uint32(f[4*i:])) }

func (f floats32) set(i int, v float32) {
	binary.LittleEndian.PutUint32(f[4*i:], math.Float32bits(v))
}

// matVec is the kernel mat_vec on the CPU. add may be nil.
func matVec(y, w, x, add floats32, rows, cols int) {
	for row := range rows {
		sum := float32(0)
		if add != nil {
			sum = add.at(row)
		}
		for i := range cols {
			sum += w.at(row*cols+i) * x.at(i)
		}
		y.set(row, sum)
	}
}

// rmsNorm is the kernel rms_norm on the CPU.
func rmsNorm(y, x, w floats32, n int, eps float32) {
	sum := float32(0)
	for i := range n {
		sum += x.at(i) * x.at(i)
	}
	scale := 1 / float32(math.Sqrt(float64(sum/float32(n)+eps)))
	for i := range n {
		y.set(i, x.at(i)*scale*w.at(i))
	}
}

// offerCompute gives the software device what does the kernels' work there. A GPU needs nothing.
func offerCompute(rt *amdhip.Runtime) {
	s, ok := rt.Backend().(amdhip.StandIns)
	if !ok {
		return
	}
	s.OfferKernel("mat_vec", []int{8, 8, 8, 8, 4, 4}, func(c *amdhip.KernelCall) amdhip.Status {
		rows, cols := c.Args[4], c.Args[5]
		y, st1 := c.Memory(amdhip.DevicePtr(c.Args[0]), 4*rows)
		w, st2 := c.Memory(amdhip.DevicePtr(c.Args[1]), 4*rows*cols)
		x, st3 := c.Memory(amdhip.DevicePtr(c.Args[2]), 4*cols)
		var add []byte
		var st4 amdhip.Status
		if c.Args[3] != 0 {
			add, st4 = c.Memory(amdhip.DevicePtr(c.Args[3]), 4*rows)
		}
		if st := max(st1, st2, st3, st4); st != amdhip.Success {
			return st
		}
		matVec(y, w, x, add, int(rows), int(cols))
		return amdhip.Success
	})
	s.OfferKernel("rms_norm", []int{8, 8, 8, 4, 4}, func(c *amdhip.KernelCall) amdhip.Status {
		n := c.Args[3]
		y, st1 := c.Memory(amdhip.DevicePtr(c.Args[0]), 4*n)
		x, st2 := c.Memory(amdhip.DevicePtr(c.Args[1]), 4*n)
		w, st3 := c.Memory(amdhip.DevicePtr(c.Args[2]), 4*n)
		if st := max(st1, st2, st3); st != amdhip.Success {
			return st
		}
		rmsNorm(y, x, w, int(n), math.Float32frombits(uint32(c.Args[4])))
		return amdhip.Success
	})
}

// network is what the program computes: for each layer, the vector x becomes x + down·(up·norm(x)), with the layer's
// ffn_norm, ffn_up and ffn_down.
type network struct {
	layers, width, inner int
	eps                  float32
}

func newNetwork(file *gguf.File) network {
	layers, _ := file.Metadata().Uint("llama.block_count")
	up, _ := file.Tensor("blk.0.ffn_up.weight")
	return network{int(layers), int(up.Shape[0]), int(up.Shape[1]), 1e-5}
}

func (n network) tensors(layer int) (norm, up, down string) {
	of := fmt.Sprintf("blk.%d.ffn_", layer)
	return of + "norm.weight", of + "up.weight", of + "down.weight"
}

// input is the vector that all begins with.
func (n network) input(x floats32) {
	for i := range n.width {
		x.set(i, float32(math.Sin(float64(i))))
	}
}

// engine computes a network on a device.
type engine struct {
	network
	matVec, rmsNorm   *amdhip.Function
	stream            *amdhip.Stream
	x, normed, middle *amdhip.Memory
	host              *amdhip.HostMemory
	closers           []func() error  // of what is open, in order
	tr                *trace.Trace    // nil: none
	afterLayer        func(layer int) // is called when a layer has been computed; nil: nobody is
}

func newEngine(dev *amdhip.Device, n network) (_ *engine, err error) {
	e := &engine{network: n}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
		}
	}()
	offerCompute(dev.Runtime())
	code, err := dev.Runtime().Compile("compute.hip", computeSource, "--gpu-architecture="+dev.Arch())
	if err != nil {
		return nil, err
	}
	module, err := dev.LoadModule(code)
	if err != nil {
		return nil, err
	}
	e.closers = append(e.closers, module.Close)
	if e.matVec, err = module.Function("mat_vec"); err != nil {
		return nil, err
	}
	if e.rmsNorm, err = module.Function("rms_norm"); err != nil {
		return nil, err
	}
	if e.stream, err = dev.NewStream(); err != nil {
		return nil, err
	}
	e.closers = append(e.closers, e.stream.Close)
	for _, m := range []struct {
		to    **amdhip.Memory
		elems int
	}{{&e.x, n.width}, {&e.normed, n.width}, {&e.middle, n.inner}} {
		if *m.to, err = dev.Malloc(uint64(4 * m.elems)); err != nil {
			return nil, err
		}
		e.closers = append(e.closers, (*m.to).Close)
	}
	if e.host, err = dev.HostMalloc(4 * n.width); err != nil {
		return nil, err
	}
	e.closers = append(e.closers, e.host.Close)
	return e, nil
}

func (e *engine) close() error {
	var errs []error
	for _, c := range slices.Backward(e.closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

// run computes with a model that may still be on its way: each layer begins when its own tensors are there.
func (e *engine) run(ctx context.Context, model *loader.Model) (floats32, error) {
	e.input(e.host.Bytes())
	if err := e.stream.CopyToDevice(e.x.Ptr(), e.host, 0, e.host.Len()); err != nil {
		return nil, err
	}
	for layer := range e.layers {
		if err := e.layer(ctx, model, layer); err != nil {
			return nil, fmt.Errorf("layer %d: %w", layer, err)
		}
		if e.afterLayer != nil {
			e.afterLayer(layer)
		}
	}
	err := errors.Join(e.stream.CopyToHost(e.host, 0, e.x.Ptr(), e.host.Len()), e.stream.Synchronize())
	return e.host.Bytes(), err
}

// layer puts the kernels of a layer on the stream, behind the arrival of its tensors. A program that is in a hurry
// would not wait for each layer; this one does to know when it was computed.
func (e *engine) layer(ctx context.Context, model *loader.Model, layer int) error {
	var ptrs [3]amdhip.DevicePtr
	norm, up, down := e.tensors(layer)
	for i, name := range []string{norm, up, down} {
		t, err := model.Tensor(name)
		if err != nil {
			return err
		}
		ptrs[i] = t.Ptr
		if err := model.WaitStream(ctx, e.stream, name); err != nil { // the stream waits for the copy, not the host
			return err
		}
	}
	start := time.Now()
	rows := func(n int) amdhip.LaunchConfig {
		return amdhip.LaunchConfig{Grid: amdhip.Dim3{X: uint32(n+63) / 64}, Block: amdhip.Dim3{X: 64}}
	}
	width, inner := int32(e.width), int32(e.inner)
	one, none := amdhip.LaunchConfig{Block: amdhip.Dim3{X: 64}}, amdhip.DevicePtr(0)
	err := errors.Join(
		e.stream.LaunchKernel(e.rmsNorm, one, e.normed.Ptr(), e.x.Ptr(), ptrs[0], width, e.eps),
		e.stream.LaunchKernel(e.matVec, rows(e.inner), e.middle.Ptr(), ptrs[1], e.normed.Ptr(), none, inner, width),
		e.stream.LaunchKernel(e.matVec, rows(e.width), e.x.Ptr(), ptrs[2], e.middle.Ptr(), e.x.Ptr(), width, inner),
		e.stream.Synchronize(),
	)
	e.tr.Add("compute", fmt.Sprintf("layer %d", layer), start, time.Now(), up, 0)
	return err
}

// Compute with a model while it is being loaded: on a stream of its own, kernels of each layer run as soon as its
// tensors are there, while later layers are still on their way. With amdhip.Default instead of soft.Open the same runs
// on a GPU.
func Example_compute() {
	ctx := context.Background()
	dev, err := soft.Open(soft.Options{LinkBytesPerSecond: 100e6})
	if err != nil {
		log.Fatal(err)
	}
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	l, err := loader.New([]*amdhip.Device{dev}, loader.Config{})
	if err != nil {
		log.Fatal(err)
	}
	p, err := l.Plan(file, plan.Spec{Policy: plan.F32})
	if err != nil {
		log.Fatal(err)
	}
	e, err := newEngine(dev, newNetwork(file)) // compiles the kernels
	if err != nil {
		log.Fatal(err)
	}
	model, err := l.Start(ctx, p, loader.Request{}) // returns at once
	if err != nil {
		log.Fatal(err)
	}
	result, err := e.run(ctx, model)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(result)/4, "numbers:", result.at(0) != 0)
	if err := errors.Join(e.close(), model.Close(), l.Close(), dev.Runtime().Close(), file.Close()); err != nil {
		log.Fatal(err)
	}
	// Output: 256 numbers: true
}
