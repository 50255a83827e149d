"""Parts of a pipeline that are not what they should be are named before anything is made of them; good ones pass."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import build_text_encoder, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_pipelines import narrow
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.errors import ModelFormatError, PruneLabError, UnsupportedModelError
from prune_lab.models import load_model, load_pipeline, load_scorer, resolve_model
from prune_lab.models.components import misfit
from prune_lab.models.conversion import flaw
from prune_lab.models.parts import installed_name, kind_of, part_class
from prune_lab.plans import parse_plan
from prune_lab.runtime import progress_shown
from prune_lab.surgery import prune_pipeline
from prune_lab.surgery.parts import copy_parts

pytestmark = pytest.mark.usefixtures("blank_figures")

VAE, TEXT, UNET = "vae", "text_encoder", "unet"
FILES = {
    VAE: "diffusion_pytorch_model.safetensors",
    UNET: "diffusion_pytorch_model.safetensors",
    TEXT: "model.safetensors",
}

Tensors = dict[str, torch.Tensor]


def changed(path: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Write what ``change`` makes of the tensors in ``path``; None for those it changed in place."""
    tensors = load_file(path)
    save_file(found if (found := change(tensors)) is not None else tensors, path, metadata={"format": "pt"})


def filled(name: str, value: float) -> Callable[[Tensors], None]:
    """What puts ``value`` into every place of the tensor ``name``."""

    def fill(tensors: Tensors) -> None:
        tensors[name].fill_(value)

    return fill


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of its own, free to be damaged."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


@pytest.fixture
def scorer(tiny_scorer_folder: Path, tmp_path: Path) -> Path:
    """A folder of a CLIP model of its own, free to be damaged."""
    return Path(shutil.copytree(tiny_scorer_folder, tmp_path / "scorer"))


# Names and shapes, by header -------------------------------------------------------------------------------------


def missing(tensors: Tensors, name: str) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_old"] = tensors.pop(name)


