"""``torch-quant doctor``: what this machine can run, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata
from typing import Any

import click

from torch_quant_cli.exits import MISSING
from torch_quant_cli.running import Result, command, wrapped

__all__ = ["cli"]

_OPTIONAL = {
    "transformers": ("models and tokenizers from Hugging Face folders", "transformers"),
    "yaml": ("configurations in YAML", "pyyaml"),
    "PIL": ("folders of images as data", "pillow"),
    "matplotlib": ("plots of sensitivity", "matplotlib"),
}
"""Module -> what it is for, and the package that has it. What backends need, they say."""


@click.command("doctor", short_help="What this machine runs, and what is missing.")
@command
def cli() -> Result:
    """Tell what this machine can run, what is missing, and how to get it.

    Ends with 3 where no backend with kernels of its own runs.

    \b
    Examples:
      torch-quant doctor
      torch-quant doctor --json
    """
    data = _found()
    runs = any(each["runs"] and each["kernels"] for each in data["backends"].values())
    return Result(_text(data), data, 0 if runs else MISSING)


def _found() -> dict[str, Any]:
    import torch

    from torch_quant import __version__, native
    from torch_quant.backends import best_backend, known_backends
    from torch_quant.backends.int8 import has_vnni

    backends = {}
    for each in known_backends():
        why = each.unavailable()
        backends[each.name] = {"runs": why is None, "kernels": each.has_kernels, "missing": why}
    missing = native.unavailable()
    return {
        "torch_quant": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "vnni": has_vnni(),
        },
        "default_backend": best_backend().name,
        "backends": backends,
        "native_kernels": {
            "built": missing is None,
            "instructions": list(native.instruction_sets()),
            "missing": missing,
        },
        "packages": {
            package: {
                "version": _version(package) if importlib.util.find_spec(module) else None,
                "for": what,
            }
            for module, (what, package) in _OPTIONAL.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "?"


def _text(data: dict[str, Any]) -> str:
    cpu, kernels = data["cpu"], data["native_kernels"]
    vnni = "VNNI" if cpu["vnni"] else "no VNNI: int8 weights are kept to 7 bits"
    lines = [
        f"torch_quant {data['torch_quant']}, torch {data['torch']}, Python {data['python']} "
        f"({sys.executable})",
        f"{data['machine']}, {cpu['capability']}, {vnni}; {cpu['cores']} cores, "
        f"{cpu['threads']} threads",
        "",
        "Backends (packages and kernels were looked for, nothing was computed)",
    ]
    for name, each in data["backends"].items():
        if each["runs"]:
            note = "found" if each["kernels"] else "found, in float arithmetic here"
            note += ", the default here" if name == data["default_backend"] else ""
            lines.append(_row(True, name, note))
        else:
            lines.append(_row(False, name, each["missing"]))
    lines += ["", "This package's own kernels"]
    if kernels["built"]:
        lines.append(_row(True, "native", f"built for {', '.join(kernels['instructions'])}"))
    else:
        lines.append(_row(False, "native", kernels["missing"]))
    lines += ["", "Optional packages"]
    for name, each in data["packages"].items():
        if each["version"]:
            lines.append(_row(True, name, f"{each['version']}: {each['for']}"))
        else:
            lines.append(_row(False, name, f"{each['for']}: pip install {name}"))
    return "\n".join(lines)


def _row(good: bool, name: str, note: str) -> str:
    first, *rest = wrapped(f"{name:<14}{note}", "").splitlines()
    return "\n".join([f"  {'ok' if good else '--'}  {first}", *(f"{' ' * 20}{x}" for x in rest)])
