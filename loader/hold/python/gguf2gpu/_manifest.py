"""What a holder says about a model. Nothing of it is believed: tensors are inside of allocations and of their size."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from ._errors import ProtocolError, UnknownNames, show

# dtype and bytes of an element, by ggml's type. All other types are blocks.
_PLAIN = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F64": ("float64", 8),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
}
_MAX_BYTES = 1 << 44  # of a model: far above any host's device memory
_MAX_DEVICES = 1024
_MAX_DIMS = 8
_HANDLE_BYTES = 64
_SHARED_ALIGN = 2 << 20  # of the size of memory that a descriptor is for


class Allocation(NamedTuple):
    """A piece of device memory, and how it is shared."""

    device: int
    nbytes: int
    handle: Optional[bytes]  # of HIP's IPC; None: a descriptor has come with the manifest
    size: int = 0  # with a descriptor, of the memory that it is for
    address: int = 0  # with a descriptor, where it should be mapped


class Tensor(NamedTuple):
    """A tensor and its place."""

    name: str
    target: str  # ggml's type on the device
    dtype: str
    shape: Tuple[int, ...]  # row-major, elements of dtype
    elements: Tuple[int, ...]  # row-major, elements of the tensor
    nbytes: int
    allocation: int
    at: int
    devices: Tuple[int, ...]
    number: int  # in the order of arrival
    slice: Optional[Dict[str, Any]]
    hf: List[Dict[str, Any]]


class Manifest(NamedTuple):
    """A model."""

    name: str
    architecture: str
    files: List[Dict[str, Any]]
    devices: List[Dict[str, Any]]
    allocations: List[Allocation]
    tensors: List[Tensor]  # in the order of arrival
    hf: Optional[Dict[str, Any]]
    residence: str = ""  # of this stay in device memory
    descriptors: bool = False  # how it is shared; then the memory does not depend on the holder

    def hf_names(self) -> Dict[str, List[Dict[str, Any]]]:
        if self.hf is None:
            raise UnknownNames("the holder is of a version that does not say what tensors are called in transformers")
        if self.hf.get("unknown"):
            raise UnknownNames(_short(self.hf["unknown"]))
        return {t.name: t.hf for t in self.tensors}


def _number(value: object, limit: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ProtocolError("%s is %s" % (what, show(value)))
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError("%s is %s" % (what, show(value)))
    return value


def _short(value: object) -> str:
    """Return a text of the holder's for people."""
    return value[:4096] if isinstance(value, str) else show(value)


def _list(value: object, what: str, kind: type = dict) -> List[Any]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
        raise ProtocolError("%s is not a list" % what)
    return value


def parse(m: object) -> Manifest:
    """Return the manifest in a message of the holder. ProtocolError says what cannot be."""
    if not isinstance(m, dict):
        raise ProtocolError("the holder sent no manifest")
    devices = _list(m.get("devices"), "devices")
    if not 0 < len(devices) <= _MAX_DEVICES:
        raise ProtocolError("a model on %d devices" % len(devices))
    if any(d.get("kind") != devices[0].get("kind") for d in devices):
        raise ProtocolError("devices of several kinds")
    share = m.get("share", "ipc")  # version 2 knew nothing else
    if share not in ("ipc", "fd"):
        raise ProtocolError(
            "the holder shares memory by %s, which this package does not know: it is too old" % show(share)
        )
    allocations = [_allocation(a, len(devices), share == "fd") for a in _list(m.get("allocations"), "allocations")]
    if sum(max(a.nbytes, a.size) for a in allocations) > _MAX_BYTES:
        raise ProtocolError("allocations of more than %d bytes" % _MAX_BYTES)
    sizes: List[List[int]] = [[] for _ in devices]
    for a in allocations:
        sizes[a.device].append(a.nbytes)
    found: List[Tuple[Tuple[int, int, int], Tensor]] = []
    grouped: Set[int] = set()
    for g in _list(m.get("groups"), "groups"):
        on = tuple(_number(d, len(devices) - 1, "a device of a group") for d in _list(g.get("devices"), "devices", int))
        if len(set(on)) != len(on) or not grouped.isdisjoint(on):  # else comparing them could take for ever
            raise ProtocolError("a device is in two groups")
        grouped.update(on)
        if not on or any(sizes[d] != sizes[on[0]] for d in on):
            raise ProtocolError("the %d devices of a group do not have the same allocations" % len(on))
        for t in _list(g.get("tensors"), "tensors"):
            try:
                where = (
                    _number(t.get("part"), 1 << 32, "part"),
                    _number(t.get("offset"), 1 << 62, "offset"),
                    len(found),
                )
                found.append((where, _tensor(t, on, sizes[on[0]])))
            except ProtocolError as e:
                raise ProtocolError("tensor %s: %s" % (show(t.get("name")), e)) from None
    found.sort(key=lambda x: x[0])  # the order in which they arrive
    tensors = [t._replace(number=i) for i, (_, t) in enumerate(found)]
    if len({t.name for t in tensors}) != len(tensors):
        raise ProtocolError("a tensor is there twice")
    hf = m.get("hf")
    return Manifest(
        _text(m.get("name"), "name")[:4096],
        _text(m.get("architecture", ""), "architecture")[:4096],
        _list(m.get("files"), "files"),
        devices,
        allocations,
        tensors,
        hf if isinstance(hf, dict) else None,
        _text(m.get("residence", ""), "residence"),
        share == "fd",
    )


