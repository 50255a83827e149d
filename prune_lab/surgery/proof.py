"""What was written is loaded in another process, by plain diffusers, before its folder gets its name.

There it must have exactly the tensors that were promised, and be the same function: as the original with the removed
blocks bypassed, or the same tensors, to the bit, as the model that was saved. One process serves all proofs of this
one: it is started with the first, knows nothing of this process but the question, and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_lab.errors import ProofError
from prune_lab.models.answers import placed, random_inputs, refuse_silent

ProofKind = Literal["bypassed teacher", "same tensors", "loads", "same answer"]
MODULES = (
    "prune-lab-modules-"  # the folder for code that the other process runs, by the beginning of its name
)

# What a launcher of many processes leaves in the environment: the prover is a process of its own.
_LAUNCHER = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "OMPI_", "PMI_", "SLURM_")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_ALONE = {
    # one thread: sums are then added in one order, and nothing is taken from what else runs
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Original:
    """The model that a student was cut from, as the other process reads it: config, files and removed blocks."""

    config: Mapping[str, Any]
    files: Sequence[Path]  # safetensors
    removed: Sequence[str]  # names of blocks
    dtype: torch.dtype | None = None  # that plain diffusers is asked for, of both; None: float32 of both
    variant: str = ""  # of the names of its files
    exact: bool = True
    """Whether the answers must be equal to the bit; else but for rounding. A block that stays and does nothing may hand
    on its state with the channels last, and kernels round by how a state lies in memory."""
    widths: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    """By name of a site: the units that stay."""


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """What a fresh process found when it loaded a written folder with plain diffusers, and no argument but the folder.

    ``bypassed teacher``: the answer to the same random latents differs from that of the original without its removed
    blocks, and with what leaves of widths set to 0, by at most ``largest_difference``; where another format than
    float32 was asked for, plain diffusers loads both in that. ``same tensors``: each tensor equals that of the model
    that was saved. ``loads``: nothing was compared. ``same answer``: with a LoRA that was loaded onto it, the answer to
    random latents differs from that of the model that was trained by at most ``largest_difference``, a rounding.
    """

    kind: ProofKind
    parameters: int  # of the model
    largest_difference: float | None  # of any number of the answer; None where no answers were compared
    versions: Mapping[str, str]  # of what loaded it

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)


def tensors_in_float32(names: Iterable[str], take: Callable[[str], Tensor]) -> str:
    """16 hexadecimal digits over names, shapes and numbers of tensors, as they are once loaded in float32."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = take(name).detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def digest_of(model: nn.Module) -> str:
    """The digest of every tensor of ``model``; see ``tensors_in_float32``."""
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors_in_float32(tensors, tensors.__getitem__)


# The other process -------------------------------------------------------------------------------------------------


