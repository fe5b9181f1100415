package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// splitFlags are the flags that say how a model is spread over several devices. A nil *splitFlags is that of a command
// that has none.
type splitFlags struct {
	set   func(name string) bool // whether a flag was given
	by    *plan.SplitBy
	ratio *[]float64
}

func addSplitFlags(fs *pflag.FlagSet) *splitFlags {
	return &splitFlags{
		set: fs.Changed,
		by: textFlag(fs, "split", plan.SplitLayers, "HOW",
			"over several devices: layer (whole layers on each), none (a full copy on each, read once)"),
		ratio: parsedFlag(fs, "split-ratio", nil, "N,N...", "with --split layer, the devices' shares, such as 3,1 (default by free memory)",
			parseRatio),
	}
}

func parseRatio(s string) ([]float64, error) {
	var all []float64
	for word := range strings.SplitSeq(s, ",") {
		x, err := strconv.ParseFloat(word, 64)
		if err != nil || !(x > 0) {
			return nil, errors.New("allowed are numbers above 0, one for each device, such as 3,1")
		}
		all = append(all, x)
	}
	return all, nil
}

// check refuses the flags where there is one device only.
func (f *splitFlags) check(device deviceSpec) error {
	switch {
	case f == nil:
	case device.list == "" && (f.set("split") || f.set("split-ratio")):
		return usageErrorf("--split and --split-ratio are for several devices, such as --device hip:0,1, hip:all or soft:2")
	}
	return nil
}

func (f *splitFlags) split() plan.Split {
	if f == nil {
		return plan.Split{}
	}
	return plan.Split{By: *f.by, Ratio: *f.ratio}
}

// deviceShare is what --json says about one of the devices.
type deviceShare struct {
	deviceReport
	Tensors     int     `json:"tensors"`
	ReadBytes   uint64  `json:"read_bytes"` // with --split none, the same bytes for all
	UploadBytes uint64  `json:"upload_bytes"`
	DeviceBytes uint64  `json:"device_bytes"`
	Transfer    float64 `json:"transfer_seconds"`
	UploadGBps  float64 `json:"upload_gbps"`
}

func shares(all []loader.DeviceReport) []deviceShare {
	out := make([]deviceShare, len(all))
	for i, d := range all {
		out[i] = deviceShare{
			deviceReport: describeDevice(d.Device), Tensors: d.Tensors, ReadBytes: d.ReadBytes, UploadBytes: d.UploadBytes,
			DeviceBytes: d.DeviceBytes, Transfer: d.Transfer.Seconds(),
		}
		if d.Transfer > 0 {
			out[i].UploadGBps = float64(d.UploadBytes) / d.Transfer.Seconds() / 1e9
		}
	}
	return out
}

// names says which devices they are.
func names(all []deviceShare) string {
	texts := make([]string, len(all))
	for i, d := range all {
		texts[i] = d.Name
		if len(all) > 1 {
			texts[i] = fmt.Sprintf("%s:%d (%s)", d.Kind, d.Index, d.Name)
		}
	}
	return strings.Join(texts, ", ")
}
