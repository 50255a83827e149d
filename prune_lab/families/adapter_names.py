"""How files of additions to a U-Net (LoRA, IP-Adapter) name its modules, and what becomes of the names in a student.

Four spellings of a module are known: diffusers' path (``down_blocks.0...to_q``), the same with underscores as kohya
writes it, and the path in the LDM layout (``input_blocks.1.1...to_q``) either way. Each file keeps its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import CLASS_NAME, Layout, family_of, is_own, meta_model
from prune_lab.families.ldm_keys import unet_places
from prune_lab.families.unet2d_condition import UNET2D_CONDITION

# Beginnings of keys that are about a text encoder or its vocabulary: pruning does not touch them.
TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_", "bundle_emb.")
# Beginnings of the keys of a U-Net, and whether what follows is spelled with underscores; the bare one comes last.
_UNET_PREFIXES = (
    ("lora_unet_", True),
    ("lycoris_", True),
    ("base_model.model.unet.", False),
    ("base_model.model.", False),
    ("model.diffusion_model.", False),
    ("diffusion_model.", False),
    ("unet.", False),
    ("", False),
)
# diffusers' first format holds a LoRA inside of the processor of an attention
_PROCESSOR = re.compile(r"processor\.(to_[qkv]|to_out)_lora\.(?P<rest>.+)")


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleKey:
    """A key of a file of additions, taken apart; ``key`` is all of it."""

    key: str
    module: str
    """diffusers' path in the teacher of the module that the tensor is added to."""
    new_key: str | None
    """The key in the file for the student; None where the student does not have the module."""
    rest: str
    """What the tensor is for that module: ``lora_A.weight``, ``alpha``."""

    @property
    def renamed(self) -> bool:
        """Whether the module has another name in the student."""
        return self.new_key not in (None, self.key)

    @property
    def in_ldm_layout(self) -> bool:
        """Whether the key counts the blocks as the LDM layout does."""
        return bool(re.search(r"(input|output)_blocks|middle_block", self.key))


def _ldm_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The LDM path of each module of ``config`` that has weights, by diffusers' path; empty where it has no place."""
    try:
        places = unet_places(config)
    except UnsupportedModelError:
        return {}
    return {place.sources[0].rpartition(".")[0]: place.key.rpartition(".")[0] for place in places}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AdapterNames:
    """The modules of a teacher by every spelling, with their names in a student and the shapes of their weights."""

    spelled: Mapping[str, str]
    """Spelled with dots: module of the teacher."""
    written: Mapping[str, str | None]
    """Spelled with dots: the same spelling in the student, None where the module is gone."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of the weight of each module of the teacher, by its path."""
    underscored: Mapping[str, str]
    """Spelled with underscores: spelled with dots."""

    def of(self, key: str) -> ModuleKey | None:
        """The parts of ``key``; None where it names no module of the teacher."""
        for prefix, underscores in _UNET_PREFIXES:
            if key.startswith(prefix):
                inner = key.removeprefix(prefix)
                found = self._underscored(inner) if underscores else self._dotted(inner)
                if found:
                    module, new, rest, tail = found
                    return ModuleKey(key, module, None if new is None else f"{prefix}{new}.{tail}", rest)
        return None

    def _underscored(self, inner: str) -> tuple[str, str | None, str, str] | None:
        name, _, rest = inner.partition(".")
        spelling = self.underscored.get(name)
        if spelling is None or self.spelled[spelling] not in self.shapes:
            return None
        new = self.written[spelling]
        return self.spelled[spelling], None if new is None else new.replace(".", "_"), rest, rest

    def _dotted(self, inner: str) -> tuple[str, str | None, str, str] | None:
        parts = inner.split(".")
        for length in range(len(parts) - 1, 0, -1):
            spelling, tail = ".".join(parts[:length]), ".".join(parts[length:])
            if spelling in self.spelled:
                module, rest = self.spelled[spelling], tail
                if old := _PROCESSOR.fullmatch(tail):
                    module = f"{module}.{'to_out.0' if old[1] == 'to_out' else old[1]}"
                    rest = old["rest"]
                # of a module without weights nothing can be changed: the key goes on to a part that is not there
                return (
                    (module, self.written[spelling], rest, tail) if module in self.shapes and rest else None
                )
        return None


