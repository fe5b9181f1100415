package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/measure"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// holdFlags are the flags of hold beside those of load.
type holdFlags struct {
	flags      *pflag.FlagSet
	load       *loadFlags
	socket     *string
	name       *string
	grace      *time.Duration
	readyFD    *int
	metrics    *string
	allowGroup *bool
	orders     *orders
	vram, ram  *uint64
	share      *hold.Share
	keep       *string
	isKeeper   *bool
	verify     *bool
	scrub      *time.Duration
	export     *exportFlags
	trace      *string
	parts      []holdPart // after prepare
}

func newHoldCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hold [MODEL...] [flags]",
		Short: "Load models and keep them for other processes",
		Long: `Load models, keep them in device memory and let other processes of this host use them, without loading them again: see
'gguf2gpu attach', and hold.Attach for programs. It ends on SIGINT or SIGTERM, once all attached processes have gone
or after the grace time; a second signal ends it at once. A socket that systemd passes is used instead of --socket, and
systemd is told when the models are loaded.

A model that nobody uses sleeps when another needs its device memory: in page-locked host memory where --ram allows it,
else in its file. It is back when a process attaches. With --keep, or systemd's store of descriptors, models in device
memory outlive this process, and the next one takes them over.

With --shard and one --rank it holds that rank's part of each model. With several, such as --rank 0-3, it holds their
parts, each on one of as many devices, in this order, or all on one. Each part is a model of its own, NAME@RANK, and
NAME stands for all of them. Processes that a launcher has started attach to NAME and get the part of their rank.

With --add, --drop, --sleep, --wake, --pin, --unpin or --list it talks to the process that holds models already instead
of becoming one. --add gives it a model with --name, --dtype, --dtype-for and --tensors; all else is as that process was
started.`,
		Example: `  gguf2gpu hold model.gguf --name assistant
  gguf2gpu hold --list
  gguf2gpu hold --add other.gguf --dtype raw
  gguf2gpu hold a.gguf b.gguf --vram 20GiB --ram 40GiB
  gguf2gpu hold model.gguf --scrub 10s
  gguf2gpu hold - --name piped --ram 8GiB
  gguf2gpu hold model.gguf --shard tensor --rank 0-3 --world 4 --device hip:0,1,2,3
  gguf2gpu hold --sleep assistant`,
		Args: cobra.ArbitraryArgs,
	}
	fs := cmd.Flags()
	f := &holdFlags{
		flags:      fs,
		load:       addLoadFlags(cmd),
		socket:     socketFlag(cmd),
		name:       fs.String("name", "", "what others ask for the model by (default the file's name without .gguf)"),
		grace:      fs.Duration("grace", 30*time.Second, "how long to wait at the end for attached processes to go"),
		readyFD:    intFlag(fs, "ready-fd", -1, 0, "write a line to this file descriptor, and close it, when the models are loaded"),
		metrics:    fs.String("metrics", "", "serve Prometheus metrics on this address, such as :9400 (loopback unless a host is named)"),
		allowGroup: fs.Bool("allow-group", false, "processes of members of this one's group may attach and list, too"),
		orders:     addOrders(cmd),
		vram:       byteSizeFlag(fs, "vram", "device memory that models may take, of each device (default all that is free)"),
		ram:        byteSizeFlag(fs, "ram", "page-locked host memory that models may sleep in (default none)"),
		share:      textFlag(fs, "share", hold.ShareAuto, "HOW", "how others get at device memory: fd (descriptors), ipc, auto"),
		keep:       fs.String("keep", "", "leave device memory to the keeper on this socket when this process ends"),
		isKeeper:   fs.Bool("keeper", false, "be a keeper on --socket: a small process that opens no device"),
		verify:     fs.Bool("verify", false, "read device memory back before being ready, and compare it with the file"),
		scrub:      fs.Duration("scrub", 0, "look again at the models' memory this often, and write what is damaged again (default never)"),
		export:     addExportFlags(fs, ", before being ready"),
		trace:      fs.String("trace", "", "write the loads' timeline to this file (Chrome trace events; opens in Perfetto)"),
	}
	_ = fs.MarkHidden("sync") // it is there, and refused
	f.load.hashes, f.load.split = addHashFlags(cmd, f.load.json), addSplitFlags(fs)
	f.load.shard = addShardFlags(fs, true)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		order, err := f.orders.check(cmd, args)
		switch {
		case err != nil:
			return err
		case *f.isKeeper && (order || len(args) > 0 || *f.keep != ""):
			return usageErrorf("--keeper takes no MODEL and no other order")
		case *f.isKeeper:
			f.sayKeeper(cmd)
			return f.keeper(cmd)
		case (*f.name != "" || *f.export.to != "" || f.load.hashes.given()) && len(args) != 1:
			return usageErrorf("--name, --readback, --hash and --expect are for one MODEL")
		case *f.load.sync:
			return usageErrorf("--sync is not for hold: models are attached to while they are loaded")
		case order:
			f.sayTalk(cmd)
			return f.talk(cmd, args)
		case *f.scrub < 0:
			return usageErrorf("--scrub %v: it takes a time above zero, such as 10s", *f.scrub)
		case *f.keep != "" && *f.share == hold.ShareIPC:
			return usageErrorf("--keep needs descriptors: --share fd or auto")
		}
		if err := f.checkNames(args); err != nil {
			return err
		}
		f.load.sayCombinations(notices(cmd), fs)
		if err := f.export.check(nil); err != nil {
			return err
		}
		ctx, stop := untilHangup(cmd.Context())
		defer stop()
		return orderly(ctx, f.run(ctx, cmd, args))
	}
	return cmd
}

func socketFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("socket", "", "Unix socket (default gguf2gpu.sock in the user's runtime directory)")
}

// holdReport is the JSON of hold, printed when the models are loaded.
type holdReport struct {
	Socket  string         `json:"socket"`
	PID     int            `json:"pid"`
	Device  deviceReport   `json:"device"` // the first
	Devices []deviceReport `json:"devices"`
	Models  []hold.Model   `json:"models"`
}

// run is the process that holds models.
func (f *holdFlags) run(ctx context.Context, cmd *cobra.Command, paths []string) (err error) {
	stderr := cmd.ErrOrStderr()
	log := newLogger(cmd, slog.LevelInfo)
	// What is wrong with the flags is said before anything is loaded.
	metrics, err := metricsAddress(*f.metrics)
	if err != nil {
		return err
	}
	ready, err := openReady(*f.readyFD)
	if err != nil {
		return err
	}
	first := ""
	if len(paths) > 0 {
		first = paths[0] // --hash and --expect are for one
	}
	err = errors.Join(f.load.split.check(*f.load.device.device), f.load.shard.resolve(), f.load.config(log).Check())
	if err == nil {
		err = f.prepare(first)
	}
	if err == nil {
		err = f.checkOutputs(paths)
	}
	if err != nil {
		return err
	}
	f.load.device.local = f.load.shard.local
	given, err := fromSystemd()
	if err != nil {
		return fmt.Errorf("what systemd passed: %w", err)
	}
	l, removeSocket, err := listen(f.load.shard.expand(*f.socket), *f.allowGroup, given.listeners)
	if err != nil {
		return err
	}
	defer func() {
		_ = l.Close() // Serve has, if it came to that
		err = errors.Join(err, removeSocket())
	}()
	f.load.device.shared = true
	rt, devs, err := f.load.device.openAll(ctx, notices(cmd), log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	if n := len(f.load.shard.ranks); n > 1 && len(devs) != 1 && len(devs) != n {
		return usageErrorf("--rank names %d ranks, --device %d devices: name a device for each rank, in the same order, or one for all",
			n, len(devs))
	}
	var bar atomic.Pointer[progress]
	update := func(done, total int64) {
		if b := bar.Load(); b != nil {
			b.Update(done, total)
		}
	}
	var tr *trace.Trace
	if *f.trace != "" {
		tr = new(trace.Trace)
	}
	o := hold.Options{
		Spec: f.load.spec(), Config: f.load.config(log), Request: f.load.request(update, tr), AllowGroup: *f.allowGroup,
		Logger: log, VRAM: *f.vram, RAM: int64(min(*f.ram, math.MaxInt64)), Share: *f.share,
		Scrub: *f.scrub, Ranks: f.load.shard.ranks,
	}
	if *f.keep != "" {
		o.Keep = hold.KeeperClient{Socket: f.load.shard.expand(*f.keep)}
	} else if store := newSystemdStore(given.stored); store != nil {
		o.Keep = store
	}
	status := newStatusLine()
	defer status.close()
	o.Changed = status.tell
	if metrics != "" {
		link := func() (float64, error) { return measure.Link(ctx, devs[0]) }
		o.LinkBytesPerSecond, err = watch.Do(ctx, f.load.device.limit(), "measuring the link", link, func(float64) {})
		if err != nil {
			return err
		}
	}
	opener, err := f.load.remote.opener(firstAddress(paths), log)
	if err != nil {
		return err
	}
	defer opener.Close()
	held := heldOpener{Opener: opener, streams: paths}
	if expect := f.load.hashes.expect(); expect != nil { // of this model, and not of those that others add
		flags := f.load.remote
		flags.expect = expect
		expecting, err := flags.opener(first, log)
		if err != nil {
			return err
		}
		defer expecting.Close()
		if models.IsPath(first) {
			err = checkFiles(ctx, expecting, first)
		} else {
			held.expecting, held.expected = expecting, first
		}
		if err != nil {
			return err
		}
	}
	o.Opener = held
	h, err := hold.New(devs, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	var isReady atomic.Bool
	stopMetrics, err := serveMetrics(metrics, h, &isReady, log)
	if err != nil {
		return err
	}
	defer stopMetrics()

	serving, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	serve := sync.OnceFunc(func() { go func() { served <- h.Serve(serving, l, *f.grace) }() })
	adopted, err := h.Adopt(ctx)
	if err != nil {
		return err
	}
	if len(adopted) > 0 {
		serve() // those who are attached look for this process
	}
	err = f.loadAll(ctx, h, paths, serve, &bar, notices(cmd), stderr)
	serve()
	if err == nil && tr != nil {
		err = writeFile(f.load.shard.expand(*f.trace), func(out *outputFile) error { _, err := tr.WriteTo(out); return err })
	}
	if err == nil {
		err = f.announce(cmd, h, l.Addr().String(), devs, ready, status)
	}
	if err == nil {
		isReady.Store(true)
		log.Info("ready", "socket", l.Addr(), "models", len(paths), "device", devs[0].Name(), "devices", len(devs))
		select {
		case <-ctx.Done():
		case err := <-served: // without being told to
			return err
		}
		isReady.Store(false)
		doing(ctx, waitClients, whyClients)
		log.Info("ending", "grace", *f.grace)
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping) // nobody to tell is no error
	stop()
	err = errors.Join(err, <-served)
	doing(ctx, waitFree, whyFree)
	return err
}

// announce tells everybody that the models are loaded: whoever reads stdout, systemd, and who waits at the other end of
// ready, which may be nil.
func (f *holdFlags) announce(cmd *cobra.Command, h *hold.Holder, socket string, devs []*amdhip.Device,
	ready *os.File, line *statusLine,
) error {
	models := h.Models()
	var err error
	switch {
	case *f.load.json:
		r := holdReport{Socket: socket, PID: os.Getpid(), Models: models, Device: describeDevice(devs[0])}
		for _, dev := range devs {
			r.Devices = append(r.Devices, describeDevice(dev))
		}
		err = writeJSON(cmd.OutOrStdout(), r)
	case f.load.hashes.ownsStdout():
	default:
		err = printHeld(cmd.OutOrStdout(), models)
	}
	if err != nil {
		return err
	}
	text := statusOf(models)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS="+text); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	line.begin(h, text)
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