def misshapen(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


def swollen(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.cat([torch.atleast_1d(tensors[name])] * 2)


def beyond(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.more"] = torch.ones(2)


BY_HEADER = {
    "missing": missing,
    "renamed": renamed,
    "misshapen": misshapen,
    "swollen": swollen,
    "extra": beyond,
}


@settings(max_examples=15)
@given(
    part=st.sampled_from([VAE, TEXT, "scorer"]),
    damage=st.sampled_from(sorted(BY_HEADER)),
    where=st.integers(0),
)
def test_any_tensor_that_is_not_as_its_class_wants_it_is_named_by_header(
    part: str,
    damage: str,
    where: int,
    tiny_pipeline_folder: Path,
    tiny_scorer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(tiny_scorer_folder if part == "scorer" else tiny_pipeline_folder, folder)
    path = folder / FILES[TEXT] if part == "scorer" else folder / part / FILES[part]
    tensors = load_file(path)
    name = sorted(tensors)[where % len(tensors)]
    BY_HEADER[damage](tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    read: Callable[[str], object] = load_scorer if part == "scorer" else resolve_model
    with pytest.raises(ModelFormatError) as caught:
        read(str(folder))
    text = one_line(caught.value)
    assert part in text or part == "scorer"
    assert name in text or damage in (
        "misshapen",
        "swollen",
    )  # a norm of the scorer may have another name there
    assert name.split(".")[-2:][0] in text


@settings(max_examples=60)
@given(
    wanted=st.dictionaries(st.text("abc", max_size=2), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    found=st.dictionaries(st.text("abc", max_size=2), st.tuples(st.integers(1, 3), st.integers(1, 3))),
)
def test_what_fits_and_what_does_not(
    wanted: dict[str, tuple[int, int]], found: dict[str, tuple[int, int]]
) -> None:
    assert (misfit(found, wanted, "a model") == "") == (found == wanted)


def test_a_layer_that_the_config_does_not_count_is_no_silent_loss(pipeline: Path) -> None:
    # one layer fewer in the config: all that is wanted is there, and the model is another one
    path = pipeline / TEXT / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(
        ModelFormatError, match=r"text_encoder.*layers\.1\.\S+ is not part of a CLIPTextModel"
    ):
        resolve_model(str(pipeline))


# Numbers ---------------------------------------------------------------------------------------------------------

NUMBERS = {"NaN": float("nan"), "infinite": float("inf"), "-infinite": float("-inf")}


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(width=32), min_size=4, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_flaw_is_found_in_any_numbers(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype)
    found = flaw([("good", torch.eye(3)), ("counter", torch.arange(3)), ("bad", tensor)])
    kept = tensor.float().tolist()
    nan = any(value != value for value in kept)
    infinite = any(abs(value) == float("inf") for value in kept)
    assert found == (
        "its tensor bad holds NaN (not a number)"
        if nan
        else "its tensor bad holds infinite numbers"
        if infinite
        else ""
    )


def test_matrices_of_one_number_are_a_flaw_only_where_there_are_no_others() -> None:
    assert "each of its 2 matrices holds 0.5" in flaw(
        [("a", torch.full((2, 3), 0.5)), ("bias", torch.arange(3.0)), ("b", torch.full((4, 1, 2), 0.5))]
    )
    assert flaw([("a", torch.zeros(2, 3)), ("b", torch.eye(2))]) == ""  # a convolution that begins with zeros
    assert flaw([("norm", torch.ones(5)), ("scale", torch.tensor(1.0))]) == ""


@settings(max_examples=8)
@given(
    part=st.sampled_from(sorted(FILES)),
    what=st.sampled_from(sorted(NUMBERS)),
    where=st.integers(0),
    at=st.integers(0),
)
def test_a_number_that_is_none_is_named_with_its_part_and_tensor(
    part: str,
    what: str,
    where: int,
    at: int,
    tiny_pipeline_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("numbers") / "model"
    shutil.copytree(tiny_pipeline_folder, folder)
    tensors = load_file(folder / part / FILES[part])
    name = sorted(tensors)[where % len(tensors)]
    tensors[name].view(-1)[at % tensors[name].numel()] = NUMBERS[what]
    save_file(tensors, folder / part / FILES[part], metadata={"format": "pt"})
    with pytest.raises(ModelFormatError) as caught:
        load_pipeline(resolve_model(str(folder)))
    text = one_line(caught.value)
    assert ("U-Net" if part == UNET else part) in text
    assert name in text
    assert what.removeprefix("-") in text
    # what is copied is looked at too, also what a plan takes away
    source, out = resolve_model(str(folder)), folder.parent / "new"
    plan = parse_plan("bk-tiny", source.architecture)
    with pytest.raises(ModelFormatError) as caught:
        prune_pipeline(source, plan, out)
    assert name in one_line(caught.value)
    assert ("U-Net" if part == UNET else part) in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# Answers ---------------------------------------------------------------------------------------------------------

# Tensors behind which nothing of the input is left when they are zero.
NARROWS = [
    (TEXT, "embeddings.token_embedding.weight", "every caption"),
    (TEXT, "final_layer_norm.weight", "every caption"),
    (VAE, "post_quant_conv.weight", "every latent"),
    (VAE, "decoder.conv_in.weight", "every latent"),
    (VAE, "decoder.conv_norm_out.weight", "every latent"),
    (VAE, "decoder.conv_out.weight", "every latent"),
    (VAE, "encoder.conv_in.weight", "every picture"),
    (VAE, "encoder.conv_out.weight", "every picture"),
    (VAE, "quant_conv.weight", "every picture"),
    (UNET, "conv_in.weight", "every latent"),
    (UNET, "conv_norm_out.weight", "every latent"),
    (UNET, "conv_out.weight", "every latent"),
]


@pytest.mark.parametrize(("part", "name", "asked"), NARROWS)
def test_a_part_that_answers_the_same_to_everything_is_named(
    part: str, name: str, asked: str, pipeline: Path
) -> None:
    changed(pipeline / part / FILES[part], filled(name, 0.0))
    with pytest.raises(ModelFormatError, match=f"gives the same answer to {asked}") as caught:
        load_pipeline(resolve_model(str(pipeline)))
    assert ("U-Net" if part == UNET else part) in one_line(caught.value)


@pytest.mark.parametrize("value", [0.0, 0.02])
@pytest.mark.parametrize("part", FILES)
def test_a_part_of_one_number_is_named(part: str, value: float, pipeline: Path) -> None:
    def fill(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.fill_(value)

    changed(pipeline / part / FILES[part], fill)
    with pytest.raises(ModelFormatError, match=rf"matrices holds {value:g} throughout") as caught:
        load_pipeline(resolve_model(str(pipeline)))
    assert ("U-Net" if part == UNET else part) in one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("text_model.embeddings.token_embedding.weight", 0.0, "the same answer to every caption"),
        ("text_projection.weight", 0.0, "every caption"),
        ("vision_model.embeddings.patch_embedding.weight", 0.0, "the same answer to every picture"),
        ("visual_projection.weight", float("nan"), r"visual_projection\.weight holds NaN"),
        ("logit_scale", float("inf"), "logit_scale holds infinite"),
    ],
)
def test_a_scorer_that_judges_nothing_is_named(name: str, value: float, named: str, scorer: Path) -> None:
    changed(scorer / FILES[TEXT], filled(name, value))
    with pytest.raises(ModelFormatError, match=named) as caught:
        load_scorer(str(scorer))
    assert "the scorer" in one_line(caught.value)


def loses_words(folder: Path) -> None:
    for path in folder.glob("*.json"):
        if path.name != "tokenizer_config.json":
            path.unlink()


def loses_pairs(folder: Path) -> None:
    loses_words(folder)
    build_tokenizer(folder)
    (folder / "merges.txt").unlink()


def forgets_words(folder: Path) -> None:
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    loses_words(folder)
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def counts_too_far(folder: Path) -> None:
    loses_words(folder)
    build_tokenizer(folder)
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({word: 1000 * at for word, at in words.items()}))


def never_cuts(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 1000}))


def is_no_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (loses_words, "lacks vocab.json"),
        (loses_pairs, "lacks merges.txt"),
        (forgets_words, "knows 1 words"),
        (counts_too_far, "do not belong together"),
        (never_cuts, "cuts captions at 1,000"),
        (is_no_json, "the tokenizer of .*cannot be loaded as a CLIPTokenizer"),
    ],
)
def test_a_tokenizer_without_its_words_is_named(
    damage: Callable[[Path], None], named: str, pipeline: Path
) -> None:
    # transformers makes one without a vocabulary and says nothing: each caption is then the same to it
    damage(pipeline / "tokenizer")
    with pytest.raises(ModelFormatError, match=named) as caught:
        load_pipeline(resolve_model(str(pipeline)))
    assert "token" in one_line(caught.value)


@pytest.mark.parametrize("change", [{"beta_schedule": "no such"}, {"num_train_timesteps": "many"}])
def test_a_part_that_cannot_be_loaded_is_named(change: dict[str, Any], pipeline: Path) -> None:
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError, match=r"the scheduler of .* cannot be loaded as a PNDMScheduler"):
        load_pipeline(resolve_model(str(pipeline)))


