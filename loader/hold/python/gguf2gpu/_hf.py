"""Tensors as Hugging Face's transformers has them: names, the order of rows, parts of fused tensors, tied ones."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple

from ._errors import ProtocolError, UnknownNames, Unsupported

if TYPE_CHECKING:
    import torch

    from ._model import Model, Tensor


def state_dict(model: "Model", hf: bool, framework: str) -> Dict[str, Any]:
    get: Callable[["Tensor"], Any]
    if framework == "torch":
        get = lambda t: t.torch()  # noqa: E731
    elif framework == "numpy":
        get = lambda t: t.numpy()  # noqa: E731
    else:
        raise ValueError("framework is %r; known are torch and numpy" % framework)
    if not hf:
        return {name: get(t) for name, t in model.items()}
    names = model.hf_names
    out: Dict[str, Any] = {}
    for name, t in model.items():
        parts = names[name]
        if parts and t.dtype == "uint8":
            raise Unsupported(
                "tensor %r is blocks of the type %s, which transformers does not have: hold the model with "
                "--dtype bf16, f16 or f32" % (name, t.ggml_type)
            )
        value = get(t) if parts else None
        for part in parts:
            for key, x in convert(t, value, part):
                if key in out:
                    raise ProtocolError("two tensors are called %r" % key)
                out[key] = x
    return out


def convert(t: "Tensor", value: Any, part: Dict[str, Any]) -> Iterator[Tuple[str, Any]]:
    """Yield what a part of a tensor is in transformers. Nothing is copied but heads that are put in order, and what has
    something added."""
    key, rows = str(part["name"]), int(part.get("rows", 0))
    if rows:
        if t.slice is not None and t.slice["dim"] == 0:
            raise Unsupported("tensor %r is one rank's slice of what transformers has as several tensors" % t.name)
        first = int(part.get("first", 0))
        if not 0 <= first <= first + rows <= value.shape[0]:
            raise ProtocolError("tensor %r has no rows %d to %d" % (t.name, first, first + rows))
        value = value[first : first + rows]
    value = in_order(t.name, value, int(part.get("head_rows", 0)))
    add = part.get("add", 0)
    if add:
        value = plus(value, float(add))
    if part.get("experts"):
        for i in range(value.shape[0]):
            yield key.replace("{}", str(i)), value[i]
    else:
        yield key, value


def in_order(name: str, value: Any, head_rows: int) -> Any:
    """Undo the permutation of llama.cpp's converter: heads whose rows are in pairs get two halves again. A copy."""
    if head_rows == 0:
        return value
    rows = value.shape[0]
    if head_rows % 2 or rows % head_rows:
        raise Unsupported("the %d rows of tensor %r are not whole heads of %d" % (rows, name, head_rows))
    rest = tuple(value.shape[1:])
    pairs = value.reshape((rows // head_rows, head_rows // 2, 2) + rest)
    return pairs.swapaxes(1, 2).reshape((rows,) + rest)


def plus(value: Any, x: float) -> Any:
    """Add x to every element in float32, and round to the type of before. A copy."""
    if hasattr(value, "astype"):
        return (value.astype("float32") + x).astype(value.dtype)
    return (value.float() + x).to(value.dtype)


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Make modules of PyTorch without memory for their parameters, as those that are to get tensors of a held model.

    Buffers are made as usual: transformers computes some of them and has them in no checkpoint."""
    import torch

    register = torch.nn.Module.register_parameter

    def without_memory(module: Any, name: str, param: Optional[Any]) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = torch.nn.Parameter(param.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_transformers(module: "torch.nn.Module", model: "Model", qk: str = "hook") -> "torch.nn.Module":
    """Give a model of transformers the weights of a held one, without a copy, and return it.

    module is best made inside of ``with gguf2gpu.empty_weights():``. Its parameters become the held tensors, and need
    no gradients; its buffers move to their device. It keeps the held model mapped.

    llama.cpp's converter has changed the order of rows of q and k for llama, mistral and mixtral. With qk="hook" these
    weights stay as they are, and what comes out of them is put in order, which costs no memory; module.state_dict()
    then has them in the order of the GGUF file. With qk="copy" they are copied in the order of transformers. Norms of
    gemma are copies in both cases: transformers wants them without the 1 that the converter has added.

    Raises UnknownNames, Unsupported for quantized blocks, and ValueError for tensors that module lacks or has in other
    shapes."""

    if qk not in ("hook", "copy"):
        raise ValueError("qk is %r; known are hook and copy" % qk)
    names = model.hf_names
    if len(model.devices) > 1 and any(t.device != next(iter(model.values())).device for t in model.values()):
        raise Unsupported("the model is on several devices; make a module for each, or use state_dict")
    if qk == "copy":
        return assign(module, state_dict(model, True, "torch"))
    for name, parts in names.items():
        for part in parts:
            if part.get("head_rows") and name in model:
                key = str(part["name"])
                hook(module, key.rpartition(".")[0], int(part["head_rows"]), key.endswith(".weight"))
    plain = _Unordered(model)
    return assign(module, state_dict(plain, True, "torch"))  # type: ignore[arg-type]


class _Unordered(Dict[str, Any]):
    """A model whose names say nothing about the order of rows."""

    def __init__(self, model: "Model") -> None:
        super().__init__(model)
        self.hf_names = {
            name: [{k: v for k, v in part.items() if k != "head_rows"} for part in parts]
            for name, parts in model.hf_names.items()
        }


def hook(module: "torch.nn.Module", path: str, head_rows: int, is_weight: bool) -> None:
    """Put in order what comes out of a linear layer whose rows are in pairs. Weight and bias are one hook."""
    if not is_weight:
        return
    linear = module.get_submodule(path)

    def order(_: Any, __: Any, out: Any) -> Any:
        shape = out.shape
        pairs = out.reshape(*shape[:-1], shape[-1] // head_rows, head_rows // 2, 2)
        return pairs.transpose(-1, -2).reshape(shape)

    previous = getattr(linear, "_gguf2gpu_hook", None)
    if previous is not None:
        previous.remove()
    linear._gguf2gpu_hook = linear.register_forward_hook(order)  # type: ignore[assignment]


def assign(module: "torch.nn.Module", tensors: Dict[str, Any]) -> "torch.nn.Module":
    """Make tensors, with the names of checkpoints, the parameters of module."""
    import torch

    wanted = dict(module.named_parameters(remove_duplicate=False))
    given = fused(tensors, wanted)
    missing = sorted(set(wanted) - set(given))
    surplus = sorted(set(given) - set(wanted) - {"lm_head.weight"})
    if missing or surplus:
        raise ValueError(
            "the module and the held model do not fit: it lacks %s, and does not know %s"
            % (missing[:5] or "nothing", surplus[:5] or "nothing")
        )
    for key, value in given.items():
        if key in wanted and tuple(wanted[key].shape) != tuple(value.shape):
            raise ValueError(
                "%s has the shape %s in the module and %s in the held model"
                % (key, tuple(wanted[key].shape), tuple(value.shape))
            )
    device = next(iter(given.values())).device if given else None
    for key in wanted:
        parent, _, name = key.rpartition(".")
        owner = module.get_submodule(parent)
        owner._parameters[name] = torch.nn.Parameter(given[key], requires_grad=False)
    if hasattr(module, "tie_weights"):
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            module.tie_weights()  # type: ignore[operator]
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and device is not None:
                owner._buffers[name] = buffer.to(device)
    return module.eval()


def fused(tensors: Dict[str, Any], wanted: Dict[str, Any]) -> Dict[str, Any]:
    """Return tensors as versions of transformers want them that put the experts of a layer into one parameter. That
    copies what has to be together; where the experts lie one behind the other as they are wanted, it is a view."""
    given = dict(tensors)
    for key in wanted:
        if key in given or ".experts." not in key:
            continue
        before, _, which = key.rpartition(".experts.")
        old = (
            before
            if any(k.startswith(before + ".experts.0.") for k in given)
            else before.rpartition(".")[0] + ".block_sparse_moe"
        )
        sources = {
            "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
            "down_proj": (("w2",), ("down_proj",)),
        }.get(which)
        for names in sources or ():
            if "%s.experts.0.%s.weight" % (old, names[0]) in given:
                given[key] = _stack([_experts(given, old, name) for name in names])
                break
    for key in list(given):
        new = key.replace(".block_sparse_moe.gate.", ".mlp.gate.")
        if new != key and key not in wanted and new in wanted:
            given[new] = given.pop(key)
    return given


def _experts(given: Dict[str, Any], before: str, name: str) -> List[Any]:
    found: List[Any] = []
    while "%s.experts.%d.%s.weight" % (before, len(found), name) in given:
        found.append(given.pop("%s.experts.%d.%s.weight" % (before, len(found), name)))
    return found


def _stack(parts: List[List[Any]]) -> Any:
    import torch

    first = parts[0][0]
    if len(parts) == 1:
        step = first.numel() * first.element_size()
        if all(
            e.is_contiguous()
            and e.data_ptr() == first.data_ptr() + i * step
            and e.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            for i, e in enumerate(parts[0])
        ):
            return first.as_strided((len(parts[0]),) + tuple(first.shape), (first.numel(),) + tuple(first.stride()))
        return torch.stack(parts[0])
    return torch.stack([torch.cat(of, dim=0) for of in zip(*parts)])


__all__ = ["UnknownNames", "assign", "empty_weights", "load_transformers", "state_dict"]
