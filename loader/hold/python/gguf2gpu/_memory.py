"""Memory of another process: that of the software device, and that of GPUs through the HIP runtime."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
from typing import Any, Dict, List, Optional, Protocol, Tuple

from . import _hip
from ._errors import DeviceError, ProtocolError, show

# Numbers of DLPack's DLDeviceType.
CPU, CUDA, ROCM = 1, 2, 10


class Memory(Protocol):
    """One allocation of a holder, mapped into this process."""

    address: int
    nbytes: int

    def close(self) -> None:
        """Unmap it."""


class Machine(Protocol):
    """The devices of a model, in the order of the manifest. Each way of sharing is one method of each machine."""

    def dlpack(self, device: int) -> Tuple[int, int]:
        """Return DLPack's type and number of a device."""

    def open_handle(self, device: int, handle: bytes, nbytes: int) -> Memory:
        """Map an allocation that a handle of 64 bytes names."""

    def open_descriptor(self, device: int, fd: int, nbytes: int, address: int) -> Memory:
        """Map memory that a descriptor is for, at an address if that is possible. The descriptor becomes the memory's,
        also on an error."""

    def read(self, device: int, address: int, nbytes: int) -> bytes:
        """Return a copy of memory of a device."""

    def synchronize(self) -> None:
        """Wait for what the devices do: then nothing reads memory that is to be unmapped."""


def machine(devices: List[Dict[str, Any]]) -> Machine:
    """Return the machine that has the devices of a manifest."""
    kind = devices[0].get("kind")
    if kind == "soft":
        return Software()
    if kind == "hip":
        return Hip(devices)
    raise DeviceError("the model is on a device of the kind %s, which this package does not know" % show(kind))


class _Mapped:
    """Shared memory of the software device. Others see no writes to it: pages are copied when written."""

    def __init__(self, fd: int, nbytes: int) -> None:
        try:
            self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError) as e:
            raise DeviceError("mapping %d bytes of shared memory: %s" % (nbytes, e)) from e
        hold = ctypes.c_char.from_buffer(self._map)
        self.address, self.nbytes = ctypes.addressof(hold), nbytes
        del hold  # while it lived the map could not be closed

    def close(self) -> None:
        self._map.close()


