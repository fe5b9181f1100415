"""The few calls of the HIP runtime that attaching needs, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import importlib.util
import mmap
import os
import re
import sys
import threading
from typing import Iterator, List, Optional, Tuple

from ._errors import DeviceError, ProtocolError

_SONAMES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")
_DEVICE_TO_HOST = 2  # hipMemcpyDeviceToHost
_NON_BLOCKING = 1  # hipStreamNonBlocking

_lock = threading.Lock()
_runtime: Optional["Runtime"] = None


class _Access(ctypes.Structure):
    """hipMemAccessDesc: what a device may do with mapped memory."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int), ("flags", ctypes.c_int)]


class _Handle(ctypes.Structure):
    """hipIpcMemHandle_t, which calls take by value."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


def mapped(name: str) -> str:
    """Return the path of the library of this process whose file name begins with name, "" if there is none."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                path = line.rstrip("\n").partition("/")
                if path[1] and os.path.basename(path[2]).startswith(name):
                    return "/" + path[2]
    except OSError:
        pass
    return ""


def _torch_directory() -> str:
    """Return where a ROCm build of PyTorch has its own runtime, "" if it has none. PyTorch need not be loaded."""
    try:
        spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else sys.modules["torch"].__spec__
    except (ImportError, ValueError):
        return ""
    return os.path.join(os.path.dirname(spec.origin), "lib") if spec is not None and spec.origin else ""


def _version(path: str) -> List[int]:
    found = re.findall(r"(?:rocm|core)-(\d+(?:\.\d+)*)", os.path.realpath(path))
    return [int(n) for n in found[-1].split(".")] if found else []


def candidates() -> Iterator[Tuple[str, bool]]:
    """Yield paths of the runtime, the best first, and whether it is the only one that will do.

    The order is that of the Go package amdhip, behind what this process has loaded already and what PyTorch will load:
    a pointer of one copy of the runtime means nothing to another one."""
    named = os.environ.get("GGUF2GPU_HIP_LIBRARY", "")
    if named:
        yield named, True
    loaded = mapped("libamdhip64.so")
    if loaded:
        yield loaded, True
    directories = [_torch_directory()]
    directories += [os.path.join(os.environ[key], "lib") for key in ("ROCM_PATH", "HIP_PATH") if os.environ.get(key)]
    for directory in directories:
        for name in _SONAMES:
            path = os.path.join(directory, name)
            if directory and os.path.exists(path):
                yield path, False
    for name in _SONAMES:
        yield name, False
    optional = glob.glob("/opt/rocm*/lib") + glob.glob("/opt/rocm*/core*/lib")
    for directory in sorted(optional, key=_version, reverse=True):
        for name in _SONAMES:
            path = os.path.join(directory, name)
            if os.path.exists(path):
                yield path, False


def runtime() -> "Runtime":
    """Return the HIP runtime of this process, opening it at the first call. The error says what was tried."""
    global _runtime
    with _lock:
        if _runtime is None:
            tried = []
            for path, only in candidates():
                try:
                    _runtime = Runtime(path)
                    break
                except (OSError, AttributeError) as e:
                    tried.append("%s: %s" % (path, e))
                    if only:
                        break
            if _runtime is None:
                raise DeviceError("no HIP runtime could be opened: " + "; ".join(tried))
        return _runtime


# What error 17 of opening memory of another process has been seen to come from.
_IPC = "containers need one PID, one IPC and one network namespace, or --share fd of the holder"
_IPC_OF_7 = (
    "HIP 7 hands memory over by a socket that belongs to a network namespace, so both processes must share their network, "
    "PID and IPC namespaces, and the one that attaches needs CAP_SYS_PTRACE; HSA_ENABLE_IPC_MODE_LEGACY=1 in the "
    "environment of both brings the older way back; --share fd of the holder needs none of that"
)


