"""The command ``torch-quant``: what the package does, without a line of Python.

It stands beside the package, not in it, so that ``--help`` and completing a word need not import
PyTorch, as ``import torch_quant`` does. Commands import the package when they run.
"""
