"""A checkpoint in diffusers' layout, written: the folder of each component, and the index that names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedModel

from wan.checkpoints.component import Component
from wan.checkpoints.file_errors import read_json_object
from wan.checkpoints.locate import INDEX
from wan.checkpoints.saving import save_json, save_shards
from wan.config.settings import SamplingSettings
from wan.models.family import Layout
from wan.models.wan.image_encoder import DEVIATION, MEAN
from wan.models.wan.kinds import kind_of
from wan.sampling.solvers import TRAIN_TIMESTEPS

SCHEDULER_FILE = "scheduler/scheduler_config.json"
COMPONENTS = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    # The class that takes `tokenizer.json` as it is, see `load_tokenizer`.
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
# For diffusers' pipelines alone: what is made of pictures here is in `image_encoder.py`. Without the size.
IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": list(MEAN),
    "image_std": list(DEVIATION),
} | dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)


def write_component(
    component: Component,
    folder: Path,
    stem: str,
    also: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a component as diffusers and transformers save it: its configuration, and safetensors of the model's names.

    also: entries of the configuration that the model does not know
    """
    folder.mkdir()
    if isinstance(component.model, PreTrainedModel):
        component.model.config.save_pretrained(folder)
    else:
        component.model.save_config(folder)
    if also:
        save_json(read_json_object(folder / "config.json") | also, folder / "config.json")
    save_shards(cast(component.tensors(), dtype), folder, stem)


def cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a dtype, or as they are if it is None."""
    return ((name, tensor if dtype is None else tensor.to(dtype)) for name, tensor in tensors)


def write_index(folder: Path, defaults: Mapping[str, Any], layout: Layout) -> None:
    """What diffusers' pipeline of a checkpoint's kind needs beside the components: the index that names them, and a
    scheduler; and what prepares pictures for an image encoder, which is in the folder already if there is one.

    defaults: the checkpoint's, of which the scheduler has the shift; layout: that tells its kind
    """
    kind = kind_of(layout)
    make_scheduler(defaults).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": kind.diffusers_pipeline, "_diffusers_version": diffusers.__version__}
    index |= COMPONENTS
    if kind.name == "vace":
        index["transformer"] = ["diffusers", "WanVACETransformer3DModel"]
    if layout.boundary is not None:
        index |= {"transformer_2": COMPONENTS["transformer"], "boundary_ratio": layout.boundary}
    if "image" in kind.inputs.optional:
        # Of each token its timestep, those of a first frame that is given among them.
        index["expand_timesteps"] = True
    if kind.sees_pictures:
        side = CLIPVisionConfig.from_pretrained(str(folder / "image_encoder")).image_size
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        (folder / "image_processor").mkdir()
        save_json(IMAGE_PROCESSOR | size, folder / "image_processor" / "preprocessor_config.json")
        index |= {"image_encoder": ["transformers", "CLIPVisionModel"]}
        index |= {"image_processor": ["transformers", IMAGE_PROCESSOR["image_processor_type"]]}
    save_json(index, folder / INDEX)


def make_scheduler(defaults: Mapping[str, Any]) -> UniPCMultistepScheduler:
    """The one that walks as this program does, of the shift that a checkpoint's defaults give."""
    shift = defaults.get("sampling", {}).get("shift", SamplingSettings.shift)
    return UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
