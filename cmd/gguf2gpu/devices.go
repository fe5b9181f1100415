package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

func newDevicesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "devices [flags]",
		Short: "Show the HIP library, the GPUs, and what keeps a GPU from being used",
		Long: `Show which HIP library was found (or every path that was tried, and why not), where hipRTC is, which compiles what
dequantizes on the GPU, which GPUs the library sees, and, when there is none, what to do about it: device files, groups,
environment variables. Warn of what may make loads slow or wrong although a GPU is usable: the PCI Express link, limits on
memory, kernels and GPUs with faults that others have reported.

It is a diagnosis: finding nothing is a result, and the exit code is 0.`,
		Args: cobra.NoArgs,
	}
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		r := findDevices()
		r.Host = checkHost(thisHost())
		r.Advice, r.Warnings = r.advise(), append(r.Host.warn(), r.warn()...)
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		return r.print(cmd.OutOrStdout())
	}
	return cmd
}

// devicesReport is the JSON of devices.
type devicesReport struct {
	Library  *libraryReport  `json:"library"`  // null when none was found
	Attempts []attemptReport `json:"attempts"` // paths that were tried in vain, when none was found
	Devices  []gpuReport     `json:"devices"`
	Error    string          `json:"no_device,omitempty"` // why devices is empty or incomplete
	Host     hostReport      `json:"host"`
	Advice   []string        `json:"advice"`   // what to do, most basic first; empty when a GPU is usable
	Warnings []string        `json:"warnings"` // what may make loads slow or wrong, each with what to do
}

type libraryReport struct {
	Path          string `json:"path"`
	Runtime       string `json:"runtime_version"` // HIP's version, not ROCm's
	Driver        string `json:"driver_version"`
	Compiler      string `json:"compiler"`                 // where hipRTC is; "": it was not found
	CompilerError string `json:"compiler_error,omitempty"` // why not, with every path that was tried
}

type attemptReport struct {
	Path   string `json:"path"`
	Source string `json:"source"` // what named the path
	Error  string `json:"error"`
}

type gpuReport struct {
	Index           int    `json:"index"`
	Name            string `json:"name"`
	Arch            string `json:"arch"`
	PCIBusID        string `json:"pci_bus_id"`
	UUID            string `json:"uuid"`
	TotalMemory     uint64 `json:"total_bytes"`
	FreeMemory      uint64 `json:"free_bytes"`
	Integrated      bool   `json:"integrated"`
	Multiprocessors int    `json:"compute_units"`
}

// findDevices asks the HIP library for what it sees.
func findDevices() *devicesReport {
	r := &devicesReport{Attempts: []attemptReport{}, Devices: []gpuReport{}}
	rt, err := amdhip.Open(amdhip.Options{})
	if err != nil {
		r.Error = firstLine(err.Error())
		if e, ok := errors.AsType[*amdhip.LibraryError](err); ok {
			for _, a := range e.Attempts {
				r.Attempts = append(r.Attempts, attemptReport{a.Path, a.Source, a.Err.Error()})
			}
		}
		return r
	}
	defer rt.Close()
	r.Library = &libraryReport{Path: rt.Library()}
	if version, driver, err := rt.Version(); err == nil {
		r.Library.Runtime, r.Library.Driver = amdhip.VersionString(version), amdhip.VersionString(driver)
	}
	if r.Library.Compiler, err = rt.Compiler(); err != nil {
		r.Library.CompilerError = err.Error()
	}
	if err := r.addGPUs(rt); err != nil {
		r.Error = err.Error()
	}
	return r
}

func (r *devicesReport) addGPUs(rt *amdhip.Runtime) error {
	n, err := rt.DeviceCount()
	if err != nil {
		return err
	}
	for i := range n {
		d, err := rt.Device(i)
		if err != nil {
			return err
		}
		free, _, err := d.MemInfo()
		if err != nil {
			return err
		}
		r.Devices = append(r.Devices, gpuReport{
			Index: i, Name: d.Name(), Arch: d.Arch(), PCIBusID: d.PCIBusID(), UUID: d.UUID(), TotalMemory: d.TotalMemory(),
			FreeMemory: free, Integrated: d.Integrated(), Multiprocessors: d.Multiprocessors(),
		})
	}
	return nil
}

// advise says what to do to make a GPU usable.
func (r *devicesReport) advise() []string {
	if len(r.Devices) > 0 && r.Error == "" {
		return []string{}
	}
	advice := r.Host.advise()
	if r.Library == nil {
		advice = append(advice, "install the HIP runtime of ROCm (libamdhip64), or set GGUF2GPU_HIP_LIBRARY to its path")
	}
	return advice
}

// warn says what the libraries lack.
func (r *devicesReport) warn() []string {
	if len(r.Devices) == 0 || r.Library.CompilerError == "" {
		return nil
	}
	return []string{"without hipRTC the CPU dequantizes, and more bytes have to cross the link: install ROCm's libhiprtc.so " +
		"(in the package hip-runtime-amd), or set GGUF2GPU_HIPRTC_LIBRARY to its path"}
}

// print writes the report for people.
func (r *devicesReport) print(w io.Writer) error {
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
			fmt.Fprintf(out, "  %s (%s): %s\n", a.Path, a.Source, a.Error)
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
	r.Host.print(out)
	for _, a := range r.Advice {
		fmt.Fprintf(out, "%-12s %s\n", "to do", a)
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(out, "%-12s %s\n", "warning", warning)
	}
	return out.Flush()
}

func (h *hostReport) print(w io.Writer) {
	for _, d := range append([]deviceFile{h.KFD}, h.RenderNodes...) {
		state := "may be opened"
		if !d.Usable {
			state = d.Error
		}
		fmt.Fprintf(w, "%-12s %s\n", "device file", d.Path+": "+state)
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
		fmt.Fprintf(w, "%-12s %s=%s\n", "environment", name, h.Environment[name])
	}
	if h.Memlock != "" {
		fmt.Fprintf(w, "%-12s %s of locked memory (ulimit -l)\n", "limit", h.Memlock)
	}
	if c := h.Cgroup; c != nil {
		fmt.Fprintf(w, "%-12s %s of memory, %s used (%s)\n", "limit", limitText(c.Limit), limitText(c.Used), c.File)
	}
}

// firstLine returns s up to its first line break.
func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
