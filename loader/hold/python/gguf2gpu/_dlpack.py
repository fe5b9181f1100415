"""DLPack's structures: how arrays of one library become arrays of another without a copy."""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
from typing import Any, Dict, Sequence, Tuple

# DLDataTypeCode and bits of each dtype of this package.
DTYPES = {
    "float64": (2, 64),
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int64": (0, 64),
    "int32": (0, 32),
    "int16": (0, 16),
    "int8": (0, 8),
    "uint8": (1, 8),
}


class _Tensor(ctypes.Structure):
    """DLTensor, with its device and its type spelt out."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


# What consumers use, by the address of the structure: the structure, what it points to, and what must stay alive.
_live: Dict[int, Tuple[Any, ...]] = {}
# Capsules that a consumer may still take from, by the same address. A destructor of the capsule would be the usual way
# to notice that nobody did, but Python code cannot be one: it would run with the consumer's exception pending.
_offered: Dict[int, object] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int, _live: Dict[int, Tuple[Any, ...]] = _live) -> None:  # type: ignore[misc]
    _live.pop(address, None)


_api = ctypes.pythonapi
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_delete_address = ctypes.cast(_delete, ctypes.c_void_p).value
_NAME = b"dltensor"  # capsules keep the pointer
_lock = threading.Lock()


def sweep() -> None:
    """Forget capsules that consumers have taken, which gives them another name, and those that nobody can take any
    more, with what they were for."""
    with _lock:
        for at in list(_offered):
            if not _is_valid(_offered[at], _NAME):
                del _offered[at]
            elif sys.getrefcount(_offered[at]) <= 2:  # that of the dict and that of the call
                del _offered[at]
                _live.pop(at, None)


def capsule(address: int, device: Tuple[int, int], dtype: str, shape: Sequence[int], alive: object) -> object:
    """Return a capsule for memory at address: a dense array, row-major, whose consumer keeps alive referenced."""
    code, bits = DTYPES[dtype]
    dims = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    t = managed.tensor
    t.data, t.device_type, t.device_id, t.ndim = address, device[0], device[1], len(shape)
    t.code, t.bits, t.lanes = code, bits, 1
    t.shape = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _delete_address
    at = ctypes.addressof(managed)
    sweep()
    _live[at] = (managed, dims, alive)
    made = _new(at, _NAME, None)
    with _lock:
        _offered[at] = made
    return made


@atexit.register
def _forget() -> None:
    """Consumers may outlive the interpreter, which they must then not call. The process's end frees everything."""
    for entry in _live.values():
        entry[0].deleter = None
    # Where they die before the interpreter does, nothing is called either, so nothing is freed under them.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_live))


def count() -> int:
    """Return how many arrays of consumers use memory of this package."""
    sweep()
    return len(_live)
