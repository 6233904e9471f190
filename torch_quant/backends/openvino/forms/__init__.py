"""Operators in the forms that OpenVINO matches on, where they differ from ONNX's: one pass a file.

OpenVINO multiplies two activations in float where a zero point is not 0, or a reshape stands
between the quantizer of one and its dequantizer; refuses some layers whose rows are flattened to a
matrix; computes some convolutions wrong, as all do that call oneDNN; and does what follows a layer
of four dimensions in a pass of its own.
"""

from torch_quant.backends.convolutions import right_convolutions
from torch_quant.backends.onnx.forms import FORMS as ONNX_FORMS
from torch_quant.backends.onnx.forms import GRIDS as ONNX_GRIDS
from torch_quant.backends.onnx.forms.biases import integer_bias
from torch_quant.backends.onnx.forms.linears import linear_forms_2d
from torch_quant.backends.onnx.forms.move_codes import move_codes
from torch_quant.backends.openvino.forms.flat_rows import flat_rows
from torch_quant.backends.openvino.forms.float_groups import float_groups
from torch_quant.backends.openvino.forms.move_numbers import move_numbers
from torch_quant.backends.openvino.forms.signed_products import signed_products
from torch_quant.passes.base import Pass

__all__ = ["FORMS", "GRIDS"]

GRIDS: tuple[Pass, ...] = (*ONNX_GRIDS, signed_products)

_INSTEAD: dict[Pass, tuple[Pass, ...]] = {
    move_codes: (flat_rows, move_numbers),
    linear_forms_2d: (),
    integer_bias: (float_groups, right_convolutions, integer_bias),
}

FORMS: tuple[Pass, ...] = tuple(own for form in ONNX_FORMS for own in _INSTEAD.get(form, (form,)))
