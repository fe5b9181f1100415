package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// planReport is the JSON of load --plan. Sizes are in bytes.
type planReport struct {
	Model        string       `json:"model"`
	Architecture string       `json:"architecture"`
	DType        string       `json:"dtype"`
	FileBytes    uint64       `json:"file_bytes"`
	Split        string       `json:"split,omitempty"`
	Devices      []devicePlan `json:"devices"`
	Shard        string       `json:"shard,omitempty"` // how the model is divided among ranks
	Rank         *int         `json:"rank,omitempty"`  // the one that devices is about
	Ranks        []rankPlan   `json:"ranks,omitempty"`
}

// planned is what goes to one place.
type planned struct {
	Tensors     int    `json:"tensors"`
	Slices      int    `json:"slices"` // of the tensors, those that are not whole
	Layers      string `json:"layers"` // "0-15", or "" where there is none
	ReadBytes   uint64 `json:"read_bytes"`
	DeviceBytes uint64 `json:"device_bytes"`
}

// devicePlan is what goes to one device.
type devicePlan struct {
	deviceReport
	planned
	FreeBytes uint64 `json:"free_bytes"`
	Fits      bool   `json:"fits"`
}

// rankPlan is what one rank loads.
type rankPlan struct {
	Rank int `json:"rank"`
	planned
}

func newPlanned(p *loader.Plan) planned {
	out := planned{Tensors: len(p.Tensors), ReadBytes: p.ReadBytes, DeviceBytes: p.DeviceBytes}
	for _, t := range p.Tensors {
		if t.Slice != nil {
			out.Slices++
		}
	}
	if first, last, ok := p.Layers(); ok {
		out.Layers = fmt.Sprintf("%d-%d", first, last)
	}
	return out
}

// plan prints what would go where.
func (f *loadFlags) plan(cmd *cobra.Command, path string) (err error) {
	all := f.shard.allRanks()
	if err := errors.Join(f.split.check(*f.device.device, *f.sync), f.shard.resolve()); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	m, client, err := f.remote.open(cmd.Context(), path, log)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, m.Close())
		if client != nil {
			client.Close()
		}
	}()
	o := f.options(nil, log)
	r := planReport{Model: remote.Redact(path), Architecture: m.Architecture(), DType: f.dtype.String(), FileBytes: m.Size(), Devices: []devicePlan{}}
	if err := r.addRanks(m, o); err != nil {
		return err
	}
	if !all {
		if err := r.addDevices(f, cmd.ErrOrStderr(), log, m, o); err != nil {
			return err
		}
	}
	if *f.json {
		return writeJSON(cmd.OutOrStdout(), r)
	}
	return r.print(cmd.OutOrStdout())
}

// addRanks says what each rank loads, if there are any.
func (r *planReport) addRanks(m *gguf.Model, o loader.Options) error {
	if o.Shard.By == loader.ShardNone {
		return nil
	}
	r.Shard = o.Shard.By.String()
	for rank := range o.Shard.World {
		o.Shard.Rank = rank
		p, err := loader.NewPlan(m, o)
		if err != nil {
			return err
		}
		r.Ranks = append(r.Ranks, rankPlan{rank, newPlanned(p)})
	}
	return nil
}

// addDevices says what goes to each device.
func (r *planReport) addDevices(f *loadFlags, stderr io.Writer, log *slog.Logger, m *gguf.Model, o loader.Options) (err error) {
	if o.Shard.By != loader.ShardNone {
		r.Rank = &o.Shard.Rank
		f.device.local = f.shard.local
	}
	rt, devs, err := f.device.openAll(stderr, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	split := loader.Split{}
	if len(devs) > 1 {
		split = f.split.split()
		r.Split = split.By.String()
	}
	plans, err := split.Plans(devs, m, o)
	if err != nil {
		return err
	}
	for i, p := range plans {
		d := devicePlan{
			deviceReport: deviceReport{Kind: rt.Kind(), Index: devs[i].Index(), Name: devs[i].Name()}, planned: newPlanned(p), Fits: true,
		}
		if d.FreeBytes, _, err = devs[i].MemInfo(); err != nil {
			return err
		}
		if err := p.Check(devs[i]); errors.Is(err, loader.ErrInsufficientMemory) {
			d.Fits = false
		} else if err != nil {
			return err
		}
		r.Devices = append(r.Devices, d)
	}
	return nil
}

// print is the report for people.
func (r *planReport) print(out io.Writer) error {
	fmt.Fprintf(out, "%s: %s, %s as %s\n", r.Model, r.Architecture, humanize.IBytes(r.FileBytes), r.DType)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(where string, p planned, more string) {
		layers := p.Layers
		if layers == "" {
			layers = "none"
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\n", where, layers, p.Tensors, p.Slices, humanize.IBytes(p.ReadBytes),
			humanize.IBytes(p.DeviceBytes), more)
	}
	fmt.Fprintln(w, "\tlayers\ttensors\tof these slices\tread\ton the device\tfree\t")
	for _, p := range r.Ranks {
		row(fmt.Sprintf("rank %d of %d", p.Rank, len(r.Ranks)), p.planned, "\t")
	}
	for _, d := range r.Devices {
		free := humanize.IBytes(d.FreeBytes) + "\t"
		if !d.Fits {
			free += " does not fit"
		}
		row(fmt.Sprintf("%s:%d", d.Kind, d.Index), d.planned, free)
	}
	return w.Flush()
}
