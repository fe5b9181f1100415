package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// splitFlags are the flags that say how a model is spread over several devices. A nil *splitFlags is that of a command that has none.
type splitFlags struct {
	set   func(name string) bool // whether a flag was given
	by    *loader.SplitBy
	ratio *[]float64
}

func addSplitFlags(fs *pflag.FlagSet) *splitFlags {
	return &splitFlags{
		set: fs.Changed,
		by: parsedFlag(fs, "split", loader.SplitLayers, "HOW",
			"over several devices: layer (whole layers on each), none (a full copy on each, read once)", loader.ParseSplitBy),
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
func (f *splitFlags) check(device deviceSpec, sync bool) error {
	switch {
	case f == nil:
	case device.list != "" && sync:
		return usageErrorf("--sync and --device %v: the synchronous loader uses one device", device)
	case device.list == "" && (f.set("split") || f.set("split-ratio")):
		return usageErrorf("--split and --split-ratio are for several devices, such as --device hip:0,1, hip:all or soft:2")
	}
	return nil
}

func (f *splitFlags) split() loader.Split { return loader.Split{By: *f.by, Ratio: *f.ratio} }

// onDevices is what a command has loaded: a loader.Model or a loader.SplitModel.
type onDevices interface {
	Report() loader.Report
	Tensors() []loader.Tensor
	Hashes() []loader.TensorHash
	Verify(context.Context) error
	WriteSafetensors(context.Context, io.WriterAt) error
	Close() error
}

// run puts m on devs in the way that the flags say.
func (f *loadFlags) run(ctx context.Context, devs []*amdhip.Device, m *gguf.Model, o loader.Options) (onDevices, []*loader.Model, error) {
	if f.device.device.list != "" {
		w, err := loader.LoadSplit(ctx, devs, m, o, f.split.split())
		if err != nil {
			return nil, nil, err
		}
		return w, w.Models(), nil
	}
	run := loader.Load
	if *f.sync {
		run = loader.LoadSync
	}
	w, err := run(ctx, devs[0], m, o)
	if err != nil {
		return nil, nil, err
	}
	return w, []*loader.Model{w}, nil
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

func shares(models []*loader.Model) []deviceShare {
	all := make([]deviceShare, len(models))
	for i, m := range models {
		r, dev := m.Report(), m.Device()
		all[i] = deviceShare{
			deviceReport: deviceReport{Kind: dev.Runtime().Kind(), Index: dev.Index(), Name: dev.Name()},
			Tensors:      r.Tensors, ReadBytes: r.ReadBytes, UploadBytes: r.UploadBytes, DeviceBytes: r.DeviceBytes,
			Transfer: r.Transfer.Seconds(),
		}
		if r.Transfer > 0 {
			all[i].UploadGBps = float64(r.UploadBytes) / r.Transfer.Seconds() / 1e9
		}
	}
	return all
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
