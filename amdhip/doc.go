// Package amdhip uses AMD GPUs through HIP without cgo: libamdhip64.so is opened at run time, so that neither a C
// compiler nor ROCm is needed to build a program, and one binary serves HIP 5, 6 and 7.
//
// Default gives the first GPU, or an error that says why there is none:
//
//	dev, err := amdhip.Default()
//	if errors.Is(err, amdhip.ErrNoLibrary) || errors.Is(err, amdhip.ErrNoDevice) {
//		dev, err = soft.Open(soft.Options{}) // of package amdhip/soft
//	}
//	if err != nil {
//		return err
//	}
//	defer dev.Runtime().Close()
//
// Open gives a Runtime, with all devices and a library of the caller's choice. A Device makes the rest: device memory
// (Memory), page-locked host memory (HostMemory), queues of work (Stream), marks in them (Event), code to run (Module)
// and virtual memory (PhysicalMemory, AddressRange). Whoever makes one of these closes it.
//
// # Which library
//
// Options.Library, or else the environment variable GGUF2GPU_HIP_LIBRARY, names a file; if that cannot be used, Open
// fails. Without them the first that works is taken of: lib in $ROCM_PATH and in $HIP_PATH; what the system's dynamic
// loader finds; /opt/rocm*/lib and /opt/rocm*/core*/lib, newest version first. In each place the names
// libamdhip64.so.7, .6, .5 and the plain one are tried in this order. A *LibraryError lists every attempt and why it
// failed.
//
// A library that works finds no GPU on a machine without one: Open succeeds there, and Runtime.DeviceCount and
// Runtime.Device return an error that matches ErrNoDevice.
//
// One binary serves all versions; where they differ, the README of this package has a table of which call, which
// version and what is done about it.
//
// # Asynchronous work
//
// Copies and memsets are put on a stream and return at once; the stream does them in order. Until a copy is done its
// host memory belongs to the GPU: do not write what it reads, do not read what it writes, do not close it. An Event
// recorded behind the copy tells when it is done. Only page-locked memory is copied at the speed of the link;
// Device.UnpinnedCopies counts the other copies. An operation that fails while it executes is reported by later calls
// on its stream or events.
//
// Files that are mapped into memory should not be page-locked or copied from directly: on AMD that is slow at best.
// Copy their bytes to memory of HostMalloc first.
//
// # Kernels
//
// Runtime.Compile turns HIP C++ into a code object with hipRTC, Device.LoadModule loads that to a device and
// Module.Function finds a kernel in it. Stream.LaunchKernel launches it with any grid, dynamic shared memory and
// arguments of any fixed size; Stream.Launch is the quick way for kernels whose parameters have 8 bytes each. Read the
// warning of Compile before calling it: some versions of AMD's compiler can end the process.
//
// hipRTC is a library of its own, libhiprtc.so, which is searched for when it is first needed and which need not be
// there: the error is then a *CompilerError that lists every attempt and matches ErrUnsupported. If the environment
// variable GGUF2GPU_HIPRTC_LIBRARY names a file, no other is tried. Else it is the first that works of: up to HIP 6 the
// open HIP library itself; libhiprtc.so.N in the folder of that library, N being its major version; the same name where
// the system's dynamic loader finds it; the same name in /opt/rocm*/lib and /opt/rocm*/core*/lib, newest version first.
//
// # Graphs
//
// Stream.Capture records the work that is put on a stream instead of doing it. Graph.Instantiate makes the recording
// ready, and Stream.LaunchGraph does all of it with one call, as often as wanted.
//
// # Virtual memory
//
// Device.CreatePhysical allocates memory without an address, Device.MapMemory gives it one. PhysicalMemory.Export gives
// a file descriptor with which another process can import the memory and map it, at the same address if the runtime can
// do that. The memory exists until everybody has let go of it: unlike memory of an IPC handle it survives the process
// that made it. AMD's runtimes have defects here; see Device.VirtualMemory and PhysicalMemory.Export.
//
// # Sharing a GPU with other code of the process
//
// Stream.Handle, Event.Handle, Module.Handle and so on are HIP's own handles, for another binding. In return
// Device.StreamFromHandle makes a Stream of a stream of that binding.
//
// # Goroutines and threads
//
// Runtime, Device and all handles are safe for concurrent use. HIP keeps a current device per OS thread and goroutines
// move between threads; the package sets it around each call that depends on it and restores it, so callers need not
// care, and need not lock goroutines to threads. Close waits for calls on the same handle that are in progress. A
// handle is refused after its Close with ErrClosed, without calling HIP. Synchronize blocks an OS thread for as long as
// it waits.
//
// A handle that is garbage-collected unclosed is counted by Runtime.Leaked and logged at debug level. It is never freed
// behind the caller's back, because the GPU may still be using it.
//
// # Errors
//
// A call that HIP refuses gives an *Error with the function, the code and what it was about. The codes are errors of
// their own: errors.Is(err, amdhip.ErrOutOfMemory) works. Functions that a library does not have give ErrUnsupported.
//
// # Without a GPU
//
// Package amdhip/soft is a software device: it fills the same table of functions with Go functions, so all code above
// the table is the code that runs on a GPU. It is what programs fall back to where there is no GPU, and what their
// tests run on. This package does not import it, so a program for GPUs alone does not carry it.
//
// # Limits
//
// The library is bound on Linux only; elsewhere Open fails with ErrNoLibrary and ErrUnsupported, and the software
// device works. Platforms of 32 bits are not supported. Programs are linked dynamically against libc, even when built
// with CGO_ENABLED=0. The library stays loaded until the process ends. A process should not use HIP libraries of two
// major versions. Textures and managed memory are out of scope.
package amdhip
