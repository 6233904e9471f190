"""Every architecture that this environment can build, small: captured, calibrated, quantized, run.

Each is tried in a process of its own, with a limit of time and memory, and adds a line to a log, so
that a run that was stopped goes on with ``--resume``. ``--table`` writes what the log has into
``results/zoo.json`` and ``docs/zoo.md``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, conditions, keep, onnxruntime_session
from zoo_models import NotBuilt, architectures, build, missing, tensors
from zoo_rounding import rounding
from zoo_table import LEAST, page, table, works

from torch_quant import Backend, QConfig, Quantizer, QuantSpec, export_onnx, recipes, sqnr
from torch_quant.convert.quantized import QuantizedModule, quantized_graphs
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import flatten_call

__all__ = ["architectures", "measure", "page", "rows_of", "table", "todo", "works"]

LOG = Path(__file__).parents[1] / "out" / "zoo.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
MEMORY = 16 << 30
"""Bytes of address space that one model may take."""

QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Of the environment, before the library that reads it is imported."""
PATIENCE = 8
"""Times the limit that is waited at most, beside other work."""

TURNS = 5

WIDE = QConfig(QuantSpec.of(bits=16), QuantSpec.of("int16", per_channel=True))
"""What rounds too little for a random network to make much of."""

Put = Callable[[dict[str, Any]], None]


def measure(name: str, made_by: str, put: Put) -> None:
    """Try everything on one architecture, and tell what is known after each step.

    Args:
        name: ``library/architecture``.
        made_by: the class or function.
        put: takes what was found: a later value of a key replaces an earlier.
    """
    try:
        model, batches, chosen = build(name, made_by)
    except NotBuilt as e:
        return put({"not built": str(e)})
    quantizer = Quantizer(recipes.int8_static())
    with torch.no_grad():
        expected = _outputs(model, batches)
        put({"class": chosen, "parameters": sum(x.numel() for x in model.parameters())})
        put({"at": "calib"})
        proxy = quantizer.calib(model)
        found = _outputs(proxy, batches)
        put({"calib equal": all(map(_equal, expected, found))})
        values: list[Any] = []
        for backend in (Backend.REFERENCE, Backend.ONEDNN):
            put({"at": str(backend.name)})
            quant_model = quantizer.quantize(model, backend=backend)
            found = _outputs(quant_model, batches)
            if _chosen(expected + found) and (pieces := _of_pieces(model, quant_model, batches[0])):
                put({backend.name: pieces, "compared": "pieces"})
            else:
                values.append(_decibels(expected, found))
                put({backend.name: values[-1]})
        coverage = quantizer.coverage(model, backend=Backend.ONEDNN)
        paths = {each.quantization.path for each, _ in quantized_graphs(quant_model)}
        captured = "whole" if paths == {""} else f"{len(paths)} pieces"
        put({"captured": captured, "coverage": coverage.share, "at": "latency"})
        put(
            dict(
                zip(("float ms", "onednn ms"), _turns(model, quant_model, batches[0]), strict=True)
            )
        )
        put({"at": "onnx"})
        for_onnx = quantizer.quantize(model, backend=Backend.ONNX)
        (simulated,) = _outputs(for_onnx, batches[:1])
        values.append(_file(for_onnx, batches[0], simulated, captured != "whole"))
        put({"onnx": values[-1]})
        if any(isinstance(x, float) and x < LEAST for x in values):
            put({"at": "rounding"})
            put(_rounded(model, batches, expected))
    put({"at": ""})


def _rounded(model: Any, batches: list[dict[str, Any]], expected: Any) -> dict[str, Any]:
    """dB of 8 bits without the package, and of the package with 16."""
    with rounding(model, lambda: _outputs(model, batches)):
        found = _decibels(expected, _outputs(model, batches))
    quantizer = Quantizer(WIDE)
    _outputs(quantizer.calib(model), batches)
    wide = quantizer.quantize(model, backend=Backend.REFERENCE)
    return {"rounding": found, "16 bits": _decibels(expected, _outputs(wide, batches))}


