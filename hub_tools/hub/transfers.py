"""How huggingface_hub moves files: by which protocol, with which progress bars, and with which warnings.

Imports the standard library and huggingface_hub (0.36 and newer), whose settings it changes for a while.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def without_xet() -> Iterator[None]:
    """Have huggingface_hub upload by LFS, also where hf_xet is installed."""
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def bars_only_on_a_terminal() -> Iterator[None]:
    """Have huggingface_hub draw no progress bars into log files, where each of their steps is a line."""
    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def no_warning_of_empty_downloads() -> Iterator[None]:
    """Keep huggingface_hub from listing our patterns where no file fits one: an error of ours says what is there."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger = logging.getLogger("huggingface_hub._snapshot_download")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
