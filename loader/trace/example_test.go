package trace_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// Record a load. What is written opens in Perfetto.
func Example() {
	ctx := context.Background()
	file, err := gguf.Open("../../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	l, err := loader.New([]*amdhip.Device{dev}, loader.Config{})
	if err != nil {
		log.Fatal(err)
	}
	p, err := l.Plan(file, plan.Spec{Policy: plan.F16})
	if err != nil {
		log.Fatal(err)
	}
	var tr trace.Trace
	model, err := l.Load(ctx, p, loader.Request{Trace: &tr})
	if err != nil {
		log.Fatal(err)
	}
	var out bytes.Buffer // or a file
	if _, err := tr.WriteTo(&out); err != nil {
		log.Fatal(err)
	}
	fmt.Println(bytes.Contains(out.Bytes(), []byte(`"worker 0"`)), bytes.Contains(out.Bytes(), []byte(`"stream 0"`)))
	if err := errors.Join(model.Close(), l.Close(), dev.Runtime().Close(), file.Close()); err != nil {
		log.Fatal(err)
	}
	// Output: true true
}

// Add something of one's own to the timeline.
func ExampleTrace_Add() {
	var tr trace.Trace
	start := time.Now()
	// ... a step of the program
	tr.Add("main", "warm up", start, start.Add(2*time.Millisecond), "blk.0.attn_q.weight", 4096)
	var out bytes.Buffer
	if _, err := tr.WriteTo(&out); err != nil {
		log.Fatal(err)
	}
	_, span, _ := bytes.Cut(out.Bytes(), []byte(`"name":"warm up",`))
	span, _, _ = bytes.Cut(span, []byte(`,"args"`))
	fmt.Println(string(span))
	// Output: "cat":"load","ph":"X","ts":0,"dur":2000,"pid":1,"tid":1
}
