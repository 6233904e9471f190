"""OpenVINO in this process."""

from torch_quant.backends.openvino.backend import OpenVINOBackend

__all__ = ["OpenVINOBackend"]