class Software:
    """The software device of gguf2gpu: its memory is a sealed file in memory, which others find in /proc."""

    _MAGIC = b"softgpu2"
    _NO_FILE = 0xFFFFFFFF
    # fcntl(2); the module has the names from Python 3.8 on, but not in every build.
    _GET_SEALS, _SEALS = getattr(fcntl, "F_GET_SEALS", 1034), 0x1 | 0x2 | 0x4

    def dlpack(self, device: int) -> Tuple[int, int]:
        return CPU, 0

    def open_handle(self, device: int, handle: bytes, nbytes: int) -> Memory:
        magic, pid, fd, start, _, _, size, nonce, check = struct.unpack("<8sIIQQQQQQ", handle)
        if magic != self._MAGIC or check != _fnv1a(handle[:56]):
            raise ProtocolError("the handle of an allocation is not one of the software device")
        if fd == self._NO_FILE:
            raise DeviceError("the holder's software device does not share its memory")
        if pid == os.getpid():
            raise DeviceError("a process cannot attach to a model that it holds itself")
        if size < nbytes:
            raise ProtocolError("an allocation of %d bytes is said to have %d" % (size, nbytes))
        try:
            if _process_start(pid) != start:
                raise DeviceError("the process that shared the memory has ended")
            # The descriptor may be that of anything by now: O_PATH opens it without effects, so that its name can be
            # compared first.
            found = os.open("/proc/%d/fd/%d" % (pid, fd), os.O_PATH | os.O_CLOEXEC)
            try:
                path = "/proc/self/fd/%d" % found
                if os.readlink(path) != "/memfd:gguf2gpu-%016x (deleted)" % nonce:
                    raise DeviceError("the shared memory is not there any more")
                opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(found)
        except (OSError, ValueError, IndexError) as e:
            raise DeviceError("opening the shared memory of process %d: %s" % (pid, e)) from e
        return self.open_descriptor(device, opened, size, 0)

    def open_descriptor(self, device: int, fd: int, nbytes: int, address: int) -> Memory:
        try:
            return self._map(fd, nbytes)
        finally:
            os.close(fd)

    def _map(self, fd: int, nbytes: int) -> Memory:
        """Map a sealed memfd. A file that could be cut short would be a fault later."""
        try:
            sealed = fcntl.fcntl(fd, self._GET_SEALS) & self._SEALS == self._SEALS
        except OSError:
            sealed = False
        if not sealed or nbytes <= 0 or os.fstat(fd).st_size < nbytes:
            raise ProtocolError("the shared memory is not of the size that the holder says")
        return _Mapped(fd, nbytes)

    def read(self, device: int, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def synchronize(self) -> None:
        pass


def _fnv1a(data: bytes) -> int:
    h = 0xCBF29CE484222325
    for b in data:
        h = (h ^ b) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h


def _process_start(pid: int) -> int:
    """Return when a process started, in clock ticks: with its number, that tells it from all others."""
    with open("/proc/%d/stat" % pid, "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[19])


class _Opened:
    """Memory of a GPU that another process has allocated."""

    def __init__(self, runtime: _hip.Runtime, device: int, handle: bytes, nbytes: int) -> None:
        self._runtime, self._device, self.nbytes = runtime, device, nbytes
        self.address = runtime.open_handle(device, handle)
        try:
            runtime.check_size(self.address, nbytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._runtime.close_handle(self._device, self.address)


class _Imported:
    """Memory of a GPU that a descriptor is for. The descriptor stays open as long, which some runtimes need."""

    def __init__(self, runtime: _hip.Runtime, device: int, fd: int, nbytes: int, address: int) -> None:
        self._runtime, self._device, self._fd, self.nbytes = runtime, device, fd, nbytes
        try:
            self._handle, self.address = runtime.open_descriptor(device, fd, nbytes, address)
        except BaseException:
            os.close(fd)
            raise
        try:
            runtime.check_size(self.address, nbytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            self._runtime.close_descriptor(self._device, self._handle, self.address, self.nbytes)
        finally:
            os.close(self._fd)


class Hip:
    """GPUs, through AMD's runtime or a library that stands for it. Numbers are those of this process."""

    def __init__(self, devices: List[Dict[str, Any]]) -> None:
        self.runtime = _hip.runtime()
        here = self.runtime.devices()
        # Looked up once: /proc/self/maps takes half a millisecond where PyTorch's libraries are loaded, and every
        # tensor asks. The call above has loaded what the runtime stands on.
        self._on_cuda = _hip.mapped("libcuda.so") != ""
        self._numbers: List[int] = []
        for d in devices:
            try:
                self._numbers.append(here.index((str(d.get("uuid")), str(d.get("pci")))))
            except ValueError:
                raise DeviceError(
                    "the model is on the device %s (%s), which is not among the %d devices of this process"
                    % (show(d.get("name")), show(d.get("uuid")), len(here))
                ) from None

    def dlpack(self, device: int) -> Tuple[int, int]:
        return _flavor(self._on_cuda), self._numbers[device]

    def open_handle(self, device: int, handle: bytes, nbytes: int) -> Memory:
        return _Opened(self.runtime, self._numbers[device], handle, nbytes)

    def open_descriptor(self, device: int, fd: int, nbytes: int, address: int) -> Memory:
        return _Imported(self.runtime, self._numbers[device], fd, nbytes, address)

    def read(self, device: int, address: int, nbytes: int) -> bytes:
        return self.runtime.read(self._numbers[device], address, nbytes)

    def synchronize(self) -> None:
        for device in set(self._numbers):
            self.runtime.synchronize(device)


def _flavor(on_cuda: bool) -> int:
    """Return what consumers of DLPack call the GPUs of this process: ROCM, or CUDA where HIP is a library over
    NVIDIA's driver. PyTorch decides where it is loaded, as it refuses the other one."""
    version: Optional[Any] = getattr(sys.modules.get("torch"), "version", None)
    return CUDA if on_cuda and not getattr(version, "hip", None) else ROCM
