"""Operators in the forms that ONNX runtimes match on: one pass a file.

They change forms and leave numbers as they are, up to the rounding of a bias. ``GRIDS`` alone
change numbers, so a simulation applies them too.
"""

from torch_quant.backends.onnx.forms.attention import attention_forms
from torch_quant.backends.onnx.forms.biases import integer_bias
from torch_quant.backends.onnx.forms.blocked_weights import blocked_weights
from torch_quant.backends.onnx.forms.keep_grids import keep_grids
from torch_quant.backends.onnx.forms.linears import linear_forms_2d
from torch_quant.backends.onnx.forms.move_codes import move_codes
from torch_quant.backends.onnx.forms.paddings import explicit_padding
from torch_quant.backends.onnx.forms.pools import padding_before_pools
from torch_quant.backends.onnx.forms.read_codes import read_codes
from torch_quant.passes.base import Pass
from torch_quant.passes.decomposed import to_decomposed
from torch_quant.passes.embeddings import embedding_forms
from torch_quant.passes.fold_scales import fold_scales

__all__ = ["FORMS", "GRIDS"]

GRIDS: tuple[Pass, ...] = (keep_grids, read_codes)
"""Rows of the table ask for these: convolutions that give integers stay on integers."""

FORMS: tuple[Pass, ...] = (
    blocked_weights,
    fold_scales,
    attention_forms,
    move_codes,
    embedding_forms,
    explicit_padding,
    integer_bias,
    linear_forms_2d,
    padding_before_pools,
    to_decomposed,
)
"""From a graph with pairs to one that PyTorch's exporter translates."""
