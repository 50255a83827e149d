"""Whatever lies in the folder of a component: what is checked and hashed is what the libraries read, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_lab.errors import ModelFormatError, PruneLabError
from prune_lab.models import resolve_model
from prune_lab.models.components import check_part
from prune_lab.models.files import headers_of, weights_in
from prune_lab.models.folders import variant_of_part
from prune_lab.models.hub import files_to_fetch
from prune_lab.models.silence import quiet
from prune_lab.models.views import component_view
from prune_lab.session.origins import _component_files

STEMS = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES: dict[str, Any] = {"vae": diffusers.AutoencoderKL, "text_encoder": transformers.CLIPTextModel}
# One set of weights in each of the ways in which people save it: its file, or its index and the name of a shard.
WAYS = {
    "plain": ("{}.safetensors", ""),
    "shards": ("{}.safetensors.index.json", "{}-0000{}-of-00002.safetensors"),
    "fp16": ("{}.fp16.safetensors", ""),
    "fp16 shards": ("{}.safetensors.index.fp16.json", "{}.fp16-0000{}-of-00002.safetensors"),
    "fp16 shards, other index": ("{}.fp16.safetensors.index.json", "{}-0000{}-of-00002.fp16.safetensors"),
}
OTHER = "other name"  # the plain file under the name that the other library gives it


def save_in(folder: Path, stem: str, way: str, tensors: dict[str, torch.Tensor]) -> None:
    name, shard = WAYS[way]
    if not shard:
        save_file(tensors, folder / name.format(stem), {"format": "pt"})
        return
    homes = {key: shard.format(stem, 1 + index % 2) for index, key in enumerate(sorted(tensors))}
    for home in set(homes.values()):
        save_file({k: tensors[k] for k in homes if homes[k] == home}, folder / home, {"format": "pt"})
    (folder / name.format(stem)).write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def probed(part: str, tensors: dict[str, torch.Tensor]) -> tuple[str, float]:
    key = min(key for key in tensors if key.endswith(".weight") and tensors[key].ndim > 1)
    return key, float(tensors[key].float().flatten()[0])


@settings(max_examples=40)
@given(
    part=st.sampled_from(sorted(STEMS)),
    ways=st.sets(st.sampled_from([*WAYS, OTHER]), min_size=1),
    asked=st.sampled_from(["", "fp16"]),
)
def test_what_is_checked_is_what_is_loaded_or_it_is_refused(
    part: str,
    ways: set[str],
    asked: str,
    tiny_pipeline_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    original = tiny_pipeline_folder / part
    shutil.copy(original / "config.json", folder)
    tensors = load_file(original / f"{STEMS[part]}.safetensors")
    for number, way in enumerate(sorted(ways), 1):  # each way holds numbers of its own
        own = {key: tensor * number for key, tensor in tensors.items()}
        other = next(stem for stem in STEMS.values() if stem != STEMS[part])
        save_in(folder, other if way == OTHER else STEMS[part], "plain" if way == OTHER else way, own)
    key, _ = probed(part, tensors)

    def loaded(place: Path, **chosen: Any) -> float:
        with quiet():
            model = CLASSES[part].from_pretrained(
                place, use_safetensors=True, local_files_only=True, **chosen
            )
        return float(model.state_dict()[key].float().flatten()[0])

    variant = variant_of_part(folder, asked)
    try:
        check_part(folder, CLASSES[part], variant)
    except PruneLabError:
        assert len(ways) > 1
        return
    hashed = [path for name, path in _component_files(folder, asked).items() if name.endswith(".safetensors")]
    assert hashed == list(weights_in(folder, variant).files)
    (value,) = [load_file(path)[key].float().flatten()[0].item() for path in hashed if key in load_file(path)]
    with component_view(folder, STEMS[part], variant) as view:
        assert loaded(view) == value
    try:
        plain = loaded(folder, variant=variant or None)
    except OSError:  # it has no weights of that name
        return
    assert plain == value


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_file_beside_shards_is_refused_of_every_part(
    part: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))
    stem = STEMS.get(part, STEMS["vae"])
    save_in(folder / part, stem, "shards", load_file(folder / part / f"{stem}.safetensors"))
    with pytest.raises(ModelFormatError, match=rf"{part}, found {stem}.*alone"):
        resolve_model(str(folder))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    fetched = files_to_fetch(names, json.loads((folder / "model_index.json").read_text()))
    assert {f"{part}/{stem}.safetensors", f"{part}/{stem}.safetensors.index.json"} <= {*fetched}


@pytest.mark.parametrize("where", ["index", "shard"])
def test_an_index_that_does_not_fit_its_shards_is_refused(
    where: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_folder / "vae", tmp_path / "vae"))
    whole = folder / f"{STEMS['vae']}.safetensors"
    save_in(folder, STEMS["vae"], "shards", load_file(whole))
    whole.unlink()
    headers_of(weights_in(folder))

    path = folder / f"{STEMS['vae']}.safetensors.index.json"
    index = json.loads(path.read_text())
    if where == "index":
        del index["weight_map"]["decoder.conv_in.bias"]
    else:
        index["weight_map"]["of nothing"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"index.json does not fit.*(decoder.conv_in.bias|of nothing)"):
        check_part(folder, diffusers.AutoencoderKL)


def test_a_file_that_only_the_config_names_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_folder / "text_encoder", tmp_path / "text_encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(PruneLabError, match="transformers_weights"):
        check_part(folder, transformers.CLIPTextModel)
