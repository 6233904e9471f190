"""The float weights of a checkpoint, read when a module is to compute with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_quant.checkpoints.files import CheckpointFiles
from torch_quant.checkpoints.layout import FLOATS
from torch_quant.checkpoints.skeletons import (
    listed,
    placeholder,
    put_tensors,
    tensors_of,
    tied_names,
)
from torch_quant.errors import InvalidConfig

__all__ = ["FloatFiles"]


class FloatFiles:
    """Gives a hollow model its buffers, and later its weights.

    Args:
        files: the checkpoint.
        model: of its class; it gets placeholders for weights.
        whole: give it all but the weights of linear layers at once.

    Raises:
        InvalidConfig: the checkpoint is of another model; says which file and tensor.
    """

    def __init__(self, files: CheckpointFiles, model: nn.Module, *, whole: bool) -> None:
        self.files = files
        wanted = tensors_of(model)
        self.names = tied_names(wanted)
        """Each name of each tensor -> all of them."""
        self._source: dict[str, str] = {}
        self._awaited: set[str] = set()
        self._computed: dict[str, Tensor] = {}
        """Buffers that the file lacks, as the model has made them."""
        linear = {
            f"{path}.weight".strip(".")
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear)
        }
        values: dict[str, Tensor] = {}
        missing = []
        for names in dict.fromkeys(self.names.values()):
            x = wanted[names[0]]
            source = next((name for name in names if name in files), None)
            parameter = isinstance(x, nn.Parameter)
            if source is None:
                if parameter or x.device.type == "meta":
                    missing.append(names[0])
                self._computed |= dict.fromkeys(names, x)
                continue
            files.check(source, tuple(x.shape), *(FLOATS if parameter else ()))
            self._source |= dict.fromkeys(names, source)
            if parameter and (not whole or linear.issuperset(names)):
                values |= dict.fromkeys(names, placeholder(tuple(x.shape)))
                self._awaited |= set(names)
            else:
                value = self.read(source)
                made = nn.Parameter(value, requires_grad=False) if parameter else value
                values |= dict.fromkeys(names, made)
        computed = {name for name, _ in model.named_buffers()}  # which older checkpoints hold, too
        extra = [name for name in files if name not in {*wanted, *computed}]
        if missing or extra:
            raise InvalidConfig(
                f"{files.folder} does not hold the tensors of a {type(model).__name__} by their "
                "names; it "
                + " and ".join(listed(missing, "lacks") + listed(extra, "has beside its tensors"))
                + ". Load it with transformers, and quantize the model"
            )
        put_tensors(model, values)
        files.close()

    def stored(self, name: str) -> Tensor:
        """A tensor as it lies in its file."""
        if name in self._computed:
            return self._computed[name]
        return self.files.tensor(self._source[name])

    def read(self, name: str) -> Tensor:
        """A tensor of the model by one of its names; a copy, float32 if it is of floats."""
        x = self.stored(name)
        return x.to(torch.float32 if x.is_floating_point() else x.dtype, copy=True)

    def fill(self, module: nn.Module, path: str) -> None:
        """Give one module, not those in it, the weights that it awaits."""
        for name in module._parameters:
            if (full := f"{path}.{name}".strip(".")) in self._awaited:
                value = nn.Parameter(self.read(full), requires_grad=False)
                module._parameters[name] = value

    def close(self) -> None:
        """Let go of the files, whose pages count as memory of the process."""
        self.files.close()
