package doctor

import (
	"errors"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// Report is what [Check] finds. Its JSON is that of the command devices.
type Report struct {
	Library  *Library  `json:"library"`  // nil when none was found
	Attempts []Attempt `json:"attempts"` // the paths that were tried in vain, when none was found
	Devices  []GPU     `json:"devices"`
	Error    string    `json:"no_device,omitempty"` // why Devices is empty or incomplete
	Host     Host      `json:"host"`
	Advice   []string  `json:"advice"`   // what to do, most basic first; empty when a GPU is usable
	Warnings []string  `json:"warnings"` // what may make loads slow or wrong, each with what to do
	Defects  []string  `json:"defects"`  // of the HIP library's version, each with what gguf2gpu does about it
}

// Library is the HIP library.
type Library struct {
	Path          string `json:"path"`
	Runtime       string `json:"runtime_version"` // HIP's version, not ROCm's
	Driver        string `json:"driver_version"`
	Compiler      string `json:"compiler"`                 // the path of hipRTC, which compiles kernels; "": not found
	CompilerError string `json:"compiler_error,omitempty"` // why not, with every path that was tried
}

// Attempt is one path where a HIP library was looked for.
type Attempt struct {
	Path   string `json:"path"`
	Source string `json:"source"` // what named the path
	Error  string `json:"error"`
}

// GPU is a device that the HIP library sees. Sizes are in bytes.
type GPU struct {
	Index           int    `json:"index"`
	Name            string `json:"name"`
	Arch            string `json:"arch"`
	PCIBusID        string `json:"pci_bus_id"`
	UUID            string `json:"uuid"`
	TotalMemory     uint64 `json:"total_bytes"`
	FreeMemory      uint64 `json:"free_bytes"`
	Integrated      bool   `json:"integrated"` // it shares the host's memory
	Multiprocessors int    `json:"compute_units"`
}

// Check looks at the HIP library, the GPUs and the machine that the process runs on.
func Check() *Report {
	r := checkLibrary()
	r.Host = checkHost(thisHost())
	r.Advice, r.Warnings = r.advise(), append(append(r.Host.warn(), r.warn()...), r.warnIPC()...)
	r.Defects = r.defects()
	return r
}

// checkLibrary asks the HIP library what it sees.
func checkLibrary() *Report {
	r := &Report{Attempts: []Attempt{}, Devices: []GPU{}}
	rt, err := amdhip.Open(amdhip.Options{})
	if err != nil {
		r.Error, _, _ = strings.Cut(err.Error(), "\n") // the other lines are the attempts
		if e, ok := errors.AsType[*amdhip.LibraryError](err); ok {
			for _, a := range e.Attempts {
				r.Attempts = append(r.Attempts, Attempt{a.Path, a.Source, a.Err.Error()})
			}
		}
		return r
	}
	defer rt.Close()
	r.Library = &Library{Path: rt.Library()}
	if version, driver, err := rt.Version(); err == nil {
		r.Library.Runtime, r.Library.Driver = amdhip.VersionString(version), amdhip.VersionString(driver)
	}
	if r.Library.Compiler, err = rt.Compiler(); err != nil {
		r.Library.CompilerError = err.Error()
	}
	if r.Devices, err = listGPUs(rt); err != nil {
		r.Error = err.Error()
	}
	return r
}

// listGPUs returns the GPUs of rt; after an error, those before it.
func listGPUs(rt *amdhip.Runtime) ([]GPU, error) {
	gpus := []GPU{}
	n, err := rt.DeviceCount()
	if err != nil {
		return gpus, err
	}
	for i := range n {
		d, err := rt.Device(i)
		if err != nil {
			return gpus, err
		}
		free, _, err := d.MemInfo()
		if err != nil {
			return gpus, err
		}
		gpus = append(gpus, GPU{
			Index: i, Name: d.Name(), Arch: d.Arch(), PCIBusID: d.PCIBusID(), UUID: d.UUID(),
			TotalMemory: d.TotalMemory(), FreeMemory: free, Integrated: d.Integrated(),
			Multiprocessors: d.Multiprocessors(),
		})
	}
	return gpus, nil
}

// advise returns what to do to make a GPU usable.
func (r *Report) advise() []string {
	if len(r.Devices) > 0 && r.Error == "" {
		return []string{}
	}
	advice := r.Host.advise()
	if r.Library == nil {
		advice = append(advice,
			"install the HIP runtime of ROCm (libamdhip64), or set GGUF2GPU_HIP_LIBRARY to its path")
	}
	return advice
}

// warn returns what the libraries lack, and what is known of their versions.
func (r *Report) warn() []string {
	if len(r.Devices) == 0 {
		return nil
	}
	var warnings []string
	for _, f := range libraryFaults {
		if strings.HasPrefix(r.Library.Runtime, f.series+".") {
			warnings = append(warnings, f.text)
		}
	}
	if r.Library.CompilerError == "" {
		return warnings
	}
	return append(warnings, "without hipRTC the CPU dequantizes, and more bytes have to cross the link: install ROCm's "+
		"libhiprtc.so (in the package hip-runtime-amd), or set GGUF2GPU_HIPRTC_LIBRARY to its path")
}
