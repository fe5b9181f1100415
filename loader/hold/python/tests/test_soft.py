"""Attaching to holders of the software device, whose memory is that of the host."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import unittest

import support
from support import SAMPLE, Case, gguf2gpu

np = __import__("numpy") if support.has("numpy") else None
needs_numpy = unittest.skipUnless(np, "NumPy is not installed")
needs_torch = unittest.skipUnless(support.has("torch"), "PyTorch is not installed")


class TestTensors(Case):
    """What a tensor is, and its bytes."""

    def test_bytes(self) -> None:
        """All values are those of the export, whatever they were converted to."""
        for dtype in ("f16", "f32", "bf16", "raw"):
            with self.subTest(dtype):
                holder = self.hold(SAMPLE, "--dtype", dtype)
                _, want = self.export(SAMPLE, "--dtype", dtype)
                with gguf2gpu.attach(holder.socket) as model:
                    self.assertTrue(model.wait(60).loaded)
                    self.assertEqual({n: t.tobytes() for n, t in model.items()}, want)

    def test_description(self) -> None:
        """Names, types, shapes and sizes are those that the command shows, and shapes are row-major."""
        holder = self.hold(SAMPLE, "--dtype-for", "^output=f32", "--dtype", "raw")
        shown = {t["name"]: t for t in json.loads(holder.run("attach", "--json"))["tensors"]}
        with gguf2gpu.attach(holder.socket, "tiny-llama") as model:
            self.assertEqual(set(model), set(shown))
            self.assertEqual((model.name, model.architecture, model.files[0]["path"]), ("tiny-llama", "llama", SAMPLE))
            kinds = set()
            for t in model.values():
                kinds.add(t.dtype)
                want = shown[t.name]
                self.assertEqual(
                    (t.ggml_type, list(t.ggml_shape), t.nbytes), (want["dtype"], want["shape"][::-1], want["bytes"])
                )
                self.assertEqual(t.device, "cpu")
                count = {"float32": 4, "uint8": 1}[t.dtype]
                for n in t.shape:
                    count *= n
                self.assertEqual(count, t.nbytes)
                if t.dtype == "uint8":
                    self.assertEqual(t.shape[:-1], t.ggml_shape[:-1])
            self.assertEqual(kinds, {"float32", "uint8"})
            self.assertEqual(model.nbytes, sum(t["bytes"] for t in shown.values()))

    def test_ranks(self) -> None:
        """Of a model that is held in parts it is the part of a rank, which torchrun may have said."""
        shard = ("--shard", "layer", "--world", "3")
        holder = self.hold(SAMPLE, *shard, "--rank", "0,2")
        want = {rank: self.export(SAMPLE, *shard, "--rank", str(rank))[1] for rank in (0, 2)}
        for rank, tensors in want.items():
            with gguf2gpu.attach(holder.socket, "tiny-llama", rank=rank, world=3) as model:
                self.assertEqual(model.name, "tiny-llama@%d" % rank)
                self.assertEqual({n: t.tobytes() for n, t in model.items()}, tensors)
            code = "import gguf2gpu, sys; print(gguf2gpu.attach(sys.argv[1]).name)"
            ran = support.python(code, holder.socket, env={"RANK": str(rank), "WORLD_SIZE": "3"})
            self.assertEqual((ran.returncode, ran.stdout.decode()), (0, "tiny-llama@%d\n" % rank), ran.stderr)
        for bad in ({}, {"rank": 1}, {"rank": 0, "world": 2}):
            with self.subTest(bad), self.assertRaises(gguf2gpu.UnknownModel):
                gguf2gpu.attach(holder.socket, **bad)

    @needs_numpy
    def test_numpy(self) -> None:
        """Arrays are the shared memory itself, read-only, with the right values."""
        holder = self.hold(SAMPLE, "--dtype", "f16")
        _, want = self.export(SAMPLE, "--dtype", "f16")
        with gguf2gpu.attach(holder.socket) as model:
            for name, t in model.items():
                a = t.numpy()
                self.assertEqual((a.tobytes(), a.shape, a.dtype.name), (want[name], t.shape, "float16"))
                self.assertEqual(a.ctypes.data, t.data_ptr())
                self.assertFalse(a.flags.writeable)
                b = np.from_dlpack(t)
                self.assertEqual((b.ctypes.data, b.shape, b.dtype), (a.ctypes.data, a.shape, a.dtype))
                self.assertTrue(np.shares_memory(a, np.asarray(t)))
            del a, b, t

    @needs_torch
    def test_torch(self) -> None:
        """PyTorch's tensors are the shared memory itself, one by one and in a dict, and keep the model attached."""
        import torch

        for dtype in ("bf16", "f16", "f32", "raw"):
            with self.subTest(dtype):
                holder = self.hold(SAMPLE, "--dtype", dtype)
                _, want = self.export(SAMPLE, "--dtype", dtype)
                model = gguf2gpu.attach(holder.socket).wait(60)
                state = model.state_dict()
                self.assertEqual(list(state), list(model))
                for name, t in model.items():
                    for x in (t.torch(), state[name]):
                        self.assertEqual((str(x.dtype), tuple(x.shape)), ("torch." + t.dtype, t.shape))
                        self.assertEqual(x.data_ptr(), t.data_ptr())
                        self.assertEqual(x.untyped_storage().nbytes(), t.nbytes)  # torch.save writes no more than that
                        self.assertEqual(x.contiguous().view(torch.uint8).numpy().tobytes(), want[name])
                row = state["output.weight"][3]
                del x, t, state
                self.assertFalse(model.close())
                self.assertEqual(holder.attached(), 1)
                del row
                self.assertEqual(self.left(holder), 0)

    @needs_numpy
    def test_bfloat16(self) -> None:
        """NumPy has no bfloat16, and nothing pretends that it has."""
        holder = self.hold(SAMPLE, "--dtype", "bf16")
        with gguf2gpu.attach(holder.socket) as model:
            t = model["output_norm.weight"]
            self.assertEqual(t.dtype, "bfloat16")
            with self.assertRaises(AttributeError):
                t.__cuda_array_interface__
            if not support.has("ml_dtypes"):
                with self.assertRaises(gguf2gpu.Unsupported):
                    t.numpy()
            else:
                self.assertEqual(t.numpy().dtype.name, "bfloat16")
            with self.assertRaises((TypeError, BufferError, RuntimeError)):
                np.from_dlpack(t)
            del t

    def test_writing(self) -> None:
        """What one process writes in spite of all, no other one sees."""
        import ctypes

        holder = self.hold(SAMPLE)
        with gguf2gpu.attach(holder.socket) as a, gguf2gpu.attach(holder.socket) as b:
            before = b["output_norm.weight"].tobytes()
            ctypes.memset(a["output_norm.weight"].data_ptr(), 0xFF, 16)
            self.assertNotEqual(a["output_norm.weight"].tobytes(), before)
            self.assertEqual(b["output_norm.weight"].tobytes(), before)

    def test_dlpack_refusals(self) -> None:
        holder = self.hold(SAMPLE)
        with gguf2gpu.attach(holder.socket) as model:
            t = model["output_norm.weight"]
            self.assertEqual(t.__dlpack_device__(), (1, 0))
            for wrong in ({"dl_device": (2, 0)}, {"copy": True}):
                with self.assertRaises(BufferError):
                    t.__dlpack__(**wrong)
            before = gguf2gpu._dlpack.count()
            for _ in range(100):
                t.__dlpack__(max_version=(1, 0))  # nobody takes them
            self.assertEqual(gguf2gpu._dlpack.count(), before)
            del t

    @needs_numpy
    def test_names_of_transformers(self) -> None:
        """The dict is the export with --names hf, with tied weights besides, and keeps the model attached."""
        holder = self.hold(SAMPLE, "--dtype", "f32")
        _, want = self.export(SAMPLE, "--dtype", "f32", "--names", "hf")
        got = gguf2gpu.state_dict(holder.socket, framework="numpy")
        self.assertEqual({n: a.tobytes() for n, a in got.items()}, want)
        self.assertEqual(holder.attached(), 1)
        del got
        self.assertEqual(self.left(holder), 0)

    def left(self, holder: support.Holder) -> int:
        """Return how many processes are attached, once the holder has heard of those that have gone."""
        gc.collect()
        for _ in range(100):
            if holder.attached() == 0:
                return 0
            time.sleep(0.05)
        return holder.attached()

    @needs_numpy
    def test_unknown_names(self) -> None:
        """An architecture that is not known says so; GGUF's names are there. Blocks have no place in transformers."""
        other = os.path.join(support.ROOT, "testdata", "gguf", "all-types.gguf")
        holder = self.hold(other, "--dtype", "raw", "--tensors", "q4_k|f32")
        with gguf2gpu.attach(holder.socket) as model:
            with self.assertRaises(gguf2gpu.UnknownNames) as caught:
                model.state_dict(hf=True, framework="numpy")
            self.assertIn("llama", str(caught.exception))
            self.assertEqual(list(model.state_dict(framework="numpy")), list(model))
            with self.assertRaises(ValueError):
                model.state_dict(framework="else")
        holder = self.hold(SAMPLE, "--dtype", "raw")
        with gguf2gpu.attach(holder.socket) as model, self.assertRaises(gguf2gpu.Unsupported):
            model.state_dict(hf=True, framework="numpy")

    def test_devices(self) -> None:
        """Layers on several devices, and copies on each."""
        holder = self.hold(SAMPLE, device="soft:3")
        _, want = self.export(SAMPLE)
        with gguf2gpu.attach(holder.socket) as model:
            self.assertEqual(len(model.devices), 3)
            parts = [model.on(i) for i in range(3)]
            self.assertEqual(sum(len(p) for p in parts), len(model))
            self.assertTrue(all(parts))
            self.assertEqual({n: t.tobytes() for n, t in model.items()}, want)
            del parts
        holder = self.hold(SAMPLE, "--split", "none", device="soft:2")
        with gguf2gpu.attach(holder.socket) as model:
            for i in range(2):
                self.assertEqual({n: t.tobytes() for n, t in model.on(i).items()}, want)
            one, two = (model.on(i)["output_norm.weight"].data_ptr() for i in range(2))
            self.assertNotEqual(one, two)


