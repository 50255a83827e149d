"""Kind ``model``: a pipeline, a U-Net folder or a config whose files somebody changed, and a verb that is given it."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.forking import Limits, answer
from tests.faults.stage import Stage
from tests.faults.verdicts import Fault, Verdict, faults_of, left_behind, mistake_line, words

_PARTS = ("unet", "vae", "text_encoder", "scheduler", "tokenizer", "")
_HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "16",
        "x",
        "../../etc",
        "os",
        "\x00",
        "é" * 40,
        [],
        [1],
        [None],
        [[8]],
        [8, 16],
        [8, 16, 32, 33],
        [0, 0, 0, 0],
    ),
    *(
        [-8, 16, 32, 32],
        [1e9] * 4,
        {},
        {"a": 1},
        ["CrossAttnDownBlock2D"],
        ["DownBlock2D"] * 40,
        ["SillyBlock2D"] * 4,
    ),
)
_KEYS_OF_INTEREST = (
    *(
        "sample_size",
        "in_channels",
        "out_channels",
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",
    ),
    *("num_attention_heads", "cross_attention_dim", "norm_num_groups", "down_block_types", "up_block_types"),
    *("mid_block_type", "transformer_layers_per_block", "class_embed_type", "addition_embed_type", "act_fn"),
    *("time_embedding_type", "conv_in_kernel", "conv_out_kernel", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("num_class_embeds", "time_cond_proj_dim", "resnet_time_scale_shift", "only_cross_attention", "dropout"),
    *("downsample_padding", "mid_block_scale_factor", "norm_eps", "center_input_sample", "flip_sin_to_cos"),
    *("freq_shift", "projection_class_embeddings_input_dim", "timestep_post_act", "dual_cross_attention"),
    *(
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
        "latent_channels",
        "scaling_factor",
    ),
    *("num_train_timesteps", "beta_start", "beta_schedule", "prediction_type", "_class_name", "torch_dtype"),
)
Change = Callable[[random.Random, Path], str]


# Configs -------------------------------------------------------------------------------------------------------------


def _config_of(rng: random.Random, folder: Path) -> Path | None:
    places = [
        path for path in folder.rglob("*.json") if path.name in ("config.json", "scheduler_config.json")
    ]
    unets = [path for path in places if path.parent.name == "unet" or path.parent == folder]
    choice = unets if unets and rng.random() < 0.6 else places
    return rng.choice(sorted(choice)) if choice else None


def _key(rng: random.Random, folder: Path) -> str:
    """Some keys of a config become something else."""
    path = _config_of(rng, folder)
    if path is None:
        return ""
    config, done = json.loads(path.read_text()), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        own = [key for key in config if key in _KEYS_OF_INTEREST] or list(config)
        key = rng.choice(own if rng.random() < 0.8 else list(_KEYS_OF_INTEREST))
        if rng.random() < 0.15:
            config.pop(key, None)
            done.append(f"no {key}")
            continue
        value: Any = rng.choice(_HOSTILE)
        now = config.get(key)
        if isinstance(now, list) and rng.random() < 0.6:
            value = list(now)
            match rng.randrange(4):
                case 0:
                    value.pop()
                case 1:
                    value.append(value[0])
                case 2:
                    value[rng.randrange(len(value))] = rng.choice(_HOSTILE)
                case _:
                    value = value[::-1]
        elif isinstance(now, int) and not isinstance(now, bool) and rng.random() < 0.5:
            value = now + rng.choice([-1, 1, 2, 100_000])
        config[key] = value
        done.append(f"{key} = {str(value)[:40]}")
    path.write_text(json.dumps(config))
    return f"{path.relative_to(folder)}: {', '.join(done)}"


def _json_text(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.rglob("*.json")))
    content = path.read_bytes()
    name, other = rng.choice(
        [
            ("cut short", content[: rng.randrange(len(content))]),
            ("empty", b""),
            ("deep brackets", b"[" * 200_000),
            ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
            ("a list", b"[]"),
            ("a number", b"3"),
            ("null", b"null"),
            ("not UTF-8", b'{"a": "\xff\xfe"}'),
            ("UTF-16", content.decode().encode("utf-16")),
            ("a byte-order mark before it", b"\xef\xbb\xbf" + content),
            ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
            ("a number of 100,000 digits", content.replace(b": ", b": " + b"9" * 100_000, 1)),
            ("60 MB of spaces", b" " * 60_000_000 + content),
            ("keys without end", b"{" + b",".join(b'"k%d":1' % n for n in range(300_000)) + b"}"),
            ("a merge conflict", b"<<<<<<< HEAD\n" + content + b"=======\n>>>>>>> x\n"),
        ]
    )
    path.write_bytes(other)
    return f"{path.relative_to(folder)} is {name}"


def _index(rng: random.Random, folder: Path) -> str:
    """model_index.json names other classes, modules or parts."""
    path = folder / "model_index.json"
    if not path.is_file():
        return ""
    index = json.loads(path.read_text())
    key = rng.choice(
        [key for key in index if not key.startswith("_")] + ["_class_name", "extra", "../x", "controlnet"]
    )
    value = rng.choice(
        [
            *(
                ["os", "system"],
                ["builtins", "eval"],
                ["subprocess", "Popen"],
                ["diffusers", "NoSuchClass"],
                [None, None],
            ),
            *(
                ["transformers", "CLIPTextModel"],
                ["diffusers", "AutoencoderKL"],
                ["diffusers", "PNDMScheduler"],
                "x",
                7,
                [],
                [1, 2],
            ),
            *(
                ["pipeline", "Mine"],
                ["diffusers", "UNet2DConditionModel"],
                ["a.b.c", "D"],
                None,
                {},
                ["diffusers"],
                "SillyPipeline",
            ),
            *(
                "StableDiffusionXLPipeline",
                "StableDiffusionInpaintPipeline",
                "FluxPipeline",
                ["diffusers", "logging"],
            ),
        ]
    )
    index[key] = value
    path.write_text(json.dumps(index))
    if value == ["pipeline", "Mine"]:
        (folder / "pipeline.py").write_text("raise SystemExit('imported')\n")
        if key not in ("../x",) and (folder / key).is_dir():
            (folder / key / "pipeline.py").write_text("raise SystemExit('imported')\n")
    return f"model_index.json: {key} = {value}"


# Weights -------------------------------------------------------------------------------------------------------------


def _weights(rng: random.Random, folder: Path) -> Path | None:
    files = sorted(folder.rglob("*.safetensors"))
    unets = [path for path in files if path.parent.name == "unet" or path.parent == folder]
    choice = unets if unets and rng.random() < 0.5 else files
    return rng.choice(choice) if choice else None


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: object, data: bytes, wrong: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) + wrong) + text + data


def _header(rng: random.Random, folder: Path) -> str:
    """The header of a file of weights says something else."""
    path = _weights(rng, folder)
    if path is None:
        return ""
    header, data = _split(path.read_bytes())
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, wrong, what = header[name], 0, rng.randrange(12)
    match what:
        case 0:
            entry["data_offsets"] = [
                entry["data_offsets"][0],
                rng.choice([10**30, -1, 1.5, "9", None, float("inf")]),
            ]
        case 1:
            entry["shape"] = rng.choice(
                [[-1], [10**12], [1.5], "3", None, [[1]], [*entry["shape"], 1], entry["shape"][::-1]]
            )
        case 2:
            entry["dtype"] = rng.choice(["F64", "X9", 7, None, "I8", "f32", "BF16"])
        case 3:
            header[f"{name}.other"] = header.pop(name)
        case 4:
            del header[name]
        case 5:
            header[name] = rng.choice([None, [], 3, "x", {}])
        case 6:
            wrong = rng.choice([1, -1, 10**6, 2**40, 2**62])
        case 7:
            header["__metadata__"] = rng.choice([{"a": 1}, [], 3, {"a": {"b": "c"}}])
        case 8:
            other = rng.choice([key for key in header if key != "__metadata__"])
            header[other], header[name] = header[name], header[other]
        case 9:
            for key, one in header.items():
                if key != "__metadata__" and "data_offsets" in one:
                    one["data_offsets"] = [0, 4]
        case 10:
            header = {f"module.{key}" if key != "__metadata__" else key: one for key, one in header.items()}
        case _:
            header = rng.choice([[], None, 3, {}, {"__metadata__": {}}])
    path.write_bytes(_joined(header, data, wrong))
    return f"{path.relative_to(folder)}: change {what} of its header, at {name}"


def _numbers(rng: random.Random, folder: Path) -> str:
    """Numbers of a tensor become not finite, or zero."""
    path = _weights(rng, folder)
    if path is None:
        return ""
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    what = rng.choice(["one NaN", "one infinity", "all zero", "all NaN"])
    words4 = {"one NaN": b"\x00\x00\xc0\x7f", "one infinity": b"\x00\x00\x80\x7f"}
    if what in words4:
        place = 8 + length + 4 * rng.randrange((len(content) - 8 - length) // 4)
        content[place : place + 4] = words4[what]
    else:
        rest = (len(content) - 8 - length) // 4
        content[8 + length :] = (b"\x00\x00\xc0\x7f" if "NaN" in what else bytes(4)) * rest
    path.write_bytes(content)
    return f"{path.relative_to(folder)}: {what}"


def _file(rng: random.Random, folder: Path) -> str:
    """A file is cut short, gone, or something that is no file."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    what = rng.choice(
        [
            "cut",
            "gone",
            "empty",
            "folder",
            "fifo",
            "link to itself",
            "/dev/zero",
            "/dev/urandom",
            "lfs",
            "html",
            "huge",
        ]
    )
    size = path.stat().st_size
    match what:
        case "cut":
            os.truncate(path, rng.randrange(max(1, size)))
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "fifo":
            path.unlink()
            os.mkfifo(path)
        case "link to itself":
            path.unlink()
            path.symlink_to(path.name)
        case "/dev/zero" | "/dev/urandom":
            path.unlink()
            path.symlink_to(what)
        case "lfs":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        case "html":
            path.write_bytes(b"<!doctype html><html></html>")
        case _:
            os.truncate(path, 20 * 2**30)
    return f"{path.relative_to(folder)}: {what}"


