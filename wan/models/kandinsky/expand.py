"""A prompt written out by the language model itself, as the published program does before it makes a video."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError, clear_errors, exists
from wan.memory.placement import on_device
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky.picture import HD_AREA
from wan.parallel.distributed import DistributedContext

log = logging.getLogger("wan")

# As the published program asks for it, in words of our own.
INSTRUCTION = (
    "Below is a short description of a video. Write it out into one full, concrete English paragraph for a model "
    "that makes videos of texts and was trained on captions such as this: 'At a kitchen table by a window, a "
    "woman in a green apron kneads dough on a floured board. She folds it over twice, presses it down with both "
    "hands, and looks up, smiling. Behind her are open shelves with jars. The camera stands still at the height "
    "of the table. Soft morning light from the left gives the scene a calm, homely mood. It looks like "
    "professional footage with natural colours.' That is only one of very many. Say where it takes place, who or "
    "what is seen and what it looks like, what happens in which order, what the camera does, the light, the mood "
    "and the visual style. Keep all that the description says."
    '\n\nDescription: "{prompt}"\n\nReply with the paragraph alone.'
)
PICTURE_INSTRUCTION = (
    "The picture is the first frame of a video, of which below is a short description. Write that out into full, "
    "concrete English for a model that continues pictures as videos and was trained on descriptions such as this: "
    "'The woman at the table lifts the dough, turns it over and presses it down with both hands, then looks up "
    "and smiles. The shelves behind her stay as they are, while the camera slowly moves closer.' That is only one "
    "of very many. Say above all what changes: how those in the picture move and act, in which order, and what "
    "the camera does, so that much happens. Keep all that the description says."
    '\n\nDescription: "{prompt}"\n\nReply with the description alone.'
)
# A turn of Qwen's chat, with the system's line that its own template puts before all others.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"
)
VISION_START, PICTURE, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
ENDS = ("<|im_end|>", "<|endoftext|>")
MOST_TOKENS = 256
# Qwen's own configuration, which the published program leaves as it is, draws tokens at a temperature of 1e-6: the
# likeliest. That is taken here, so that a text follows from its prompt and from no seed.
REPETITION_PENALTY = 1.05
PICTURE_FILE = "preprocessor_config.json"
# How many times as long as wide a picture may be for transformers' processor.
MOST_NARROW = 200


class Pipeline(Protocol):
    """What is asked of the pipeline."""

    expander: Expander | None
    text_device: torch.device
    offload: bool
    distributed: DistributedContext | None


class Expander(NamedTuple):
    """What writes prompts.

    model: whose language model is the pipeline's text encoder; without vision if it sees no pictures
    processor: of pictures, transformers'; None without vision
    """

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: Any
    processor: Any


def make_expander(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Any, checkpoint: Checkpoint) -> Expander:
    """An expander of a loaded model. Raises `CheckpointError` if its tokenizer lacks what marks turns or pictures."""
    if tokenizer is None:
        raise CheckpointError("the checkpoint lacks a tokenizer, so prompts cannot be written; download it again")
    sees = model.model.visual is not None
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (*ENDS, *((PICTURE,) if sees else ()))}
    if lost := [word for word, number in ids.items() if number is None]:
        raise CheckpointError(f"the tokenizer of the text encoder lacks {lost[0]}, so that it writes no prompts")
    if sees:
        model.config.image_token_id = ids[PICTURE]
    return Expander(model, tokenizer, _picture_processor(checkpoint, model) if sees else None)


def language_model_of(model: nn.Module) -> Qwen2_5_VLTextModel:
    """The text encoder, of the model that writes or of itself."""
    return model.model.language_model if isinstance(model, Qwen2_5_VLForConditionalGeneration) else model


def _picture_processor(checkpoint: Checkpoint, model: Qwen2_5_VLForConditionalGeneration) -> Any:
    try:
        # By this name, since `Qwen2VLImageProcessor` resizes otherwise where torchvision is installed.
        from transformers import Qwen2VLImageProcessorPil
    except ImportError:
        raise InputError("expand_prompt with an image needs transformers 5.23 or newer; leave one out") from None
    vision, folder = model.config.vision_config, checkpoint.tokenizer_folder
    own = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    own["temporal_patch_size"] = vision.temporal_patch_size
    if not exists(folder / PICTURE_FILE):
        return Qwen2VLImageProcessorPil(**own)
    with clear_errors(folder / PICTURE_FILE):
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, **own)
        # More than a video has would cost memory and time.
        processor.size = {key: min(processor.size[key], HD_AREA) for key in ("shortest_edge", "longest_edge")}
        # Numbers that make no sense are seen when they are used.
        processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        return processor


def expand(pipe: Pipeline, prompt: str, picture: np.ndarray | None) -> str:
    """What the leader's model writes of a prompt, and a picture (height, width, 3) uint8, on all that share a video.

    Raises `InputError` if it was not loaded for that, or writes nothing.
    """
    leads = pipe.distributed is None or pipe.distributed.is_leader
    text = _write(pipe, prompt, picture) if leads else None
    return text if pipe.distributed is None else pipe.distributed.broadcast_object_from_leader(text)


@torch.no_grad()
def _write(pipe: Pipeline, prompt: str, picture: np.ndarray | None) -> str:
    expander = pipe.expander
    if expander is None:
        raise InputError("prompts are expanded by a pipeline that was loaded with expand_prompt=True")
    if picture is not None and expander.processor is None:
        raise InputError(
            "this pipeline was loaded to expand prompts without a picture; leave image or expand_prompt out"
        )
    if hasattr(expander.model, "block_stream"):
        log.warning(
            "warning: the text encoder is streamed, all of it for each word of the expanded prompt: this is slow"
        )
    inputs = inputs_of(expander, prompt, picture)
    given = inputs["input_ids"].shape[1]
    with on_device(expander.model, pipe.text_device, pipe.offload) as model:
        inputs = {name: tensor.to(pipe.text_device) for name, tensor in inputs.items()}
        ids = model.generate(**inputs, generation_config=_decoding(expander.tokenizer))[0, given:]
    text = expander.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    if not text:
        raise InputError(f"the language model wrote nothing for the prompt {prompt!r}; leave expand_prompt out")
    return text


def inputs_of(expander: Expander, prompt: str, picture: np.ndarray | None) -> dict[str, Tensor]:
    """What the model is given: token ids (1, L), and of a picture its patches, their grid and which tokens they are."""
    seen, slot, count = {}, "", 0
    if picture is not None:
        height, width = picture.shape[:2]
        if max(height, width) > MOST_NARROW * min(height, width):
            raise InputError(f"image of {width}x{height} is too narrow to expand a prompt by; leave expand_prompt out")
        made = expander.processor(images=[Image.fromarray(picture)], return_tensors="pt")
        seen = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
        count = int(made["image_grid_thw"].prod()) // expander.processor.merge_size**2
        slot = VISION_START + PICTURE * count + VISION_END
    instruction = INSTRUCTION if picture is None else PICTURE_INSTRUCTION
    # The prompt last, since it may hold braces of its own.
    chat = CHAT.replace("{picture}", slot).replace("{text}", instruction).replace("{prompt}", prompt.strip())
    ids = expander.tokenizer(chat, return_tensors="pt").input_ids
    if picture is not None:
        stands_for_picture = ids == expander.model.config.image_token_id
        if int(stands_for_picture.sum()) != count:
            raise InputError(f"the prompt holds {PICTURE}, which stands for a picture; leave it out")
        seen["mm_token_type_ids"] = stands_for_picture.int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}


def _decoding(tokenizer: Any) -> GenerationConfig:
    ends = [tokenizer.convert_tokens_to_ids(word) for word in ENDS]
    return GenerationConfig(
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
        max_new_tokens=MOST_TOKENS,
        eos_token_id=ends,
        pad_token_id=ends[-1],
        use_cache=True,
    )
