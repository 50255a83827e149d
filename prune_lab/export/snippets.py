"""The few lines that draw with a pipeline in plain diffusers, by its class; they run in the folder as they stand."""

from __future__ import annotations

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
_TEXT = f"""{_LOAD}picture = pipeline("a red bird on a branch", num_inference_steps=25).images[0]
picture.save("picture.png")
"""
_EDIT = f"""from PIL import Image
{_LOAD}{_PICTURE}picture = pipeline("a red bird on a branch", image=own, num_inference_steps=25).images[0]
picture.save("picture.png")
"""
_INPAINT = f"""from PIL import Image
{_LOAD}{_PICTURE}mask = Image.new("L", (side, side), 255)  # white is drawn anew
drawn = pipeline("a red bird on a branch", image=own, mask_image=mask, num_inference_steps=25)
drawn.images[0].save("picture.png")
"""
_PARTS = f"""{_LOAD}print(f"{{pipeline.unet.num_parameters():,}} parameters")
"""
_MODEL = """from diffusers import AutoModel

# In this folder; from anywhere else give its path, or its name on the hub.
model = AutoModel.from_pretrained(".")
print(f"{model.num_parameters():,} parameters")
"""

# A part of the class's name: what the hub calls its task, and the lines. The first that is found counts.
_BY_NAME: dict[str, tuple[str, str]] = {
    "InpaintPipeline": ("image-to-image", _INPAINT),
    "Img2ImgPipeline": ("image-to-image", _EDIT),
    "Pix2PixPipeline": ("image-to-image", _EDIT),
}
_FROM_TEXT = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")


def _lines(class_name: str) -> tuple[str, str]:
    for part, found in _BY_NAME.items():
        if part in class_name:
            return found
    if class_name in _FROM_TEXT:
        return "text-to-image", _TEXT
    return "text-to-image", _PARTS if class_name.endswith("Pipeline") else _MODEL


def snippet_for(class_name: str, variant: str = "", *, trusted: bool = False) -> tuple[str, str]:
    """(the task as the hub calls it, lines of Python) for a pipeline of that class, or for a model alone.

    ``variant`` is the one that is in the names of its files; ``trusted`` runs the code that the folder brings along.
    """
    task, lines = _lines(class_name)
    more = [f'variant="{variant}"'] * bool(variant) + ["trust_remote_code=True"] * trusted
    return task, lines.replace('(".")', "({})".format(", ".join(['"."', *more])))