def _shards(rng: random.Random, folder: Path) -> str:
    """Weights of the U-Net in shards, with an index that says something odd."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    path = unet / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        return ""
    header, _ = _split(path.read_bytes())
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    names = [key for key in header if key != "__metadata__"]
    mapped: Any = dict.fromkeys(names, shard)
    what = rng.choice(
        [
            "right",
            "list",
            "list of lists",
            "outside",
            "absolute",
            "missing file",
            "one name less",
            "one more",
            "number",
            "none",
        ]
    )
    match what:
        case "list":
            mapped = names
        case "list of lists":
            mapped[names[0]] = [[shard]]
        case "outside":
            mapped[names[0]] = f"../unet/{shard}"
        case "absolute":
            mapped[names[0]] = "/etc/passwd"
        case "missing file":
            mapped[names[0]] = "diffusion_pytorch_model-00002-of-00002.safetensors"
        case "one name less":
            del mapped[names[0]]
        case "one more":
            mapped["no.such.tensor"] = shard
        case "number":
            mapped[names[0]] = 7
        case "none":
            mapped = None
    path.rename(unet / shard)
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": mapped}
    path.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    return f"shards: {what}"


def _names(rng: random.Random, folder: Path) -> str:
    """A folder or file has another name, or a stray one lies beside it."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path != folder))
    what = rng.choice(["renamed", "twice", "stray", "variant"])
    match what:
        case "renamed":
            path.rename(path.with_name(f"{path.name}_old"))
        case "twice":
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, path.with_name(f"{path.name}.copy"))
        case "stray":
            (path.parent / "stray\n\x1b[31mname.safetensors").write_bytes(b"x")
        case _:
            if path.suffix != ".safetensors":
                return ""
            path.rename(path.with_suffix(".fp16.safetensors"))
    return f"{path.relative_to(folder)}: {what}"


