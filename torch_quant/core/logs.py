"""Warnings say whose they are, also where nobody has set up logging."""

from __future__ import annotations

import logging

__all__ = ["name_messages"]

_logger = logging.getLogger("torch_quant")


class _Named(logging.Filter):
    """Puts the package's name before a message that Python shows without one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything pass."""
        if not _logger.hasHandlers():  # Python's last resort shows the message alone
            record.msg = f"{_logger.name}: {record.msg}"
        return True


def name_messages() -> None:
    """Begin each message with ``torch_quant:`` unless handlers show the logger's name.

    >>> name_messages()
    >>> len([each for each in _logger.filters if isinstance(each, _Named)])
    1
    """
    if not any(isinstance(each, _Named) for each in _logger.filters):
        _logger.addFilter(_Named())