def _allocation(a: Dict[str, Any], devices: int, descriptors: bool) -> Allocation:
    device = _number(a.get("device"), devices - 1, "the device of an allocation")
    nbytes = _number(a.get("bytes"), _MAX_BYTES, "the size of an allocation")
    if descriptors:
        size = _number(a.get("size"), _MAX_BYTES, "the size of shared memory")
        address = _number(a.get("address", 0), 1 << 63, "the address of an allocation")
        if size < max(nbytes, 1) or size % _SHARED_ALIGN or address % 4096:
            raise ProtocolError("%d bytes are shared as %d bytes at %#x" % (nbytes, size, address))
        return Allocation(device, nbytes, None, size, address)
    try:
        handle = base64.b64decode(_text(a.get("handle"), "a handle"), validate=True)
    except binascii.Error as e:
        raise ProtocolError("the handle of an allocation: %s" % e) from None
    if len(handle) != _HANDLE_BYTES:
        raise ProtocolError("a handle of %d bytes, not %d" % (len(handle), _HANDLE_BYTES))
    return Allocation(device, nbytes, handle)


def _tensor(t: Dict[str, Any], on: Tuple[int, ...], sizes: List[int]) -> Tensor:
    whole = [_number(n, 1 << 62, "a dimension") for n in _list(t.get("shape"), "shape", int)]
    if len(whole) > _MAX_DIMS:
        raise ProtocolError("%d dimensions" % len(whole))
    part = t.get("slice")
    sliced = None
    if isinstance(part, dict):
        dim = _number(part.get("dim"), len(whole) - 1, "the dimension of a slice")
        ranges = [[_number(n, whole[dim], "an index") for n in r] for r in _list(part.get("ranges"), "ranges", list)]
        if any(len(r) != 2 or r[0] > r[1] for r in ranges):
            raise ProtocolError("the ranges of a slice are not ascending pairs")
        sliced = {"dim": len(whole) - 1 - dim, "ranges": ranges, "shape": tuple(reversed(whole))}
        whole[dim] = sum(r[1] - r[0] for r in ranges)
    elements = tuple(reversed(whole))
    allocation = _number(t.get("allocation"), len(sizes) - 1, "the allocation")
    nbytes = _number(t.get("bytes"), sizes[allocation], "the size")
    at = _number(t.get("at"), sizes[allocation] - nbytes, "the place")
    target = _text(t.get("target"), "the type")
    count = 1
    for n in elements:
        count *= n
    dtype, size = _PLAIN.get(target, ("uint8", 0))
    shape = elements
    if size == 0:  # blocks: every row is whole ones
        rows = count // elements[-1] if elements and elements[-1] else 0
        shape = elements[:-1] + (nbytes // rows,) if rows and nbytes % rows == 0 else (nbytes,)
    elif count * size != nbytes:
        raise ProtocolError("%d bytes for %d elements of %s" % (nbytes, count, target))
    return Tensor(
        _text(t.get("name"), "the name"),
        target,
        dtype,
        shape,
        elements,
        nbytes,
        allocation,
        at,
        on,
        0,
        sliced,
        _list(t.get("hf"), "hf"),
    )
