"""Every operator that is known, one family a file. Importing this package fills the table."""

from torch_quant.ops import attention, embedding_bags, experts, products, recurrent, whole

__all__ = ["attention", "embedding_bags", "experts", "products", "recurrent", "whole"]
