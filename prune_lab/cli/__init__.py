"""The command line: ``prune-lab VERB``, one file and one thin function per verb; torch is imported inside the verb."""

from __future__ import annotations

import logging

# In the order in which --help lists them.
from prune_lab.cli import blocks, profile, score, search, compare, prune, narrow, generate  # noqa: F401 # isort: skip
from prune_lab.cli import export, convert, push  # noqa: F401 # isort: skip
from prune_lab.cli import personalise, img2img, steps, distill_steps  # noqa: F401 # isort: skip
from prune_lab.cli import data, distill, rank, evaluate, report, run, doctor, config  # noqa: F401 # isort: skip
from prune_lab.cli.application import app

__all__ = ["app", "main"]

# diffusers imports torchao where ExecuTorch brought it, and these tell of what it lacks on this machine
_TALKERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def main() -> None:
    """Answer the command in ``sys.argv``; ends with one of ``prune_lab.exit_codes``."""
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    app(prog_name="prune-lab")
