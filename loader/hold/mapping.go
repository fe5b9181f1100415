package hold

import (
	"errors"
	"fmt"
	"os"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// mapMemory opens the Holder's allocations. The result is by device, also with an error: it then has what is mapped
// already.
func mapMemory(all []manifestAllocation, devices []*amdhip.Device) ([][]loader.Mapping, error) {
	memory := make([][]loader.Mapping, len(devices))
	for i := range all {
		var h amdhip.IPCHandle
		if err := h.UnmarshalBinary(all[i].Handle); err != nil {
			return memory, err
		}
		d := all[i].Device
		mem, err := devices[d].OpenIPC(h)
		if errors.Is(err, amdhip.ErrInvalidContext) {
			return memory, fmt.Errorf("hold: HIP takes this process for the holder: in that process, Holder.Model returns the model; %s: %w",
				inContainers, err)
		}
		if errors.Is(err, amdhip.ErrInvalidDevicePointer) {
			return memory, fmt.Errorf("hold: HIP does not find the holder's memory: %s: %w", ipcNeeds(devices[d]), err)
		}
		if err != nil {
			return memory, fmt.Errorf("hold: allocation %d of the holder's %d: %w", i+1, len(all), err)
		}
		memory[d] = append(memory[d], loader.Mapping{Ptr: mem.Ptr(), Memory: mem})
		if err := checkSize(mem, all[i].Bytes); err != nil {
			return memory, fmt.Errorf("hold: allocation %d of the holder's %d: %w", i+1, len(all), err)
		}
	}
	return memory, nil
}

// checkSize compares what was mapped with what the Holder says of it, where the runtime knows how much that is.
func checkSize(mem *amdhip.Memory, want uint64) error {
	base, size, err := mem.Device().AddressRangeOf(mem.Ptr())
	switch {
	case errors.Is(err, amdhip.ErrUnsupported):
		return nil
	case err != nil:
		return err
	case base > mem.Ptr() || size-uint64(mem.Ptr()-base) < want:
		return fmt.Errorf("%d bytes are mapped, the holder says %d: it is damaged or hostile", size, want)
	}
	return nil
}

// ipcNeeds says what keeps HIP from finding memory of another process, and what to do.
func ipcNeeds(dev *amdhip.Device) string {
	version, _, err := dev.Runtime().Version()
	if err != nil || version < 7e7 || dev.Runtime().Kind() != "hip" {
		return inContainers
	}
	return "HIP 7 hands memory over by a socket that belongs to a network namespace, so both processes must share their " +
		"network, PID and IPC namespaces (docker run --network=host --pid=host --ipc=host), and the one that attaches needs " +
		"CAP_SYS_PTRACE; HSA_ENABLE_IPC_MODE_LEGACY=1 in the environment of both processes brings the older way back, which " +
		"needs no common network namespace; --share fd of the holder needs none of that"
}

// inContainers says what HIP's IPC needs, by what its errors 201 and 17 have been seen to come from.
const inContainers = "containers that share memory by HIP's IPC need one PID, one IPC and one network namespace " +
	"(docker run --pid, --ipc and --network, hostPID, hostIPC and hostNetwork of a pod), or --share fd"

// mapDescriptors maps what the descriptors are for, each at the Holder's address if the device allows it. It takes
// over the files that it has mapped. The result is as that of mapMemory.
func (a *Attached) mapDescriptors(
	m *manifest, devices []*amdhip.Device, files *[]*os.File,
) ([][]loader.Mapping, error) {
	memory, all := make([][]loader.Mapping, len(devices)), m.Allocations
	if len(*files) != len(all) {
		return memory, fmt.Errorf("hold: the holder sent %d descriptors for %d allocations", len(*files), len(all))
	}
	for i, dev := range devices {
		if err := m.Devices[i].canMap(dev); err != nil {
			return memory, fmt.Errorf("%w; %s", err, otherShare)
		}
	}
	shared := newSharedMemory(devices, &a.ranges)
	for i := range all {
		d, file := all[i].Device, (*files)[0]
		*files = (*files)[1:]
		x, err := shared.adopt(d, len(memory[d]), file, all[i].Size, amdhip.DevicePtr(all[i].Address))
		if err != nil {
			return memory, fmt.Errorf("hold: allocation %d of the holder's %d: %w; %s", i+1, len(all), err, otherShare)
		}
		memory[d] = append(memory[d], x)
	}
	return memory, nil
}

// otherShare says what to do where the runtime of a process cannot map what another one's has made.
const otherShare = "if the HIP runtime of this process cannot map such memory, start the holder with --share ipc"

// canMap refuses a device whose runtime cannot map virtual memory. The Holder's runtime has shown that it can; one of
// another version has to show it here, too, once in each process, see VirtualMemoryWorks.
func (d *manifestDevice) canMap(dev *amdhip.Device) error {
	version, _, err := dev.Runtime().Version()
	if err != nil || dev.VirtualMemory() && version == d.Runtime {
		return err
	}
	return VirtualMemoryWorks(dev)
}

// unmap undoes mapMemory and mapDescriptors.
func unmap(memory [][]loader.Mapping) error {
	var errs []error
	for _, of := range memory {
		for _, m := range of {
			errs = append(errs, m.Memory.Close())
		}
	}
	return errors.Join(errs...)
}
