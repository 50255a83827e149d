"""A small network with Stable Diffusion's exact topology, a whole pipeline folder around it, and a finished run of it.

Four stages, three with cross-attention, two layers per block: the same 38 block names as SD-v1.4, in milliseconds.
What takes long to build is built once for all workers of pytest-xdist (``built_once``).
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One thread, also of what a test starts: models this small only wait for a second one, which also rounds differently.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray puts its workers behind everything else: beside another worker of pytest they would hardly be served.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

from prune_lab.config import RunConfig
from prune_lab.runs import Run

pytest_plugins = ("families_seen", "must_run", "pytester")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tables of latency that tests measure are kept for the session only; matplotlib's list of fonts takes long to make.
os.environ.setdefault("MPLCONFIGDIR", str(Path("~/.cache/matplotlib").expanduser()))
_kept = tempfile.TemporaryDirectory(prefix="prune-lab-tests-")
os.environ["XDG_CACHE_HOME"] = _kept.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of the finished run come last: until one worker has built it, the other has enough to do."""
    late = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path in late)


def pytest_collection_finish() -> None:
    """What all imports left is looked through once and then left alone by the garbage collector, for all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


# A property test has no business failing because the machine was busy; in CI it tries the same examples every time.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)

# Nothing here has to outlive a power cut, and Optuna's journal waits for the disk at every number that it keeps.
os.fsync = lambda _: None

BuiltOnce = Callable[[str, Callable[[Path], object]], Path]

TINY_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [8, 16, 32, 32],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}

# Small networks of the other shapes that are supported.
SHAPES: dict[str, dict[str, Any]] = {
    "sd-v1": TINY_UNET,
    "sd-v2": {**TINY_UNET, "use_linear_projection": True, "attention_head_dim": [1, 2, 4, 4]},
    "sdxl": {
        **TINY_UNET,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16, 32],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}


def build_unet(config: dict[str, Any], seed: int = 0) -> Any:
    """A randomly initialised float32 U-Net in eval mode; the global random state stays as it was."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(config).eval()


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Whatever a test draws without a generator of its own is the same every time and in every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltOnce]:
    """``built_once(name, build)``: the folder that ``build(folder)`` made, the first time any worker asked for it.

    All workers read the same folder, so nobody may change it: the end of the session fails when a file is not as it
    was built. ``name`` must be the same in each worker and of one use only.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    given: dict[Path, dict[str, tuple[int, int]]] = {}

    def folder_of(name: str, build: Callable[[Path], object]) -> Path:
        folder, failed = root / "shared" / name, root / "shared" / f"{name}.failed"
        folder.parent.mkdir(exist_ok=True)
        with folder.with_name(f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the block ends, and when this process dies
            if failed.exists():
                pytest.fail(f"{name} could not be built: {failed.read_text(encoding='utf-8')}")
            if not (built := folder.with_name(f"{name}.built")).exists():
                try:
                    build(folder)
                except BaseException as error:
                    failed.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                    raise
                built.touch()
        given.setdefault(folder, _stamps(folder))
        return folder

    yield folder_of
    changed = [str(folder) for folder, before in given.items() if _stamps(folder) != before]
    assert not changed, f"tests changed what all of them share: {changed}; copy it to change it"


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of change, in nanoseconds, of each file below ``folder``."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="session")
def tiny_unet_shared() -> Any:
    """The one tiny U-Net that the copies of ``tiny_unet`` are made from; do not change it."""
    return build_unet(TINY_UNET)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A U-Net config with SD's topology and few channels."""
    return copy.deepcopy(TINY_UNET)


@pytest.fixture
def tiny_unet(tiny_unet_shared: Any) -> Any:
    """A U-Net of ``tiny_config``, the same weights in every test, and free to be changed."""
    return copy.deepcopy(tiny_unet_shared)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(built_once: BuiltOnce, tiny_unet_shared: Any) -> Path:
    """A complete ``StableDiffusionPipeline`` folder in safetensors with random weights; copy it to change it.

    Latents are 4 x 16 x 16, pictures 3 x 32 x 32, captions 16 tokens of width 16.
    """
    return built_once("pipeline", lambda folder: save_tiny_pipeline(folder, tiny_unet_shared))


@pytest.fixture(scope="session")
def pipeline_folder(built_once: BuiltOnce) -> Callable[[str], Path]:
    """``pipeline_folder(kind)``: the folder of a tiny pipeline of one of the kinds of tiny_pipelines; copy it to
    change it.
    """
    from tiny_pipelines import tiny_pipeline

    return lambda kind: built_once(f"pipeline-{kind}", lambda folder: tiny_pipeline(kind, folder))


@pytest.fixture(scope="session")
def tiny_scorer_folder(built_once: BuiltOnce) -> Path:
    """A ``CLIPModel`` folder with random weights, its tokenizer and its picture settings (32 x 32 pixels)."""
    return built_once("scorer", save_tiny_scorer)


# What a job needs to be done in seconds; ``small_run_config`` adds the two models.
SMALL: dict[str, Any] = {
    "device": "cpu",
    "probe": {"samples": 4, "timesteps": 2},
    "score": {"bootstrap": 10},
    "data": {"source": "shipped"},
    "search": {"budgets": (), "controls": ("bk-tiny",)},
    "repair": {"kind": "none"},
    "distill": {
        "steps": 2,
        "batch": 2,
        "pictures": 4,
        "warmup": 1,
        "checkpoint_every": 1,
        "validate_every": 1,
        "trackers": (),
    },
    "evaluate": {"prompts": ("a red cat",), "steps": 1, "guidance": 1.0},
    "profile": {"runs": 2, "warmup": 0},
}


