"""Every error the package raises on purpose. Each message names the place, the fact and the fix."""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CaptureFailed",
    "InvalidConfig",
    "NotCalibrated",
    "QuantError",
    "UnsupportedOp",
]


class QuantError(RuntimeError):
    """Base of all errors of torch_quant."""


class NotCalibrated(QuantError):
    """A range is needed that no calibration data has given, or that no longer fits the model."""


class CaptureFailed(QuantError):
    """The model, or a call of it, could not be turned into a graph."""

    leaves_behind: tuple[str, ...] = ()
    """Attributes that the call writes, as ``child.attribute``, where that is known."""

    def leaving(self, names: tuple[str, ...]) -> CaptureFailed:
        """This error, knowing them.

        >>> CaptureFailed("it writes").leaving(("encoder.cache",)).leaves_behind
        ('encoder.cache',)
        """
        self.leaves_behind = names
        return self


class UnsupportedOp(QuantError):
    """An operator, or its dtype, has no quantized form in the chosen backend."""


class BackendUnavailable(QuantError):
    """The runtime a backend needs is missing or too old; the message says what to install."""


class InvalidConfig(QuantError, ValueError):
    """A specification contradicts itself, the backend or the model."""
