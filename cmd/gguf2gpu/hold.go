package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
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
	verify     *bool
	readback   *string
	trace      *string
}

func newHoldCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hold [MODEL...] [flags]",
		Short: "Load models and keep them for other processes",
		Long: `Load models, keep them in device memory and let other processes of this host use them, without loading them again: see
'gguf2gpu attach', and loader.Attach for programs. It ends on SIGINT or SIGTERM, once all attached processes have gone
or after the grace time; a second signal ends it at once. A socket that systemd passes is used instead of --socket, and
systemd is told when the models are loaded.

With --add, --drop or --list it talks to the process that holds models already instead of becoming one. --add gives it a
model with --name, --dtype, --dtype-for and --tensors; all else is as that process was started.`,
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
		allowGroup: fs.Bool("allow-group", false, "processes of members of this one's group may attach and list, too"),
		add:        fs.Bool("add", false, "make the process that holds models load MODEL, too"),
		drop:       fs.String("drop", "", "make it drop the model of this name"),
		list:       fs.Bool("list", false, "list what it holds"),
		verify:     fs.Bool("verify", false, "read device memory back before being ready, and compare it with the file"),
		readback:   fs.String("readback", "", "write what is in device memory to this safetensors file, before being ready"),
		trace:      fs.String("trace", "", "write the loads' timeline to this file (Chrome trace events; opens in Perfetto)"),
	}
	for _, name := range []string{"sync", "allow-http", "connections"} { // refused, or without a meaning here
		_ = fs.MarkHidden(name) // it is there
	}
	f.load.hashes = addHashFlags(cmd, f.load.json)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case *f.add && *f.list || *f.drop != "" && (*f.add || *f.list):
			return usageErrorf("--add, --drop and --list exclude each other")
		case *f.add && len(args) != 1:
			return usageErrorf("--add takes one MODEL")
		case (*f.list || *f.drop != "") && len(args) > 0:
			return usageErrorf("--list and --drop take no MODEL")
		case (*f.name != "" || *f.readback != "" || f.load.hashes.wanted()) && len(args) != 1:
			return usageErrorf("--name, --readback, --hash and --expect are for one MODEL")
		case slices.ContainsFunc(args, remote.IsAddress):
			return usageErrorf("hold takes files: those who attach compare them with what is held, which cannot be done with addresses")
		case *f.load.sync:
			return usageErrorf("--sync is not for hold: models are attached to while they are loaded")
		case *f.add || *f.list || *f.drop != "":
			return f.talk(cmd, args)
		}
		return f.hold(cmd, args)
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

// holdReport is the JSON of hold, printed when the models are loaded.
type holdReport struct {
	Socket string             `json:"socket"`
	PID    int                `json:"pid"`
	Device deviceReport       `json:"device"`
	Models []loader.HeldModel `json:"models"`
}

