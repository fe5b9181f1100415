"""Models that another process holds, and their tensors."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from . import _dlpack, _manifest, _memory, _wire
from ._attachment import CLOSED, Attachment, open_allocation
from ._errors import Closed, Error, ProtocolError, Unsupported

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor as TorchTensor


class _View:
    """What NumPy keeps of memory of the software device."""

    def __init__(self, attachment: Attachment, interface: Dict[str, Any]) -> None:
        self._attachment, self.__array_interface__ = attachment, interface


class Tensor:
    """A tensor in the memory of a device, which belongs to the holder.

    ``shape`` is row-major, slowest dimension first (the reverse of ggml's order), and counts elements of ``dtype``,
    which is the name that NumPy and PyTorch use: float16, bfloat16, ... A tensor of quantized blocks has the dtype
    uint8: its last dimension is then the bytes of a row, and ``ggml_type`` names the blocks. ``ggml_shape`` always
    counts the elements of the tensor, in row-major order as well.

    Everything that gives access to values waits until the tensor has arrived, and raises Gone when the holder has ended
    (but see Model.independent),
    Closed when the model is closed, or HolderError when loading failed. Arrays stay valid after Model.close and keep
    the memory mapped. They share memory with other processes: do not write to them."""

    __slots__ = (
        "name",
        "dtype",
        "shape",
        "nbytes",
        "ggml_type",
        "ggml_shape",
        "slice",
        "_device",
        "_at",
        "_address",
        "_attachment",
        "_number",
        "__weakref__",
    )

    def __init__(self, attachment: Attachment, t: _manifest.Tensor, device: int, address: int) -> None:
        self.name: str = t.name
        self.dtype: str = t.dtype
        self.shape: Tuple[int, ...] = t.shape
        self.nbytes: int = t.nbytes
        self.ggml_type: str = t.target
        self.ggml_shape: Tuple[int, ...] = t.elements
        #: The part of the tensor that the holder has, of one rank of several: {"dim", "ranges"}, dim row-major. None:
        #: all.
        self.slice: Optional[Dict[str, Any]] = t.slice
        self._device, self._address, self._attachment, self._number = device, address, attachment, t.number
        self._at = attachment.machine.dlpack(device)

    def __repr__(self) -> str:
        return "<gguf2gpu.Tensor %r %s %s on %s>" % (self.name, self.dtype, list(self.shape), self.device)

    @property
    def device(self) -> str:
        """Where it is, as PyTorch says it: "cpu" for the software device, "cuda:N" for GPUs, also of AMD."""
        return "cpu" if self._at[0] == _memory.CPU else "cuda:%d" % self._at[1]

    @property
    def ready(self) -> bool:
        """Whether it has arrived."""
        self._attachment.refresh()
        return self._attachment.loaded or self._attachment.ready > self._number

    def wait(self, timeout: Optional[float] = None) -> "Tensor":
        """Wait until it has arrived, and return it. TimeoutError after timeout seconds; None waits as long as it
        takes."""
        self._attachment.wait(self._number + 1, timeout)
        return self

    def data_ptr(self) -> int:
        """Return its address in this process, once it has arrived. The pointer is valid while this object lives."""
        self.wait()
        return self._address

    def tobytes(self) -> bytes:
        """Return a copy of its bytes, little-endian."""
        self.wait()
        return self._attachment.machine.read(self._device, self._address, self.nbytes)

    def numpy(self) -> "ndarray[Any, Any]":
        """Return it as a read-only NumPy array: the shared memory itself on the software device, a copy from a GPU.

        NumPy has no bfloat16 of its own: such tensors need the package ml_dtypes, else they are Unsupported."""
        import numpy as np

        self.wait()
        bits = None
        dtype = self.dtype
        if dtype == "bfloat16":
            try:
                import ml_dtypes
            except ImportError:
                raise Unsupported(
                    "tensor %r is bfloat16, which NumPy lacks: use torch(), tobytes(), or install ml_dtypes" % self.name
                ) from None
            bits, dtype = ml_dtypes.bfloat16, "uint16"
        if self._at[0] != _memory.CPU or self.nbytes == 0:
            out = np.frombuffer(self.tobytes(), dtype=dtype).reshape(self.shape)
        else:
            out = np.asarray(
                _View(
                    self._attachment,
                    {
                        "shape": self.shape,
                        "typestr": np.dtype(dtype).str,
                        "data": (self._address, True),
                        "version": 3,
                    },
                )
            )
        return out if bits is None else out.view(bits)

    def torch(self) -> "TorchTensor":
        """Return it as a PyTorch tensor on its device, without a copy. bfloat16 stays that."""
        import torch

        if self._at[0] != _memory.CPU:
            self._at = self._attachment.machine.dlpack(self._device)  # PyTorch may have been loaded since
        return torch.from_dlpack(self.__dlpack__())  # of self itself it would ask twice, and look for a stream each time

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> "ndarray[Any, Any]":
        out = self.numpy()
        if dtype is not None and dtype != out.dtype:
            return out.astype(dtype)
        return out.copy() if copy else out

    def __dlpack_device__(self) -> Tuple[int, int]:
        """Return DLPack's type (kDLCPU, kDLCUDA, kDLROCM) and number of the device."""
        return self._at

    def __dlpack__(
        self,
        *,
        stream: Optional[int] = None,
        max_version: Optional[Tuple[int, int]] = None,
        dl_device: Optional[Tuple[int, int]] = None,
        copy: Optional[bool] = None,
    ) -> object:
        """Return a capsule of DLPack. What has arrived is complete, so stream needs no synchronization."""
        if dl_device is not None and tuple(dl_device) != self._at:
            raise BufferError("tensor %r is on the device %s, and is not copied to another" % (self.name, self._at))
        if copy:
            raise BufferError("tensor %r is not copied: ask for the tensor itself, and copy that" % self.name)
        self.wait()
        return _dlpack.capsule(self._address, self._at, self.dtype, self.shape, self._attachment)

    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        """The interface of Numba and CuPy, version 3: on GPUs, for all types but bfloat16, which it cannot express."""
        if self._at[0] == _memory.CPU:
            raise AttributeError("tensor %r is in the memory of the host" % self.name)
        if self.dtype == "bfloat16":
            raise AttributeError(
                "tensor %r is bfloat16, which __cuda_array_interface__ cannot express: use DLPack" % self.name
            )
        self.wait()
        kind = {0: "i", 1: "u", 2: "f"}[_dlpack.DTYPES[self.dtype][0]]
        size = _dlpack.DTYPES[self.dtype][1] // 8
        return {
            "shape": self.shape,
            "typestr": "%s%s%d" % ("|" if size == 1 else "<", kind, size),
            "data": (self._address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


class Model(Mapping[str, Tensor]):
    """A model that another process holds: a mapping from the names of tensors to Tensor, in the order of the file.

    It is made by attach, and may be used as a context manager. Methods may be called by several threads."""

    def __init__(self, manifest: _manifest.Manifest, attachment: Attachment) -> None:
        self._attachment, self._manifest = attachment, manifest
        #: The name that it is held under, and its architecture as GGUF names it.
        self.name: str = manifest.name
        self.architecture: str = manifest.architecture
        #: What it was loaded from: dicts with path, size, mtime_ns and header_sha256.
        self.files: List[Dict[str, Any]] = manifest.files
        #: Its devices: dicts with kind, index (in the holder), uuid, pci and name.
        self.devices: List[Dict[str, Any]] = manifest.devices
        self._copies: List[Dict[str, Tensor]] = []  # by device
        for device in range(len(manifest.devices)):
            starts = [m.address for m in attachment.memories[device]]
            self._copies.append(
                {
                    t.name: Tensor(attachment, t, device, starts[t.allocation] + t.at)
                    for t in manifest.tensors
                    if device in t.devices
                }
            )
        self._tensors: Dict[str, Tensor] = {}
        for t in manifest.tensors:
            self._tensors[t.name] = self._copies[t.devices[0]][t.name]

    def __getitem__(self, name: str) -> Tensor:
        if self._attachment.closed:
            raise Closed("the model is closed")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return "<gguf2gpu.Model %r: %d tensors of architecture %s>" % (self.name, len(self), self.architecture)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on(self, device: int) -> Mapping[str, Tensor]:
        """Return the tensors that are on a device, by its position in devices. With ``--split none`` each has all."""
        return dict(self._copies[device])

    @property
    def loaded(self) -> bool:
        """Whether all tensors have arrived. Raises as the methods of Tensor do."""
        self._attachment.refresh()
        return self._attachment.loaded

    @property
    def gone(self) -> bool:
        """Whether the holder has ended or taken the model away, or loading failed."""
        try:
            self._attachment.refresh()
        except Closed:
            return False
        except Error:
            return True
        return False

    def wait(self, timeout: Optional[float] = None) -> "Model":
        """Wait until all tensors have arrived, and return the model. Raises as the methods of Tensor do."""
        self._attachment.wait(len(self._manifest.tensors), timeout)
        return self

    @property
    def independent(self) -> bool:
        """Whether the memory stays whatever becomes of the holder: it is shared by descriptors, and not by IPC handles.
        Such a model, once loaded, is never gone; the next holder may adopt it, and hears that this process uses it."""
        return self._manifest.descriptors

    @property
    def alone(self) -> bool:
        """Whether the holder of an independent model has ended, and no other one has adopted it yet."""
        self._attachment.refresh()
        return self._attachment.alone

    @property
    def ending(self) -> bool:
        """Whether the holder has said that it is about to end. It waits a while for models that are not independent."""
        self._attachment.refresh()
        return self._attachment.ending

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together, without those of further copies."""
        return sum(t.nbytes for t in self._tensors.values())

    def close(self) -> bool:
        """Give the model back. Return whether that is done: while arrays or tensors of it are in use somewhere, the
        memory stays mapped and the connection open, until the last of them has gone."""
        if self._attachment is CLOSED:
            return True
        attachment = self._attachment
        attachment.closed = True
        self._tensors, self._copies = {}, []
        self._attachment = CLOSED
        released = weakref.ref(attachment)
        del attachment
        _dlpack.sweep()
        return released() is None

    def state_dict(self, hf: bool = False, framework: str = "torch") -> Dict[str, Any]:
        """Return all tensors by name; see the function state_dict for hf and framework."""
        from . import _hf

        return _hf.state_dict(self, hf, framework)

    @property
    def hf_names(self) -> Dict[str, List[Dict[str, Any]]]:
        """What each tensor is in Hugging Face's transformers, as the holder says. UnknownNames where it cannot."""
        return self._manifest.hf_names()


def attach(
    socket: Optional[str] = None,
    model: Optional[str] = None,
    timeout: Optional[float] = None,
    waiting: Optional[Callable[[str], None]] = None,
    rank: Optional[int] = None,
    world: Optional[int] = None,
) -> Model:
    """Map a model that ``gguf2gpu hold`` keeps in device memory into this process, without a copy.

    socket is the path of the holder's Unix socket, None for the usual one; model is the name that it is held under,
    None for the only one. The model may still be loading: see Model.wait and Tensor.wait. timeout bounds how long the
    holder may take to answer, which it does at once unless it is opening that model, or wakes it; None waits as long as
    it takes. waiting is called every two seconds with what the holder waits for.

    Of a model that is held in parts it is the part of a rank, of world ranks if that is given. Without rank it is what
    RANK and WORLD_SIZE say, which torchrun sets. What is held whole is for all ranks.

    Errors are NoHolder, UnknownModel and other HolderErrors, Gone, ProtocolError, DeviceError when this process cannot
    use the model's devices, and TimeoutError. Attach to holders that you trust: what they say is checked, but the
    memory that they name is used."""
    request: Dict[str, Any] = {"op": "attach", "model": model or ""}
    if rank is None and world is None:
        rank, world = _launched()
    if rank is not None:
        request.update(rank=rank, world=world or 0)
    connection, reply = _wire.ask(socket, request, timeout, waiting)
    attachment = None
    try:
        manifest = _manifest.parse(reply.get("manifest"))
        attachment = Attachment(connection, _memory.machine(manifest.devices), socket, manifest)
        attachment.memories.extend([] for _ in manifest.devices)
        if manifest.descriptors and len(connection.fds) != len(manifest.allocations):
            raise ProtocolError(
                "the holder sent %d descriptors for %d allocations" % (len(connection.fds), len(manifest.allocations))
            )
        for a in manifest.allocations:
            attachment.memories[a.device].append(open_allocation(attachment, a))
        attachment.take(reply)
    except BaseException:
        if attachment is None:
            connection.close()
        else:
            attachment.end()
        raise
    return Model(manifest, attachment)


def _launched() -> Tuple[Optional[int], Optional[int]]:
    """Return which rank of how many torchrun has made of this process, if it has."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None, None
    return (rank, world) if 0 <= rank < world else (None, None)
