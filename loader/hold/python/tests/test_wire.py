"""Holders that lie, are slow, or speak another version. They are threads of this process."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
import unittest
from typing import Any, Callable, Dict, List

from support import SAMPLE, Case, gguf2gpu, has

from gguf2gpu import _manifest, _memory


def frame(message: Any) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


class Fake:
    """A holder that does what a function does with each connection; it gets the socket and the request."""

    def __init__(self, path: str, serve: Callable[[socket.socket, Dict[str, Any]], None]) -> None:
        self.path, self.requests = path, []  # type: ignore[var-annotated]
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._serve = serve
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            with conn:
                size = struct.unpack(">I", conn.recv(4, socket.MSG_WAITALL))[0]
                request = json.loads(conn.recv(size, socket.MSG_WAITALL))
                self.requests.append(request)
                try:
                    self._serve(conn, request)
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def manifest() -> Dict[str, Any]:
    """Return a manifest of two tensors that is all right."""
    return {
        "name": "m",
        "architecture": "llama",
        "files": [],
        "share": "ipc",
        "residence": "00",
        "devices": [{"kind": "soft", "index": 0, "uuid": "u", "pci": "p", "name": "n"}],
        "allocations": [{"device": 0, "handle": base64.b64encode(bytes(64)).decode(), "bytes": 1024}],
        "groups": [
            {
                "devices": [0],
                "tensors": [
                    {
                        "name": "b",
                        "type": "F32",
                        "shape": [4, 2],
                        "part": 0,
                        "offset": 64,
                        "target": "F16",
                        "bytes": 16,
                        "allocation": 0,
                        "at": 256,
                    },
                    {
                        "name": "a",
                        "type": "Q8_0",
                        "shape": [64, 2],
                        "part": 0,
                        "offset": 0,
                        "target": "Q8_0",
                        "bytes": 136,
                        "allocation": 0,
                        "at": 0,
                    },
                ],
            }
        ],
    }


class TestManifest(unittest.TestCase):
    def test_good(self) -> None:
        m = _manifest.parse(manifest())
        self.assertEqual([t.name for t in m.tensors], ["a", "b"])  # in the order of the file
        self.assertEqual([t.number for t in m.tensors], [0, 1])
        self.assertEqual([t.shape for t in m.tensors], [(2, 68), (2, 4)])
        self.assertEqual([t.dtype for t in m.tensors], ["uint8", "float16"])
        with self.assertRaises(gguf2gpu.UnknownNames):
            m.hf_names()

    def test_lies(self) -> None:
        """Nothing that cannot be is believed."""

        def tensor(**change: Any) -> Callable[[Dict[str, Any]], None]:
            return lambda m: m["groups"][0]["tensors"][0].update(change)

        def allocation(**change: Any) -> Callable[[Dict[str, Any]], None]:
            return lambda m: m["allocations"][0].update(change)

        lies: List[Callable[[Dict[str, Any]], None]] = [
            lambda m: m.update(devices=[]),
            lambda m: m.update(devices=3),
            lambda m: m.update(devices=[1]),
            lambda m: m.update(devices=m["devices"] + [{"kind": "hip"}]),
            lambda m: m.update(name=None),
            lambda m: m.update(share="smoke"),
            lambda m: m.update(groups={}),
            lambda m: m["groups"][0].update(devices=[1]),
            lambda m: m["groups"][0].update(devices=[]),
            lambda m: m["groups"].append(m["groups"][0]),
            tensor(at=1010),
            tensor(at=-1),
            tensor(at=1.0),
            tensor(at=True),
            tensor(bytes=2048),
            tensor(bytes=12),
            tensor(shape=[4, 3]),
            tensor(shape=[1] * 9),
            tensor(shape=[-4, -2]),
            tensor(shape=[1 << 63]),
            tensor(allocation=1),
            tensor(target=7),
            tensor(name=None),
            tensor(part=None),
            tensor(slice={"dim": 2, "ranges": []}),
            tensor(slice={"dim": 0, "ranges": [[0, 9]]}),
            tensor(slice={"dim": 0, "ranges": [[3, 1]]}),
            tensor(slice={"dim": 0, "ranges": [[1]]}),
            tensor(hf=3),
            allocation(device=1),
            allocation(bytes=1 << 50),
            allocation(handle="x"),
            allocation(handle=""),
            allocation(handle=base64.b64encode(bytes(63)).decode()),
            lambda m: m.update(share="fd"),
            lambda m: (m.update(share="fd"), allocation(size=2 << 20, address=77)(m)),
            lambda m: (m.update(share="fd"), allocation(size=4096, address=0)(m)),
        ]
        for i, lie in enumerate(lies):
            m = manifest()
            lie(m)
            with self.subTest(i), self.assertRaises(gguf2gpu.ProtocolError):
                _manifest.parse(m)
        for nothing in (None, [], "x"):
            with self.assertRaises(gguf2gpu.ProtocolError):
                _manifest.parse(nothing)

    def test_handles(self) -> None:
        """Handles of the software device that are not, or of processes that are not."""
        soft = _memory.Software()

        def handle(pid: int, start: int) -> bytes:
            raw = struct.pack("<8sIIQQQQQ", b"softgpu2", pid, 0, start, 1, 1, 4096, 1)
            return raw + struct.pack("<Q", _memory._fnv1a(raw))

        with self.assertRaises(gguf2gpu.ProtocolError):
            soft.open_handle(0, bytes(64), 16)
        for pid in (os.getpid(), 1, 1 << 30):
            with self.assertRaises(gguf2gpu.DeviceError):
                soft.open_handle(0, handle(pid, 12345), 16)


class TestWire(Case):
    def fake(self, serve: Callable[[socket.socket, Dict[str, Any]], None]) -> Fake:
        fake = Fake(os.path.join(self.dir, "s%d" % time.monotonic_ns()), serve)
        self.addCleanup(fake.close)
        return fake

    def test_versions(self) -> None:
        """A holder of an older version is asked again, in that version."""

        def serve(conn: socket.socket, request: Dict[str, Any]) -> None:
            if request["version"] != 2:
                conn.sendall(frame({"version": 2, "error": "this is version 2"}))
            else:
                conn.sendall(frame({"version": 2, "models": [{"name": "m"}]}))

        fake = self.fake(serve)
        self.assertEqual(gguf2gpu.models(fake.path), [{"name": "m"}])
        self.assertEqual([r["version"] for r in fake.requests], [3, 2])
        other = self.fake(lambda conn, _: conn.sendall(frame({"version": 99, "error": "this is version 99"})))
        with self.assertRaises(gguf2gpu.HolderError) as caught:
            gguf2gpu.models(other.path)
        self.assertEqual((str(caught.exception), len(other.requests)), ("this is version 99", 1))

    def test_bad_messages(self) -> None:
        for bad, error in (
            (struct.pack(">I", 65 << 20), gguf2gpu.ProtocolError),
            (frame(b"{"), gguf2gpu.ProtocolError),
            (frame([]), gguf2gpu.ProtocolError),
            (frame({"version": 3}), gguf2gpu.ProtocolError),
            (b"", gguf2gpu.Gone),
            (frame({})[:5], gguf2gpu.Gone),
            (frame({"version": 3, "manifest": manifest()}), gguf2gpu.ProtocolError),
            (frame({"version": 3, "error": "no", "kind": "unknown"}), gguf2gpu.UnknownModel),
            (frame({"version": 3, "error": "no", "kind": "closing"}), gguf2gpu.Gone),
        ):
            fake = self.fake(lambda conn, _, bad=bad: conn.sendall(bad))
            with self.subTest(bad[:80]), self.nothing_left(), self.assertRaises(error):
                gguf2gpu.attach(fake.path, timeout=20)

    def test_waiting(self) -> None:
        """Replies that tell to wait are passed on; silence ends with the time."""

        def serve(conn: socket.socket, _: Dict[str, Any]) -> None:
            conn.sendall(frame({"version": 3, "waiting": "room"}) + frame({"version": 3, "waiting": "room"}))
            conn.recv(1)

        told: List[str] = []
        fake = self.fake(serve)
        with self.assertRaises(TimeoutError):
            gguf2gpu.attach(fake.path, timeout=0.2, waiting=told.append)
        self.assertEqual(told, ["room", "room"])

    def test_descriptors(self) -> None:
        """Descriptors that nobody asked for, that are too few, or no shared memory, are closed."""

        def serve(conn: socket.socket, _: Dict[str, Any]) -> None:
            m = manifest()
            m.update(share="fd")
            m["allocations"][0].update(size=2 << 20, address=0)
            message = frame({"version": 3, "manifest": m})
            with open(os.devnull) as f:
                fds = [f.fileno()] * count
                conn.sendmsg(
                    [message[:1]],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("%di" % count, *fds))] if fds else [],
                )
                conn.sendall(message[1:])

        for count in (0, 1, 2, 200):
            fake = self.fake(serve)
            with self.subTest(count), self.nothing_left(), self.assertRaises(gguf2gpu.ProtocolError):
                gguf2gpu.attach(fake.path, timeout=20)

    def test_default_socket(self) -> None:
        before = os.environ.get("XDG_RUNTIME_DIR")
        try:
            os.environ["XDG_RUNTIME_DIR"] = self.dir
            self.assertEqual(gguf2gpu.socket_path(), os.path.join(self.dir, "gguf2gpu.sock"))
            with self.assertRaises(gguf2gpu.NoHolder):
                gguf2gpu.attach()
            os.chmod(self.dir, 0o777)
            with self.assertRaises(gguf2gpu.Error) as caught:
                gguf2gpu.attach()
            self.assertIn("other users", str(caught.exception))
        finally:
            os.chmod(self.dir, 0o700)
            if before is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = before

    @unittest.skipUnless(has("safetensors") and has("numpy"), "safetensors and NumPy are not installed")
    def test_exports(self) -> None:
        """The library that others read such files with reads them, and finds the format that transformers wants."""
        from safetensors import safe_open

        header, want = self.export(SAMPLE, "--dtype", "f32", "--names", "hf")
        self.assertEqual(header["__metadata__"], {"format": "pt"})
        with safe_open(os.path.join(self.dir, "export.safetensors"), "numpy") as f:
            self.assertEqual({name: f.get_tensor(name).tobytes() for name in f.keys()}, want)


if __name__ == "__main__":
    unittest.main()
