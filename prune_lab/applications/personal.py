"""A model that learns to draw one subject from a few pictures: DreamBooth with prior preservation.

Half of each batch are pictures of the subject with a prompt that holds its token, the other half are pictures of its
class with the same prompt without the token, so that the model does not forget what others of the class look like
(arXiv:2208.12242, equation 2). The loss is the task loss of the distillation. Either the whole model is trained or a
LoRA on its attentions; text encoders stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.config import DistillConfig
from prune_lab.distill.batches import Batch, draw_batch
from prune_lab.distill.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from prune_lab.distill.data import LatentData
from prune_lab.distill.losses import task_errors
from prune_lab.errors import ConfigError, DataError, DeviceError, RunError, UnsupportedModelError
from prune_lab.families import known_conditions
from prune_lab.live_bytes import LiveBytes
from prune_lab.probes import schedule_of
from prune_lab.runtime import device_of, note, pick_dtype, synchronize, tensors_digest, track

ADAPTER = "subject"  # the name of a LoRA while it is trained
_MOST = 1e30  # of a rate or a weight: what float32 still holds when it is multiplied
WHOLE_RATE, LORA_RATE = 1e-6, 1e-4  # BK-SDM's learning rates for Stable Diffusion
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, as in the scripts of diffusers
_MOST_RANK = 1024
_MOST_PICTURES = 16  # of a prompt, before and after: as many columns as a figure holds
_KEPT_EVERY = 100  # steps after which the state is written, and at most lost
_LOOKS = 8  # batches over which the loss is told, before and after
_UNSEEN = 10**9  # the first of their steps, which no training comes to
_BETAS, _DECAY, _CLIP = (0.9, 0.999), 1e-2, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PersonalSettings:
    """What the subject is called, and how it is learnt; the numbers are BK-SDM's for Stable Diffusion."""

    token: str
    """Words that are to mean the subject, such as ``sks11df``."""
    subject_class: str
    """What it is one of, such as ``dog``."""
    template: str = "a photo of {}"
    """The prompt, with ``{}`` in the place of the subject."""
    lora: int = 0
    """Rank of a LoRA; 0: the whole model is trained."""
    steps: int = 800
    batch: int = 1
    """Pictures of the subject per step, and as many of the class."""
    learning_rate: float = 0.0
    """0: 1e-6 for the whole model, 1e-4 for a LoRA."""
    prior_weight: float = 1.0
    """Of the loss on the pictures of the class; 0: there are none."""
    class_count: int = 200
    """Pictures of the class that the model draws where none are given."""
    class_steps: int | None = None
    """Denoising steps of each of these, and of what is drawn before and after; None: as the model is meant to draw, 25
    of most.
    """
    guidance: float | None = None
    """Of all that is drawn; None: as the model is meant to draw, 7.5 of most."""
    seed: int = 0
    precision: str = "float32"
    """Number format of the forward passes, float32 or bfloat16; weights are trained in float32."""
    gradient_checkpointing: bool = False
    pictures: int = 2
    """Of each prompt, drawn before and after, to see what was learnt; 0: none are drawn."""
    context: str = ""
    """A prompt, with ``{}`` for the subject, that shows it elsewhere; empty: the template, on the beach."""

    def __post_init__(self) -> None:
        def check(right: bool, name: str, rule: str) -> None:
            if not right:
                raise ConfigError(f"asked for {name} = {getattr(self, name)!r:.60}; give {rule}")

        check(bool(self.token.strip()), "token", "words that are to mean the subject, such as sks11df")
        check(bool(self.subject_class.strip()), "subject_class", "what the subject is one of, such as dog")
        check(
            self.template.count("{}") == 1, "template", "a prompt with one {} in it, such as 'a photo of {}'"
        )
        check(
            not self.context or self.context.count("{}") == 1,
            "context",
            "a prompt with one {} in it, such as 'a painting of {} at sea'",
        )
        check(
            type(self.lora) is int and 0 <= self.lora <= _MOST_RANK,
            "lora",
            f"a rank from 1 to {_MOST_RANK:,}, or nothing to train the whole model",
        )
        check(
            type(self.pictures) is int and 0 <= self.pictures <= _MOST_PICTURES,
            "pictures",
            f"a whole number from 0, for none, to {_MOST_PICTURES}",
        )
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("class_count", 1),
            ("class_steps", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            unsaid = name == "class_steps" and value is None
            check(
                unsaid or (type(value) is int and least <= value < 2**31),
                name,
                f"a whole number from {least} to {2**31 - 1:,}",
            )
        for name in ("learning_rate", "prior_weight", "guidance"):
            value = getattr(self, name)
            unsaid = name == "guidance" and value is None
            check(unsaid or 0 <= value <= _MOST, name, f"a number from 0 to {_MOST:g}")
        check(self.precision in ("float32", "bfloat16"), "precision", "float32 or bfloat16")

    def _named(self, template: str) -> str:
        return template.replace("{}", f"{self.token.strip()} {self.subject_class.strip()}")

    @property
    def prompt(self) -> str:
        """The prompt that is to mean the subject."""
        return self._named(self.template)

    @property
    def class_prompt(self) -> str:
        """The prompt of the pictures of the class."""
        return self.template.replace("{}", self.subject_class.strip())

    @property
    def shown_prompts(self) -> tuple[str, str, str]:
        """What is drawn before and after: the subject, the subject elsewhere, and its class."""
        context = self.context or f"{self.template} on the beach"
        return self.prompt, self._named(context), self.class_prompt

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (LORA_RATE if self.lora else WHOLE_RATE)


@dataclasses.dataclass(frozen=True, slots=True)
class Learnt:
    """How the training went; ``subject_loss`` and ``class_loss`` are before and after it, over the same noise."""

    subject_loss: tuple[float, float]
    class_loss: tuple[float, float] | None  # None without pictures of the class
    seconds: float
    steps_per_second: (
        float  # without the first two, in which memory is laid out and watched, where there are more
    )
    trained: int  # parameters that were trained
    peak_bytes: int
    """The most at one moment of a step: of the model, its optimiser and the step itself; on CUDA what torch held."""
    peak_of: str  # how it was measured


# What is trained ---------------------------------------------------------------------------------------------------


def _inside(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}.") for folder in folders)


def check_takes_lora(model: Any) -> None:
    """Raise UnsupportedModelError for a model whose class of diffusers takes no LoRA."""
    if not hasattr(model, "add_adapter"):
        raise UnsupportedModelError(
            f"asked for a LoRA on a {type(model).__name__}, found that diffusers loads none into this class; "
            "leave --lora away, and the whole model is trained"
        )


def _add_lora(model: Any, rank: int, frozen: Sequence[str], seed: int) -> list[nn.Parameter]:
    """The parameters of a new LoRA on all attentions of ``model`` outside of ``frozen``."""
    from peft import LoraConfig

    check_takes_lora(model)
    targets = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(_TARGETS) and not _inside(path, frozen)
    ]
    if not targets:
        raise UnsupportedModelError(
            "asked for a LoRA, found no attention left in the model to put it on; leave --lora away, and the whole "
            "model is trained"
        )
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=ADAPTER)
    return [parameter for name, parameter in model.named_parameters() if f".{ADAPTER}." in name]


