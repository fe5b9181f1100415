package soft

import (
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// memoryStatusEx is MEMORYSTATUSEX of sysinfoapi.h.
type memoryStatusEx struct {
	length, load                           uint32
	totalPhys, availPhys                   uint64
	totalPageFile, availPageFile           uint64
	totalVirtual, availVirtual, availExtra uint64
}

var globalMemoryStatusEx = windows.NewLazySystemDLL("kernel32.dll").NewProc("GlobalMemoryStatusEx")

// hostMemory returns the host's memory in bytes.
func hostMemory() (uint64, error) {
	s := memoryStatusEx{length: uint32(unsafe.Sizeof(memoryStatusEx{}))}
	if ok, _, err := globalMemoryStatusEx.Call(uintptr(unsafe.Pointer(&s))); ok == 0 {
		return 0, err
	}
	return s.totalPhys, nil
}

// threadID tells OS threads apart.
func threadID() uint64 { return uint64(windows.GetCurrentThreadId()) }

// maxNap and nap: Go's timers are precise here.
const maxNap = 0

func nap(time.Duration) {}

// prefault is for Linux.
func prefault([]byte) {}
