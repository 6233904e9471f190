"""Real networks, trained weights, real data: what static int8 costs, by us and by other tools.

Every way calibrates on the same data and answers the same held-out data. `make bench-accuracy`
installs what this needs, but for what is not Python's:

    apt-get install espeak-ng
    apt-get download mate-backgrounds && dpkg -x mate-backgrounds_*.deb out/photos
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accuracy_audio import Pitch, Speakers, Voice
from accuracy_page import chart, table
from accuracy_task import Task
from accuracy_text import Descriptions, Docstrings, Perplexity
from accuracy_vision import Digits, Photographs
from accuracy_ways import ROUNDINGS, WAYS, Setting
from digits_networks import DepthwiseCNN, SmallViT
from harness import keep, kept_rows
from latency_ways import quiet
from tqdm import tqdm

TASKS: dict[str, Callable[[], Task]] = {
    "minilm": Docstrings,
    "minilm-descriptions": Descriptions,
    "lite0": lambda: Photographs(0),
    "lite1": lambda: Photographs(1),
    "lite2": lambda: Photographs(2),
    "crepe": lambda: Pitch("full"),
    "crepe-tiny": lambda: Pitch("tiny"),
    "resemblyzer": Speakers,
    "silero": Voice,
    "smollm2": Perplexity,
    "digits-vit": lambda: Digits(SmallViT),
    "digits-cnn": lambda: Digits(DepthwiseCNN),
}
EVERY = {**WAYS, **ROUNDINGS}
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS), metavar="MODEL",
                        help=f"of {', '.join(TASKS)}; default: all")  # fmt: skip
    parser.add_argument("--roundings", action="store_true",
                        help="ways to round weights, in a table of their own")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=EVERY, metavar="WAY",
                        help=f"of {', '.join(map(repr, WAYS))}; with --roundings of "
                        f"{', '.join(map(repr, ROUNDINGS))}; default: all")  # fmt: skip
    parser.add_argument("--backend", help="ours; default: the best of this machine")
    parser.add_argument(
        "--resume", action="store_true", help="keep what was measured before, but for failures"
    )
    parser.add_argument("--limit", type=int, default=1800, help="seconds for a way (default 1800)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    parser.add_argument("--plot", type=Path, help="draw a chart there, as .png or .svg")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ways = options.ways or list(ROUNDINGS if options.roundings else WAYS)
    return options


def one(options: argparse.Namespace) -> None:
    """One network by each way asked for, in this process: a line of JSON each."""
    quiet()
    torch.set_num_threads(options.threads)
    (name,) = options.models
    with tempfile.TemporaryDirectory() as folder:
        setting, expected = None, []
        for way in options.ways:
            row: Row = {"model": name, "way": way}
            start = time.process_time()
            signal.signal(signal.SIGALRM, _late)
            signal.alarm(options.limit)
            try:
                if setting is None:
                    setting = Setting(TASKS[name](), Path(folder), options.backend)
                    expected = answers(setting, EVERY["float32"](setting))
                    row |= {"network": setting.task.name, "metric": setting.task.metric}
                row |= measured(setting, way, expected)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            finally:
                signal.alarm(0)
            row["cpu seconds"] = time.process_time() - start
            print("row " + json.dumps(row), flush=True)


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("not done in time; --limit gives more")


def measured(setting: Setting, way: str, expected: list[torch.Tensor]) -> Row:
    """The score of a way, and how near it is to float."""
    task, setting.notes = setting.task, {}
    outputs = answers(setting, EVERY[way](setting))
    near = task.close(outputs, expected) if way != "float32" else {}
    return {
        "network": task.name, "metric": task.metric,
        "score": task.score(outputs, expected), "close": near, **setting.notes,
    }  # fmt: skip


@torch.no_grad()
def answers(setting: Setting, run: Callable[[dict[str, torch.Tensor]], Any]) -> list[torch.Tensor]:
    """What is kept of the outputs for the held-out data."""
    found = []
    for each in tqdm(setting.held_out, leave=False, unit="batch"):
        output = run(each)
        found.append(setting.task.read(output, each))
    return found


def rows_of(options: argparse.Namespace, model: str, ways: list[str]) -> Iterator[Row]:
    """One network in a process of its own; where that ends before time, in another for the rest."""
    while ways:
        command = [sys.executable, __file__, "--one", "--models", model, "--ways", *ways]
        command += ["--limit", str(options.limit), "--threads", str(options.threads)]
        command += ["--backend", options.backend] if options.backend else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("row "):
                    ways = ways[1:]
                    yield json.loads(line[4:])
        code = process.returncode
        if ways:
            yield {"model": model, "way": ways[0], "error": f"the process ended with {code}"}
            ways = ways[1:]


def main() -> None:
    options = parse()
    if options.one:
        one(options)
        return
    notes = {"threads of each": options.threads, "backend": options.backend or "default"}
    ways, file = (ROUNDINGS, "accuracy_roundings") if options.roundings else (WAYS, "accuracy")
    known = {(row["model"], row["way"]): row for row in kept_rows(file, notes)}
    if not options.table:
        wanted = [(model, way) for model in options.models for way in options.ways]
        if options.resume:
            done = {key for key, row in known.items() if "error" not in row}
            wanted = [each for each in wanted if each not in done]
        with tqdm(total=len(wanted), unit="way") as bar:
            for model in TASKS:
                mine = [way for way in ways if (model, way) in wanted]
                for row in rows_of(options, model, mine):
                    bar.update()
                    bar.set_postfix_str(f"{row['model']}, {row['way']}")
                    known[model, row["way"]] = row
                    order = [(m, w) for m in TASKS for w in ways if (m, w) in known]
                    keep(file, [known[each] for each in order], **notes)
    print(table(list(known.values()), list(ways)))
    if options.plot:
        chart(list(known.values()), list(ways), options.plot)


if __name__ == "__main__":
    main()
