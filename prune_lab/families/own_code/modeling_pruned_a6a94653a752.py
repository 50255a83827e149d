"""A diffusers model with blocks taken out of it, or made narrower. Complete in itself: it needs torch and diffusers.

``config.json`` beside this file holds the settings of the whole model, what is gone of it (``removed``, by the path of
each module), and the numbers of what is narrower (``widths``, by the path of each module). Load it with the class that
is named there, or ``diffusers.AutoModel``, and ``trust_remote_code=True``.
"""

import functools
import hashlib
import inspect
import json
import pathlib
import shutil
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config

_PREFIX = "Pruned"  # of the names of classes here; what follows is the diffusers class


def mark_shape(*said: Any) -> tuple[int, int, int]:
    """Shape of the tensors without numbers that stand in a student: a digest of what is gone of it, ``removed`` and
    ``main_path``, or of its ``widths``.

    So weights that were saved without some blocks do not fit a list of others, or one that somebody changed.
    """
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()
    return 0, int.from_bytes(digest[:3], "big"), int.from_bytes(digest[3:6], "big")


def _container(module: Any, path: str) -> Any:
    """The module inside ``module`` that holds what is called ``path``; empty ones are made on the way."""
    for part in path.split(".")[:-1]:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    return module


class Layout:
    """How the latest state of the main path lies in memory, which kernels round by; a concatenation hides it."""

    def __init__(self) -> None:
        self.form = torch.contiguous_format

    def seen(self, module: Any, args: Any, output: Any) -> None:
        """A hook on what writes to the main path."""
        state = output if isinstance(output, torch.Tensor) else output[0]
        last = state.ndim == 4 and not state.is_contiguous()
        last = last and state.is_contiguous(memory_format=torch.channels_last)
        self.form = torch.channels_last if last else torch.contiguous_format


class Removed(torch.nn.Module):
    """In place of a block that is gone: hands on its inputs ``hands_on``, of each the first ``channels`` only.

    ``keeps`` are modules inside of it that others read. ``mark`` is the name of a tensor of the block: one without
    numbers, of the shape ``shape``, stands there, so that a class that knows nothing of this refuses the weights
    instead of filling the gap.
    """

    def __init__(
        self,
        block: Any,
        hands_on: Any,
        channels: int | None = None,
        in_tuple: bool = False,
        keeps: Any = (),
        mark: str = "",
        shape: tuple[int, ...] = (0,),
    ) -> None:
        super().__init__()
        self._names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._hands_on, self._channels, self._in_tuple = tuple(hands_on), channels, in_tuple
        self.layout = Layout()
        for path in keeps:
            _container(self, path).add_module(path.rsplit(".", 1)[-1], block.get_submodule(path))
        if mark:
            place = _container(self, mark)
            place.register_buffer(mark.rsplit(".", 1)[-1], torch.empty(shape))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What goes on without the block."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        out: tuple[Any, ...] = tuple(None if name is None else given[name] for name in self._hands_on)
        if self._channels is not None:
            form = self.layout.form
            out = tuple(tensor[:, : self._channels].contiguous(memory_format=form) for tensor in out)
        return out if self._in_tuple or len(out) > 1 else out[0]


