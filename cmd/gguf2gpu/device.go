package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// deviceFlags are the flags that say where a model goes.
type deviceFlags struct {
	device     *deviceSpec
	softMemory *uint64  // bytes; 0: the host's memory
	softLink   *float64 // bytes per second; 0: unlimited
	shared     bool     // other processes shall be able to open device memory
	local      int      // which of this host's ranks the process is; 0 or less where that does not matter
}

func addDeviceFlags(fs *pflag.FlagSet) *deviceFlags {
	return &deviceFlags{
		device: parsedFlag(fs, "device", deviceSpec{kind: "auto"}, "DEVICE",
			"auto (a GPU if one is usable, else the software device), soft, hip, or hip:N", parseDevice),
		softMemory: byteSizeFlag(fs, "soft-memory", "capacity of the software device, such as 16GiB (default the host's memory)"),
		softLink:   byteRateFlag(fs, "soft-link", "link speed of the software device, such as 25GB/s (default unlimited)"),
	}
}

// open opens the device that the flags name. Under auto a line on stderr says so when it is the software device for want
// of a GPU. The caller must Close the runtime.
func (f *deviceFlags) open(stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime, *amdhip.Device, error) {
	if f.device.kind == "hip" && (*f.softMemory != 0 || *f.softLink != 0) {
		return nil, nil, usageErrorf("--soft-memory and --soft-link are for the software device, not for --device %v", *f.device)
	}
	if f.device.kind != "soft" {
		rt, dev, err := f.openGPU(stderr, logger)
		if err == nil || f.device.kind == "hip" {
			return rt, dev, err
		}
		fmt.Fprintf(stderr, "gguf2gpu: %s; using the software device ('gguf2gpu devices' tells more)\n", whyNoGPU(err))
	}
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{
		Memory: *f.softMemory, LinkBytesPerSecond: *f.softLink, Shared: f.shared, Logger: logger,
	})
	if err != nil {
		return nil, nil, err
	}
	dev, err := rt.Device(0)
	if err != nil {
		return nil, nil, errors.Join(err, rt.Close())
	}
	return rt, dev, nil
}

// openGPU opens the GPU that --device names. Whatever stands in the way makes the exit code 4.
func (f *deviceFlags) openGPU(stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime, *amdhip.Device, error) {
	rt, err := amdhip.Open(amdhip.Options{Logger: logger})
	if err != nil {
		return nil, nil, withCode(exitNoDevice, err)
	}
	dev, err := f.pickGPU(rt, stderr)
	if err != nil {
		return nil, nil, withCode(exitNoDevice, errors.Join(err, rt.Close()))
	}
	return rt, dev, nil
}

// pickGPU picks by number or, where --device names none, lets the ranks of a host take one each.
func (f *deviceFlags) pickGPU(rt *amdhip.Runtime, stderr io.Writer) (*amdhip.Device, error) {
	if f.device.numbered || f.local <= 0 {
		return pickGPU(rt, f.device.index)
	}
	n, err := rt.DeviceCount()
	if err != nil || n == 0 {
		return pickGPU(rt, f.local) // its error says so
	}
	index, notice := deviceOfRank(f.local, n, os.Getenv)
	if notice != "" {
		fmt.Fprintf(stderr, "gguf2gpu: %s\n", notice)
	}
	return pickGPU(rt, index)
}

func pickGPU(rt *amdhip.Runtime, index int) (*amdhip.Device, error) {
	n, err := rt.DeviceCount()
	if err != nil {
		return nil, fmt.Errorf("no GPU is usable through %s: %w", rt.Library(), err)
	}
	if index >= n {
		return nil, fmt.Errorf("there is no GPU number %d: this machine has %d, numbered from 0", index, n)
	}
	return rt.Device(index)
}

// whyNoGPU says in a few words why --device auto fell back; the full story is for 'gguf2gpu devices'.
func whyNoGPU(err error) string {
	switch {
	case errors.Is(err, amdhip.ErrNoLibrary):
		return "no HIP library was found"
	case errors.Is(err, amdhip.ErrNoDevice):
		return "the HIP library sees no GPU"
	default:
		return firstLine(err.Error())
	}
}
