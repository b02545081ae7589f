"""Logging of the package: plain lines with time and rank, so that a log file can be read afterwards."""

from __future__ import annotations

import logging
import os
import sys

import torch
from transformers.utils import logging as transformers_logging

from llava_cl.terminal import printable


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def setup_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Configures the root logger to write to standard error; ranks above 0 only warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain(f"%(asctime)s r{rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))
    for noisy in ("DeepSpeed", "accelerate", "transformers", "httpx", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import that it found no GPU