class _Prover:
    """The process that loads what was written; it is started when it is first needed and ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._words: IO[bytes] | None = None  # what it says on its standard error
        self._owner = 0
        self._modules: Path | None = None  # where diffusers copies code that it runs, if there is any

    def start(self) -> subprocess.Popen[str]:
        """The process; a new one where there is none, or only that of the process from which this one was forked."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.stop()
            kept = {
                name: value
                for name, value in os.environ.items()
                if name not in _RANKS and not name.startswith(_LAUNCHER)
            }
            paths = [str(Path(__file__).resolve().parents[2]), kept.get("PYTHONPATH", "")]
            self._owner, self._words = os.getpid(), tempfile.TemporaryFile()  # noqa: SIM115
            # Made by diffusers when it is needed; the process removes it at its end, also when this one was killed.
            self._modules = Path(tempfile.gettempdir(), f"{MODULES}{secrets.token_hex(16)}")
            own = {
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "HF_MODULES_CACHE": str(self._modules),  # its own: others read theirs while a copy is written
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prune_lab.surgery.prover"],
                env=kept | _ALONE | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
                encoding="utf-8",
            )
        return self._process

    def stop(self) -> None:
        """End the process where it belongs to this one, and let go of it in any case."""
        process, self._process = self._process, None
        words, self._words = self._words, None
        modules, self._modules = self._modules, None
        if process is not None:
            if self._owner == os.getpid():
                process.kill()
                process.wait()
            if modules is not None and self._owner == os.getpid():
                shutil.rmtree(modules, ignore_errors=True)
            for stream in (process.stdin, process.stdout, words):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was to be flushed has no reader any more
                        stream.close()

    def _answer(self, line: str) -> str:
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        return process.stdout.readline()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What the process answers. Raises ProofError when it dies instead."""
        line = json.dumps(question) + "\n"
        with self._lock:
            try:
                answer = self._answer(line)
                if (
                    not answer and self.start().wait() == 0
                ):  # it had ended after a long time without a question
                    answer = self._answer(line)
                if answer:
                    found: dict[str, Any] = json.loads(answer)
                    return found
            except BaseException:  # also when the user breaks off: its answer would be taken for the next one
                self.stop()
                raise
            why = self._why_it_died()
            self.stop()
            raise ProofError(why)

    def _why_it_died(self) -> str:
        assert self._process is not None
        assert self._words is not None
        code = self._process.wait()
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip().splitlines()
        why = said[-1] if said else "it may have been killed for its memory"
        return f"the process that loads what was written ended with {code}: {why}"


_PROVER = _Prover()
atexit.register(_PROVER.stop)


def get_ready_to_prove() -> None:
    """Start the other process, so that it is ready when what is written now is complete; it takes seconds to import."""
    _PROVER.start()


# Proofs ------------------------------------------------------------------------------------------------------------


def _told(question: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the other process found of ``folder``. Raises ProofError where that is not what it should be."""
    try:
        found = _PROVER.ask(question)
        if found["error"]:
            raise ProofError(found["error"].replace(str(Path(folder).resolve()), str(folder)))
    except ProofError as error:
        raise ProofError(
            f"asked to write {folder}; loaded by plain diffusers in a process of its own it is not what it should be: "
            f"{error}; nothing was left of it"
        ) from None
    return found


def prove(
    folder: Path,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    original: Original | None = None,
    digest: str = "",
    variant: str = "",
    answers: bool = False,
) -> Proof:
    """That plain diffusers loads the pipeline or model ``folder`` in a fresh process, all of it in one number format.

    ``shapes`` are those of every tensor of its model by name. ``original`` is what the model must equal without its
    removed blocks, ``digest`` that of its tensors (``digest_of``). ``variant`` is that of the names of its files. With
    ``answers`` each part is asked whether its answers differ. Raises ProofError when anything differs, or when it does
    not load, ModelFormatError when a part answers the same to every input.
    """
    place = str(Path(folder).resolve())
    question = {
        "folder": place,
        "variant": variant,
        "shapes": None if shapes is None else {name: list(shape) for name, shape in shapes.items()},
        "digest": digest,
        "answers": answers,
        "original": original
        and {
            "config": dict(original.config),
            "files": [str(Path(path).resolve()) for path in original.files],
            "removed": list(original.removed),
            "widths": {site: list(kept) for site, kept in original.widths.items()},
            "dtype": original.dtype and str(original.dtype).removeprefix("torch."),
            "exact": original.exact,
            "variant": original.variant,
        },
    }
    found = _told(question, folder)
    refuse_silent(found["complaint"], str(folder))
    kind: ProofKind = "bypassed teacher" if original else "same tensors" if digest else "loads"
    return Proof(kind, found["parameters"], found["difference"], found["versions"])


def prove_lora(
    pipeline: Path, lora: Path, model: Any, layers: Mapping[str, Tensor], *, variant: str = ""
) -> Proof:
    """That plain diffusers loads the LoRA in the folder ``lora`` onto the ``pipeline`` folder in a fresh process.

    There it must have the tensors ``layers``, and its model must give the answer to random latents that ``model``, on
    the CPU in float32 and with the LoRA, gives here. Raises ProofError when it does not, or when it does not load.
    """
    own = placed(random_inputs(model), model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as place:
        answer = model(**own, return_dict=False)[0].float().cpu().contiguous()
        save_file({"answer": answer}, Path(place, "answer.safetensors"))
        question = {
            "folder": str(Path(pipeline).resolve()),
            "variant": variant,
            "shapes": None,
            "digest": tensors_in_float32(layers, layers.__getitem__),
            "answers": False,
            "original": None,
            "lora": {"folder": str(Path(lora).resolve()), "answer": str(Path(place, "answer.safetensors"))},
        }
        found = _told(question, lora)
    return Proof("same answer", found["parameters"], found["difference"], found["versions"])
