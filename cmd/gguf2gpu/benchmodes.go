package main

import (
	"context"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// modes are the warm loads that are compared for d.
func (b *bench) modes(d loader.DType) []string {
	by := *b.flags.dequant.by
	switch {
	case by == loader.DequantCPU || !b.expands(d) || by == loader.DequantAuto && b.rt.Kind() != "hip":
		return []string{modeSync, modeAsync}
	case by == loader.DequantGPU:
		return []string{modeSync, modeAsyncGPU}
	}
	return []string{modeSync, modeAsync, modeAsyncGPU}
}

// expands reports whether a load as d has something that a device can convert.
func (b *bench) expands(d loader.DType) bool {
	plan, err := loader.NewPlan(b.file, b.options(modeAsyncGPU, d))
	if err != nil {
		return false // the load will say it
	}
	return slices.ContainsFunc(plan.Tensors, func(t loader.PlannedTensor) bool { return gpu.Supported(t.Target, t.Type) })
}

// options are those of a load. Each mode settles who converts.
func (b *bench) options(mode string, d loader.DType) loader.Options {
	o := b.flags.options(nil, b.log)
	o.DType, o.Dequant = d, loader.DequantCPU
	if mode == modeAsyncGPU {
		o.Dequant = loader.DequantGPU
	}
	return o
}

// measureModes measures all warm loads with usual settings. A device that cannot convert is a failure only if it was asked to.
func (b *bench) measureModes(ctx context.Context, dtypes []loader.DType) error {
	unable := false
	for _, d := range dtypes {
		for _, mode := range b.modes(d) {
			if mode == modeAsyncGPU && unable {
				continue
			}
			run, err := b.run(ctx, mode, d, "", b.options(mode, d))
			if err != nil && mode == modeAsyncGPU && *b.flags.dequant.by == loader.DequantAuto && ctx.Err() == nil {
				b.log.Warn("loads that the device converts for are not measured, as it cannot", "error", err)
				unable = true
				continue
			}
			if err != nil {
				return err
			}
			b.report.Runs = append(b.report.Runs, run)
		}
	}
	return nil
}
