"""What rounding a model a block at a time has done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BlockError", "Rounding"]


_HEADERS = ("block", "weights", "methods", "SQNR, dB", "seconds")


@dataclass(frozen=True)
class BlockError:
    """One block.

    Args:
        path: in the model; empty for what lies outside of all blocks.
        sites: that were rounded.
        methods: names of the methods and transforms, in their order.
        sqnr: of the block's result on the inputs of the rounded model, dB: what this block alone
            adds. NaN where it was not measured.
        seconds: that it took.
    """

    path: str
    sites: tuple[str, ...]
    methods: tuple[str, ...]
    sqnr: float
    seconds: float


@dataclass(frozen=True)
class Rounding:
    """What :meth:`Quantizer.round_weights` has done; ``print`` shows a table.

    Args:
        blocks: in the order in which they were rounded.
    """

    blocks: tuple[BlockError, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites that were rounded."""
        return tuple(site for block in self.blocks for site in block.sites)

    @property
    def seconds(self) -> float:
        """Time of all blocks."""
        return sum(block.seconds for block in self.blocks)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            (
                block.path or "(outside of blocks)",
                len(block.sites),
                ", ".join(block.methods),
                "" if block.sqnr != block.sqnr else f"{block.sqnr:.1f}",
                f"{block.seconds:.1f}",
            )
            for block in self.blocks
        ]
        head = f"{len(self.sites)} weights rounded in {self.seconds:.0f} s"
        return f"{head}\n{tabulate(rows, _HEADERS, tablefmt='simple')}"
