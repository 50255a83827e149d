"""The few lines that draw with a pipeline in plain diffusers, by its class; they run in the folder as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prune_lab.export.students import model_folder_in
from prune_lab.families import CLASS_NAME, is_own
from prune_lab.families.drawing import needed_by
from prune_lab.models import UsualDrawing, weight_files
from prune_lab.models.files import json_object
from prune_lab.models.parts import component_of, pipeline_class

_LOAD = """\
from diffusers import DiffusionPipeline

# In this folder; from anywhere else give its path, or its name on the hub.
pipeline = DiffusionPipeline.from_pretrained(".")
"""
_PICTURE = """
# A stand-in for your own picture.
side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
own = Image.new("RGB", (side, side), "white")
"""
_SAVE = """.images[0]
picture.save("picture.png")
"""
_TEXT = f"""{_LOAD}picture = pipeline("a red bird on a branch", num_inference_steps=25){_SAVE}"""
_CLASS = f"""{_LOAD}picture = pipeline([207], num_inference_steps=25)  # a class by its number
picture.images[0].save("picture.png")
"""
_NOTHING = f"""{_LOAD}picture = pipeline(num_inference_steps=50){_SAVE}"""
_VIDEO = f"""{_LOAD}frames = pipeline("a red bird on a branch", num_inference_steps=25, output_type="pil").frames[0]
frames[0].save("video.gif", save_all=True, append_images=frames[1:])
"""
_EDIT = f"""from PIL import Image
{_LOAD}{_PICTURE}picture = pipeline("a red bird on a branch", image=own, num_inference_steps=25){_SAVE}"""
_INPAINT = f"""from PIL import Image
{_LOAD}{_PICTURE}mask = Image.new("L", (side, side), 255)  # white is drawn anew
drawn = pipeline("a red bird on a branch", image=own, mask_image=mask, num_inference_steps=25)
drawn.images[0].save("picture.png")
"""
_PARTS = f"""{_LOAD}print(f"{{pipeline.COMPONENT.num_parameters():,}} parameters")
"""
_MODEL = """from diffusers import AutoModel

# In this folder; from anywhere else give its path, or its name on the hub.
model = AutoModel.from_pretrained(".")
print(f"{model.num_parameters():,} parameters")
"""

_TEXT_TO_IMAGE, _TEXT_TO_VIDEO = "text-to-image", "text-to-video"
_UNCONDITIONAL = "unconditional-image-generation"
# The classes whose lines are known, what the hub calls their task, and the lines.
_BY_CLASS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"),
            *(
                "StableDiffusion3Pipeline",
                "FluxPipeline",
                "Flux2Pipeline",
                "ChromaPipeline",
                "QwenImagePipeline",
            ),
            *(
                "PixArtAlphaPipeline",
                "PixArtSigmaPipeline",
                "SanaPipeline",
                "AuraFlowPipeline",
                "PRXPipeline",
            ),
            *(
                "Lumina2Pipeline",
                "ZImagePipeline",
                "CogView3PlusPipeline",
                "CogView4Pipeline",
                "HunyuanDiTPipeline",
            ),
        ),
        (_TEXT_TO_IMAGE, _TEXT),
    ),
    **dict.fromkeys(
        (
            *("WanPipeline", "CogVideoXPipeline", "LTXPipeline", "MochiPipeline", "AllegroPipeline"),
            *("HunyuanVideoPipeline", "SkyReelsV2Pipeline"),
        ),
        (_TEXT_TO_VIDEO, _VIDEO),
    ),
    **dict.fromkeys(
        ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "ConsistencyModelPipeline"),
        (_UNCONDITIONAL, _NOTHING),
    ),
    "DiTPipeline": (_UNCONDITIONAL, _CLASS),
}
# Others with a U-Net by a part of the class's name; the first that is found counts.
_BY_NAME: dict[str, tuple[str, str]] = {
    "InpaintPipeline": ("image-to-image", _INPAINT),
    "Img2ImgPipeline": ("image-to-image", _EDIT),
    "Pix2PixPipeline": ("image-to-image", _EDIT),
}


def _lines(class_name: str) -> tuple[str, str]:
    if class_name in _BY_CLASS:
        return _BY_CLASS[class_name]
    if pipeline_class(class_name) is None:
        return _TEXT_TO_IMAGE, _MODEL
    component = component_of({CLASS_NAME: class_name})
    if component == "unet":
        for part, found in _BY_NAME.items():
            if part in class_name:
                return found
    return _TEXT_TO_IMAGE, _PARTS.replace("COMPONENT", component)


def _loading(place: str, variant: str, trusted: bool) -> str:
    """What stands between the brackets of ``from_pretrained`` for a folder or a name of the hub."""
    more = [f'variant="{variant}"'] * bool(variant) + ["trust_remote_code=True"] * trusted
    return ", ".join([json.dumps(place, ensure_ascii=False), *more])


def snippet_for(
    class_name: str,
    variant: str = "",
    *,
    size: object = None,
    tokens: int = 0,
    trusted: bool = False,
    usual: UsualDrawing | None = None,
) -> tuple[str, str]:
    """(the task as the hub calls it, lines of Python) for a pipeline of that class, or for a model alone.

    ``variant`` is the one that is in the names of its files, ``size`` the side of the latent and ``tokens`` the length
    of the text that its model is meant for; ``trusted`` runs the code that the folder brings along,
    ``usual`` is how its model is meant to draw.
    """
    task, lines = _lines(class_name)
    needed = needed_by(pipeline_class(class_name), size, tokens)
    told = "".join(f", {name}={value}" for name, value in needed.items())
    lines = lines.replace("num_inference_steps=25", f"num_inference_steps=25{told}")
    if usual is not None and usual.few:
        few = f"num_inference_steps={usual.steps}, guidance_scale={usual.guidance}"
        lines = lines.replace("num_inference_steps=25", few)
    return task, lines.replace('(".")', f"({_loading('.', variant, trusted)})")


def variant_of(model_folder: Path) -> str:
    """The variant in the names of its weights, as ``fp16``; empty where there is none."""
    first = weight_files(model_folder)[0].name
    found = re.match(r"[^.]+\.(.+?)(-\d+-of-\d+)?\.safetensors", first)
    return found[1] if found else ""


def mixes_formats(folder: Path) -> bool:
    """Whether plain diffusers loads parts of the pipeline in ``folder`` in different number formats: text encoders as
    their configs say, its own parts in float32. Such a pipeline draws with a ``torch_dtype`` alone.
    """
    said = [json_object(path) for path in folder.glob("*/config.json")]
    return any(one.get("dtype", one.get("torch_dtype")) in ("float16", "bfloat16") for one in said)


def loaded_in_python(folder: Path, lora: Path | None = None, name: str = "") -> str:
    """The line of Python that loads what lies in ``folder``, a pipeline's or a model's, with plain diffusers; with the
    ``lora`` in another folder on top. ``name`` is what the pipeline is called elsewhere, as on the hub.
    """
    index, inner = folder / "model_index.json", model_folder_in(folder)
    config = json_object(inner / "config.json")
    whole = index.is_file()
    loader, kept = ("DiffusionPipeline", "pipeline") if whole else ("AutoModel", "model")
    given = _loading(name or str(folder), variant_of(inner), is_own(config))
    line = f"from diffusers import {loader}; {kept} = {loader}.from_pretrained({given})"
    if whole and mixes_formats(folder):
        line = f"import torch; {line[:-1]}, torch_dtype=torch.float32)"
    if lora is not None:
        line += f"; pipeline.load_lora_weights({json.dumps(str(lora), ensure_ascii=False)})"
    return line
