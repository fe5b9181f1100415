package loader

import (
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// Report says what a load did, and how long it took. It is complete once the load has ended. Sums are over all devices.
type Report struct {
	Tensors        int    // loaded: of the plan, each counted once
	ModelTensors   int    // that the whole model has
	FileBytes      uint64 // of all parts
	ReadBytes      uint64 // tensor bytes taken from the file
	MappedBytes    uint64 // of these, through the mapping
	DirectBytes    uint64 // of these, by direct reads
	PlainBytes     uint64 // of these, by ordinary reads: of slices, and where direct reads do not work
	RemoteBytes    uint64 // of these, from a gguf.Source
	FetchedBytes   uint64 // by direct and ordinary reads: with what lies between pieces, and around what is not aligned
	ImageBytes     uint64 // tensor bytes that came from an Image instead of the file
	UploadBytes    uint64 // copied to the devices, padding included
	DeviceBytes    uint64 // allocated on the devices
	ScratchBytes   uint64 // device memory beside the model during the load, for blocks that the devices convert
	Expanded       int    // tensors that the devices converted
	Proved         bool   // the fingerprints of all bytes that the devices got are right
	ProvedTensors  int    // whose fingerprints are right, on all devices that they are on
	ProvedBytes    uint64 // of these, as they travelled to all devices, without padding
	Unproved       string // why a load was not proved that ProveAuto leaves open; ""
	Streams        int
	Threads        int
	Connections    int // ranges of a remote model that were read at the same time; 0 for other models
	ChunkBytes     int
	PinnedBytes    int64 // staging memory that is page-locked
	UnpinnedCopies int64 // copies from memory that could not be pinned

	Plan     time.Duration // laying out and checking
	Kernels  time.Duration // making the devices' kernels ready
	Alloc    time.Duration // device memory
	Pin      time.Duration // staging memory, as far as the transfer waited for it; 0 when an earlier load made it
	PinTotal time.Duration // staging memory in all; the rest overlaps the transfer
	Transfer time.Duration // from the first read to the end of the last copy, on the device that took longest
	Prove    time.Duration // after the transfer, until fingerprints were compared, on the device that took longest
	Check    time.Duration // after the transfer, until it was clear that the bytes are what a gguf.CheckedSource says
	Total    time.Duration // from Start to the end

	Devices []DeviceReport // in the order that New was given
}

// DeviceReport is what a load did on one device.
type DeviceReport struct {
	Device      *amdhip.Device
	Tensors     int    // on the device
	ReadBytes   uint64 // with a full copy on each device, the same bytes for all
	UploadBytes uint64
	DeviceBytes uint64
	Transfer    time.Duration
}

// add takes in what the load of one group did. Bytes that went to several devices were read once.
func (r *Report) add(g *groupReport) {
	r.MappedBytes += uint64(g.read.Mapped)
	r.DirectBytes += uint64(g.read.Direct)
	r.PlainBytes += uint64(g.read.Plain)
	r.FetchedBytes += uint64(g.read.Fetched)
	r.RemoteBytes += uint64(g.read.Remote)
	r.ImageBytes += g.image
	r.UploadBytes += g.upload * uint64(len(g.devices))
	r.ScratchBytes += g.scratch * uint64(len(g.devices))
	r.Expanded += g.expanded
	r.Streams += g.streams * len(g.devices)
	r.Threads += g.threads
	r.Connections += g.connections
	r.ChunkBytes = max(r.ChunkBytes, g.chunk)
	r.PinnedBytes += g.pinned
	r.UnpinnedCopies += g.unpinned
	r.Pin += g.pin
	r.PinTotal += g.pinTotal
	r.Transfer = max(r.Transfer, g.transfer)
	r.Prove = max(r.Prove, g.prove)
	r.ProvedTensors += g.provedTensors
	r.ProvedBytes += g.provedBytes
	for _, d := range g.devices {
		r.Devices[d].UploadBytes, r.Devices[d].Transfer = g.upload, g.transfer
	}
}