# Verbs -----------------------------------------------------------------------------------------------------------

VERBS: dict[str, list[str]] = {
    "score": ["score", "M", "--out", "OUT", "--device", "cpu", "--set", "probe.samples=2"],
    "prune": ["prune", "M", "--plan", "bk-tiny", "--out", "OUT"],
    "profile": ["profile", "M", "--pipeline", "--device", "cpu"],
    "generate": ["generate", "M", "--prompt", "a cat", "--steps", "1", "--out", "OUT.png", "--device", "cpu"],
    "distill": ["distill", "M", "--plan", "bk-tiny", "--out", "OUT", "--device", "cpu"],
}
KINDS = ("header", "number", "answer")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_refuses_a_damaged_part_in_one_line(verb: str, kind: str, pipeline: Path) -> None:
    draw = random.Random(f"{verb} {kind}")
    part, name, _ = draw.choice([one for one in NARROWS if one[0] != UNET])
    spoil = draw.choice(list(BY_HEADER.values()))
    damage: dict[str, Callable[[Tensors], None]] = {
        "header": lambda tensors: spoil(tensors, name),
        "number": filled(name, draw.choice(list(NUMBERS.values()))),
        "answer": filled(name, 0.0),
    }
    changed(pipeline / part / FILES[part], damage[kind])
    new = pipeline.parent / "new"
    words = {"M": str(pipeline), "OUT": str(new), "OUT.png": f"{new}.png"}
    result = CliRunner().invoke(app, [words.get(word, word) for word in VERBS[verb]])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    errors = [line for line in result.stderr.strip().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.strip().splitlines()[-1] == errors[0]
    assert part in errors[0]
    assert name in errors[0] or kind == "answer"
    left = {path.name for path in pipeline.parent.iterdir()} - {
        "pipeline",
        "new.run",
    }  # settings of a run may stay
    assert not left


# Good layouts ----------------------------------------------------------------------------------------------------


def same_weights(first: Any, second: Any) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def has_counters(folder: Path) -> None:
    changed(
        folder / TEXT / FILES[TEXT],
        lambda tensors: (
            {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        ),
    )


def has_old_attention(folder: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            new = next((one for one in names if f".{one}." in name), "")
            found[name.replace(new, names[new]) if new else name] = tensor
        return found

    changed(folder / VAE / FILES[VAE], old)


def is_half(folder: Path) -> None:
    for part, name in FILES.items():
        path = folder / part / name
        tensors = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(tensors, path.with_name(name.replace(".safe", ".fp16.safe")), metadata={"format": "pt"})
        path.unlink()


def is_in_shards(folder: Path) -> None:
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for part, name in FILES.items():
        (folder / part / name).unlink()
        getattr(loaded, part).save_pretrained(folder / part, max_shard_size="10KB")
        assert not (folder / part / name).exists()


def has_the_other_half(folder: Path) -> None:
    # the text encoder of a whole CLIP model, with what belongs to its pictures
    more = {"logit_scale": torch.tensor(1.0), "text_projection.weight": torch.eye(16)}
    more["vision_model.embeddings.class_embedding"] = torch.ones(16)
    changed(
        folder / TEXT / FILES[TEXT],
        lambda tensors: {f"text_model.{name}": tensor for name, tensor in tensors.items()} | more,
    )


def lists_what_is_not_there(folder: Path) -> None:
    edit_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        requires_safety_checker=True,
    )


def has_an_old_preparation(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    edit_index(folder, feature_extractor=["transformers", "CLIPFeatureExtractor"])
    CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32}).save_pretrained(folder / "feature_extractor")


def has_an_average(folder: Path) -> None:
    shutil.copytree(folder / UNET, folder / "unet_ema")
    (folder / "optimizer.bin").write_bytes(b"")


def has_old_classes(folder: Path) -> None:
    edit_index(folder, tokenizer=["transformers", "CLIPTokenizerFast"])


GOOD = {
    function.__name__: function
    for function in (
        has_counters,
        has_old_attention,
        is_half,
        is_in_shards,
        has_the_other_half,
        lists_what_is_not_there,
        has_an_old_preparation,
        has_an_average,
        has_old_classes,
    )
}


@pytest.mark.parametrize("layout", GOOD)
def test_good_layouts_are_read_pruned_and_loaded_as_plain_diffusers_does(layout: str, pipeline: Path) -> None:
    GOOD[layout](pipeline)
    loaded = load_pipeline(resolve_model(str(pipeline)))
    absent = {"safety_checker": None, "feature_extractor": None}
    variant = {"variant": "fp16"} if layout == "is_half" else {}
    plain: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        pipeline, dtype=torch.float32, **absent, **variant
    )
    for part in FILES:
        assert same_weights(getattr(loaded, part), getattr(plain, part)), part
    assert type(loaded.scheduler) is type(plain.scheduler)  # type: ignore[attr-defined]
    words = [one.tokenizer("a cat").input_ids for one in (loaded, plain)]  # type: ignore[attr-defined]
    assert words[0] == words[1]
    new = pipeline.parent / "new"
    if layout not in ("has_old_attention", "has_an_old_preparation"):  # each takes seconds
        return
    result = CliRunner().invoke(app, ["prune", str(pipeline), "--plan", "bk-tiny", "--out", str(new)])
    assert result.exit_code == 0, (result.output, result.exception)
    student: Any = diffusers.StableDiffusionPipeline.from_pretrained(new)
    for part in (VAE, TEXT):
        assert same_weights(getattr(student, part), getattr(plain, part)), part


