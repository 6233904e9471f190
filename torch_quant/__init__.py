"""Quantize PyTorch models and run them on real int8 kernels."""