CHANGES: dict[str, Change] = {
    "key": _key,
    "key again": _key,
    "json": _json_text,
    "index": _index,
    "header": _header,
    "numbers": _numbers,
    "file": _file,
    "shards": _shards,
    "names": _names,
}


# A case --------------------------------------------------------------------------------------------------------------

# The verb, and whether a U-Net alone will do.
_ASKED: dict[str, tuple[tuple[str, ...], bool]] = {
    "blocks": (("blocks", "MODEL", "--json"), True),
    "profile": (("profile", "MODEL", "--no-latency", "--json"), True),
    "prune": (("prune", "MODEL", "--plan", "bk-small", "--out", "OUT"), True),
    "compare": (("compare", "bk-base", "--model", "MODEL", "--json"), True),
    "score": (
        (
            "score",
            "MODEL",
            "--samples",
            "2",
            "--set",
            "probe.timesteps=1",
            "--set",
            "score.groups=block",
            "--json",
        ),
        False,
    ),
    "generate": (("generate", "MODEL", "--prompt", "a cat", "--out", "OUT.png", "--steps", "1"), False),
    "search": (("search", "MODEL", "--params", "70%", "--samples", "2", "--json"), False),
    "export": (("export", "MODEL", "--to", "single-file", "--out", "OUT.safetensors"), False),
}