// hold is the process that holds models.
func (f *holdFlags) hold(cmd *cobra.Command, paths []string) (err error) {
	ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	// What is wrong with the flags is said before anything is loaded.
	metrics, err := metricsAddress(*f.metrics)
	if err != nil {
		return err
	}
	ready, err := openReady(*f.readyFD)
	if err != nil {
		return err
	}
	if err := f.load.hashes.prepare(); err != nil {
		return err
	}
	l, removeSocket, err := listen(*f.socket, *f.allowGroup)
	if err != nil {
		return err
	}
	defer func() {
		_ = l.Close() // Serve has, if it came to that
		err = errors.Join(err, removeSocket())
	}()
	f.load.device.shared = true
	rt, dev, err := f.load.device.open(stderr, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	var bar atomic.Pointer[progress]
	update := func(done, total int64) {
		if b := bar.Load(); b != nil {
			b.Update(done, total)
		}
	}
	o := loader.HolderOptions{Load: f.load.options(update, log), AllowGroup: *f.allowGroup, Logger: log}
	if *f.trace != "" {
		o.Load.Trace = new(loader.Trace)
	}
	if metrics != "" {
		if o.LinkBytesPerSecond, err = loader.LinkSpeed(ctx, dev); err != nil {
			return err
		}
	}
	h := loader.NewHolder(dev, o)
	defer func() { err = errors.Join(err, h.Close()) }()
	stopMetrics, err := serveMetrics(metrics, h, log)
	if err != nil {
		return err
	}
	defer stopMetrics()

	serving, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	serve := sync.OnceFunc(func() { go func() { served <- h.Serve(serving, l, *f.grace) }() })
	err = f.loadAll(ctx, h, paths, serve, &bar, stderr)
	serve()
	if err == nil && o.Load.Trace != nil {
		err = writeFile(*f.trace, func(out *outputFile) error { _, err := o.Load.Trace.WriteTo(out); return err })
	}
	if err == nil {
		err = f.announce(cmd, h, l.Addr().String(), dev, ready)
	}
	if err == nil {
		log.Info("ready", "socket", l.Addr(), "models", len(paths), "device", dev.Name())
		select {
		case <-ctx.Done():
		case err := <-served: // without being told to
			return err
		}
		log.Info("ending", "grace", *f.grace)
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping) // nobody to tell is no error
	stop()
	return errors.Join(err, <-served)
}

// loadAll loads the models, one after the other: each has the link for itself. It calls serve when there is something to attach to;
// who comes earlier waits.
func (f *holdFlags) loadAll(ctx context.Context, h *loader.Holder, paths []string, serve func(), bar *atomic.Pointer[progress],
	stderr io.Writer) error {
	for _, path := range paths {
		b := newProgress(*f.load.progress, stderr, "loading "+filepath.Base(path))
		bar.Store(b)
		err := f.loadOne(ctx, h, path, serve)
		if err != nil {
			b.Abort()
			return err
		}
		b.Finish()
	}
	bar.Store(nil)
	return nil
}

// loadOne loads a model and does with it what the flags say.
func (f *holdFlags) loadOne(ctx context.Context, h *loader.Holder, path string, serve func()) (err error) {
	name, err := h.Add(ctx, *f.name, path)
	if err != nil {
		return err
	}
	serve()
	if err := h.Wait(ctx, name); err != nil {
		return err
	}
	w, err := h.Model(name)
	if err != nil {
		return err
	}
	if *f.verify {
		if err := verifyWith(ctx, w, path); err != nil {
			return err
		}
	}
	if *f.readback != "" {
		if err := writeFile(*f.readback, func(o *outputFile) error { return w.WriteSafetensors(ctx, o) }); err != nil {
			return err
		}
	}
	if !f.load.hashes.wanted() {
		return nil
	}
	file, err := gguf.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	return f.load.hashes.finish(&loaded{path: path, file: file, weights: w})
}

// announce tells everybody that the models are loaded: whoever reads stdout, systemd, and who waits at the other end of ready,
// which may be nil.
func (f *holdFlags) announce(cmd *cobra.Command, h *loader.Holder, socket string, dev *amdhip.Device, ready *os.File) error {
	models := h.Models()
	var err error
	switch {
	case *f.load.json:
		err = writeJSON(cmd.OutOrStdout(), holdReport{
			Socket: socket, PID: os.Getpid(), Models: models,
			Device: deviceReport{Kind: dev.Runtime().Kind(), Index: dev.Index(), Name: dev.Name()},
		})
	case f.load.hashes.ownsStdout():
	default:
		err = printHeld(cmd.OutOrStdout(), models)
	}
	if err != nil {
		return err
	}
	var bytes uint64
	for _, m := range models {
		bytes += m.Bytes
	}
	status := fmt.Sprintf("%s\nSTATUS=holding %d models, %s", daemon.SdNotifyReady, len(models), humanize.Bytes(bytes))
	if _, err := daemon.SdNotify(false, status); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	if ready == nil {
		return nil
	}
	_, err = io.WriteString(ready, "READY\n")
	if err = errors.Join(err, ready.Close()); err != nil {
		return fmt.Errorf("--ready-fd %d: %w", *f.readyFD, err)
	}
	return nil
}

// openReady returns the file of --ready-fd, nil for a negative number.
func openReady(fd int) (*os.File, error) {
	if fd < 0 {
		return nil, nil
	}
	file := os.NewFile(uintptr(fd), "ready-fd")
	if file == nil {
		return nil, usageErrorf("--ready-fd %d is no file descriptor", fd)
	}
	if _, err := file.Stat(); err != nil {
		return nil, usageErrorf("--ready-fd %d is not open: %w", fd, err)
	}
	return file, nil
}

// metricsAddress is the address to listen on, with loopback as the host unless one is named; "" for none.
func metricsAddress(addr string) (string, error) {
	if addr == "" {
		return "", nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", usageErrorf("--metrics %q: %w; use [HOST]:PORT", addr, err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}
