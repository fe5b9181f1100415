"""Reads models and dequantizes blocks with gguf-py, the reader of the llama.cpp project, for the tests of this package.

A request on stdin is an operation of one byte, a number of four bytes and a length of eight, little-endian, and then so
many bytes. "m" is a model: the answer is a line of JSON. "d" is blocks of the type with that number: the answer is a
length and so many bytes of float32, or the length 2^64-1 where gguf-py cannot do that type."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import tempfile
import warnings

import gguf
import numpy as np

warnings.simplefilter("ignore")  # numpy warns of overflows that are asked for
np.seterr(all="ignore")


def model(data: bytes, path: str) -> dict:
    with open(path, "wb") as f:
        f.write(data)
    try:
        r = gguf.GGUFReader(path)
    except Exception as e:  # whatever it is, the file is refused
        return {"error": "%s: %s" % (type(e).__name__, str(e)[:200])}
    keys = []
    for name, field in r.fields.items():
        if name.startswith("GGUF.") and not field.parts[0].flags.owndata and field.offset < 24:
            continue  # the header's own numbers
        kind = [int(t) for t in field.types]
        keys.append([bytes(field.parts[1]).hex(), kind, [field.parts[i].tobytes().hex() for i in field.data]])
    tensors = [
        [t.name.encode().hex(), int(t.tensor_type), [int(n) for n in t.shape], t.data_offset, t.n_bytes, t.data.nbytes]
        for t in r.tensors
    ]
    return {"version": int(r.fields["GGUF.version"].parts[0][0]), "keys": keys, "tensors": tensors}


def dequantize(data: bytes, number: int) -> "bytes | None":
    try:
        kind = gguf.GGMLQuantizationType(number)
        _, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
        return gguf.quants.dequantize(blocks, kind).astype("<f4").tobytes()
    except (ValueError, NotImplementedError, KeyError):
        return None


def give_up(*_: object) -> None:
    raise TimeoutError("it takes too long")


def main() -> None:
    signal.signal(signal.SIGALRM, give_up)  # a count that no file can have makes it read nothing, again and again
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "m.gguf")
        while head := sys.stdin.buffer.read(13):
            op, number, size = struct.unpack("<cIQ", head)
            data = sys.stdin.buffer.read(size)
            if op == b"m":
                signal.setitimer(signal.ITIMER_REAL, 2)
                answer = model(data, path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            else:
                out = dequantize(data, number)
                sys.stdout.buffer.write(struct.pack("<Q", (1 << 64) - 1 if out is None else len(out)) + (out or b""))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
