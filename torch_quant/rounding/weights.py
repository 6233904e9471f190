"""Where the float weights of a model are while it is rounded: in it, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from torch_quant.core.rounded import RoundedWeights, checksum

__all__ = ["FloatWeights"]


class FloatWeights:
    """Weights that the model itself has; a subclass brings those of each block when it runs."""

    elsewhere = False
    """Whether the model has them only when they are lent, and who lends them takes the codes."""

    def begin(self, twin: nn.Module, blocks: Sequence[str]) -> None:
        """Give the model what lies outside of its blocks.

        Args:
            twin: of the model.
            blocks: paths of all of them.
        """

    def stored(self, name: str, x: nn.Parameter) -> Tensor:
        """The values of a parameter of the model, in any dtype.

        Args:
            name: of the parameter.
            x: as the model has it.
        """
        return x

    def checksums(self, model: nn.Module) -> Iterator[int]:
        """A number for the values of each parameter of the model."""
        for name, x in model.named_parameters():
            yield checksum(self.stored(name, x))

    @contextmanager
    def lent(self, path: str, block: nn.Module) -> Iterator[None]:
        """Give a block of the twin its float weights, and take them away.

        Args:
            path: of the block in the model.
            block: of the twin.
        """
        yield

    def take(self, made: RoundedWeights) -> None:
        """Take the codes of a block that is done."""
