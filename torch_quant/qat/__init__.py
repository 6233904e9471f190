"""Training through the quantization that is deployed: the twin, its rounding, the methods."""

from torch_quant.qat import fixed, lsq, lsq_plus, pact  # noqa: F401 - they register themselves
