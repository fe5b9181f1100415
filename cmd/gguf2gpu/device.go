package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"

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
			"auto (a GPU if one is usable, else the software device), soft, hip, or hip:N; for several hip:N,M, hip:all, soft:COUNT",
			parseDevice),
		softMemory: byteSizeFlag(fs, "soft-memory", "capacity of the software device, such as 16GiB (default the host's memory)"),
		softLink:   byteRateFlag(fs, "soft-link", "link speed of the software device, such as 25GB/s (default unlimited)"),
		local:      -1,
	}
}

// open is openAll for a command that works with one device.
func (f *deviceFlags) open(stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime, *amdhip.Device, error) {
	if f.device.list != "" {
		return nil, nil, usageErrorf("--device %v: this command uses one device; load and verify can use several", *f.device)
	}
	rt, devs, err := f.openAll(stderr, logger)
	if err != nil {
		return nil, nil, err
	}
	return rt, devs[0], nil
}

// openAll opens the devices that the flags name. Under auto a line on stderr says so when it is the software device for want of a GPU.
// The caller must Close the runtime.
func (f *deviceFlags) openAll(stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime, []*amdhip.Device, error) {
	if f.device.kind == "hip" && (*f.softMemory != 0 || *f.softLink != 0) {
		return nil, nil, usageErrorf("--soft-memory and --soft-link are for the software device, not for --device %v", *f.device)
	}
	if f.device.kind != "soft" {
		rt, devs, err := f.openGPUs(stderr, logger)
		if err == nil || f.device.kind == "hip" {
			return rt, devs, err
		}
		fmt.Fprintf(stderr, "gguf2gpu: %s; using the software device ('gguf2gpu devices' tells more)\n", whyNoGPU(err))
	}
	count := 1
	if f.device.list != "" {
		count, _ = strconv.Atoi(f.device.list) // parseDevice has seen it
	}
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{
		Devices: count, Memory: *f.softMemory, LinkBytesPerSecond: *f.softLink, Shared: f.shared, Logger: logger,
	})
	if err != nil {
		return nil, nil, err
	}
	devs, err := pick(rt, f.device.numbers(count))
	if err != nil {
		return nil, nil, errors.Join(err, rt.Close())
	}
	return rt, devs, nil
}

// pick returns the devices of those numbers.
func pick(rt *amdhip.Runtime, numbers []int) ([]*amdhip.Device, error) {
	var devs []*amdhip.Device
	for _, n := range numbers {
		dev, err := rt.Device(n)
		if err != nil {
			return nil, err
		}
		devs = append(devs, dev)
	}
	return devs, nil
}

// openGPUs opens the GPUs that the flags name. Whatever stands in the way makes the exit code 4.
func (f *deviceFlags) openGPUs(stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime, []*amdhip.Device, error) {
	rt, err := amdhip.Open(amdhip.Options{Logger: logger})
	if err != nil {
		return nil, nil, withCode(exitNoDevice, err)
	}
	devs, err := f.pickGPUs(rt, stderr)
	if err != nil {
		return nil, nil, withCode(exitNoDevice, errors.Join(err, rt.Close()))
	}
	return rt, devs, nil
}

// pickGPUs picks by number or, where --device names none, lets the ranks of a host take one each.
func (f *deviceFlags) pickGPUs(rt *amdhip.Runtime, stderr io.Writer) ([]*amdhip.Device, error) {
	count, err := countGPUs(rt)
	if err != nil {
		return nil, err
	}
	numbers := f.device.numbers(count)
	if f.local > 0 && !f.device.named && f.device.list == "" && count > 0 {
		index, notice := deviceOfRank(f.local, count, os.Getenv)
		if notice != "" {
			fmt.Fprintf(stderr, "gguf2gpu: %s\n", notice)
		}
		numbers = []int{index}
	}
	for _, n := range numbers {
		if n >= count {
			return nil, noGPU(n, count)
		}
	}
	return pick(rt, numbers)
}

func countGPUs(rt *amdhip.Runtime) (int, error) {
	n, err := rt.DeviceCount()
	if err != nil {
		return 0, fmt.Errorf("no GPU is usable through %s: %w", rt.Library(), err)
	}
	return n, nil
}

func noGPU(index, count int) error {
	return fmt.Errorf("there is no GPU number %d: this machine has %d, numbered from 0", index, count)
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
