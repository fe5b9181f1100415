"""python -m gguf2gpu: list what a holder holds, or attach to a model and show its tensors."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Dict, List, Optional

from . import Error, Model, attach, models


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return "%.4g %s" % (nbytes, unit)
        nbytes /= 1024
    return ""


def _safe(text: object) -> str:
    """Return a text of the holder's without what drives terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _json(value: object) -> str:
    return json.dumps(value, indent=2).replace("\x7f", "\\u007f")  # the only control character that json leaves


def _list(socket: Optional[str], as_json: bool) -> None:
    held = models(socket)
    if as_json:
        print(_json(held))
        return
    for m in held:
        nbytes = m.get("device_bytes")
        size = _size(nbytes) if isinstance(nbytes, (int, float)) else ""
        print("%-30s %-10s %s" % (_safe(m.get("name")), _safe(m.get("state", "")), size))
    if not held:
        print("the holder has no models")


def _describe(model: Model) -> List[Dict[str, Any]]:
    return [
        {
            "name": t.name,
            "dtype": t.dtype,
            "ggml_type": t.ggml_type,
            "shape": list(t.shape),
            "nbytes": t.nbytes,
            "device": t.device,
        }
        for t in model.values()
    ]


def _attach(socket: Optional[str], name: Optional[str], rank: Optional[int], as_json: bool) -> None:
    began = time.monotonic()
    with attach(socket, name, rank=rank) as model:
        took = time.monotonic() - began
        tensors = _describe(model)
        if as_json:
            print(
                _json(
                    {
                        "model": model.name,
                        "architecture": model.architecture,
                        "files": model.files,
                        "devices": model.devices,
                        "nbytes": model.nbytes,
                        "seconds": took,
                        "tensors": tensors,
                    }
                )
            )
            return
        for t in tensors:
            kind = t["dtype"] if t["dtype"] != "uint8" else t["ggml_type"]
            print(
                "%-40s %-9s %-18s %12d  %s"
                % (_safe(t["name"]), _safe(kind), "x".join(map(str, t["shape"])), t["nbytes"], t["device"])
            )
        print(
            "%d tensors, %s on %s, attached in %.2f ms"
            % (len(model), _size(model.nbytes), _safe(model.devices[0].get("name")), took * 1000)
        )


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gguf2gpu", description="Models that 'gguf2gpu hold' keeps in device memory."
    )
    parser.add_argument("--socket", help="path of the holder's socket (default: that of this user)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the models")
    attaching = commands.add_parser("attach", help="attach to a model and show its tensors")
    attaching.add_argument("model", nargs="?", help="its name (default: the only one)")
    attaching.add_argument("--rank", type=int, help="whose part of it (default: RANK, which torchrun sets)")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            _list(args.socket, args.json)
        else:
            _attach(args.socket, args.model, args.rank, args.json)
    except (Error, OSError) as e:
        print("gguf2gpu: %s" % _safe(e), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