@pytest.mark.parametrize("kind", ["sdxl", "refiner", "controlnet", "lcm"])
def test_pipelines_of_other_kinds_pass(kind: str, tiny_pipeline: Any, tmp_path: Path) -> None:
    made = narrow(kind, tiny_pipeline)
    made.save_pretrained(tmp_path / kind)
    loaded = load_pipeline(resolve_model(str(tmp_path / kind)))
    assert type(loaded) is type(made)
    for name, part in made.components.items():
        if isinstance(part, torch.nn.Module):
            assert same_weights(getattr(loaded, name), part), name
    settings_ = {name: value for name, value in made.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in settings_} == settings_


def test_encoders_with_tied_and_projected_weights_pass(tmp_path: Path) -> None:
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from prune_lab.models.components import check_part

    t5 = T5EncoderModel(T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    t5.save_pretrained(tmp_path / "t5")
    check_part(tmp_path / "t5", T5EncoderModel)
    path, names = tmp_path / "t5" / FILES[TEXT], ("shared.weight", "encoder.embed_tokens.weight")
    tensors = load_file(path)
    (tied,) = (tensors.pop(name) for name in names if name in tensors)
    for kept in (names, names[:1], names[1:]):  # as files of several versions have them
        save_file(tensors | {name: tied.clone() for name in kept}, path, metadata={"format": "pt"})
        check_part(tmp_path / "t5", T5EncoderModel)
    changed(path, lambda tensors: tensors | {"decoder.final_layer_norm.weight": torch.ones(8)})
    check_part(tmp_path / "t5", T5EncoderModel)

    projected = CLIPTextModelWithProjection(build_text_encoder().config)
    projected.save_pretrained(tmp_path / "clip")
    check_part(tmp_path / "clip", CLIPTextModelWithProjection)
    changed(tmp_path / "clip" / FILES[TEXT], lambda tensors: missing(tensors, "text_projection.weight"))
    with pytest.raises(ModelFormatError, match=r"text_projection\.weight is missing"):
        check_part(tmp_path / "clip", CLIPTextModelWithProjection)


# Classes ---------------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    ["os", "system"],
    ["builtins", "eval"],
    ["subprocess", "Popen"],
    ["pickle", "Unpickler"],
    ["sentinel_module", "Sentinel"],
    ["sentinel_module.inner", "Sentinel"],
    ["torch.nn", "Linear"],
    ["torch", "nn"],
    ["diffusers.models", "AutoencoderKL"],
    ["diffusers", "DiffusionPipeline"],
    ["diffusers", "__class__"],
    ["diffusers", "utils"],
    ["diffusers", "OnnxRuntimeModel"],
    ["transformers", "Trainer"],
    ["transformers", "pipeline"],
    ["transformers", "AutoModel"],
    ["pipeline_utils", "DiffusionPipeline"],
    ["__builtins__", "eval"],
    ["stable_diffusion", "StableDiffusionPipeline"],
    ["stable_diffusion.pipeline_stable_diffusion", "torch"],
    ["diffusers", "PNDMScheduler\n"],
    ["../..", "x"],
    ["", ""],
    [1, 2],
    ["diffusers"],
    ["diffusers", "AutoencoderKL", "more"],
    ["diffusers", None],
    [["diffusers"], "AutoencoderKL"],
    "AutoencoderKL",
    {"library": "diffusers"},
    7,
    True,
    None,
    [None, None],
    [],
]