class Runtime:
    """The HIP runtime. Calls leave the thread's current device as it was."""

    def __init__(self, path: str) -> None:
        self.path, self._lib, self._pid = path, ctypes.CDLL(path), os.getpid()
        self._error = self._lib.hipGetErrorString
        self._error.restype = ctypes.c_char_p
        for name, types in {
            "hipGetDeviceCount": [ctypes.POINTER(ctypes.c_int)],
            "hipGetDevice": [ctypes.POINTER(ctypes.c_int)],
            "hipSetDevice": [ctypes.c_int],
            "hipRuntimeGetVersion": [ctypes.POINTER(ctypes.c_int)],
            "hipDeviceGetPCIBusId": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
            "hipIpcOpenMemHandle": [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint],
            "hipIpcCloseMemHandle": [ctypes.c_void_p],
            "hipStreamCreateWithFlags": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint],
            "hipStreamDestroy": [ctypes.c_void_p],
            "hipStreamSynchronize": [ctypes.c_void_p],
            "hipMemcpyAsync": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p],
            "hipDeviceSynchronize": [],
        }.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = types, ctypes.c_int
        for name, types in {  # virtual memory, which not every version has
            "hipMemAddressReserve": [
                ctypes.POINTER(ctypes.c_void_p),
                ctypes.c_size_t,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_ulonglong,
            ],
            "hipMemAddressFree": [ctypes.c_void_p, ctypes.c_size_t],
            "hipMemImportFromShareableHandle": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_int],
            "hipMemMap": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_ulonglong],
            "hipMemSetAccess": [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(_Access), ctypes.c_size_t],
            "hipMemUnmap": [ctypes.c_void_p, ctypes.c_size_t],
            "hipMemRelease": [ctypes.c_void_p],
        }.items():
            optional = getattr(self._lib, name, None)
            if optional is not None:
                optional.argtypes, optional.restype = types, ctypes.c_int
        self._uuid = getattr(self._lib, "hipDeviceGetUuid", None)  # from HIP 5.2 on
        version = ctypes.c_int()
        self._call("hipRuntimeGetVersion", ctypes.byref(version))
        self._version = version.value
        # hipIpcMemLazyEnablePeerAccess, the only flag there is, changed its value in HIP 6.
        self._flags = 1 if version.value >= 60000000 else 0
        self._by_value = version.value >= 70100000  # how hipMemImportFromShareableHandle takes a descriptor

    def _call(self, name: str, *args: object) -> None:
        if os.getpid() != self._pid:
            raise DeviceError(
                "the HIP runtime does not work in the child of a process that has used it: attach in the child alone"
            )
        function = getattr(self._lib, name, None)
        if function is None:
            raise DeviceError("%s has no %s, which the holder's way of sharing memory needs" % (self.path, name))
        code = function(*args)
        if code != 0:
            text = self._error(ctypes.c_int(code)) or b"unknown"
            raise DeviceError("%s: %s (%d)" % (name, text.decode(errors="replace"), code), code)

    def _on(self, device: int) -> "_Current":
        return _Current(self, device)

    def devices(self) -> List[Tuple[str, str]]:
        """Return UUID and PCI address of each device, as a manifest has them."""
        count = ctypes.c_int()
        self._call("hipGetDeviceCount", ctypes.byref(count))
        found = []
        for i in range(count.value):
            text = ctypes.create_string_buffer(256)
            pci = text.value.decode(errors="replace") if self._lib.hipDeviceGetPCIBusId(text, 64, i) == 0 else ""
            found.append((self._uuid_of(i), pci))
        return found

    def _uuid_of(self, device: int) -> str:
        raw = ctypes.create_string_buffer(16)
        if self._uuid is None or self._uuid(raw, ctypes.c_int(device)) != 0 or raw.raw == bytes(16):
            return ""
        if re.fullmatch(rb"[0-9a-fA-F]{16}", raw.raw):  # on AMD the bytes are the digits themselves
            return "GPU-" + raw.raw.decode()
        return "GPU-" + raw.raw.hex()

    def open_handle(self, device: int, handle: bytes) -> int:
        pointer, raw = ctypes.c_void_p(), _Handle.from_buffer_copy(handle)
        with self._on(device):
            try:
                self._call("hipIpcOpenMemHandle", ctypes.byref(pointer), raw, self._flags)
            except DeviceError as e:
                if e.code != 17:
                    raise
                raise DeviceError("%s: %s" % (e, _IPC_OF_7 if self._version >= 70000000 else _IPC), e.code) from None
        return pointer.value or 0

    def check_size(self, address: int, nbytes: int) -> None:
        """Raise ProtocolError where less is mapped than the holder says: what is behind it belongs to nobody. Runtimes
        that cannot tell are believed."""
        function = getattr(self._lib, "hipMemGetAddressRange", None)
        if function is None:
            return
        base, size = ctypes.c_void_p(), ctypes.c_size_t()
        function.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.c_void_p]
        function.restype = ctypes.c_int
        code = function(ctypes.byref(base), ctypes.byref(size), address)
        if code == 801:  # hipErrorNotSupported
            return
        if code != 0:
            raise DeviceError("hipMemGetAddressRange: error %d" % code, code)
        start = base.value or 0
        if start > address or start + size.value < address + nbytes:
            raise ProtocolError("%d bytes are mapped, the holder says %d" % (size.value, nbytes))

    def close_handle(self, device: int, address: int) -> None:
        with self._on(device):
            self._call("hipIpcCloseMemHandle", address)

    def open_descriptor(self, device: int, fd: int, nbytes: int, hint: int) -> Tuple[int, int]:
        """Map memory that a descriptor is for, and return its handle and its address: hint, if the runtime allows
        it."""
        address, handle = ctypes.c_void_p(), ctypes.c_void_p()
        undo: List[Tuple[object, ...]] = []
        with self._on(device):
            try:
                with _descriptor(fd, self._by_value) as argument:
                    self._call("hipMemImportFromShareableHandle", ctypes.byref(handle), argument, 1)
                undo.append(("hipMemRelease", handle))
                self._call("hipMemAddressReserve", ctypes.byref(address), nbytes, _ALIGN, hint or None, 0)
                undo.append(("hipMemAddressFree", address, nbytes))
                self._call("hipMemMap", address, nbytes, 0, handle, 0)
                undo.append(("hipMemUnmap", address, nbytes))
                self._call("hipMemSetAccess", address, nbytes, ctypes.byref(_Access(1, device, 3)), 1)
            except BaseException:
                for call in reversed(undo):
                    self._call(*call)  # type: ignore[arg-type]
                raise
        return handle.value or 0, address.value or 0

    def close_descriptor(self, device: int, handle: int, address: int, nbytes: int) -> None:
        with self._on(device):
            self._call("hipMemUnmap", address, nbytes)
            self._call("hipMemRelease", handle)
            self._call("hipMemAddressFree", address, nbytes)

    def read(self, device: int, address: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""
        out, stream = ctypes.create_string_buffer(nbytes), ctypes.c_void_p()
        with self._on(device):
            self._call("hipStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
            try:
                self._call("hipMemcpyAsync", out, address, nbytes, _DEVICE_TO_HOST, stream)
                self._call("hipStreamSynchronize", stream)
            finally:
                self._call("hipStreamDestroy", stream)
        return out.raw

    def synchronize(self, device: int) -> None:
        with self._on(device):
            self._call("hipDeviceSynchronize")


_ALIGN = 2 << 20  # of addresses: that of large pages
_PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@contextlib.contextmanager
def _descriptor(fd: int, by_value: bool) -> Iterator[int]:
    """Yield what hipMemImportFromShareableHandle takes for a descriptor.

    Before HIP 7.1 some versions take the descriptor and some a pointer to it, and nothing tells which. For those it is
    a number that is right both ways: its lower 32 bits are the descriptor, and it is the address of an int with it."""
    if by_value:
        yield fd
        return
    spare: List[int] = []
    try:
        while fd % 4 or fd > _PAGE - 4:
            fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0 if not spare else fd // 4 * 4 + 4)
            spare.append(fd)
            if fd > _PAGE - 4:
                raise DeviceError("too many files are open: no descriptor below %d is free" % _PAGE)
        page = _page()
        try:
            ctypes.c_int.from_address(page + fd).value = fd
            yield page + fd
        finally:
            _libc.munmap(page, _PAGE)
    finally:
        for extra in spare:
            os.close(extra)


def _page() -> int:
    """Map a page whose address is a multiple of 2^32."""
    for at in range(0x70, 0x60, -1):  # below what the kernel gives out by itself, above what programs occupy
        got = _libc.mmap(
            at << 32, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        if got == at << 32:
            return at << 32
        if got is not None and got != ctypes.c_void_p(-1).value:
            _libc.munmap(got, _PAGE)  # something is there already, so the kernel chose another place
    raise DeviceError("no address that is a multiple of 2^32 is free")


class _Current:
    """Makes a device the thread's current one for a while."""

    def __init__(self, runtime: Runtime, device: int) -> None:
        self._runtime, self._device, self._before = runtime, device, ctypes.c_int()

    def __enter__(self) -> None:
        self._runtime._call("hipGetDevice", ctypes.byref(self._before))
        self._runtime._call("hipSetDevice", self._device)  # also where it is that: it makes a context current

    def __exit__(self, *_: object) -> None:
        if self._before.value != self._device:
            self._runtime._call("hipSetDevice", self._before.value)
