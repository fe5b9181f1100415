package hold

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
)

// WriteMetrics writes what the Holder holds in the text format of Prometheus, version 0.0.4.
func (h *Holder) WriteMetrics(w io.Writer) error {
	models := h.Models()
	h.mu.Lock()
	attached, refused, wakes, evictions := h.attached, h.refused, h.wakes, h.evictions
	wakeTime := h.wakeTime
	h.mu.Unlock()
	link := h.options.LinkBytesPerSecond

	var b bytes.Buffer
	metric := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	each := func(name, help string, value func(*Model) (float64, bool)) {
		metric(name, "gauge", help)
		for i := range models {
			if v, ok := value(&models[i]); ok {
				fmt.Fprintf(&b, "%s{model=\"%s\",dtype=\"%s\"} %v\n", name, escapeLabel(models[i].Name), models[i].Policy, v)
			}
		}
	}
	loaded := func(m *Model) bool { return m.State == stateResident }
	metric("gguf2gpu_models", "gauge", "Models held, in whatever state.")
	fmt.Fprintf(&b, "gguf2gpu_models %d\n", len(models))
	each("gguf2gpu_model_loaded", "1 when all tensors are in device memory.", func(m *Model) (float64, bool) {
		if loaded(m) {
			return 1, true
		}
		return 0, true
	})
	each("gguf2gpu_model_device_bytes", "Device memory of the model.", func(m *Model) (float64, bool) { return float64(m.Bytes), true })
	each("gguf2gpu_model_attached", "Processes that use the model now.", func(m *Model) (float64, bool) { return float64(m.Attached), true })
	each("gguf2gpu_model_load_seconds", "What loading took.", func(m *Model) (float64, bool) { return m.Seconds, loaded(m) })
	each("gguf2gpu_model_link_efficiency", "Uploaded bytes per second of loading, as a share of the speed of the links.",
		func(m *Model) (float64, bool) {
			if link <= 0 || m.Transfer <= 0 || m.links == 0 {
				return 0, false
			}
			return float64(m.Uploaded) / m.Transfer / (link * float64(m.links)), loaded(m)
		})
	each("gguf2gpu_model_pinned", "1 when the model makes no room for others.", func(m *Model) (float64, bool) {
		if m.Pinned {
			return 1, true
		}
		return 0, true
	})
	each("gguf2gpu_model_last_used_seconds", "When the model was last used, in seconds since 1970.", func(m *Model) (float64, bool) {
		return float64(m.LastUsed), true
	})
	each("gguf2gpu_model_wake_seconds", "What the last wake took.", func(m *Model) (float64, bool) { return m.WakeTime, m.Wakes > 0 })
	metric("gguf2gpu_model_state", "gauge", "1 for the state that the model is in.")
	for _, m := range models {
		fmt.Fprintf(&b, "gguf2gpu_model_state{model=\"%s\",state=\"%s\"} 1\n", escapeLabel(m.Name), m.State)
	}
	metric("gguf2gpu_model_tier_bytes", "gauge", "Memory of the model in each tier.")
	var sum TierBytes
	for _, m := range models {
		fmt.Fprintf(&b, "gguf2gpu_model_tier_bytes{model=\"%s\",tier=\"vram\"} %d\n", escapeLabel(m.Name), m.Tiers.VRAM)
		fmt.Fprintf(&b, "gguf2gpu_model_tier_bytes{model=\"%s\",tier=\"ram\"} %d\n", escapeLabel(m.Name), m.Tiers.RAM)
		sum.VRAM, sum.RAM = sum.VRAM+m.Tiers.VRAM, sum.RAM+m.Tiers.RAM
	}
	if h.pool != nil {
		sum.RAM = uint64(h.pool.bytes()) // with what is free for the next model
	}
	metric("gguf2gpu_tier_bytes", "gauge", "Memory that is taken in each tier.")
	fmt.Fprintf(&b, "gguf2gpu_tier_bytes{tier=\"vram\"} %d\ngguf2gpu_tier_bytes{tier=\"ram\"} %d\n", sum.VRAM, sum.RAM)
	metric("gguf2gpu_tier_budget_bytes", "gauge", "Memory that may be taken in each tier, of device memory on each device; 0: no limit, or no tier.")
	fmt.Fprintf(&b, "gguf2gpu_tier_budget_bytes{tier=\"vram\"} %d\ngguf2gpu_tier_budget_bytes{tier=\"ram\"} %d\n", h.options.VRAM,
		h.options.RAM)
	metric("gguf2gpu_wakes_total", "counter", "Times that a model came back to device memory.")
	fmt.Fprintf(&b, "gguf2gpu_wakes_total %d\n", wakes)
	metric("gguf2gpu_wake_seconds_total", "counter", "What that took in all.")
	fmt.Fprintf(&b, "gguf2gpu_wake_seconds_total %v\n", wakeTime.Seconds())
	metric("gguf2gpu_evictions_total", "counter", "Models that made room for others.")
	fmt.Fprintf(&b, "gguf2gpu_evictions_total %d\n", evictions)
	if h.options.Scrub > 0 {
		writeScrubMetrics(&b, metric, models)
	}
	metric("gguf2gpu_build_info", "gauge", "What this process is; the value is 1.")
	fmt.Fprintf(&b, "gguf2gpu_build_info{version=\"%s\",goversion=\"%s\",runtime=\"%s\",share=\"%v\"} 1\n", escapeLabel(buildVersion()),
		escapeLabel(runtime.Version()), escapeLabel(h.devices[0].Runtime().Kind()), h.share)
	metric("gguf2gpu_attachments_total", "counter", "Attachments since the start.")
	fmt.Fprintf(&b, "gguf2gpu_attachments_total %d\n", attached)
	metric("gguf2gpu_refused_total", "counter", "Connections that were refused.")
	fmt.Fprintf(&b, "gguf2gpu_refused_total %d\n", refused)
	if link > 0 {
		metric("gguf2gpu_link_bytes_per_second", "gauge", "Speed of the link to a device, as measured at the start.")
		fmt.Fprintf(&b, "gguf2gpu_link_bytes_per_second %v\n", link)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// buildVersion is the version of the module, as the go command has recorded it.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// escapeLabel makes s the value of a label.
func escapeLabel(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s)
}
