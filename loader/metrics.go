package loader

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// WriteMetrics writes what the Holder holds in the text format of Prometheus, version 0.0.4.
func (h *Holder) WriteMetrics(w io.Writer) error {
	models := h.Models()
	h.mu.Lock()
	attached, refused, link := h.attached, h.refused, h.o.LinkBytesPerSecond
	h.mu.Unlock()

	var b bytes.Buffer
	metric := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	each := func(name, help string, value func(*HeldModel) (float64, bool)) {
		metric(name, "gauge", help)
		for i := range models {
			if v, ok := value(&models[i]); ok {
				fmt.Fprintf(&b, "%s{model=\"%s\",dtype=\"%s\"} %v\n", name, escapeLabel(models[i].Name), models[i].DType, v)
			}
		}
	}
	loaded := func(m *HeldModel) bool { return m.State == stateLoaded }
	metric("gguf2gpu_models", "gauge", "Models held, in whatever state.")
	fmt.Fprintf(&b, "gguf2gpu_models %d\n", len(models))
	each("gguf2gpu_model_loaded", "1 when all tensors are in device memory.", func(m *HeldModel) (float64, bool) {
		if loaded(m) {
			return 1, true
		}
		return 0, true
	})
	each("gguf2gpu_model_device_bytes", "Device memory of the model.", func(m *HeldModel) (float64, bool) { return float64(m.Bytes), true })
	each("gguf2gpu_model_attached", "Processes that use the model now.", func(m *HeldModel) (float64, bool) { return float64(m.Attached), true })
	each("gguf2gpu_model_load_seconds", "What loading took.", func(m *HeldModel) (float64, bool) { return m.Seconds, loaded(m) })
	each("gguf2gpu_model_link_efficiency", "Uploaded bytes per second of loading, as a share of the link's speed.",
		func(m *HeldModel) (float64, bool) {
			if link <= 0 || m.Transfer <= 0 {
				return 0, false
			}
			return float64(m.Uploaded) / m.Transfer / link, loaded(m)
		})
	metric("gguf2gpu_attachments_total", "counter", "Attachments since the start.")
	fmt.Fprintf(&b, "gguf2gpu_attachments_total %d\n", attached)
	metric("gguf2gpu_refused_total", "counter", "Connections that were refused.")
	fmt.Fprintf(&b, "gguf2gpu_refused_total %d\n", refused)
	if link > 0 {
		metric("gguf2gpu_link_bytes_per_second", "gauge", "Speed of the link to the device, as measured at the start.")
		fmt.Fprintf(&b, "gguf2gpu_link_bytes_per_second %v\n", link)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// escapeLabel makes s the value of a label.
func escapeLabel(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s)
}