@settings(max_examples=60)
@given(part=st.sampled_from([UNET, VAE, TEXT, "tokenizer", "scheduler"]), value=st.sampled_from(HOSTILE))
def test_what_is_no_part_is_refused_before_it_is_touched(
    part: str, value: Any, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(tiny_pipeline_folder, folder)
    (folder.parent / "sentinel_module.py").write_text("raise SystemExit('this was run')")
    shutil.copy(folder.parent / "sentinel_module.py", folder / part / "sentinel_module.py")
    edit_index(folder, **{part: value})
    sys.path.insert(0, str(folder.parent))
    try:
        with pytest.raises(PruneLabError) as caught:
            resolve_model(str(folder))
    finally:
        sys.path.remove(str(folder.parent))
    assert part in one_line(caught.value)
    assert "sentinel_module" not in sys.modules


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (VAE, ["diffusers", "PNDMScheduler"]),
        (VAE, ["transformers", "CLIPTextModel"]),
        (VAE, ["transformers", "CLIPTokenizer"]),
        (TEXT, ["diffusers", "AutoencoderKL"]),
        (TEXT, ["transformers", "CLIPImageProcessor"]),
        ("tokenizer", ["transformers", "CLIPTextModel"]),
        ("scheduler", ["diffusers", "AutoencoderKL"]),
        ("scheduler", ["diffusers", "KarrasDiffusionSchedulers"]),
        (UNET, ["diffusers", "AutoencoderKL"]),
        (UNET, ["transformers", "CLIPTextModel"]),
    ],
)
def test_a_part_of_another_sort_is_refused(part: str, value: list[str], pipeline: Path) -> None:
    edit_index(pipeline, **{part: value})
    with pytest.raises(PruneLabError) as caught:
        resolve_model(str(pipeline))
    assert part in one_line(caught.value)


