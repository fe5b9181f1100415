"""Small random models of every family, made by transformers: written as GGUF with the names of llama.cpp's gguf
package, held, and given back to transformers without a copy. Their logits are those of the models that were made, bit
for bit. Usage: python_families.py COMMAND DEVICE DIRECTORY. It needs torch, transformers and gguf."""

import os
import subprocess
import sys

import gguf
import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM

import gguf2gpu
from python_rig import typed

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# The class of the configuration, the architecture of GGUF, what differs, and whether q and k are put in another order.
FAMILIES = [
    ("LlamaConfig", "llama", {}, True),
    ("LlamaConfig", "llama", dict(attention_bias=True, tie_word_embeddings=True), True),
    ("MistralConfig", "llama", {}, True),
    ("MixtralConfig", "llama", dict(num_local_experts=4), True),
    ("Qwen2Config", "qwen2", {}, False),
    ("Qwen3Config", "qwen3", dict(head_dim=16), False),
    (
        "Qwen3MoeConfig",
        "qwen3moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
        False,
    ),
    ("GemmaConfig", "gemma", dict(head_dim=16), False),
    ("Gemma2Config", "gemma2", dict(head_dim=16), False),
    ("Gemma3TextConfig", "gemma3", dict(head_dim=16), False),
    ("PhiConfig", "phi2", {}, False),
    ("Phi3Config", "phi3", {}, False),
]


def checkpoint(model):
    """Return the tensors as checkpoints have them: experts are single."""
    out = {}
    for key, x in model.state_dict().items():
        before, experts, which = key.rpartition(".experts.")
        if not experts or which not in ("gate_up_proj", "down_proj"):
            out[key] = x
            continue
        for i, e in enumerate(x):
            parts = e.chunk(2) if which == "gate_up_proj" else (e,)
            for name, part in zip(("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",), parts):
                out["%s.experts.%d.%s.weight" % (before, i, name)] = part
    return out


def permute(x, heads):
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def convert(model, config, arch, permuted, path):
    """Write the model as llama.cpp's converter does."""
    ids = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(ids[arch], config.num_hidden_layers)
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config.num_hidden_layers)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_embedding_length(config.hidden_size)
    stacked = {}
    for key, x in checkpoint(model).items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = x.float()
        if permuted and ".q_proj." in key:
            x = permute(x, config.num_attention_heads)
        if permuted and ".k_proj." in key:
            x = permute(x, config.num_key_value_heads)
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            x = x + 1
        before, experts, rest = key.partition(".experts.")
        if experts:
            stacked.setdefault("%s.experts.%s" % (before, rest.partition(".")[2]), []).append(x)
            continue
        add(w, names, key, x)
    for key, all_of in stacked.items():
        add(w, names, key, torch.stack(all_of))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def add(w, names, key, x):
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError("gguf has no name for %s" % key)
    w.add_tensor(name, numpy.ascontiguousarray(x.cpu().numpy()))


def main(command, device, directory):
    torch.use_deterministic_algorithms(True)
    for i, (cls, arch, extra, permuted) in enumerate(FAMILIES):
        torch.manual_seed(i)
        config = getattr(transformers, cls)(**{**SMALL, **extra})
        model = AutoModelForCausalLM.from_config(config, **typed("float32")).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(
                    torch.randn_like(p).mul_(0.2).bfloat16()
                )  # few bits, so that adding 1 and taking it away is exact
        path, socket = os.path.join(directory, "family.gguf"), os.path.join(directory, "families")
        convert(model, config, arch, permuted, path)
        read, write = os.pipe()
        holder = subprocess.Popen(
            [
                command,
                "hold",
                path,
                "--socket",
                socket,
                "--device",
                device,
                "--dtype",
                "f32",
                "--progress",
                "none",
                "--grace",
                "0s",
                "--quiet",
                "--ready-fd",
                str(write),
            ],
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
        )
        try:
            os.close(write)
            with os.fdopen(read) as ready:
                assert ready.readline() == "READY\n"
            held = gguf2gpu.attach(socket).wait()
            on = next(iter(held.values())).device
            tokens = torch.randint(0, 50, (2, 9)).to(on)
            with torch.inference_mode():
                want = model.to(on)(tokens, use_cache=False).logits
                for qk in ("hook", "copy"):
                    with gguf2gpu.empty_weights():
                        module = AutoModelForCausalLM.from_config(config, **typed("float32"))
                    gguf2gpu.load_transformers(module, held, qk=qk)
                    got = module(tokens, use_cache=False).logits
                    assert torch.isfinite(got).all()
                    assert torch.equal(got, want), "%s: logits differ by up to %g" % (cls, (got - want).abs().max())
            state = held.state_dict(hf=True)
            known = {k: v for k, v in checkpoint(model).items()}
            same = sum(k in state and torch.equal(state[k], known[k].to(on)) for k in known)
            print(
                "%-18s %-9s logits equal; %d of %d tensors of the dict have the name and the values of the module"
                % (cls, arch, same, len(known))
            )
            assert same == len(known) or cls == "MixtralConfig"  # checkpoints of it have older names than the module
        finally:
            holder.terminate()
            holder.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
