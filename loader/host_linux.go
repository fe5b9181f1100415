package loader

import "github.com/gguf2gpu/gguf2gpu/internal/cgroup"

// hostAvailable is how many bytes the host can give this process without swapping: a container may have less than the
// host has.
func hostAvailable() (n uint64, ok bool) { return availableBelow("/") }

// ownMemory is what the process itself needs, beside the model. A process in a container that takes more than there is
// gets no error; it is ended.
const ownMemory = 64 << 20

// availableBelow is hostAvailable with the files of the kernel below root.
func availableBelow(root string) (n uint64, ok bool) {
	n, ok = cgroup.Host(root)
	most, limited := cgroup.Available(root)
	if !limited || ok && n <= most {
		return n, ok
	}
	return most - min(most/2, ownMemory), true
}