class TestLife(Case):
    """Loading, closing, and the end of either side."""

    def test_while_loading(self) -> None:
        """Tensors are there one after the other, and none is read before it is."""
        holder = self.hold(SAMPLE, "--dtype", "f32", "--soft-link", "6MB/s", "--chunk", "64KiB", wait=False)
        for _ in range(200):
            try:
                model = gguf2gpu.attach(holder.socket, timeout=30)
                break
            except gguf2gpu.NoHolder:
                time.sleep(0.02)
        _, want = self.export(SAMPLE, "--dtype", "f32")
        names = list(model)
        last = model[names[-1]]
        early = not last.ready
        if early:
            with self.assertRaises(TimeoutError):
                last.wait(0.001)
        for name in names:
            self.assertEqual(model[name].tobytes(), want[name])
        self.assertTrue(early, "the load was over at once")
        model.wait()  # the holder says that all is loaded a little after the last tensor is there
        self.assertTrue(model.loaded)
        del last
        self.assertTrue(model.close())
        holder.wait()

    @needs_numpy
    def test_closing_with_views(self) -> None:
        """Views keep the memory, and the holder knows."""
        holder = self.hold(SAMPLE)
        with self.nothing_left():
            model = gguf2gpu.attach(holder.socket)
            view, pack = model["token_embd.weight"].numpy(), np.from_dlpack(model["output.weight"])
            want = view.tobytes(), pack.tobytes()
            tensor = model["output_norm.weight"]
            self.assertFalse(model.close())
            for use in (
                tensor.tobytes,
                tensor.numpy,
                tensor.__dlpack__,
                lambda: model["x"],
                lambda: model.loaded,
                model.wait,
            ):
                with self.assertRaises(gguf2gpu.Closed):
                    use()
            self.assertTrue(model.close())
            self.assertEqual((view.tobytes(), pack.tobytes()), want)
            part = view[3:5].T
            del view, tensor, use
            self.assertEqual(holder.attached(), 1)
            with self.assertRaises(subprocess.CalledProcessError):
                holder.run("hold", "--drop", "tiny-llama")
            del pack, part
            for _ in range(100):
                if holder.attached() == 0:
                    break
                time.sleep(0.05)
            self.assertEqual(holder.attached(), 0)

    @needs_numpy
    def test_killed_holder(self) -> None:
        """With descriptors nothing changes but that the holder has gone, and the next one does not have the memory."""
        holder = self.hold(SAMPLE)
        _, want = self.export(SAMPLE)
        model = gguf2gpu.attach(holder.socket)
        self.assertTrue(model.independent)
        self.assertFalse(model.alone)
        holder.kill()
        time.sleep(0.05)
        self.assertTrue(model.alone)
        self.assertFalse(model.gone)
        self.assertEqual({n: t.tobytes() for n, t in model.items()}, want)
        self.assertEqual(model["output.weight"].numpy().tobytes(), want["output.weight"])
        self.assertTrue(model.close())

    @needs_numpy
    def test_killed_while_loading(self) -> None:
        """The next use is an exception, and what is mapped can still be read."""
        holder = self.hold(SAMPLE, "--dtype", "f32", "--soft-link", "1MB/s", "--chunk", "64KiB", wait=False)
        for _ in range(500):
            try:
                model = gguf2gpu.attach(holder.socket, timeout=30)
                break
            except gguf2gpu.NoHolder:
                time.sleep(0.02)
        first = model[next(iter(model))]
        view = first.numpy()
        want = view.tobytes()
        holder.kill()
        time.sleep(0.05)
        for use in (first.numpy, first.tobytes, lambda: model.loaded, model.wait, first.__dlpack__):
            with self.assertRaises(gguf2gpu.Gone):
                use()
        self.assertTrue(model.gone)
        self.assertEqual(view.tobytes(), want)
        del view, use, first
        self.assertTrue(model.close())
        with self.assertRaises(gguf2gpu.NoHolder):
            gguf2gpu.attach(holder.socket)

    def test_thousand_attachments(self) -> None:
        """Nothing is left of them, on either side."""
        holder = self.hold(SAMPLE)
        gguf2gpu.attach(holder.socket).close()
        fds = "/proc/%d/fd" % holder.process.pid
        held = len(os.listdir(fds))
        with self.nothing_left():
            for i in range(1000):
                model = gguf2gpu.attach(holder.socket)
                capsule = model["output_norm.weight"].__dlpack__()
                if i % 2:
                    self.assertFalse(model.close())
                    del capsule
                else:
                    del capsule
                    self.assertTrue(model.close())
            del model
        for _ in range(100):
            if holder.attached() == 0 and len(os.listdir(fds)) <= held + 8:
                break
            time.sleep(0.05)
        self.assertEqual(holder.attached(), 0)
        self.assertLessEqual(len(os.listdir(fds)), held + 8)

    def test_forked(self) -> None:
        """A child of an attached process cannot use the model, and does not keep it attached."""
        holder = self.hold(SAMPLE)
        code = """
import os, sys, time, gguf2gpu
model = gguf2gpu.attach(sys.argv[1])
t = model['output_norm.weight']
pid = os.fork()
if pid == 0:
    try:
        t.tobytes()
    except gguf2gpu.Closed:
        print('closed', flush=True)
    with gguf2gpu.attach(sys.argv[1]) as own:
        own.wait(); print(len(own), flush=True)
    os.close(1); os.close(2)  # else the test waits for it to end
    time.sleep(60)
while len(gguf2gpu.models(sys.argv[1])) != 1 or not t.ready: time.sleep(0.01)
time.sleep(0.5)
del t
print(model.close(), pid, flush=True)
"""
        out = support.python(code, holder.socket)
        self.assertEqual(out.returncode, 0, out.stderr)
        *said, last = out.stdout.decode().splitlines()
        self.assertEqual(said, ["closed", "40"])
        done, pid = last.split()
        try:
            self.assertEqual(done, "True")
            for _ in range(100):
                if holder.attached() == 0:
                    break
                time.sleep(0.05)
            self.assertEqual(holder.attached(), 0)
        finally:
            os.kill(int(pid), 9)

    @needs_numpy
    def test_ends_with_views(self) -> None:
        """An interpreter that ends while arrays are in use ends well."""
        holder = self.hold(SAMPLE)
        code = """
import sys, numpy, gguf2gpu
model = gguf2gpu.attach(sys.argv[1])
a, b, c = numpy.from_dlpack(model['output.weight']), model['output.weight'].numpy(), model['output.weight'].__dlpack__()
class Late:
    def __init__(self, held): self.held = held
    def __del__(self): self.held = None
late = Late([numpy.from_dlpack(t) for t in model.values()])
sys.modules['late'] = late
"""
        for _ in range(5):
            out = support.python(code, holder.socket)
            self.assertEqual((out.returncode, out.stderr), (0, b""))