def _trained(model: Any, settings: PersonalSettings, frozen: Sequence[str]) -> list[nn.Parameter]:
    """The parameters that are trained, which alone want gradients."""
    model.requires_grad_(False)
    if settings.lora:
        found = _add_lora(model, settings.lora, frozen, settings.seed)
    else:
        found = [parameter for name, parameter in model.named_parameters() if not _inside(name, frozen)]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


# Memory ------------------------------------------------------------------------------------------------------------


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextlib.contextmanager
def _watched(model: nn.Module, optimiser: torch.optim.Optimizer, found: list[int]) -> Iterator[None]:
    """Inside one step is taken; the most bytes of model, optimiser and step are appended to ``found``."""
    states = [value for one in optimiser.state.values() for value in one.values() if torch.is_tensor(value)]
    known = _bytes([*model.parameters(), *model.buffers(), *states])
    with LiveBytes(model) as live:
        yield
    found.append(known + live.peak)


# Training ----------------------------------------------------------------------------------------------------------


def _drawn(
    data: Sequence[LatentData], scheduler: Any, settings: PersonalSettings, step: int, model: Any
) -> Batch:
    """The batch of a step: as many rows of each of ``data``, with noise and timesteps of their own."""
    device, conditions = device_of(model), known_conditions(model)
    batches = []
    for number, one in enumerate(data):
        how = DistillConfig(batch=settings.batch, caption_dropout=0.0, seed=2 * settings.seed + number)
        batches.append(draw_batch(one, scheduler, how, step, device, conditions=conditions))
    return batches[0] if len(batches) == 1 else batches[0].followed_by(batches[1])


def _measured(
    model: Any, data: Sequence[LatentData], scheduler: Any, settings: PersonalSettings
) -> tuple[float, float]:
    """(the loss on the subject, that on its class, NaN without pictures of it), over noise that no step trains on.

    Losses of single steps are of other timesteps each, which differ more than the training changes them.
    """
    precision, size = pick_dtype(settings.precision), settings.batch
    model.eval()
    with torch.no_grad():
        found = [
            task_errors(
                model, _drawn(data, scheduler, settings, _UNSEEN + number, model), precision=precision
            )
            for number in range(_LOOKS)
        ]
    errors = torch.stack(found).float()
    return float(errors[:, :size].mean()), float(errors[:, size:].mean())


