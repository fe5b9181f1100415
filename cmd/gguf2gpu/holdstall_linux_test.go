package main

import (
	"bytes"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// blockedAttach are the HIP functions that attaching, verifying and detaching call, by the call that is made to block.
var blockedAttach = []string{
	"hipRuntimeGetVersion:1", "hipGetDeviceCount:1", "hipDeviceGetName:2", "hipDeviceGetUuid:1", "hipDeviceTotalMem:1",
	"hipGetDevice:1", "hipSetDevice:1", "hipSetDevice:5", "hipMemGetInfo:1", "hipMemGetInfo:3", "hipMemGetAddressRange:1",
	"hipMemGetAddressRange:2", "hipStreamCreateWithFlags:1", "hipHostRegister:1", "hipMemcpyAsync:1", "hipMemcpyAsync:20",
	"hipEventCreateWithFlags:1", "hipEventRecord:5", "hipEventQuery:3", "hipStreamQuery:1", "hipEventDestroy:1",
	"hipHostUnregister:1", "hipStreamDestroy:1",
}

// blockedShare are those of each way to share memory.
var blockedShare = map[string][]string{
	"ipc": {"hipIpcOpenMemHandle:1", "hipIpcOpenMemHandle:2", "hipIpcCloseMemHandle:1", "hipIpcCloseMemHandle:2"},
	"fd": {
		"hipMemImportFromShareableHandle:1", "hipMemImportFromShareableHandle:2", "hipMemAddressReserve:1", "hipMemMap:1",
		"hipMemMap:2", "hipMemSetAccess:1", "hipMemUnmap:1", "hipMemUnmap:2", "hipMemRelease:1", "hipMemAddressFree:1",
		"hipDeviceSynchronize:1", "hipDeviceSynchronize:2",
	},
}

// TestEveryCallOfAttachBlocks lets calls of attaching, of verifying and of detaching never return, on one device and on
// the other, alone and with another call that fails. The command gives up with an error that says so, and the holder
// goes on as if nothing had been.
func TestEveryCallOfAttachBlocks(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	for share, own := range blockedShare {
		t.Run(share, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "hip:0,1")
			r.env = []string{"GGUF2GPU_HIP_LIBRARY=" + lib, "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0", "HIPSIM_DEVICES=2"}
			h := r.hold(t, samplePath, "--dtype", "raw", "--share", share).isReady(t)
			var struck atomic.Int64
			calls := append(append([]string(nil), blockedAttach...), own...)
			t.Run("calls", func(t *testing.T) {
				for i, call := range calls {
					second := []string{"", ",hipStreamQuery:0:999", ",hipMemUnmap:0:999", ",hipIpcCloseMemHandle:0:999"}[i%4]
					t.Run(call+second, func(t *testing.T) {
						t.Parallel()
						p := r.command(t, "attach", "--verify", "--stall", "1s")
						p.Env = append(p.Env, "HIPSIM_FAIL="+call+":0:block"+second, fmt.Sprint("HIPSIM_WAITS=", i%2))
						p.run(t)
						<-p.ended
						text := p.stderr.String()
						switch code := exitCode(p.ProcessState.ExitCode()); {
						case code == exitOK && !strings.Contains(string(read(p.report)), `"faults":0`):
							t.Errorf("it has done all, although %s blocked", call)
						case code == exitOK: // there is no such call in this way to share
						case code != exitFailed && code != exitNoDevice:
							t.Errorf("exit code %d:\n%s", code, text)
						case strings.Contains(text, "no progress"), strings.Contains(text, "may still use"):
							struck.Add(1)
						case !strings.Contains(text, "(999)"):
							t.Errorf("nobody says that it stalled:\n%s", text)
						}
					})
				}
			})
			t.Logf("%d of %d stalled", struck.Load(), len(calls))
			if int(struck.Load()) < len(calls)*2/3 {
				t.Error("too few stalled")
			}
			r.wantAttached(t, 0)
			if a := r.attach(t, "--verify"); !a.Verified {
				t.Errorf("%+v", a)
			}
			h.ends(t, r)
		})
	}
}

// blockedOrders are HIP functions that block in a holder when it is asked for something, by the function and the order;
// says is what who asked is told, and left that something stays until the holder ends.
var blockedOrders = []struct {
	call, order, says string
	left              bool
}{
	{"hipFree", "--sleep", "may still use", true},
	{"hipFree", "--drop", "may still use", true},
	{"hipMalloc", "--wake", "no progress", false},
	{"hipMemcpyAsync", "--wake", "no progress", true},
	{"hipDeviceSynchronize", "--sleep", "may still use", true},
	{"hipMemUnmap", "--sleep", "may still use", true},
	{"hipMemRelease", "--drop", "may still use", true},
	{"hipMemAddressFree", "--drop", "addresses", false}, // they take no memory
	{"hipMemCreate", "--wake", "no progress", false},
}

// TestOrdersBlock lets a call of the holder block while it puts a model to sleep, wakes it, or drops it. Who asked is
// told that this does not end, and what stays; the holder answers others meanwhile, and ends when it is told to.
func TestOrdersBlock(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	for _, tt := range blockedOrders {
		share := "fd"
		if strings.HasPrefix(tt.call, "hipM") && tt.order == "--wake" && tt.call != "hipMemCreate" || tt.call == "hipFree" {
			share = "ipc"
		}
		t.Run(tt.call+" "+tt.order, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "hip")
			r.env = []string{"GGUF2GPU_HIP_LIBRARY=" + lib, "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0"}
			faults := `"faults":1`
			for n := 1; ; n++ { // the first call that the load, or the trial of virtual memory, does not make
				h := r.command(t, "hold", samplePath, "--dtype", "raw", "--share", share, "--stall", "1s", "--device", "hip",
					"--progress", "none", "--threads", "1")
				h.Env = append(h.Env, fmt.Sprintf("HIPSIM_FAIL=%s:%d:0:block", tt.call, n))
				h.run(t)
				until(t, "it is ready, or the call blocks", func() bool {
					return strings.Contains(h.stderr.String(), "msg=loaded") || bytes.Contains(read(h.report), []byte(faults))
				})
				if bytes.Contains(read(h.report), []byte(faults)) {
					h.kill()
					continue
				}
				if tt.order == "--wake" {
					r.list(t, "--sleep", "tiny-llama")
				}
				asked := r.start(t, "hold", tt.order, "tiny-llama")
				asked.exits(t, exitFailed, tt.says)
				if !bytes.Contains(read(h.report), []byte(faults)) {
					t.Fatalf("%s never calls %s", tt.order, tt.call)
				}
				list := r.start(t, "hold", "--list")
				list.exits(t, exitOK, "")
				if err := h.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				if tt.left {
					h.exits(t, exitFailed, "may still use")
				}
				<-h.ended
				return
			}
		})
	}
}
