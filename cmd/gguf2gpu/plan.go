package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
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

func newPlanned(g *plan.Group) planned {
	out := planned{Tensors: len(g.Tensors), ReadBytes: g.ReadBytes, DeviceBytes: g.DeviceBytes}
	for i := range g.Tensors {
		if g.Tensors[i].Slice != nil {
			out.Slices++
		}
	}
	if first, last, ok := g.Layers(); ok {
		out.Layers = fmt.Sprintf("%d-%d", first, last)
	}
	return out
}

// plan prints what would go where.
func (f *loadFlags) plan(cmd *cobra.Command, path string) (err error) {
	all := f.shard.allRanks()
	if err := firstError([]error{f.split.check(*f.device.device), f.shard.resolve()}); err != nil {
		return err
	}
	f.sayCombinations(notices(cmd), cmd.Flags())
	log := newLogger(cmd, slog.LevelWarn)
	m, opener, err := f.remote.openModel(cmd.Context(), path, log)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, m.Close())
		if opener != nil {
			opener.Close()
		}
	}()
	f.sayUseless(notices(cmd), cmd.Flags(), path, m)
	r := planReport{
		Model: remote.Redact(path), Architecture: m.Architecture(), DType: f.dtype.String(),
		FileBytes: m.Size(), Devices: []devicePlan{},
	}
	if err := r.addRanks(m, f.spec()); err != nil {
		return err
	}
	if !all {
		if err := r.addDevices(cmd.Context(), f, notices(cmd), log, m); err != nil {
			return err
		}
	}
	if *f.json {
		return writeJSON(cmd.OutOrStdout(), r)
	}
	return r.print(cmd.OutOrStdout())
}

// addRanks says what each rank loads, if there are any: onto one device, whatever it is spread over.
func (r *planReport) addRanks(m *gguf.File, s plan.Spec) error {
	if s.Shard.By == plan.ShardNone {
		return nil
	}
	r.Shard, s.Split = s.Shard.By.String(), plan.Split{}
	for rank := range s.Shard.World {
		s.Shard.Rank = rank
		p, err := plan.New(m, s, []uint64{0})
		if err != nil {
			return err
		}
		r.Ranks = append(r.Ranks, rankPlan{rank, newPlanned(&p.Groups[0])})
	}
	return nil
}

// addDevices says what goes to each device, by the plan that a load would have.
func (r *planReport) addDevices(
	ctx context.Context, f *loadFlags, stderr io.Writer, log *slog.Logger, m *gguf.File,
) (err error) {
	if f.shard.shard.By != plan.ShardNone {
		r.Rank = &f.shard.shard.Rank
		f.device.local = f.shard.local
	}
	rt, devs, err := f.device.openAll(ctx, stderr, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	l, err := loader.New(devs, f.config(log))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	p, err := l.Plan(m, f.spec())
	if err != nil {
		return err
	}
	if len(devs) > 1 {
		r.Split = p.Spec.Split.By.String()
	}
	for i, dev := range devs {
		d := devicePlan{deviceReport: describeDevice(dev), planned: newPlanned(p.GroupOf(i)), FreeBytes: p.Free[i]}
		d.Fits = p.Plan.Fits(i, d.FreeBytes, 0) == nil
		r.Devices = append(r.Devices, d)
	}
	return nil
}

// print is the report for people.
func (r *planReport) print(out io.Writer) error {
	fmt.Fprintf(out, "%s: %s, %s as %s\n", term.Safe(r.Model),
		term.Safe(term.Shorten(r.Architecture, maxText)), humanize.IBytes(r.FileBytes), r.DType)
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
