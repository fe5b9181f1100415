"""What the tests share: holders in processes of their own, and a reader of safetensors files that checks what it reads.

GGUF2GPU names the command, GGUF2GPU_SIMULATOR the C simulator of AMD's runtime; make python builds both."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from typing import Any, Dict, Iterator, List, Optional, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(HERE)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(PACKAGE)))
sys.path.insert(0, PACKAGE)

COMMAND = os.environ.get("GGUF2GPU", os.path.join(ROOT, "bin", "gguf2gpu"))
SIMULATOR = os.environ.get("GGUF2GPU_SIMULATOR", os.path.join(ROOT, "bin", "libamdhip64.so"))
SAMPLE = os.path.join(ROOT, "testdata", "tiny-llama.gguf")

import gguf2gpu  # noqa: E402


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def safetensors(path: str) -> Tuple[Dict[str, Any], Dict[str, bytes]]:
    """Return the header of a file, and the bytes of each tensor."""
    with open(path, "rb") as f:
        data = f.read()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    body = data[8 + n :]
    return header, {
        name: body[e["data_offsets"][0] : e["data_offsets"][1]] for name, e in header.items() if name != "__metadata__"
    }


class Holder:
    """A process that holds models, on a software device unless env names a library."""

    def __init__(
        self, directory: str, *args: str, device: str = "soft", env: Optional[Dict[str, str]] = None, wait: bool = True
    ) -> None:
        self.socket = os.path.join(directory, "s")
        self.env = dict(os.environ, **(env or {}))
        self.log = open(os.path.join(directory, "log"), "w+b")  # a pipe that nobody reads would stop the holder
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [
                COMMAND,
                "hold",
                *args,
                "--socket",
                self.socket,
                "--device",
                device,
                "--progress",
                "none",
                "--grace",
                "0s",
                "--ready-fd",
                str(write),
            ],
            env=self.env,
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
            stderr=self.log,
        )
        os.close(write)
        self._ready = read
        if wait:
            self.wait()

    def wait(self) -> None:
        with os.fdopen(self._ready) as f:
            line = f.readline()
        if line != "READY\n":
            raise AssertionError("the holder did not become ready: %s" % self.said())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def attached(self) -> int:
        return sum(m["attached"] for m in gguf2gpu.models(self.socket))

    def run(self, *args: str) -> str:
        """Run a command on this holder's socket."""
        return subprocess.run(
            [COMMAND, *args, "--socket", self.socket],
            env=self.env,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ).stdout.decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=60)
        if self.process.returncode not in (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM):
            raise AssertionError("the holder ended with %d: %s" % (self.process.returncode, self.said()))
        self.log.close()

    def said(self) -> str:
        self.process.wait(timeout=60)
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


class Case(unittest.TestCase):
    """A test that has a directory, and may have holders."""

    def setUp(self) -> None:
        self.dir = tempfile.mkdtemp(prefix="gg")
        self.addCleanup(shutil.rmtree, self.dir, True)

    def hold(self, *args: str, **more: Any) -> Holder:
        directory = tempfile.mkdtemp(dir=self.dir)
        holder = Holder(directory, *args, **more)
        self.addCleanup(holder.close)
        return holder

    def export(self, *args: str) -> Tuple[Dict[str, Any], Dict[str, bytes]]:
        """Return what load --readback writes."""
        path = os.path.join(self.dir, "export.safetensors")
        subprocess.run(
            [COMMAND, "load", *args, "--device", "soft", "--readback", path, "--progress", "none"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return safetensors(path)

    @contextlib.contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Fail when descriptors or mappings of this process are more afterwards."""
        before = open_things()
        yield
        after = open_things()
        self.assertEqual(before, after)


def open_things() -> Dict[str, int]:
    """Return how many descriptors, mappings of shared memory and arrays of consumers this process has."""
    arrays = gguf2gpu._dlpack.count()  # first: it lets go of what nobody can use any more
    with open("/proc/self/maps") as f:
        shared = sum("gguf2gpu-" in line or "hipsim" in line for line in f)
    return {"descriptors": len(os.listdir("/proc/self/fd")), "mappings": shared, "arrays": arrays}


def python(code: str, *args: str, env: Optional[Dict[str, str]] = None) -> "subprocess.CompletedProcess[bytes]":
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=dict(os.environ, PYTHONPATH=PACKAGE, **(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
    )


def names(tensors: List[Dict[str, Any]]) -> List[str]:
    return [t["name"] for t in tensors]