def kept_path(layout: Layout, removed: Iterable[str], path: str) -> str | None:
    """Path in the student of a module of the teacher; None where it lies in one of the blocks at the paths ``removed``,
    though it be there: in the neutral form it does nothing, and an addition would bring it back to life.
    """
    inside = any(path == block or path.startswith(f"{block}.") for block in removed)
    return None if inside else layout.renamed(path)


def adapter_names(teacher: Mapping[str, Any], layout: Layout, removed: Collection[str] = ()) -> AdapterNames:
    """The names of the modules of the U-Net of config ``teacher`` in files of additions, and those in its student.

    ``removed`` are the paths of the blocks that the plan takes out, in whatever form.
    """
    model = meta_model(teacher)
    shapes = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.endswith(".weight")
    }
    modules = [name for name, _ in model.named_modules() if name]
    spelled = {name: name for name in modules}
    written = {name: kept_path(layout, removed, name) for name in modules}
    ours = _ldm_modules(teacher)
    # with code of its own every block keeps its place, and no reader of the LDM layout knows it
    students = ours if is_own(layout.config) else _ldm_modules(layout.config)
    for module, ldm in ours.items():
        new = written[module]
        if ldm not in spelled:
            spelled[ldm] = module
            written[ldm] = None if new is None else students.get(new)
    return AdapterNames(spelled, written, shapes, {name.replace(".", "_"): name for name in spelled})


_INPUTS = re.compile(r"(lora_A|lora_down|lora\.down|down)\b.*weight")
_OUTPUTS = re.compile(r"(lora_B|lora_up|lora\.up|up)\b.*weight")


def fits(part: ModuleKey, tensor: Tensor, names: AdapterNames) -> bool:
    """Whether the matrices of a LoRA, or its alpha, have a shape for the teacher's module; others are not looked at.

    Of a module of shape (out, in, ...) these are (rank, in, ...) and (out, rank); ones may stand for a size of the
    kernel, and behind the second matrix. An alpha is one number.
    """
    outputs, *inputs = names.shapes[part.module]
    shape = tuple(tensor.shape)
    if part.rest == "alpha":
        return tensor.numel() == 1
    first = _INPUTS.fullmatch(part.rest)
    if not first and not _OUTPUTS.fullmatch(part.rest):
        return True
    if not inputs or len(shape) < 2 or 0 in shape:
        return False
    kernel, ones = tuple(inputs[1:]), (1,) * (len(shape) - 2)
    if first:
        bare = max(kernel, default=1) == 1  # a kernel of one may be left out
        return shape[1] == inputs[0] and (
            shape[2:] == kernel or (shape[2:] == ones and (bare or len(ones) == len(kernel)))
        )
    return shape[0] == outputs and shape[2:] == ones


def has_additions(config: Mapping[str, Any]) -> bool:
    """Whether LoRAs, ControlNets and IP-Adapters for the model of ``config``, and its single files, are known here."""
    return family_of(config) is UNET2D_CONDITION


def check_has_additions(config: Mapping[str, Any], asked: str, *, instead: str) -> None:
    """Raise UnsupportedModelError, which says what was ``asked`` of the model of ``config`` and what works ``instead``,
    unless that is known.
    """
    if not has_additions(config):
        raise UnsupportedModelError(
            f"asked {asked}, found a {config[CLASS_NAME]}; this is known of a "
            f"{UNET2D_CONDITION.model_class().__name__} alone: {instead}"
        )


def attentions(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of all attentions of the U-Net of ``config``, in the order in which diffusers counts their processors."""
    return tuple(name.removesuffix(".processor") for name in meta_model(config).attn_processors)


def is_cross_attention(path: str) -> bool:
    """Whether the attention at ``path`` reads the text: the second of each transformer layer."""
    return path.endswith(".attn2")


def values_of(path: str) -> str:
    """The module that makes the values of the attention at ``path``; its shape is (width, width of the text)."""
    return f"{path}.to_v"


def attention_projections(paths: Iterable[str]) -> tuple[str, ...]:
    """The modules that a LoRA of the attentions at ``paths`` changes: query, key, value and output of each."""
    return tuple(f"{path}.{name}" for path in paths for name in ("to_q", "to_k", "to_v", "to_out.0"))
