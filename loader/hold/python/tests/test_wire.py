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

from support import SAMPLE, Case, gguf2gpu, has, python

from gguf2gpu import _manifest, _memory, _wire


# Takes a message of 4 MiB, of a head, pieces and a tail, and prints how many times its size it costs at most.
_MEMORY = """
import gc, struct, sys
from gguf2gpu import _errors, _manifest, _wire
head, piece, tail = sys.argv[1:]
def memory(key):
    with open('/proc/self/status') as f:
        return [int(line.split()[1]) << 10 for line in f if line.startswith(key)][0]
class Connection(_wire.Connection):
    def __init__(self):
        self._buffer = bytearray()
connection = Connection()
text = (head + piece * ((4 << 20) // len(piece)) + tail).encode()
size = len(text)
connection._buffer = bytearray(struct.pack('>I', size) + text)
del text
gc.collect()
with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')
before = memory('VmRSS')
try:
    message = connection._take()
    error = _wire.error_of(message)
    if error is None:
        _manifest.parse(message.get('manifest'))
except _errors.Error:
    pass
print((memory('VmHWM') - before) / size)
"""


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
        """End it, with all that it has open: it is a thread of the process whose descriptors tests count."""
        if self._listener.fileno() < 0:
            return
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
            tensor(name="x" * 200, at=[[[]]] * 1000),
            tensor(at=1 << 5000),
            lambda m: m["groups"][0].update(devices=[0] * 1000),
            lambda m: m["devices"].append(dict(m["devices"][0])) or m["groups"].append({"devices": [0], "tensors": []}),
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
            with self.subTest(i):
                try:
                    _manifest.parse(m)
                except gguf2gpu.ProtocolError as e:
                    self.assertLess(len(str(e)), 500)
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
            (frame({"version": 3, "error": "x" * 100000}), gguf2gpu.HolderError),
            (frame({"version": 3, "error": [[]], "kind": {}}), gguf2gpu.HolderError),
            (frame(b'{"a":' * 5000), gguf2gpu.ProtocolError),
            (frame(b"[" * 100000), gguf2gpu.ProtocolError),
            (frame(b'{"version":3,"manifest":{"devices":' + b"[" * 900 + b"]" * 900 + b"}}"), gguf2gpu.ProtocolError),
            (frame(b'{"version":' + b"9" * 10000 + b"}"), gguf2gpu.Error),
        ):
            with self.subTest(bad[:80]), self.nothing_left():
                fake = self.fake(lambda conn, _, bad=bad: conn.sendall(bad))
                with self.assertRaises(error) as caught:
                    gguf2gpu.attach(fake.path, timeout=20)
                fake.close()
            self.assertLess(len(str(caught.exception)), 5000)

    def test_models(self) -> None:
        """What is no list of models is none."""
        for bad in (5, "x", [1], {"a": 1}):
            fake = self.fake(lambda conn, _, bad=bad: conn.sendall(frame({"version": 3, "models": bad})))
            with self.subTest(bad), self.assertRaises(gguf2gpu.ProtocolError):
                gguf2gpu.models(fake.path)

    def test_memory(self) -> None:
        """A message costs at most eight times its size, whatever is in it. Each is taken by a process of its own."""
        for head, piece, tail in (
            ('{"version":3,"x":[', "1000,", "0]}"),
            ('{"version":3,"x":[', '"ab",', '""]}'),
            ('{"version":3,"x":[', '"abcdefghi",', '""]}'),
            ('{"version":3,"x":[', "{},", "{}]}"),
            ('{"version":3,"x":[', '{"a":{},"y":"%s"},' % ("y" * 150), "{}]}"),
            ('{"version":3,"x":[', "[],", "[]]}"),
            ('{"version":3,"error":"\U0001f642', "x", '"}'),
            ('{"version":3,"manifest":{"devices":[', '{"kind":"soft","y":"%s"},' % ("y" * 150), "{}]}}"),
        ):
            out = python(_MEMORY, head, piece, tail)
            with self.subTest(piece):
                self.assertEqual(out.returncode, 0, out.stderr.decode())
                self.assertLess(float(out.stdout), 8)

    def test_flood(self) -> None:
        """Messages without end keep nobody, and descriptors that come with them are closed."""
        ended = threading.Event()

        def serve(conn: socket.socket, _: Dict[str, Any]) -> None:
            conn.sendall(frame({"version": 3, "manifest": held, "ready": 0}))
            message = frame({"ready": 1})
            with open(os.devnull) as f:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("2i", f.fileno(), f.fileno()))]
                while not ended.is_set():
                    conn.sendmsg([message * 100], rights)

        held = manifest()
        held["allocations"], held["groups"][0]["tensors"] = [], []
        with self.nothing_left():
            fake = self.fake(serve)
            model = gguf2gpu.attach(fake.path, timeout=20)
            for _ in range(20):
                self.assertFalse(model.loaded)
            self.assertLess(len(os.listdir("/proc/self/fd")), 600)
            ended.set()
            model.close()
            del model
            fake.close()

    def test_silence(self) -> None:
        """A holder that says nothing is given up, and one that does not accept."""
        fake = self.fake(lambda conn, _: conn.recv(1) and None)
        before = _wire.SILENT_TIME
        try:
            _wire.SILENT_TIME = 0.1
            with self.assertRaises(gguf2gpu.Gone):
                gguf2gpu.attach(fake.path)
        finally:
            _wire.SILENT_TIME = before
        path = os.path.join(self.dir, "full")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(0)
            waiting = []
            try:
                for _ in range(3):
                    s = socket.socket(socket.AF_UNIX)
                    s.setblocking(False)
                    waiting.append(s)
                    try:
                        s.connect(path)
                    except BlockingIOError:
                        break
                with self.assertRaises(gguf2gpu.Error) as caught:
                    gguf2gpu.models(path, timeout=0.1)
                self.assertIn("nobody has accepted", str(caught.exception))
            finally:
                for s in waiting:
                    s.close()

    def test_terminals(self) -> None:
        """What a holder says reaches no terminal raw."""
        nasty = "a\x1b[31m\x9b\u202e\x7f\nb"
        for message, args in (
            ({"version": 3, "models": [{"name": nasty, "state": nasty, "device_bytes": nasty}]}, ["list"]),
            ({"version": 3, "models": [{"name": nasty}]}, ["--json", "list"]),
            ({"version": 3, "error": nasty}, ["attach"]),
        ):
            fake = self.fake(lambda conn, _, message=message: conn.sendall(frame(message)))
            out = python("from gguf2gpu.__main__ import main; main(%r)" % (["--socket", fake.path] + args))
            text = (out.stdout + out.stderr).decode()
            self.assertNotIn("Traceback", text)
            self.assertEqual([c for c in text if not c.isprintable() and c != "\n"], [], text)
            self.assertIn("a\\", text)

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
            with self.subTest(count), self.nothing_left():
                fake = self.fake(serve)
                with self.assertRaises(gguf2gpu.ProtocolError):
                    gguf2gpu.attach(fake.path, timeout=20)
                fake.close()

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
            os.environ["XDG_RUNTIME_DIR"] = "relative"
            self.assertTrue(os.path.isabs(gguf2gpu.socket_path()))
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