def _outputs(model: Any, batches: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
    """Of each batch, with the same random numbers in each run."""
    found = []
    for i, inputs in enumerate(batches):
        torch.manual_seed(i)
        found.append(tensors(model(**inputs)))
    return found


def _chosen(outputs: list[list[torch.Tensor]]) -> bool:
    """Whether outputs are choices (labels, which boxes), which flip as a whole."""
    return any(not x.is_floating_point() for each in outputs for x in each)


def _of_pieces(model: Any, quant_model: QuantizedModule, inputs: dict[str, Any]) -> float | str:
    """dB of all pieces, each with the inputs that it has in the float model; "" where it is one."""
    pieces = {each.quantization.path: each for each, _ in quantized_graphs(quant_model)}
    calls: list[tuple[str, Any, Any, list[torch.Tensor]]] = []

    def hook(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: calls.append(
            (path, args, kwargs, [x.clone() for x in tensors(output)])
        )

    parts = {path: part for path, part in model.named_modules() if path and path in pieces}
    hooks = [
        part.register_forward_hook(hook(path), with_kwargs=True) for path, part in parts.items()
    ]
    try:
        model(**inputs)
    finally:
        for each in hooks:
            each.remove()
    if not calls:
        return ""
    found = [tensors(pieces[path](*args, **kwargs)) for path, args, kwargs, _ in calls]
    return _decibels([output for *_, output in calls], found)


def _turns(*models_and_inputs: Any) -> list[float]:
    """Milliseconds of the processor for one call of each model: the least of some, in turns."""
    *models, inputs = models_and_inputs
    spent: list[list[float]] = [[] for _ in models]
    for _ in range(TURNS):
        for model, times in zip(models, spent, strict=True):
            started = time.process_time()
            model(**inputs)
            times.append(1e3 * (time.process_time() - started))
    return [round(min(each), 3) for each in spent]


def _file(model: QuantizedModule, inputs: dict[str, Any], expected: Any, pieces: bool) -> Any:
    """dB between the file in onnxruntime and the model; of pieces, how many files load."""
    with tempfile.TemporaryDirectory() as folder:
        files = export_onnx(
            model, inputs, Path(folder) / "model.onnx", pieces=pieces, progress=False
        )
        sessions = [onnxruntime_session(each) for each in files]
        if pieces:
            return f"{len(sessions)} files load"
        call = flatten_call(*bind(model.signature, (), inputs))
        known = {each.name for each in sessions[0].get_inputs()}
        feed = zip(call.names(), call.tensors, strict=True)
        outputs = sessions[0].run(None, {key: x.numpy() for key, x in feed if key in known})
        return _decibels([expected], [[torch.from_numpy(x) for x in outputs]])


def _warm_up() -> None:
    """Load in this process what every model needs, so that those forked from it need not."""
    model, inputs = torch.nn.Linear(4, 4).eval(), torch.ones(2, 4)
    quantizer = Quantizer(recipes.int8_static())
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        quantizer.calib(model)(inputs)
        quant_model = quantizer.quantize(model, backend=Backend.ONNX)
        export_onnx(quant_model, inputs, Path(folder) / "model.onnx", progress=False)


def _equal(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    pairs = zip(expected, found, strict=False)
    return len(expected) == len(found) and all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in pairs
    )


def _decibels(expected: Any, found: Any) -> float | str:
    """What JSON can hold: a number, "inf" or "nan"."""
    value = sqnr(expected, found)
    return value if abs(value) < float("inf") else str(value)


def _child(name: str, made_by: str, limit: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    started = time.process_time()
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            measure(name, made_by, pipe.send)
        except BaseException as e:
            pipe.send({"error": f"{type(e).__name__}: {str(e)[:600]}"})
    pipe.send({"cpu seconds": round(time.process_time() - started, 1)})


def _one(name: str, made_by: str, limit: int) -> dict[str, Any]:
    """Try one architecture in a process of its own, for so many seconds of the processor."""
    context = multiprocessing.get_context("fork")
    pipe, end = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, made_by, limit, end))
    row: dict[str, Any] = {"name": name, "class": made_by, "torch": str(torch.__version__)}
    started = time.monotonic()
    child.start()
    end.close()
    while True:
        left = started + PATIENCE * limit - time.monotonic()
        try:
            if left <= 0 or not pipe.poll(left):
                row["error"] = f"not done in {PATIENCE * limit} s"
                break
            row |= pipe.recv()
        except EOFError:
            child.join()
            if child.exitcode == -signal.SIGXCPU:
                row["error"] = f"not done in {limit} s of the processor"
            elif "cpu seconds" not in row:
                row["error"] = f"the process ended with {child.exitcode}"
            break
    child.kill()
    child.join()
    return row | {"seconds": round(time.monotonic() - started, 1)}


def rows_of(log: Path) -> dict[str, dict[str, Any]]:
    """What a log has, the last line of each name; a line that was cut off does not count."""
    found = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["name"]] = row
    return found


def todo(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What is to be tried: in a random order, so that a part of a run is a fair sample."""
    known = architectures()
    if arguments.only:
        chosen = {each: fnmatch.filter(known, each) for each in arguments.only}
        if unknown := [each for each, names in chosen.items() if not names]:
            raise SystemExit(f"no architecture {', '.join(unknown)}: --list has them all")
        known = {name: known[name] for names in chosen.values() for name in names}
    done = rows_of(arguments.log) if arguments.resume else {}
    items = list(known.items())
    random.Random(0).shuffle(items)
    yield from (each for each in items if each[0] not in done)


def write_table(log: Path) -> None:
    """``results/zoo.json`` and ``docs/zoo.md`` of a log, and of what was kept of earlier ones."""
    kept = RESULTS / "zoo.json"
    earlier = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    known = {row["name"]: row for row in earlier} | rows_of(log)
    rows = [row for _, row in sorted(known.items())]
    if not rows:
        raise SystemExit(f"{log} has no line: run benchmarks/zoo.py first")
    notes = {
        "architectures": len(architectures().keys() | known),
        "torch": ", ".join(sorted({row["torch"] for row in rows})),
    }
    keep("zoo", rows, **notes)
    PAGE.write_text(page(rows, conditions() | notes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=LOG, help="JSON lines, one for each model")
    parser.add_argument("--resume", action="store_true", help="leave out what the log has")
    parser.add_argument("--table", action="store_true", help="write the table of the log alone")
    parser.add_argument("--list", action="store_true", help="names of all architectures")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these alone, as names or patterns such as timm/*; shown, and kept with --resume",
    )
    parser.add_argument("--limit", type=int, default=300, help="processor seconds for each")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for library, how in missing().items():
        print(f"{library} is not installed: {how}", file=sys.stderr)
    if arguments.list:
        print(*architectures(), sep="\n")
        return
    if not arguments.table:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        items = list(todo(arguments))
        _warm_up()
        if arguments.only and not arguments.resume:
            for name, made_by in items:
                print(table([_one(name, made_by, arguments.limit)])[0], flush=True)
            return
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        with arguments.log.open("a" if arguments.resume else "w") as log:
            for i, (name, made_by) in enumerate(items, 1):
                row = _one(name, made_by, arguments.limit)
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(f"{i} of {len(items)}: {table([row])[0]}", flush=True)
    write_table(arguments.log)
    print(f"{RESULTS / 'zoo.json'} and {PAGE} are written")


if __name__ == "__main__":
    main()
