"""Which architecture of those in every run shows an operator that some architecture has.

``test_zoo`` holds it from both sides: whatever is captured of an architecture stands here, which
``make test-long`` tries with all of them, and each of these has what it is to show. So what every
run leaves out has no operator that it does not try.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_quant.graph.capture import CapturedModule
from torch_quant.ops.functions import operator_name, path_of

__all__ = ["SHOWN", "operators_of", "same_torch"]

same_torch = torch.__version__.startswith("2.13.")
"""Whether models are exported to the operators that this table has, which differ with torch."""


def operators_of(root: CapturedModule) -> set[str]:
    """The operators in what was captured of a model, and those that multiply in its Python code."""
    found = {name for each in root.walk() for name in each.glue_macs}
    for each in root.walk():
        for _, graph in each.graphs:
            found |= {_name(x) for x in graph.gm.graph.nodes if x.op == "call_function"}
    return found


def _name(node: Any) -> str:
    return operator_name(node.target) or path_of(node.target)


SHOWN = {
    name: frozenset(operators.split())
    for name, operators in {
        "deberta": "aten.item.default",
        "deberta_v2": """
        operator.mul aten.__and__.Tensor aten.abs.default aten.add.Tensor aten.add_.Tensor
        aten.alias.default aten.arange.default aten.bitwise_not.default aten.bmm.default
        aten.ceil.default aten.clamp.default aten.contiguous.default aten.detach_.default
        aten.div.Tensor aten.dropout.default aten.embedding.default aten.expand.default
        aten.gather.default aten.gelu.default aten.gt.Scalar aten.layer_norm.default aten.le.Scalar
        aten.lift_fresh_copy.default aten.linear.default aten.log.default aten.lt.Scalar
        aten.masked_fill.Scalar aten.mul.Tensor aten.neg.default aten.permute.default
        aten.repeat.default aten.sign.default aten.slice.Tensor aten.softmax.int aten.sqrt.default
        aten.squeeze.dim aten.sub.Tensor aten.sym_size.int aten.to.device aten.to.dtype
        aten.transpose.int aten.type_as.default aten.unsqueeze.default aten.view.default
        aten.where.self
    """,
        "funnel": """
        operator.neg aten.__or__.Tensor aten.arange.start_step aten.avg_pool2d.default
        aten.einsum.default aten.eq.Tensor aten.mul_.Tensor aten.pow.Scalar aten.reciprocal.default
        aten.repeat_interleave.self_int aten.rsub.Scalar aten.select.int aten.split.Tensor
        aten.tanh.default aten.zeros.default
    """,
        "convbert": "aten.multiply.Tensor",
        "modernbert": "aten.unbind.int",
        "fnet": "aten.fft_fftn.default aten.real.default",
        "gpt2": "aten.addmm.default",
        "gemma2": "aten.gt.Tensor",
        "bloom": """
        aten.arange.start aten.baddbmm.default aten.full.default aten.pow.Tensor_Tensor
    """,
        "falcon": "aten.numpy_T.default",
        "mpt": "torch.sym_max",
        "mixtral": """
        operator.getitem aten.cat.default aten.chunk.default aten.cos.default aten.cumsum.default
        aten.div_.Tensor aten.empty_like.default aten.floor_divide.default aten.histc.default
        aten.index.Tensor aten.index_put_.default aten.le.Tensor aten.mean.dim aten.new_ones.default
        aten.pow.Tensor_Scalar aten.reshape.default aten.rsqrt.default
        aten.scaled_dot_product_attention.default aten.silu.default aten.sin.default
        aten.sort.default aten.sum.dim_IntList aten.to.dtype_layout aten.topk.default
        transformers.grouped_mm_fallback.default
    """,
        "t5": "aten.full_like.default aten.min.other aten.zeros_like.default",
        "resnet": "aten.max_pool2d.default",
        "mobilenet_v1": """
        aten.adaptive_avg_pool2d.default aten.dropout_.default aten.hardtanh.default
    """,
        "beit": """
        aten.copy_.default aten.fill_.Tensor aten.meshgrid.indexing aten.scalar_tensor.default
        aten.stack.default aten.upsample_bilinear2d.vec
    """,
        "dinov2": "operator.pow",
        "yolos": "aten.upsample_bicubic2d.vec",
        "vit_mae": "aten.argsort.default aten.ones.default torch.sym_min",
        "swinv2": """
        operator.add operator.floordiv operator.mod operator.sub
        aten.adaptive_avg_pool1d.default aten.clamp_min.default aten.conv2d.default aten.eq.Scalar
        aten.exp.default aten.expand_as.default aten.flatten.using_ints aten.ge.Scalar
        aten.linalg_vector_norm.default aten.matmul.default aten.ne.Scalar aten.pad.default
        aten.relu_.default aten.roll.default aten.sigmoid.default
    """,
        "mobilevitv2": """
        aten.batch_norm.default aten.col2im.default aten.group_norm.default aten.im2col.default
        aten.split_with_sizes.default
    """,
        "levit": "aten.hardswish.default aten.reshape_as.default",
        "sew": "aten._weight_norm.default aten.avg_pool1d.default",
        "whisper": "aten.diff.default",
        "speech_to_text": """
        aten.conv1d.default aten.detach.default aten.flip.default aten.glu.default
        aten.index_select.default aten.relu.default aten.where.ScalarOther
    """,
        "hifigan": "aten.conv_transpose1d.default aten.leaky_relu.default",
        "clip": "aten.argmax.default",
        "siglip": "aten.conv2d.padding aten.t.default aten.unflatten.int",
    }.items()
}
