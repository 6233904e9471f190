"""``nn.TransformerEncoder`` as a graph: zeros at padded positions, where PyTorch gives zeros.

Without gradients and with a padding mask, PyTorch's own encoder runs on nested tensors, which hold
no padding, and fills it with zeros afterwards. In all other cases padding has values of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_quant.graph.running import fastpath_wanted

__all__ = ["PaddedEncoder"]


class PaddedEncoder(nn.TransformerEncoder):
    """The twin of an ``nn.TransformerEncoder``: the same results, of operators that export."""

    stands_for = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As ``nn.TransformerEncoder``: ``src`` is (batch, length, width)."""
        output: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
        if (
            torch.backends.mha.get_fastpath_enabled()  # then PyTorch has done it
            or src_key_padding_mask is None
            or mask is not None
            or src.dim() != 3
            or not self._nests()
        ):
            return output
        padded = src_key_padding_mask != 0
        if getattr(self, "mask_check", True):
            kept = ~padded
            padded = padded & (kept[:, 1:] <= kept[:, :-1]).all()  # padding comes last
        zeros = output.new_zeros(1, 1, output.shape[-1])
        if self.norm is not None:
            zeros = self.norm(zeros)
        return torch.where(padded.unsqueeze(-1), zeros, output)

    def _nests(self) -> bool:
        if not fastpath_wanted() or not getattr(self, "use_nested_tensor", False):
            return False
        if torch.is_autocast_enabled():
            return False
        learns = any(x.requires_grad for x in self.layers[0].parameters())
        return not (torch.is_grad_enabled() and learns)