def _narrow(module: Any, numbers: Any) -> None:
    """Set these attributes of ``module``, and give it parameters that fit them; what they hold comes from a file."""
    for name, number in numbers.items():
        if not isinstance(getattr(module, name), int):
            raise TypeError(f"found the width {name} = {number} of a {type(module).__name__}, which has none")
        setattr(module, name, number)
    if isinstance(module, torch.nn.Linear):
        shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    elif isinstance(module, torch.nn.Conv2d):
        kernel = (module.in_channels // module.groups, *module.kernel_size)
        shapes = {"weight": (module.out_channels, *kernel), "bias": (module.out_channels,)}
    elif isinstance(module, torch.nn.GroupNorm):
        shapes = {"weight": (module.num_channels,), "bias": (module.num_channels,)}
    else:
        return
    for name, shape in shapes.items():
        was = getattr(module, name)
        if was is not None:
            made = torch.empty(shape, dtype=was.dtype, device=was.device)
            setattr(module, name, torch.nn.Parameter(made, requires_grad=was.requires_grad))
    module.reset_parameters()


# A class that knows nothing of what is gone or narrower can be told to leave out tensors that do not fit, and would
# answer with what is no number. It does not load a model that says it is quantised in a way it does not know.
_GUARD = "quantization_config"
_ALONE = {
    "quant_method": "none, but the model is not what its settings say: load it with trust_remote_code=True"
}
WIDTHS_MARK = (
    "widths_mark"  # name of the tensor without numbers in a model with ``widths``; see ``mark_shape``
)


def _signature(base: Any) -> inspect.Signature:
    own = list(inspect.signature(base.__init__).parameters.values())
    more = ("removed", "main_path", "widths", "auto_map")
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    return inspect.Signature([*own, *added])


@functools.cache
def pruned(base: Any) -> Any:
    """The class of the diffusers model ``base`` that takes blocks out of itself once it is built."""

    def built(
        self: Any,
        *args: Any,
        removed: Any = None,
        main_path: Any = None,
        widths: Any = None,
        auto_map: Any = None,
        **config: Any,
    ) -> None:
        base.__init__.__wrapped__(
            self, *args, **config
        )  # the config is registered once, by our own decorator
        layout, shape = Layout(), mark_shape(removed, main_path)
        if removed and not any(how.get("mark") for how in removed.values()):
            raise ValueError(
                "none of the modules in ``removed`` has a mark: no weights would tell what is gone"
            )
        for path, how in (removed or {}).items():
            gone = Removed(self.get_submodule(path), **how, shape=shape)
            gone.layout = layout
            self.set_submodule(path, gone)
        for path in main_path or ():  # the modules that write what a block with ``channels`` reads
            self.get_submodule(path).register_forward_hook(layout.seen)
        for path, numbers in (widths or {}).items():
            _narrow(self.get_submodule(path), numbers)
        if widths:
            self.register_buffer(WIDTHS_MARK, torch.empty(mark_shape(widths)))

    built.__signature__ = _signature(base)  # type: ignore[attr-defined]

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        source, target = pathlib.Path(__file__), pathlib.Path(save_directory) / pathlib.Path(__file__).name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (
            source.resolve() != target.resolve()
        ):  # first: with push_to_hub the folder goes up before the base is done
            shutil.copyfile(source, target)
        base.save_pretrained(self, save_directory, *args, **kwargs)

    @functools.wraps(base.load_config)
    def load_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = base.load_config.__func__(cls, *args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if config.get(_GUARD) == _ALONE:
            config.pop(_GUARD)
        return found

    @functools.wraps(base.to_json_string)
    def to_json_string(self: Any) -> str:
        settings = {_GUARD: _ALONE, **json.loads(base.to_json_string(self))}
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    body = {
        "__init__": register_to_config(built),
        "save_pretrained": save_pretrained,
        "load_config": classmethod(load_config),
        "to_json_string": to_json_string,
        # diffusers writes the class into ``auto_map`` of config.json, and the module into model_index.json
        "_auto_class": "AutoModel",
        "__module__": __name__.rsplit(".", 1)[-1],
        "__doc__": f"A {base.__name__} with blocks taken out; see ``removed`` and ``widths`` in its config.",
    }
    return type(_PREFIX + base.__name__, (base,), body)


def __getattr__(name: str) -> Any:
    """The class called ``PrunedX`` for each model class ``X`` of diffusers."""
    base = getattr(diffusers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(base, type) and issubclass(base, diffusers.ModelMixin):
        return pruned(base)
    raise AttributeError(f"{__name__} has no {name}")