def test_a_class_that_is_never_loaded_does_not_stand_in_the_way(
    pipeline: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (pipeline / "safety_checker").mkdir()
    (pipeline / "safety_checker" / "sentinel_module.py").write_text("raise SystemExit('this was run')")
    for number, value in enumerate((["os", "system"], ["sentinel_module", "X"], ["transformers", "Trainer"])):
        edit_index(pipeline, safety_checker=value)
        new = pipeline.parent / f"new{number}"
        new.mkdir()
        source = resolve_model(str(pipeline))
        with progress_shown():
            copy_parts(source.folder or pipeline, new, model=UNET)
        assert "left safety_checker out" in capfd.readouterr().err
        assert json.loads((new / "model_index.json").read_text())["safety_checker"] == [None, None]
        assert not (new / "safety_checker").exists()
        assert "sentinel_module" not in sys.modules


def test_a_part_that_is_not_used_is_copied_as_it_is_and_stays_closed(pipeline: Path) -> None:
    folder = pipeline / "safety_checker"
    folder.mkdir()
    save_file({"concept_embeds": torch.arange(6.0).reshape(2, 3)}, folder / FILES[TEXT])
    (folder / "config.json").write_text('{"this": "makes no sense", "vision_config": 7}')
    edit_index(pipeline, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    new = pipeline.parent / "new"
    result = CliRunner().invoke(app, ["prune", str(pipeline), "--plan", "bk-tiny", "--out", str(new)])
    assert result.exit_code == 0, (result.output, result.exception)
    copied, original = (place / "safety_checker" / FILES[TEXT] for place in (new, pipeline))
    assert copied.read_bytes() == original.read_bytes()
    assert json.loads((new / "safety_checker" / "config.json").read_text())["vision_config"] == 7


def test_an_adapter_beside_the_weights_is_no_silent_change(pipeline: Path) -> None:
    # transformers would load it, and for that open a pickled file
    (pipeline / TEXT / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "x/y", "peft_type": "LORA"}'
    )
    (pipeline / TEXT / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedModelError, match="adapter"):
        resolve_model(str(pipeline))


def test_classes_and_their_sorts() -> None:
    known = {
        ("diffusers", "AutoencoderKL"): "diffusers model",
        ("transformers", "CLIPTextModelWithProjection"): "transformers model",
        ("stable_diffusion", "StableDiffusionSafetyChecker"): "transformers model",
        ("diffusers", "DDIMInverseScheduler"): "scheduler",
        ("transformers", "CLIPTokenizerFast"): "tokenizer",
        ("transformers", "T5Tokenizer"): "tokenizer",
        ("transformers", "CLIPFeatureExtractor"): "processor",
        ("transformers", "DPTFeatureExtractor"): "processor",
    }
    assert {name: kind_of(part_class(*name)) for name in known} == known
    assert installed_name("transformers", "DPTFeatureExtractor") == "DPTImageProcessor"
    assert installed_name("transformers", "ClapFeatureExtractor") == "ClapFeatureExtractor"


def test_a_unet_alone_is_checked_too(pipeline: Path) -> None:
    changed(pipeline / UNET / FILES[UNET], filled("conv_out.weight", 0.0))
    with pytest.raises(ModelFormatError, match="gives the same answer to every latent"):
        load_model(resolve_model(str(pipeline / UNET)))
