package main

import (
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// dequantizedBy returns who converted the tensors of w, which were loaded from m: "gpu" if the device converted at
// least one, else "cpu", or "none" if there was nothing to convert.
func dequantizedBy(w *loader.Model, m *gguf.File) string {
	if w.Report().Expanded > 0 {
		return "gpu"
	}
	for _, t := range w.Tensors() {
		if in, ok := m.Tensor(t.Name); ok && in.Type != t.Type {
			return "cpu"
		}
	}
	return "none"
}