class TestCommand(Case):
    """python -m gguf2gpu"""

    def run_module(self, *args: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [sys.executable, "-m", "gguf2gpu", *args],
            env=dict(os.environ, PYTHONPATH=support.PACKAGE),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def test_list_and_attach(self) -> None:
        holder = self.hold(SAMPLE, "--dtype", "raw")
        listed = self.run_module("--socket", holder.socket, "list")
        self.assertEqual(listed.returncode, 0, listed.stderr)
        self.assertIn(b"tiny-llama", listed.stdout)
        both = self.run_module("--socket", holder.socket, "--json", "list")
        self.assertEqual(json.loads(both.stdout)[0]["name"], "tiny-llama")
        shown = self.run_module("--socket", holder.socket, "attach", "tiny-llama")
        self.assertIn(b"Q4_K", shown.stdout)
        self.assertIn(b"40 tensors", shown.stdout)
        as_json = json.loads(self.run_module("--socket", holder.socket, "--json", "attach").stdout)
        self.assertEqual(len(as_json["tensors"]), 40)

    def test_errors(self) -> None:
        out = self.run_module("--socket", os.path.join(self.dir, "nobody"), "list")
        self.assertEqual(out.returncode, 1)
        self.assertTrue(out.stderr.startswith(b"gguf2gpu: nobody holds models at"), out.stderr)
        holder = self.hold(SAMPLE)
        out = self.run_module("--socket", holder.socket, "attach", "another")
        self.assertEqual(out.returncode, 1)
        self.assertIn(b"another", out.stderr)
        with self.assertRaises(gguf2gpu.UnknownModel):
            gguf2gpu.attach(holder.socket, "another")


if __name__ == "__main__":
    unittest.main()