def _fingerprint(
    model: Any, data: Sequence[LatentData], scheduler: Any, settings: PersonalSettings, frozen: Sequence[str]
) -> dict[str, Any]:
    """What a training must have in common with the one that it goes on from; taken before the first step."""
    decide = ("lora", "batch", "prior_weight", "seed", "precision", "gradient_checkpointing")
    return {
        **{name: getattr(settings, name) for name in decide},
        "learning_rate": settings.rate,
        "frozen": list(frozen),
        "model": tensors_digest(dict(model.named_parameters())),
        "data": [tensors_digest(one.tensors()) for one in data],
        "prediction": schedule_of(scheduler.config).kind,
    }


def _go_on(path: Path, state: TrainingState, fingerprint: dict[str, Any], steps: int) -> None:
    """Set ``state`` to that in ``path``, where there is one. Raises RunError for that of another training."""
    if not path.is_file():
        return
    load_checkpoint(path, state, fingerprint)
    if state.step >= steps:
        raise RunError(
            f"asked for {steps} steps of training, found {state.step} taken in {path.name}; ask for more, or --force "
            "to start again"
        )
    note(f"going on from step {state.step} in {path.name}")


def learn_subject(
    model: Any,
    scheduler: Any,
    subject: LatentData,
    others: LatentData | None,
    settings: PersonalSettings,
    *,
    frozen: Sequence[str] = (),
    state_file: Path | None = None,
) -> Learnt:
    """Train ``model``, where it lies, on the ``subject`` and on ``others`` of its class; it is left in eval mode.

    With ``settings.lora`` the model then has an adapter called ``subject``, else other weights. ``frozen`` are paths of
    modules that stay as they are. Batches depend on seed and step alone, so a training that was stopped goes on from
    ``state_file``, written every hundred steps, on a CPU bit for bit as if never stopped; it is there until the caller
    has kept what was learnt, and removes it. Raises RunError for a state of another training, DataError when the
    loss is not finite, DeviceError for a model in another format than float32, UnsupportedModelError where a LoRA has
    no place.
    """
    if next(model.parameters()).dtype != torch.float32:
        raise DeviceError(
            f"asked to train weights in {next(model.parameters()).dtype}, where small changes are rounded away; load "
            "the model in float32, and ask for bfloat16 passes with --precision"
        )
    data = [subject] if others is None or not settings.prior_weight else [subject, others]
    fingerprint = _fingerprint(model, data, scheduler, settings, frozen) if state_file is not None else {}
    parameters = _trained(model, settings, frozen)
    optimiser = torch.optim.AdamW(parameters, lr=settings.rate, betas=_BETAS, weight_decay=_DECAY)
    device, precision = device_of(model), pick_dtype(settings.precision)
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    peaks: list[int] = []
    state = TrainingState(model, optimiser, None, step=0, seconds=0.0, history=[])
    first = _measured(model, data, scheduler, settings)  # ahead of what was learnt before a stop
    if state_file is not None:
        _go_on(state_file, state, fingerprint, settings.steps)
    begun, before = state.step, state.seconds
    aside, aside_seconds = min(2, settings.steps - begun - 1), 0.0
    model.train()
    try:
        start = time.perf_counter()
        for step in track(range(begun + 1, settings.steps + 1), "learning the subject", unit="steps"):
            batch = _drawn(data, scheduler, settings, step, model)
            # the second step is the first in which the optimiser's state is there
            watched = not cuda and step == min(begun + 2, settings.steps)
            with _watched(model, optimiser, peaks) if watched else contextlib.nullcontext():
                errors = task_errors(model, batch, precision=precision)
                own, prior = errors[: settings.batch].mean(), errors[settings.batch :]
                loss = own + settings.prior_weight * prior.mean() if len(prior) else own
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, _CLIP)
            if not math.isfinite(loss.item()):
                raise DataError(
                    f"asked to learn the subject, found a loss of {loss.item()} in step {step}; give a smaller "
                    "--learning-rate, or --precision float32"
                )
            optimiser.step()
            state.history.append((own.item(), prior.mean().item() if len(prior) else math.nan))
            state.step, state.seconds = step, before + time.perf_counter() - start
            if state_file is not None and step % _KEPT_EVERY == 0 and step < settings.steps:
                save_checkpoint(state_file, state, fingerprint)
            if step == begun + aside:
                synchronize(device)
                aside_seconds = time.perf_counter() - start
        synchronize(device)
        seconds = time.perf_counter() - start
    finally:
        if settings.gradient_checkpointing:
            model.disable_gradient_checkpointing()
        model.eval().requires_grad_(False)
    last = _measured(model, data, scheduler, settings)
    return Learnt(
        (first[0], last[0]),
        (first[1], last[1]) if len(data) > 1 else None,
        before + seconds,
        (settings.steps - begun - aside) / (seconds - aside_seconds),
        sum(parameter.numel() for parameter in parameters),
        int(torch.cuda.max_memory_allocated(device)) if cuda else max(peaks),
        "held by torch on CUDA" if cuda else "live tensors of model, optimiser and one step",
    )
