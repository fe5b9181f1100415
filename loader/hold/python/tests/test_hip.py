"""Attaching through the C simulator of AMD's runtime, in both ways of sharing memory: that of HIP 5, which has IPC
handles alone, and that of HIP 6 and 7, which have descriptors. Each test is a process of its own, as the library is
opened once."""

from __future__ import annotations

import json
import os
import time
import unittest

import support
from support import SAMPLE, SIMULATOR, Case

# What the code in the processes begins with. They end with the number of live objects that the simulator counts.
HEAD = """
import ctypes, json, os, signal, sys, gguf2gpu
from gguf2gpu import _hip, _dlpack
socket = sys.argv[1]
def stat(name):
    f = _hip.runtime()._lib.hipsim_stat
    f.restype, f.argtypes = ctypes.c_longlong, [ctypes.c_char_p]
    return f(name.encode())
def live():
    f = _hip.runtime()._lib.hipsim_live
    f.restype = ctypes.c_longlong
    return f()
def end():
    assert stat('misuses') == 0, 'misuses of the simulator: %d' % stat('misuses')
    assert live() == 0, 'left on the device: %d' % live()
    print('ok', flush=True)
"""


@unittest.skipUnless(os.path.exists(SIMULATOR), "the simulator is not built: make hipsim")
class TestHip(Case):
    def environment(self, version: int, devices: int = 1) -> "dict[str, str]":
        return {
            "GGUF2GPU_HIP_LIBRARY": SIMULATOR,
            "HIPSIM_VERSION": str(version),
            "HIPSIM_DEVICES": str(devices),
            "HIPSIM_MEMORY": "67108864",
            "HIPSIM_VERBOSE": "1",
        }

    def run_code(self, code: str, holder: support.Holder, env: "dict[str, str]") -> "list[str]":
        out = support.python(HEAD + code, holder.socket, env=env)
        lines = out.stdout.decode().splitlines()
        self.assertEqual((out.returncode, lines[-1:]), (0, ["ok"]), out.stderr.decode())
        return lines[:-1]

    def each(self, *args: str, devices: int = 1, dtype: str = "bf16"):
        """Yield a holder and its environment for each version."""
        for version in (5, 6, 7):
            with self.subTest(version=version):
                env = self.environment(version, devices)
                holder = self.hold(
                    SAMPLE, "--dtype", dtype, *args, device="hip" if devices == 1 else "hip:all", env=env
                )
                yield version, holder, env
                holder.close()

    def test_bytes(self) -> None:
        """Copies to the host have all bytes, and nothing is left on the device."""
        import hashlib

        _, want = self.export(SAMPLE, "--dtype", "bf16")
        for version, holder, env in self.each():
            lines = self.run_code(
                """
import hashlib
with gguf2gpu.attach(socket) as model:
    model.wait(60)
    print(model.independent, model['output.weight'].device)
    print(json.dumps({n: hashlib.sha256(t.tobytes()).hexdigest() for n, t in model.items()}))
end()
""",
                holder,
                env,
            )
            self.assertEqual(lines[0], "%s cuda:0" % (version > 5))
            self.assertEqual(json.loads(lines[1]), {n: hashlib.sha256(b).hexdigest() for n, b in want.items()})

    def test_dlpack(self) -> None:
        """Capsules say kDLROCM, the type and the shape, and their deleter gives the memory back."""
        for _, holder, env in self.each():
            self.run_code(
                """
model = gguf2gpu.attach(socket).wait(60)
t = model['blk.1.ffn_down.weight']
assert t.__dlpack_device__() == (10, 0), t.__dlpack_device__()
capsule = t.__dlpack__(stream=1, max_version=(1, 1))
api = ctypes.pythonapi
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
at = api.PyCapsule_GetPointer(capsule, b'dltensor')
m = _dlpack._Managed.from_address(at)
d = m.tensor
assert (d.data, d.device_type, d.device_id, d.ndim, d.code, d.bits, d.lanes) == (t.data_ptr(), 10, 0, 2, 4, 16, 1)
assert (d.shape[0], d.shape[1]) == t.shape == (256, 768) and not d.strides and d.byte_offset == 0
used = b'used_dltensor'
api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_SetName(capsule, used)  # as a consumer does
del t, capsule
assert not model.close() and live() > 0
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(m.deleter)(at)
end()
""",
                holder,
                env,
            )

    def test_cuda_array_interface(self) -> None:
        for _, holder, env in self.each(dtype="f16"):
            self.run_code(
                """
with gguf2gpu.attach(socket) as model:
    t = model.wait(60)['output.weight']
    want = {'shape': (320, 256), 'typestr': '<f2', 'data': (t.data_ptr(), False), 'strides': None, 'version': 3,
            'stream': None}
    assert t.__cuda_array_interface__ == want, t.__cuda_array_interface__
    del t
end()
""",
                holder,
                env,
            )

    def test_many_tensors(self) -> None:
        """What is slow is asked once for a model, not for each tensor, and PyTorch decides what GPUs are called."""
        for _, holder, env in self.each():
            self.run_code(
                """
import types
calls = []
mapped = _hip.mapped
_hip.mapped = lambda name: calls.append(name) or ('/lib/libcuda.so.1' if name == 'libcuda.so' else mapped(name))
torch = types.ModuleType('torch')
torch.version = types.SimpleNamespace(hip=None, cuda='13.0')
pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
def from_dlpack(capsule): # DLTensor begins with the address, the type and the number of the device
    at = pointer(capsule, b'dltensor')
    return tuple((ctypes.c_int32 * 2).from_address(at + 8)), capsule
torch.from_dlpack = from_dlpack
sys.modules['torch'] = torch
with gguf2gpu.attach(socket) as model:
    model.wait(60)
    assert len(calls) < 4, calls
    del calls[:]
    assert len(model) == 40 and {t.torch()[0] for t in model.values()} == {(2, 0)}
    torch.version.hip = '7.0'
    assert {t[0] for t in model.state_dict().values()} == {(10, 0)}
    assert not calls, calls
end()
""",
                holder,
                env,
            )

    def test_devices(self) -> None:
        """Tensors are on the devices that the holder says, and the thread's current device stays."""
        for _, holder, env in self.each(devices=3):
            lines = self.run_code(
                """
lib = _hip.runtime()._lib
lib.hipSetDevice(2)
with gguf2gpu.attach(socket) as model:
    model.wait(60)
    print(json.dumps(sorted({t.device for t in model.values()})))
    assert all(t.tobytes() for t in model.values())
    assert [{t.device for t in model.on(i).values()} for i in range(3)] == [{'cuda:0'}, {'cuda:1'}, {'cuda:2'}]
now = ctypes.c_int()
lib.hipGetDevice(ctypes.byref(now))
assert now.value == 2
end()
""",
                holder,
                env,
            )
            self.assertEqual(json.loads(lines[0]), ["cuda:0", "cuda:1", "cuda:2"])
            fewer = dict(env, HIPSIM_DEVICES="1")
            self.run_code(
                """
try:
    gguf2gpu.attach(socket)
except gguf2gpu.DeviceError as e:
    assert 'not among the 1 devices' in str(e), e
else:
    raise AssertionError('attached')
end()
""",
                holder,
                fewer,
            )

    def test_killed_holder(self) -> None:
        """What is shared by IPC is gone with the holder; what is shared by descriptors stays."""
        for version, holder, env in self.each():
            self.run_code(
                """
model = gguf2gpu.attach(socket).wait(60)
t = model['output.weight']
before = t.tobytes()
os.kill(%d, signal.SIGKILL)
import time
time.sleep(0.2)
try:
    after = t.tobytes()
except gguf2gpu.Gone:
    after = None
assert after == (before if model.independent else None)
assert model.gone != model.independent
del t
assert model.close()
end()
"""
                % holder.process.pid,
                holder,
                env,
            )
            holder.process.wait()

    def test_thousand_attachments(self) -> None:
        for version, holder, env in self.each():
            self.run_code(
                """
gguf2gpu.attach(socket).close()
fds = len(os.listdir('/proc/self/fd'))
for i in range(1000):
    model = gguf2gpu.attach(socket)
    capsule = model['output_norm.weight'].__dlpack__() if i % 10 == 0 else None
    del capsule
    assert model.close()
assert len(os.listdir('/proc/self/fd')) == fds
end()
""",
                holder,
                env,
            )
            for _ in range(100):
                if holder.attached() == 0:
                    break
                time.sleep(0.05)
            self.assertEqual(holder.attached(), 0)

    def test_network(self) -> None:
        """HIP 7 shares memory within a network namespace: the error says what to set, and with that it works."""
        code = """
try:
    gguf2gpu.attach(socket).close()
    print('attached')
except gguf2gpu.DeviceError as e:
    print(e.code, 'HSA_ENABLE_IPC_MODE_LEGACY=1' in str(e), '--share fd' in str(e))
end()
"""
        for more, said in (({}, "17 True True"), ({"HSA_ENABLE_IPC_MODE_LEGACY": "1"}, "attached")):
            env = dict(self.environment(7), HIPSIM_NETWORK="1", **more)
            holder = self.hold(SAMPLE, "--share", "ipc", device="hip", env=env)
            with self.subTest(said):
                self.assertEqual(self.run_code(code, holder, dict(env, HIPSIM_NETWORK="2")), [said])
            holder.close()

    def test_sizes(self) -> None:
        """Where the runtime does not say how much is mapped, or says less than the holder, nothing is left mapped."""
        code = """
sizes = _hip.Runtime.check_size
if False:
    _hip.Runtime.check_size = lambda self, address, nbytes: sizes(self, address, nbytes + (64 << 20))
try:
    gguf2gpu.attach(socket)
except gguf2gpu.Error as e:
    print(type(e).__name__)
end()
"""
        for share in ("ipc", "fd"):
            env = self.environment(6)
            holder = self.hold(SAMPLE, "--share", share, device="hip", env=env)
            failing = dict(env, HIPSIM_FAIL="hipMemGetAddressRange:1:999")
            with self.subTest(share):
                self.assertEqual(self.run_code(code, holder, failing), ["DeviceError"])
                less = code.replace("if False", "if True")
                self.assertEqual(self.run_code(less, holder, env), ["ProtocolError"])
            holder.close()

    def test_no_library(self) -> None:
        """The error names what was tried."""
        env = self.environment(6)
        holder = self.hold(SAMPLE, device="hip", env=env)
        out = support.python(
            HEAD + "gguf2gpu.attach(socket)", holder.socket, env=dict(env, GGUF2GPU_HIP_LIBRARY="/nowhere/x.so")
        )
        self.assertEqual(out.returncode, 1)
        self.assertIn(b"no HIP runtime could be opened: /nowhere/x.so", out.stderr)


if __name__ == "__main__":
    unittest.main()
