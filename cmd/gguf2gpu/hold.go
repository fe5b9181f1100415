package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// holdFlags are the flags of hold beside those of load.
type holdFlags struct {
	load       *loadFlags
	socket     *string
	name       *string
	grace      *time.Duration
	readyFD    *int
	metrics    *string
	allowGroup *bool
	add, list  *bool
	drop       *string
}

func newHoldCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hold [MODEL...] [flags]",
		Short: "Load models and keep them for other processes",
		Long: `Load models, keep them in device memory and let other processes of this host use them, without loading them again: see
'gguf2gpu attach', and loader.Attach for programs. It ends on SIGINT or SIGTERM, once all attached processes have gone
or after the grace time.

With --add, --drop or --list it talks to the process that holds models already instead of becoming one.`,
		Args: cobra.ArbitraryArgs,
	}
	fs := cmd.Flags()
	f := &holdFlags{
		load:       addLoadFlags(cmd),
		socket:     socketFlag(cmd),
		name:       fs.String("name", "", "what others ask for the model by (default the file's name without .gguf)"),
		grace:      fs.Duration("grace", 30*time.Second, "how long to wait at the end for attached processes to go"),
		readyFD:    fs.Int("ready-fd", -1, "write a line to this file descriptor, and close it, when the models are loaded"),
		metrics:    fs.String("metrics", "", "serve Prometheus metrics on this address, such as :9400 (loopback unless a host is named)"),
		allowGroup: fs.Bool("allow-group", false, "processes of the same group may attach, too"),
		add:        fs.Bool("add", false, "make the process that holds models load MODEL, too"),
		drop:       fs.String("drop", "", "make it drop the model of this name"),
		list:       fs.Bool("list", false, "list what it holds"),
	}
	cmd.MarkFlagsMutuallyExclusive("add", "drop", "list")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case *f.add && len(args) != 1:
			return usageErrorf("--add takes one MODEL")
		case (*f.list || *f.drop != "") && len(args) > 0:
			return usageErrorf("--list and --drop take no MODEL")
		case *f.name != "" && len(args) != 1:
			return usageErrorf("--name is for one MODEL")
		case *f.load.sync:
			return usageErrorf("--sync is not for hold: models are attached to while they are loaded")
		case *f.add || *f.list || *f.drop != "":
			return f.talk(cmd, args)
		}
		return f.hold(cmd.Context(), args, cmd.ErrOrStderr())
	}
	return cmd
}

func socketFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("socket", "", "Unix socket (default gguf2gpu.sock in the user's runtime directory)")
}

// talk asks the process that holds models for something and prints what it holds afterwards.
func (f *holdFlags) talk(cmd *cobra.Command, args []string) error {
	c := loader.HolderClient{Socket: *f.socket}
	var models []loader.HeldModel
	var err error
	switch {
	case *f.add:
		a := loader.AddRequest{Path: args[0], Name: *f.name}
		if cmd.Flags().Changed("dtype") {
			a.DType = f.load.dtype
		}
		a.Rules, a.Tensors = f.load.rules, *f.load.tensors
		models, err = c.Add(cmd.Context(), a)
	case *f.drop != "":
		models, err = c.Drop(cmd.Context(), *f.drop)
	default:
		models, err = c.List(cmd.Context())
	}
	if err != nil {
		return err
	}
	if *f.load.json {
		return writeJSON(cmd.OutOrStdout(), struct {
			Models []loader.HeldModel `json:"models"`
		}{append([]loader.HeldModel{}, models...)})
	}
	return printHeld(cmd.OutOrStdout(), models)
}

func printHeld(w io.Writer, models []loader.HeldModel) error {
	if len(models) == 0 {
		_, err := fmt.Fprintln(w, "no models are held")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tDTYPE\tTENSORS\tSIZE\tSTATE\tATTACHED\tPATH")
	for _, m := range models {
		state := m.State
		if m.Error != "" {
			state += ": " + firstLine(m.Error)
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%s\t%s\t%d\t%s\n", m.Name, m.DType, m.Tensors, humanize.Bytes(m.Bytes), state, m.Attached, m.Path)
	}
	return tw.Flush()
}

// hold is the process that holds models.
func (f *holdFlags) hold(ctx context.Context, paths []string, stderr io.Writer) (err error) {
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	l, socket, err := listen(*f.socket, *f.allowGroup)
	if err != nil {
		return err
	}
	defer func() {
		_ = l.Close() // Serve has, if it came to that
		if socket != "" {
			_ = os.Remove(socket)
		}
	}()
	f.load.device.shared = true
	rt, dev, err := f.load.device.open(stderr, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	bar := newProgress(*f.load.progress, stderr, "loading")
	o := loader.HolderOptions{Load: f.load.options(bar.Update, log), AllowGroup: *f.allowGroup, Logger: log}
	if *f.metrics != "" {
		if o.LinkBytesPerSecond, err = loader.LinkSpeed(ctx, dev); err != nil {
			bar.Abort()
			return err
		}
	}
	h := loader.NewHolder(dev, o)
	defer func() { err = errors.Join(err, h.Close()) }()
	stopMetrics, err := serveMetrics(*f.metrics, h, log)
	if err != nil {
		bar.Abort()
		return err
	}
	defer stopMetrics()

	serving, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- h.Serve(serving, l, *f.grace) }()
	err = f.loadAll(ctx, h, paths)
	if err != nil {
		bar.Abort()
		stop()
		return errors.Join(err, <-served)
	}
	bar.Finish()
	log.Info("ready", "socket", l.Addr(), "models", len(paths), "device", dev.Name())
	if err := f.tellReady(); err != nil {
		stop()
		return errors.Join(err, <-served)
	}
	select {
	case err = <-served:
		return err
	case <-ctx.Done():
	}
	log.Info("ending", "grace", *f.grace)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping) // nobody to tell is no error
	return <-served
}

// loadAll loads the models, one after the other: each has the link for itself.
func (f *holdFlags) loadAll(ctx context.Context, h *loader.Holder, paths []string) error {
	for _, path := range paths {
		name, err := h.Add(ctx, *f.name, path)
		if err != nil {
			return err
		}
		if err := h.Wait(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// tellReady tells whoever started this process that it is ready: on the file descriptor that was asked for, and systemd.
func (f *holdFlags) tellReady() error {
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	if *f.readyFD < 0 {
		return nil
	}
	file := os.NewFile(uintptr(*f.readyFD), "ready-fd")
	if file == nil {
		return usageErrorf("--ready-fd %d is no file descriptor", *f.readyFD)
	}
	_, err := io.WriteString(file, "READY\n")
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("--ready-fd %d: %w", *f.readyFD, err)
	}
	return nil
}

// metricsAddress is the address to listen on: loopback, unless a host is named.
func metricsAddress(addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", usageErrorf("--metrics %q: %w", addr, err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}
