"""Summaries of IPEX: what ``save_qconf_summary`` wrote."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from torch_quant.io.ipex_summary import read_ipex_summary
from torch_quant.migrate.ranges import migration_of, sites_of
from torch_quant.migrate.result import Migration, Rows

__all__ = ["from_ipex"]


def from_ipex(source: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> Migration:
    """The decisions and ranges of a summary of IPEX, for the sites of a model.

    Weights have scales that follow from them. What the summary has in float, or has not, stays in
    float.

    Args:
        source: a file that IPEX's ``prepared.save_qconf_summary(path)`` wrote.
        model: the float model that it is of.
        example_inputs: one call of the model, as for :meth:`Quantizer.calib`.

    Raises:
        InvalidConfig: it is no such file, or of another model.

    >>> import torch
    >>> from_ipex("none.json", nn.Linear(4, 2), torch.ones(1, 4))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: none.json is no summary of IPEX's save_qconf_summary: ...
    """
    rows = Rows()
    plan, ranges, left = read_ipex_summary(source, sites_of(model, example_inputs))
    for operator in left:
        rows.left_out(operator, "no site stands for it: it is no product, or is part of one")
    return migration_of(f"{source}, a summary of IPEX", plan, ranges, rows)
