"""A checkpoint in diffusers' layout, written: configurations, and the files that tell it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ConfigMixin

from wan.checkpoints.locate import INDEX
from wan.checkpoints.saving import save_json
from wan.sampling.solvers import TRAIN_TIMESTEPS

# Named so for image to video too, as it is published.
PIPELINE_INDEX = {
    "_class_name": "Kandinsky5T2VPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "Qwen2VLProcessor"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "Kandinsky5Transformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}
# Of most published checkpoints.
SHIFT = 5.0


def write_index(folder: Path, defaults: Mapping[str, Any]) -> None:
    """The index that names the components, and a scheduler of the shift that a checkpoint's defaults give."""
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": diffusers.__version__,
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "shift": defaults.get("sampling", {}).get("shift", SHIFT),
        "use_dynamic_shifting": False,
    }
    (folder / "scheduler").mkdir()
    save_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    save_json(PIPELINE_INDEX, folder / INDEX)


def config_of(model: type[ConfigMixin], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model of a class, as diffusers writes it."""
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return {"_class_name": model.__name__, "_diffusers_version": diffusers.__version__} | own
