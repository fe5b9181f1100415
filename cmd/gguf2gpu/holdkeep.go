package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// untilHangup is a context that also ends when the terminal is gone (SIGHUP), unless that is to be ignored, as nohup
// wants it.
func untilHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	if signal.Ignored(syscall.SIGHUP) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, syscall.SIGHUP)
}

// orderly makes the end of a process that holds something a good one when somebody has asked for it: whoever supervises
// it has to tell that from a crash.
func orderly(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx))) {
		return nil
	}
	return err
}

// sayKeeper says which flags mean nothing to a keeper, which opens neither models nor devices.
func (f *holdFlags) sayKeeper(cmd *cobra.Command) {
	cmd.Flags().Visit(func(g *pflag.Flag) {
		if !slices.Contains([]string{"keeper", "socket", "ready-fd", "progress"}, g.Name) && cmd.InheritedFlags().Lookup(g.Name) == nil {
			sayWithout(notices(cmd), cmd.Flags(), "with --keeper: it is for the process that holds the models", g.Name)
		}
	})
}

// checkNames refuses models that would be held under the same name, and streams that would have none or would have to
// come twice, before any of them is loaded.
func (f *holdFlags) checkNames(paths []string) error {
	seen := map[string]string{}
	for _, path := range paths {
		name := hold.DefaultName(path)
		if models.IsStream(path) {
			switch {
			case *f.name == "":
				return usageErrorf("%s needs --name, under which others ask for it", path)
			case *f.verify || *f.export.to != "" || f.load.hashes.given():
				return usageErrorf("--verify, --readback, --hash and --expect read MODEL a second time, and %s comes once: write it to a file first",
					path)
			}
		}
		if other, twice := seen[name]; twice {
			return usageErrorf("%q and %q would both be held as %q: hold one of them, and add the other with "+
				"'gguf2gpu hold --add MODEL --name NAME'", other, path, name)
		}
		seen[name] = path
	}
	return nil
}

// keeper is the process of 'hold --keeper'.
func (f *holdFlags) keeper(cmd *cobra.Command) (err error) {
	ctx, stop := untilHangup(cmd.Context())
	defer stop()
	log := newLogger(cmd, slog.LevelInfo)
	ready, err := openReady(*f.readyFD)
	if err != nil {
		return err
	}
	l, removeSocket, err := hold.Listen(*f.socket, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeSocket()) }()
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS=keeping models"); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	if ready != nil {
		_, err := io.WriteString(ready, "READY\n")
		if err = errors.Join(err, ready.Close()); err != nil {
			return fmt.Errorf("--ready-fd %d: %w", *f.readyFD, err)
		}
	}
	log.Info("keeping models", "socket", l.Addr())
	return hold.ServeKeeper(ctx, l, log)
}

// storePrefix is what the names of descriptors in systemd's store begin with.
const storePrefix = "gguf2gpu-"

// passed is what systemd has passed to this process: sockets, and descriptors that an earlier process has put into its
// store.
type passed struct {
	listeners []net.Listener
	stored    []*os.File
}

// fromSystemd takes what systemd has passed. It may be called once.
func fromSystemd() (p passed, err error) {
	for _, file := range activation.Files(false) {
		if strings.HasPrefix(file.Name(), storePrefix) {
			p.stored = append(p.stored, file)
			continue
		}
		l, lerr := net.FileListener(file)
		err = errors.Join(err, lerr, file.Close())
		if lerr == nil {
			p.listeners = append(p.listeners, l)
		}
	}
	return p, err
}

// statusLine tells systemd what is held, whenever that changes.
type statusLine struct {
	holder  atomic.Pointer[hold.Holder]
	changed chan struct{} // has one place
	said    chan string   // what systemd was told with READY
	quit    chan struct{}
	ended   chan struct{}
}

func newStatusLine() *statusLine {
	s := &statusLine{
		changed: make(chan struct{}, 1), said: make(chan string), quit: make(chan struct{}),
		ended: make(chan struct{}),
	}
	go func() {
		defer close(s.ended)
		var last string
		for {
			select {
			case <-s.quit:
				return
			case last = <-s.said:
			case <-s.changed:
				h := s.holder.Load()
				if h == nil {
					continue
				}
				if text := statusOf(h.Models()); text != last {
					last = text
					_, _ = daemon.SdNotify(false, "STATUS="+text) // nobody to tell is no error
				}
			}
			select { // no more often than anybody reads it
			case <-s.quit:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return s
}

// begin tells systemd from now on what h holds, and that it was told text already.
func (s *statusLine) begin(h *hold.Holder, text string) {
	s.said <- text
	s.holder.Store(h)
	s.tell()
}

// tell says that something has changed. It does not wait.
func (s *statusLine) tell() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *statusLine) close() {
	close(s.quit)
	<-s.ended
}

// statusOf is what systemd shows.
func statusOf(models []hold.Model) string {
	var vram, ram uint64
	states := make(map[string]int)
	for _, m := range models {
		vram, ram = vram+m.Tiers.VRAM, ram+m.Tiers.RAM
		states[m.State]++
	}
	text := fmt.Sprintf("holding %d models, %s", len(models), humanize.Bytes(vram))
	if ram > 0 {
		text += fmt.Sprintf(" and %s of host memory", humanize.Bytes(ram))
	}
	for _, state := range []string{"loading", "asleep", "stored", "failed"} {
		if n := states[state]; n > 0 {
			text += fmt.Sprintf("; %d %s", n, state)
		}
	}
	return text
}
