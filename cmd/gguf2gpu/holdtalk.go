package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// orders are the flags that ask the process which holds models for something. One of them is given, or none.
type orders struct {
	add, list                     *bool
	drop, sleep, wake, pin, unpin *string
	names                         []string // of those that are given
}

func addOrders(cmd *cobra.Command) *orders {
	fs := cmd.Flags()
	return &orders{
		add:   fs.Bool("add", false, "make the process that holds models load MODEL, too"),
		drop:  fs.String("drop", "", "make it drop the model of this name"),
		sleep: fs.String("sleep", "", "make it take the model of this name out of device memory"),
		wake:  fs.String("wake", "", "make it bring the model of this name back to device memory"),
		pin:   fs.String("pin", "", "make it leave the model of this name where it is: it makes no room for others"),
		unpin: fs.String("unpin", "", "undo --pin"),
		list:  fs.Bool("list", false, "list what it holds"),
	}
}

// check refuses orders that exclude each other, and reports whether there is one.
func (o *orders) check(cmd *cobra.Command, args []string) (given bool, err error) {
	for _, name := range []string{"add", "drop", "sleep", "wake", "pin", "unpin", "list"} {
		if cmd.Flags().Changed(name) {
			o.names = append(o.names, name)
		}
	}
	switch {
	case len(o.names) > 1:
		return true, usageErrorf("--add, --drop, --sleep, --wake, --pin, --unpin and --list exclude each other")
	case *o.add && len(args) != 1:
		return true, usageErrorf("--add takes one MODEL")
	case len(o.names) == 1 && !*o.add && len(args) > 0:
		return true, usageErrorf("--%s takes no MODEL", o.names[0])
	}
	return len(o.names) == 1, nil
}

// waiting tells on stderr for whom a command waits.
func waiting(stderr io.Writer) func(string) {
	return func(what string) { fmt.Fprintf(stderr, "gguf2gpu: waiting for %s\n", term.Safe(what)) }
}

// sayTalk says which flags mean nothing to another process.
func (f *holdFlags) sayTalk(cmd *cobra.Command) {
	if *f.orders.add {
		sayTalk(notices(cmd), cmd, "add", "name", "dtype", "dtype-for", "tensors")
		return
	}
	sayTalk(notices(cmd), cmd, f.orders.names[0])
}

// talk asks the process that holds models for something and prints what it holds afterwards.
func (f *holdFlags) talk(cmd *cobra.Command, args []string) error {
	c := hold.Client{Socket: *f.socket, Waiting: waiting(notices(cmd))}
	var held []hold.Model
	var err error
	o := f.orders
	byName := func(call func(context.Context, string) ([]hold.Model, error), name *string) {
		held, err = call(cmd.Context(), *name)
	}
	switch o.names[0] {
	case "add":
		if models.IsStream(args[0]) {
			return usageErrorf("--add %s: the process that holds models has another one: name a file", args[0])
		}
		a := hold.AddRequest{Path: args[0], Name: *f.name, Elsewhere: !models.IsPath(args[0])}
		if cmd.Flags().Changed("dtype") {
			a.Policy = f.load.dtype
		}
		a.Rules, a.Tensors = f.load.rules, *f.load.tensors
		held, err = c.Add(cmd.Context(), a)
	case "drop":
		byName(c.Drop, o.drop)
	case "sleep":
		byName(c.Sleep, o.sleep)
	case "wake":
		byName(c.Wake, o.wake)
	case "pin":
		byName(c.Pin, o.pin)
	case "unpin":
		byName(c.Unpin, o.unpin)
	default:
		held, err = c.List(cmd.Context())
	}
	if err != nil {
		return err
	}
	if *f.load.json {
		return writeJSON(cmd.OutOrStdout(), struct {
			Models []hold.Model `json:"models"`
		}{append([]hold.Model{}, held...)})
	}
	return printHeld(cmd.OutOrStdout(), held)
}

func printHeld(w io.Writer, models []hold.Model) error {
	if len(models) == 0 {
		_, err := fmt.Fprintln(w, "no models are held")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	parts := slices.ContainsFunc(models, func(m hold.Model) bool { return m.Shard != nil })
	head, of := "NAME\t", "" // with a column for ranks where there are some
	if parts {
		head += "RANK\t"
	}
	fmt.Fprintln(tw, head+"DTYPE\tTENSORS\tVRAM\tRAM\tSTATE\tATTACHED\tPATH")
	for _, m := range models {
		switch {
		case m.Shard != nil:
			of = fmt.Sprintf("%d of %d\t", m.Shard.Rank, m.Shard.World)
		case parts:
			of = "all\t"
		}
		state := m.State
		if m.Pinned {
			state += ", pinned"
		}
		if s := m.Scrub; s != nil && s.Now > 0 {
			state += ", damaged"
		}
		if m.Error != "" {
			state += ": " + term.Safe(firstLine(m.Error))
		}
		fmt.Fprintf(tw, "%s\t%s%s\t%d\t%s\t%s\t%s\t%d\t%s\n", term.Safe(m.Name), of, m.Policy, m.Tensors, humanize.Bytes(m.Tiers.VRAM),
			humanize.Bytes(m.Tiers.RAM), state, m.Attached, term.Safe(m.Path))
	}
	return tw.Flush()
}
