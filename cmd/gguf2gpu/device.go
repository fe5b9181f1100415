package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/rank"
)

// deviceFlags are the flags that say which devices a model goes to.
type deviceFlags struct {
	device     *deviceSpec
	softMemory *uint64        // bytes; 0: the host's memory
	softLink   *float64       // bytes per second; 0: unlimited
	softFlip   *softFlips     // damage, for tests
	shared     bool           // other processes must be able to open the device memory
	stall      *time.Duration // how long calls of the runtime may take; nil: a minute
	local      int            // the number among the ranks of this host; 0 or less where ranks do not matter
}

func addDeviceFlags(fs *pflag.FlagSet) *deviceFlags {
	f := &deviceFlags{
		device: parsedFlag(fs, "device", deviceSpec{kind: "auto"}, "DEVICE",
			"auto (a GPU if one is usable, else the software device), soft, hip, or hip:N; for several hip:N,M, hip:all, soft:COUNT",
			parseDevice),
		softMemory: byteSizeFlag(fs, "soft-memory", "capacity of the software device, such as 16GiB (default the host's memory)"),
		softLink:   byteRateFlag(fs, "soft-link", "link speed of the software device, such as 25GB/s (default unlimited)"),
		softFlip: parsedFlag(fs, "soft-flip", softFlips{}, "LIST",
			"damage bits on the software device: WHEN:BYTE:BIT[:DEVICE], see soft.Flip; separated by commas", parseFlips),
		local: -1,
	}
	_ = fs.MarkHidden("soft-flip") // it is there; only tests have a use for it
	return f
}

// softFlips is the value of --soft-flip. It prints as the flag takes it.
type softFlips []soft.Flip

func (l softFlips) String() string {
	words := make([]string, len(l))
	for i, f := range l {
		words[i] = f.String()
	}
	return strings.Join(words, ",")
}

func parseFlips(s string) (softFlips, error) {
	var l softFlips
	for word := range strings.SplitSeq(s, ",") {
		var f soft.Flip
		if err := f.UnmarshalText([]byte(word)); err != nil {
			return nil, err
		}
		l = append(l, f)
	}
	return l, nil
}

// open opens the device that the flags name, for a command that works with one device. See openAll.
func (f *deviceFlags) open(
	ctx context.Context, stderr io.Writer, logger *slog.Logger,
) (*amdhip.Runtime, *amdhip.Device, error) {
	if f.device.list != "" {
		return nil, nil, usageErrorf("--device %v: this command uses one device; load and verify can use several", *f.device)
	}
	rt, devs, err := f.openAll(ctx, stderr, logger)
	if err != nil {
		return nil, nil, err
	}
	return rt, devs[0], nil
}

