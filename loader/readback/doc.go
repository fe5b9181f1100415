// Package readback looks at what is in device memory: it compares a loaded model with its file, returns single tensors,
// and writes safetensors files.
//
//	model, err := loader.Load(ctx, file, plan.Spec{Policy: plan.F16}, dev)
//	...
//	result, err := readback.Verify(ctx, model, file) // result says of how many tensors
//	bytes, err := readback.Tensor(ctx, model, "output_norm.weight")
//	err = readback.WriteSafetensors(ctx, model, out)
//	err = readback.Export{HF: names}.WriteSafetensors(ctx, model, out) // as transformers has it; see plan.HFTensors
//
// It works the same for a model on several devices, for one rank's share, and for a model that another process holds.
package readback