def _true_result(verb: str, out: Path, what: str) -> list[Fault]:
    """Why what was written is no true result, although the verb said so."""
    if verb == "prune":
        import diffusers
        import torch

        kind = "pipeline" if (out / "model_index.json").is_file() else "unet"
        try:
            if kind == "pipeline":
                unet = diffusers.DiffusionPipeline.from_pretrained(out).unet
            else:
                unet = diffusers.UNet2DConditionModel.from_pretrained(out)
        except Exception as error:
            return [
                Fault("a student that does not load", type(error).__name__, f"{what}: {str(error)[:300]}")
            ]
        if not all(bool(torch.isfinite(one).all()) for one in unet.parameters()):
            return [Fault("a student that is not finite", verb, what)]
    if verb == "generate":
        import numpy as np
        from PIL import Image

        picture = np.asarray(Image.open(out.with_suffix(".png")))
        if picture.std() == 0:
            return [Fault("a picture of one colour without a word", verb, what)]
    return []


def hostile_model(stage: Stage, seed: int, place: Path) -> Verdict:
    """One or two changes of a pipeline or U-Net folder, and one verb that is given it."""
    rng = random.Random(seed)
    verb = rng.choice(sorted(_ASKED))
    model = place / "model"
    shutil.copytree(
        stage.pipeline / "unet" if _ASKED[verb][1] and rng.random() < 0.35 else stage.pipeline, model
    )
    done: list[str] = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        change = CHANGES[rng.choice(sorted(CHANGES))]
        try:
            done.append(change(rng, model))
        except (ValueError, OSError, KeyError, AttributeError, TypeError, IndexError):
            if not any(done):  # the second change of what the first one broke
                raise
    what = "; ".join(filter(None, done)) or "no change"
    out = place / "out"
    given = {
        "MODEL": model,
        "OUT": out,
        "OUT.png": place / "out.png",
        "OUT.safetensors": place / "out.safetensors",
    }
    target = (
        model / "config.json"
        if verb in ("blocks", "profile") and (model / "config.json").is_file() and rng.random() < 0.3
        else model
    )
    command = [str(given.get(word, word)) if word != "MODEL" else str(target) for word in _ASKED[verb][0]]
    found = answer(command, place, limits=Limits(seconds=180.0))
    faults = [Fault(one.kind, one.signature, f"{what}: {one.detail}") for one in faults_of(found, command)]
    if "imported" in found.err:
        faults.append(Fault("code of the model ran", verb, what))
    if not faults and found.code == 0:
        faults += _true_result(verb, out, what)
        alone = not (model / "model_index.json").is_file()
        spoilt = any(word in what for word in ("all zero", "NaN", "infinity")) and (alone or "unet/" in what)
        if spoilt and "_class_name" not in what and verb in ("score", "search", "prune", "generate"):
            faults.append(Fault("a U-Net that is not finite, or zero, without a word", verb, what))
    if found.code == 2:
        faults += [Fault("left behind", verb, f"{what}: {one}") for one in left_behind(place)[:1]]
        if out.exists():
            faults.append(Fault("written although refused", verb, f"{what}: {words(command)}"))
        if len(mistake_line(found)) > 3000:
            faults.append(
                Fault("the line is longer than a page", verb, f"{what}: {mistake_line(found)[:200]}")
            )
    return Verdict(f"{verb} of {what}", 1, tuple(faults), int(found.code == 2))