// openAll opens the devices that the flags name. If --device auto finds no GPU it opens the software device, and says
// so in a line on stderr; but a HIP library that the user has named and that cannot be used is an error. The caller
// must close the runtime.
func (f *deviceFlags) openAll(ctx context.Context, stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime,
	[]*amdhip.Device, error,
) {
	forSoft := *f.softMemory != 0 || *f.softLink != 0 || len(*f.softFlip) > 0
	if f.device.kind == "hip" && forSoft {
		return nil, nil, usageErrorf("--soft-memory, --soft-link and --soft-flip are for the software device, not for --device %v",
			*f.device)
	}
	if f.device.kind != "soft" {
		rt, devs, err := f.openGPUs(ctx, stderr, logger)
		if err == nil && forSoft {
			fmt.Fprintln(stderr, "gguf2gpu: --soft-memory, --soft-link and --soft-flip have no effect: a GPU is used")
		}
		wanted := f.device.kind == "hip" || namedLibrary() && !errors.Is(err, amdhip.ErrNoDevice)
		if err == nil || watch.Lost(err) || ctx.Err() != nil || wanted {
			return rt, devs, err
		}
		fmt.Fprintf(stderr, "gguf2gpu: %s; using the software device ('gguf2gpu devices' tells more)\n", whyNoGPU(err))
	}
	count := 1
	if f.device.list != "" {
		count, _ = strconv.Atoi(f.device.list) // parseDevice has checked it
	}
	rt, err := soft.OpenRuntime(soft.Options{
		Devices: count, Memory: *f.softMemory, LinkBytesPerSecond: *f.softLink, Shared: f.shared, Flips: *f.softFlip,
		Logger: logger,
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

// pick returns the devices with those numbers.
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

// openGPUs opens the GPUs that the flags name. Any failure makes the exit code 4, but a runtime that hangs.
func (f *deviceFlags) openGPUs(ctx context.Context, stderr io.Writer, logger *slog.Logger) (*amdhip.Runtime,
	[]*amdhip.Device, error,
) {
	doing(ctx, waitDevices, whyDevices)
	limit := f.limit()
	rt, err := watch.Do(ctx, limit, "opening the HIP library", func() (*amdhip.Runtime, error) {
		return amdhip.Open(amdhip.Options{Logger: logger})
	}, func(rt *amdhip.Runtime) { _ = rt.Close() })
	if err != nil {
		return nil, nil, noDevice(err)
	}
	devs, err := watch.Do(ctx, limit, "asking the HIP library for the GPUs", func() ([]*amdhip.Device, error) {
		return f.pickGPUs(rt, stderr)
	}, func([]*amdhip.Device) {})
	if err != nil {
		return nil, nil, errors.Join(noDevice(err), rt.Close())
	}
	return rt, devs, nil
}

// limit is how long the calls of the runtime may take before a load begins.
func (f *deviceFlags) limit() *watch.Limit {
	stall := time.Minute
	if f.stall != nil && *f.stall > 0 {
		stall = *f.stall
	}
	return new(watch.Calls).Limit(stall)
}

// noDevice gives an error of opening GPUs the exit code 4. A runtime that hangs is there.
func noDevice(err error) error {
	if watch.Lost(err) {
		return err
	}
	return withCode(exitNoDevice, err)
}

// pickGPUs returns the GPUs with the numbers that --device names. If it names none, each rank of a host takes one GPU.
func (f *deviceFlags) pickGPUs(rt *amdhip.Runtime, stderr io.Writer) ([]*amdhip.Device, error) {
	count, err := countGPUs(rt)
	if err != nil {
		return nil, err
	}
	numbers := f.device.numbers(count)
	if f.local > 0 && !f.device.named && f.device.list == "" && count > 0 {
		index, shared := rank.Device(f.local, count, os.Getenv)
		if shared {
			fmt.Fprintf(stderr, "gguf2gpu: local rank %d takes GPU %d, which another rank has, too: the number of GPUs here is %d\n",
				f.local, index, count)
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

// namedLibrary reports whether the user has named a HIP library. Who does that wants it, and is to be told why it
// cannot be used.
func namedLibrary() bool { return os.Getenv("GGUF2GPU_HIP_LIBRARY") != "" }

// whyNoGPU says in a few words why --device auto takes the software device. 'gguf2gpu devices' tells the details.
func whyNoGPU(err error) string {
	switch {
	case errors.Is(err, amdhip.ErrNoLibrary):
		return "no HIP library was found"
	case errors.Is(err, amdhip.ErrNoDevice):
		text := "the HIP library sees no GPU"
		if _, hint, ok := strings.Cut(firstLine(err.Error()), "; "); ok {
			text += ": " + hint
		}
		return text
	default:
		return firstLine(err.Error())
	}
}

// deviceSpec is the value of --device. It prints as the flag takes it.
type deviceSpec struct {
	kind  string // "auto", "soft" or "hip"
	index int    // of the GPU; 0 unless the value was hip:N
	named bool   // the value was hip:N
	list  string // for several devices what follows the colon: "0,1" or "all" for hip, their number for soft; else ""
}

func (d deviceSpec) String() string {
	switch {
	case d.list != "":
		return d.kind + ":" + d.list
	case d.named:
		return d.kind + ":" + strconv.Itoa(d.index)
	}
	return d.kind
}

// numbers returns the numbers of the devices that d names, on a machine that has count devices.
func (d deviceSpec) numbers(count int) []int {
	if d.list == "" {
		return []int{d.index}
	}
	var all []int
	if d.list == "all" || d.kind == "soft" {
		for i := range count {
			all = append(all, i)
		}
		return all
	}
	for word := range strings.SplitSeq(d.list, ",") {
		n, _ := strconv.Atoi(word) // parseDevice has checked it
		all = append(all, n)
	}
	return all
}

// maxSoftDevices is the largest number of software devices.
const maxSoftDevices = 64

func parseDevice(s string) (deviceSpec, error) {
	s = strings.ToLower(s)
	kind, number, numbered := strings.Cut(s, ":")
	d := deviceSpec{kind: kind}
	switch {
	case !numbered && (s == "auto" || s == "soft" || s == "hip"):
		return d, nil
	case kind == "hip" && number == "all":
		d.list = number
		return d, nil
	case kind == "soft":
		if n, err := strconv.ParseUint(number, 10, 8); err == nil && n >= 1 && n <= maxSoftDevices {
			d.list = strconv.Itoa(int(n))
			return d, nil
		}
		if numbered {
			return deviceSpec{}, fmt.Errorf("soft:COUNT takes the number of software devices, 1 to %d", maxSoftDevices)
		}
	case kind == "hip":
		var words []string
		for word := range strings.SplitSeq(number, ",") {
			n, err := strconv.ParseUint(word, 10, 16)
			if err == nil && slices.Contains(words, strconv.Itoa(int(n))) {
				return deviceSpec{}, fmt.Errorf("GPU number %d is named twice", n)
			}
			if err != nil {
				words = nil
				break
			}
			words = append(words, strconv.Itoa(int(n)))
		}
		switch len(words) {
		case 0:
		case 1:
			d.index, _ = strconv.Atoi(words[0])
			d.named = true
			return d, nil
		default:
			d.list = strings.Join(words, ",")
			return d, nil
		}
	}
	return deviceSpec{}, errors.New("allowed are auto, soft, hip, and hip:N for GPU number N; several are hip:N,M..., hip:all, and soft:COUNT")
}