@pytest.fixture(scope="session")
def small_run_config(tiny_pipeline_folder: Path, tiny_scorer_folder: Path) -> Callable[..., RunConfig]:
    """``small_run_config(**changes)``: the settings of a whole job on the tiny pipeline in a few seconds.

    A change names a setting or a table; ``distill={"steps": 4}`` changes one setting of that table, and a table given
    as an object, such as ``distill=DistillConfig()``, stands as it is.
    """
    models = {"model": str(tiny_pipeline_folder), "evaluate": {"scorer": str(tiny_scorer_folder)}}

    def small(**changes: Any) -> RunConfig:
        config = RunConfig()
        for layer in (SMALL, models, changes):
            merged = {
                name: dataclasses.replace(getattr(config, name), **value)
                if isinstance(value, dict)
                else value
                for name, value in layer.items()
            }
            config = dataclasses.replace(config, **merged)
        return config

    return small


@pytest.fixture(scope="session")
def finished_config(small_run_config: Callable[..., RunConfig]) -> RunConfig:
    """The settings of ``finished``: every step but repair, own pictures and a tournament."""
    return small_run_config(
        probe={"samples": 6, "timesteps": 3},
        score={"batch": 6, "bootstrap": 20},
        search={"budgets": ("params<=bk-base", "macs<=bk-tiny"), "controls": ("bk-base", "bk-tiny")},
        distill={"trackers": ("tensorboard",)},
        evaluate={"prompts": ("a red cat", "a dog"), "steps": 2, "guidance": 2.0},
        report={"title": "Tiny", "also_presets": ("sd-v1.4",)},
    )


@contextmanager
def figures_left_blank() -> Iterator[None]:
    """Inside, reports and cards have white pictures for figures: drawing takes as long as all the rest of a report."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from PIL import Image

    def save(_figure: Figure, path: Path, _area: Bbox) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255).save(path, format="PNG")

    blank = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
    with pytest.MonkeyPatch.context() as patch:
        for module in ("prune_lab.report.page", "prune_lab.export.card"):
            patch.setattr(f"{module}.freeze_layout", lambda _figure: Bbox.unit())
            patch.setattr(f"{module}.save_png", save)
        patch.setattr("prune_lab.report.page.svg_uri", lambda _figure, _area: blank)
        yield


@pytest.fixture
def blank_figures() -> Iterator[None]:
    """Reports and cards with ``figures_left_blank``, for tests that look at other things."""
    with figures_left_blank():
        yield


@pytest.fixture(scope="session")
def finished(built_once: BuiltOnce, finished_config: RunConfig) -> Run:
    """A run that was done from first to last, its figures left blank; read it, copy it to change it."""
    from prune_lab.workflow import run_all

    def build(folder: Path) -> None:
        with figures_left_blank():
            run_all(finished_config, folder)

    return Run(built_once("finished", build))


@pytest.fixture(scope="session")
def distilled_alone(built_once: BuiltOnce, tiny_unet_shared: Any) -> Path:
    """A folder with BK-SDM's three students of the tiny U-Net, each distilled by itself; copy it to change it."""
    from distilling import distil_alone

    return built_once("distilled", lambda folder: distil_alone(copy.deepcopy(tiny_unet_shared), folder))


def save_tiny_pipeline(folder: Path, unet: Any) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        )
        text_encoder = build_text_encoder()
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=build_tokenizer(folder.with_name(f"{folder.name}-tokenizer")),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def save_tiny_scorer(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=build_text_encoder().config.to_dict(),
                vision_config={**vision, "image_size": 32, "patch_size": 8, "projection_dim": 16},
                projection_dim=16,
            )
        )
    model.save_pretrained(folder)
    build_tokenizer(folder.with_name(f"{folder.name}-tokenizer")).save_pretrained(folder)
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")


def build_text_encoder() -> Any:
    """A two-layer CLIP text model of width 16 over 16 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            bos_token_id=_vocabulary()["<|startoftext|>"],
            eos_token_id=_vocabulary()["<|endoftext|>"],
        )
    )


def build_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that spells words letter by letter; its two files are written to ``folder``."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


@pytest.fixture
def tiny_inputs(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of one forward pass of ``tiny_unet`` on a batch of two."""
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([20, 700]),
        "encoder_hidden_states": torch.randn(2, 7, tiny_config["cross_attention_dim"], generator=generator),
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in the subprocesses of tests; models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_pipeline_folder: Path) -> Any:
    """The pipeline of ``tiny_pipeline_folder`` in float32; do not change it."""
    from prune_lab.models import load_pipeline, resolve_model

    return load_pipeline(resolve_model(str(tiny_pipeline_folder)))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Seven captioned images as `datasets` reads them, free to be changed."""
    from training_images import write_images

    return write_images(tmp_path / "images")


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without its figures, for tests of other steps: drawing them takes longer than all the rest."""

    def write(run: Run) -> Path:
        run.report_dir.mkdir(exist_ok=True)
        run.report.write_text("drawn")
        return run.report

    monkeypatch.setattr("prune_lab.workflow.ranking.write_report", write)
