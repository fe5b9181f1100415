package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/doctor"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

func newDevicesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "devices [flags]",
		Short: "Show the HIP library, the GPUs, and what keeps a GPU from being used",
		Long: `Show which HIP library was found (or every path that was tried, and why not), where hipRTC is, which compiles what
dequantizes on the GPU, which GPUs the library sees, and, when there is none, what to do about it: device files, groups,
environment variables. Warn of what may make loads slow or wrong although a GPU is usable: the PCI Express link, limits on
memory, kernels and GPUs with faults that others have reported. Name the defects that the library's version is known to
have with the memory of held models, and what 'gguf2gpu hold' does about each.

It is a diagnosis: finding nothing is a result, and the exit code is 0.`,
		Example: `  gguf2gpu devices
  gguf2gpu devices --json | jq .advice`,
		Args: cobra.NoArgs,
	}
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		doing(cmd.Context(), waitDevices, whyDevices)
		check := func() (*doctor.Report, error) { return doctor.Check(), nil }
		limit := new(watch.Calls).Limit(time.Minute)
		r, err := watch.Do(cmd.Context(), limit, "asking the HIP library for the GPUs", check, func(*doctor.Report) {})
		if err != nil {
			return err
		}
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		return printDoctor(cmd.OutOrStdout(), r)
	}
	return cmd
}

// printDoctor writes the report for people.
func printDoctor(w io.Writer, r *doctor.Report) error {
	out := bufio.NewWriter(w)
	if r.Library != nil {
		fmt.Fprintf(out, "HIP library  %s, runtime %s, driver %s\n", r.Library.Path, r.Library.Runtime, r.Library.Driver)
		compiler := r.Library.Compiler
		if compiler == "" {
			compiler = "none: " + r.Library.CompilerError
		}
		fmt.Fprintf(out, "hipRTC       %s\n", compiler)
	} else {
		fmt.Fprintln(out, "HIP library  none; tried:")
		for _, a := range r.Attempts {
			fmt.Fprintf(out, "  %s (%s): %s\n", term.Safe(a.Path), a.Source, term.Safe(a.Error))
		}
	}
	for _, d := range r.Devices {
		memory := "memory of its own"
		if d.Integrated {
			memory = "memory shared with the host"
		}
		fmt.Fprintf(out, "GPU %d        %s, %s, PCI %s, %d compute units, %s free of %s, %s\n", d.Index, d.Name, d.Arch, d.PCIBusID,
			d.Multiprocessors, humanize.IBytes(d.FreeMemory), humanize.IBytes(d.TotalMemory), memory)
	}
	if r.Error != "" {
		fmt.Fprintf(out, "no GPU       %s\n", r.Error)
	}
	printHost(out, &r.Host)
	for _, a := range r.Advice {
		fmt.Fprintf(out, "%-12s %s\n", "to do", a)
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(out, "%-12s %s\n", "warning", warning)
	}
	for _, defect := range r.Defects {
		fmt.Fprintf(out, "%-12s %s\n", "defect", defect)
	}
	return out.Flush()
}

func printHost(w io.Writer, h *doctor.Host) {
	for _, d := range append([]doctor.DeviceFile{h.KFD}, h.RenderNodes...) {
		state := "may be opened"
		if !d.Usable {
			state = d.Error
		}
		fmt.Fprintf(w, "%-12s %s\n", "device file", term.Safe(d.Path)+": "+term.Safe(state))
	}
	driver := "not loaded"
	if h.Driver {
		driver = fmt.Sprintf("loaded, lists %d GPUs", h.GPUNodes)
		if h.GPUNodes > 0 {
			driver += ": " + strings.Join(h.Targets, ", ")
		}
		if h.DriverDKMS != "" {
			driver = h.DriverDKMS + " " + driver
		}
	}
	fmt.Fprintf(w, "%-12s amdgpu %s\n", "driver", driver)
	if h.Kernel != "" {
		fmt.Fprintf(w, "%-12s Linux %s\n", "kernel", h.Kernel)
	}
	for _, v := range h.ROCm {
		fmt.Fprintf(w, "%-12s %s in %s\n", "ROCm", v.Version, v.Path)
	}
	for _, l := range h.Links {
		fmt.Fprintf(w, "%-12s GPU %s: %d of %d lanes at %g of %g GT/s, %.1f of %.1f GB/s\n", "PCIe link", l.GPU, l.Lanes, l.MaxLanes,
			l.GTps, l.MaxGTps, l.GBps, l.MaxGBps)
	}
	for _, name := range slices.Sorted(maps.Keys(h.Groups)) {
		member := "not a member"
		if h.Groups[name] {
			member = "member"
		}
		fmt.Fprintf(w, "%-12s %s: %s\n", "group", name, member)
	}
	for _, name := range slices.Sorted(maps.Keys(h.Environment)) {
		fmt.Fprintf(w, "%-12s %s=%s\n", "environment", name, term.Safe(h.Environment[name]))
	}
	if h.Memlock != "" {
		fmt.Fprintf(w, "%-12s %s of locked memory (ulimit -l)\n", "limit", h.Memlock)
	}
	if c := h.Cgroup; c != nil {
		fmt.Fprintf(w, "%-12s %s of memory, %s used (%s)\n", "limit", humanize.IBytes(c.Limit), humanize.IBytes(c.Used), c.File)
	}
}

// firstLine returns s up to its first line break.
func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
