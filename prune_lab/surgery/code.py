"""What lies beside the weights of a student with code of its own: its model file, and how it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_lab.families import CLASS_NAME, base_name, code_path, family_of, file_of, is_own
from prune_lab.runtime import write_text

_NOTES = """\
A {base} with {changes}, written by prune-lab. No plain config describes what is left, so the
model brings `{file}.py` along, a small file that needs torch and diffusers alone. Its name holds the first digits of
the SHA-256 of its content.

Load the pipeline around this folder:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PIPELINE", trust_remote_code=True)
```

Load the model alone:

```python
from diffusers import AutoModel

model = AutoModel.from_pretrained("PIPELINE/{component}", trust_remote_code=True)
```

prune-lab loads it without being told to trust it: it knows the file by its hash, and runs a copy of its own.

Good to know:

- Give `AutoModel` the folder of the model itself, as text: it raises a TypeError for a `pathlib.Path`, and with
  `subfolder=` it looks for the code where the pipeline is and raises a ValueError.
- `{base}.from_pretrained` refuses this folder, as it must: `quantization_config` in `config.json` names a way that it
  does not know. Nothing is quantised. Where that entry is lost, the weights do not fit ("expected shape", "size
  mismatch"): each module that is gone has left a tensor without numbers under the name of one of its own. Its shape is
  a digest of `removed` in config.json, so that a list that was changed is refused as well. Without the entry, do not
  pass `ignore_mismatched_sizes=True`: diffusers would then fill the gaps with random numbers.
- The entry of the model in `model_index.json` names the file and the class, `["{file}", "{name}"]`. With an entry for
  diffusers there a plain {base} would be asked for.
- `DiffusionPipeline.from_pretrained(..., {component}=model)` raises a TypeError for a model with code of its own: load
  the pipeline without, and set `pipeline.{component} = model`.
- `save_pretrained`, of the pipeline too, copies the file along.
- diffusers keeps a copy of the file in its cache of modules. Files of other versions have other names, so several can
  be loaded in one process. On a hub the file belongs where it is here: in the folder of the component.
- No single file (.safetensors) holds such a model.
"""


def _changes(config: Mapping[str, Any]) -> str:
    removed, widths = len(config["removed"]), len(config.get("widths") or {})
    narrower = f"{widths} of its layers and norms narrower"
    taken = f"{removed} of its modules taken out"
    return taken if not widths else f"{taken} and {narrower}" if removed else narrower


def notes_on_form(config: Mapping[str, Any]) -> str:
    """What one has to know to load a student of this ``config``, as Markdown; empty for one of a plain class."""
    if not is_own(config):
        return ""
    name = str(config[CLASS_NAME])
    return _NOTES.format(
        name=name,
        base=base_name(name),
        changes=_changes(config),
        file=file_of(config),
        component=family_of(config).component,
    )


def write_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Put the model file and a README beside the weights in ``folder``; nothing for a plain ``config``."""
    if not is_own(config):
        return
    file = file_of(config)
    shutil.copyfile(code_path(file), folder / f"{file}.py")
    write_text(folder / "README.md", f"# {config[CLASS_NAME]}\n\n{notes_on_form(config)}")
