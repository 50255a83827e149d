"""Folders as diffusers and transformers read them, made of links where the files are named or encoded otherwise.

The libraries know one name for the weights of a component, and one order of variant and index in it; they read JSON in
UTF-8 without a byte-order mark. A view is a temporary folder under whose plain names the same bytes lie.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from prune_lab.models.files import Weights, is_plain_text, json_object, weights_in

STEMS: Mapping[str, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How each library calls the weights of a component."""
_TEXT = (".json", ".txt", ".model")


def _plain_weights(weights: Weights, stem: str) -> dict[str, Path]:
    """Where the library finds the files of ``weights``: the plain name, or the plain index and its shards."""
    name = f"{stem}.safetensors"
    if weights.index is None:
        return {name: weights.files[0]}
    return {f"{name}.index.json": weights.index, **{path.name: path for path in weights.files}}


def _entries(folder: Path, weights: Weights | None, stem: str) -> dict[str, Path]:
    """The files of a component under the names by which its library finds them."""
    kept = {
        path.name: path
        for path in folder.iterdir()
        if path.suffix in _TEXT and ".safetensors" not in path.name
    }
    return kept | (_plain_weights(weights, stem) if weights else {})


def _is_plain(name: str, path: Path) -> bool:
    return name == path.name and (path.suffix != ".json" or is_plain_text(path))


def _link(path: Path, target: Path) -> None:
    if path.suffix == ".json" and not is_plain_text(path):
        target.write_text(json.dumps(json_object(path)), encoding="utf-8")
    else:
        target.symlink_to(path.resolve())


@contextlib.contextmanager
def component_view(folder: Path, stem: str, variant: str = "", *, weighs: bool = True) -> Iterator[Path]:
    """A folder from which the library that calls weights ``stem`` loads the component in ``folder``, with no variant.

    It is ``folder`` itself where that is plain already. Without ``weighs`` the component has no weights.
    """
    entries = _entries(folder, weights_in(folder, variant) if weighs else None, stem)
    if all(_is_plain(name, path) for name, path in entries.items()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="prune-lab-view-") as temporary:
        for name, path in entries.items():
            _link(path, Path(temporary) / name)
        yield Path(temporary)


@contextlib.contextmanager
def pipeline_view(
    folder: Path, stems: Mapping[str, str | None], variants: Mapping[str, str]
) -> Iterator[Path]:
    """The same of the whole pipeline in ``folder``: its parts in ``stems``, None for those without weights.

    ``variants`` are those asked for by part.
    """
    with contextlib.ExitStack() as stack:
        views = {
            part: stack.enter_context(
                component_view(folder / part, stem or "", variants.get(part, ""), weighs=stem is not None)
            )
            for part, stem in stems.items()
            if (folder / part).is_dir()
        }
        index = folder / "model_index.json"
        if _is_plain(index.name, index) and all(view == folder / part for part, view in views.items()):
            yield folder
            return
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prune-lab-view-")))
        _link(index, temporary / index.name)
        for part, view in views.items():
            (temporary / part).symlink_to(view.resolve())
        yield temporary
