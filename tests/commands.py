"""A folder with models and data for tests of the command line, and a way to run it in process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from torch_quant_cli.main import cli

WORDS = [
    "the",
    "a",
    "of",
    "model",
    "text",
    "data",
    "layer",
    "weight",
    "number",
    "cat",
    "dog",
    "runs",
    "sees",
    "small",
    "large",
]

NET = """
import torch
from torch import nn

CALLS = 0
STOP_AT = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x):
        global CALLS
        CALLS += not torch.compiler.is_compiling()
        if STOP_AT is not None and CALLS >= STOP_AT:
            raise KeyboardInterrupt
        return self.second(torch.relu(self.first(x)))


def make():
    torch.manual_seed(0)
    return Net()


def inputs():
    torch.manual_seed(1)
    return [torch.randn(8, 32) for _ in range(4)]


def interrupted():
    yield torch.randn(8, 32)
    raise KeyboardInterrupt


not_a_model = dict
"""


class Net(nn.Module):
    """The model of ``net.py``, as it is when nothing interrupts it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[UNK]", pad_token="[PAD]")


def make_home(home: Path) -> None:
    """Write a network with its weights and arrays, two models of transformers, and texts."""
    (home / "net.py").write_text(NET)
    torch.manual_seed(0)
    save_file(dict(Net().state_dict()), str(home / "net.safetensors"))
    random = numpy.random.default_rng(0)
    numpy.savez(home / "inputs.npz", x=random.standard_normal((64, 32)).astype("float32"))
    (home / "q.yaml").write_text("overrides: {second: float}\n")
    (home / "rtn.json").write_text('{"bits": 4, "group_size": 32, "use_full_range": true}')
    (home / "short.json").write_text('{"bits": 4, "group_size": 32}')
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64,
    }  # fmt: skip
    BertModel(BertConfig(**sizes)).save_pretrained(home / "my-bert")
    LlamaForCausalLM(LlamaConfig(**sizes | {"num_hidden_layers": 2})).save_pretrained(
        home / "my-llm"
    )
    for folder in ("my-bert", "my-llm"):
        tokenizer().save_pretrained(home / folder)
    lines = [" ".join(random.choice(WORDS, size=5 + i % 12)) for i in range(40)]
    (home / "texts.txt").write_text("\n".join(lines) + "\n")


def linked(models: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a test's own, in which it works and in which what is in ``models`` lies too."""
    for each in models.iterdir():
        if each.name != "__pycache__":
            (home / each.name).symlink_to(each)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    return home


def run(*arguments: str, expect: int = 0, stdin: str | None = None) -> Result:
    """Run a command in this process; its exit code is compared with ``expect``."""
    sys.modules.pop("net", None)  # the folder of another test had one too
    result = CliRunner().invoke(cli, [*arguments], input=stdin, prog_name="torch-quant")
    assert result.exit_code == expect, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    return result


def data_of(*arguments: str, expect: int = 0) -> Any:
    """What a command prints as JSON."""
    return json.loads(run(*arguments, "--json", expect=expect).stdout)


def entries(folder: Path) -> set[str]:
    """Everything in a folder, hidden names too."""
    return {each.name for each in folder.iterdir() if each.name != "__pycache__"}
