"""What python.sh runs: logits of attached weights against those of files, two processes on one copy, times, the end of
the holder. Usage: python_rig.py COMMAND ARGUMENTS; each function whose name begins with run_ is a command."""

import json
import os
import signal
import subprocess
import sys
import time

import gguf2gpu


def run_config(inspected, directory, dtype):
    """Write config.json of transformers for a llama, from what 'gguf2gpu inspect --json' printed."""
    with open(inspected) as f:
        report = json.load(f)
    metadata = {
        k.partition(".")[2]: v for k, v in report["metadata"].items() if k.startswith(report["architecture"] + ".")
    }
    heads = metadata["attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "hidden_size": metadata["embedding_length"],
        "intermediate_size": metadata["feed_forward_length"],
        "num_hidden_layers": metadata["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": metadata["embedding_length"] // heads,
        "rms_norm_eps": metadata["attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "max_position_embeddings": metadata["context_length"],
        "vocab_size": report["hyperparameters"]["vocabulary"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def typed(dtype):
    """Return the argument that sets the type of a model, whose name depends on the version of transformers."""
    import torch
    import transformers

    return {"dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype": getattr(torch, dtype)}


def logits(model, config, device):
    import torch

    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, config.vocab_size, (2, 33), generator=generator).to(device)
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def reference(directory, dtype, device):
    """Return the model as transformers loads it from safetensors files."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **typed(dtype)).to(device).eval()


def attached(socket, config, dtype, qk="hook"):
    """Return the model with the weights of the holder."""
    from transformers import AutoModelForCausalLM

    held = gguf2gpu.attach(socket, timeout=60).wait(600)
    with gguf2gpu.empty_weights():
        module = AutoModelForCausalLM.from_config(config, **typed(dtype))
    return gguf2gpu.load_transformers(module, held, qk=qk), held


def run_logits(socket, directory, dtype):
    """Logits from attached weights are those from files, bit for bit; weights are the holder's memory."""
    import torch
    from transformers import AutoConfig

    torch.use_deterministic_algorithms(True)
    config = AutoConfig.from_pretrained(directory)
    device = next(iter(gguf2gpu.attach(socket).values())).device
    want = logits(reference(directory, dtype, device), config, device)
    for qk in ("hook", "copy"):
        module, held = attached(socket, config, dtype, qk)
        got = logits(module, config, device)
        shared = sum(
            p.numel() * p.element_size()
            for p in module.parameters()
            if any(t.data_ptr() == p.data_ptr() for t in held.values())
        )
        total = sum(p.numel() * p.element_size() for p in module.parameters())
        print(
            "logits, qk=%s: %s; %d of %d bytes of parameters are the holder's memory"
            % (
                qk,
                "equal" if torch.equal(got, want) else "DIFFERENT by up to %g" % (got - want).abs().max(),
                shared,
                total,
            )
        )
        assert torch.isfinite(got).all() and got.abs().max() > 0
        assert torch.equal(got, want)
        assert qk == "copy" or shared == total
        del module, held, got


def run_same(socket, safetensors):
    """All tensors are those of the exported file."""
    import torch
    from safetensors import safe_open

    state = gguf2gpu.state_dict(socket)
    with safe_open(safetensors, "pt") as f:
        assert set(f.keys()) == set(state), set(f.keys()) ^ set(state)
        for name in f.keys():
            want = f.get_tensor(name)
            assert state[name].dtype == want.dtype and torch.equal(state[name].cpu(), want), name
    print("%d tensors are equal" % len(state))


def run_times(socket):
    """How long attaching takes once the runtime has started, and how much device memory that costs."""
    import torch

    gpu = next(iter(gguf2gpu.attach(socket).values())).device != "cpu"
    if gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    attaching, converting, both, at_once = [], [], [], []
    for _ in range(11):
        free = torch.cuda.mem_get_info()[0] if gpu else 0
        began = time.perf_counter()
        model = gguf2gpu.attach(socket)
        attached = time.perf_counter()
        tensors = {name: t.torch() for name, t in model.items()}
        ended = time.perf_counter()
        attaching.append(attached - began)
        converting.append(ended - attached)
        both.append(ended - began)
        used = free - torch.cuda.mem_get_info()[0] if gpu else 0
        count, nbytes = len(tensors), model.nbytes
        del tensors
        began = time.perf_counter()
        tensors = model.state_dict()
        at_once.append(time.perf_counter() - began)
        del tensors
        assert model.close()
        del model

    def ms(took):
        return "median %.2f ms (%.2f to %.2f)" % (1e3 * sorted(took)[len(took) // 2], 1e3 * min(took), 1e3 * max(took))

    print(
        "%d tensors (%d bytes) as torch tensors: %s; of that attach %s, torch() of all %s; state_dict() %s; "
        "%d bytes of device memory more"
        % (count, nbytes, ms(both), ms(attaching), ms(converting), ms(at_once), used)
    )
    assert used <= 2 << 20, used


def run_stay(socket, directory, dtype):
    """Attach, print a sum of the logits, and print it again for each line of stdin."""
    import torch
    from transformers import AutoConfig

    torch.use_deterministic_algorithms(True)
    config = AutoConfig.from_pretrained(directory)
    module, held = attached(socket, config, dtype)
    device = next(iter(held.values())).device
    while True:
        print(
            json.dumps(
                {
                    "sum": logits(module, config, device).double().sum().item(),
                    "gone": held.gone,
                    "independent": held.independent,
                }
            ),
            flush=True,
        )
        if not sys.stdin.readline():
            return


def run_two(socket, directory, dtype, holder):
    """Two processes compute on one copy; the holder is killed under them."""
    import torch

    def free():
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0

    both = [
        subprocess.Popen(
            [sys.executable, __file__, "stay", socket, directory, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    first = [json.loads(p.stdout.readline()) for p in both]
    assert first[0] == first[1] and not first[0]["gone"], first
    held = [m["attached"] for m in gguf2gpu.models(socket)]
    print("two processes on one copy: the sums are %s and %s, attached: %s" % (first[0]["sum"], first[1]["sum"], held))
    assert held == [2]
    os.kill(int(holder), signal.SIGKILL)
    time.sleep(1)
    after = []
    for p in both:
        if first[0]["independent"]:
            p.stdin.write("\n")
            p.stdin.flush()
            after.append(json.loads(p.stdout.readline()))
        p.stdin.close()
        assert p.wait(120) == 0, "a process ended with %s" % p.returncode
    if after:
        assert after == first, (after, first)
        print("the holder was killed: both go on, with the same sums")
    else:
        print("the holder was killed: both ended well")


def run_leaks(socket):
    """1,000 attachments leave nothing: no descriptors, no device memory."""
    import torch

    def now():
        return len(os.listdir("/proc/self/fd")), torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0

    def once():
        model = gguf2gpu.attach(socket)
        name = next(iter(model))
        t = model[name].torch()
        del t
        assert model.close()

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    for _ in range(10):
        once()
    before = now()
    began = time.perf_counter()
    for _ in range(1000):
        once()
    took = time.perf_counter() - began
    after = now()
    print(
        "1000 attachments in %.1f s: descriptors %d, then %d; free device memory %d, then %d"
        % (took, before[0], after[0], before[1], after[1])
    )
    assert before[0] == after[0] and before[1] - after[1] <= 2 << 20


if __name__ == "__main__":
    globals()["run_" + sys.argv[1]](*sys.argv[2:])
