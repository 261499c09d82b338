"""Checkpoints of any size in the published layout with random weights: real speed and memory, meaningless pictures."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel

from wan.checkpoints import random_weights
from wan.checkpoints.locate import CONFIG
from wan.checkpoints.random_weights import captions, make_empty
from wan.checkpoints.saving import save_json, save_pickle, save_shards
from wan.models.family import Layout
from wan.models.wan import image_encoder, names, published
from wan.models.wan.components import PAD_TOKEN, TIED, finish_transformer
from wan.models.wan.kinds import KINDS
from wan.models.wan.layout import TEXT_LENGTH, TOKENIZER_FOLDER, components_of, write_task
from wan.models.wan.random_sizes import (
    MODELS,
    PictureTower,
    Sizes,
    meta_picture_tower,
    meta_text_encoder,
    meta_transformer,
    meta_vae,
    vae_config,
)
from wan.models.wan.vae_names import published_name

# Of what takes in states of pictures, whose layers have numbers alone.
PICTURE_NORM = re.compile(r"img_emb\.proj\.[04]\.weight")
Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(sizes: Sizes) -> Shapes:
    """Published names and shapes of the transformer's tensors."""
    state = meta_transformer(sizes).state_dict()
    return {names.published(name, names.TRANSFORMER): tuple(tensor.shape) for name, tensor in state.items()}


def random_transformer(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    layers: int | None = None,
    place: Callable[[WanTransformer3DModel], Callable[[str, Tensor], Tensor]] | None = None,
) -> WanTransformer3DModel:
    """The transformer of the size of `model`, a key of `MODELS`, with random weights, without a checkpoint on disk.

    layers: how many instead of the model's own
    place: from the model to what is done with each tensor by its name, as it is drawn on the device
    """
    transformer = meta_transformer(MODELS[model], layers)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...], kept: torch.dtype) -> Tensor:
        return random_tensor(names.published(name, names.TRANSFORMER), shape, kept, generator)

    random_weights.fill(transformer, dtype, transformer._keep_in_fp32_modules, draw, place)
    finish_transformer(transformer, device)
    return transformer.requires_grad_(False).eval()


def random_vae(model: str, device: torch.device, seed: int = 0) -> AutoencoderKLWan:
    """The VAE of `model` with random weights, in float32."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoencoderKLWan(**vae_config(MODELS[model])).eval().requires_grad_(False)


def random_picture_tower(tower: PictureTower, device: torch.device, seed: int = 0) -> CLIPVisionModel:
    """CLIP's picture tower with random weights, in float32."""
    torch.manual_seed(seed)
    with torch.device(device):
        return CLIPVisionModel(meta_picture_tower(tower).config).eval().requires_grad_(False)


def text_encoder_shapes(sizes: Sizes) -> Shapes:
    """Published names and shapes of the text encoder's tensors."""
    state = meta_text_encoder(sizes).state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    return {names.published(name, names.TEXT_ENCODER): tuple(t.shape) for name, t in state.items()}


def random_text_encoder(model: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> UMT5EncoderModel:
    """The text encoder of `model` with random weights, drawn on a device, in host memory."""
    encoder = meta_text_encoder(MODELS[model])
    draw = functools.partial(random_tensor, dtype=dtype, generator=torch.Generator(device).manual_seed(seed))
    named = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items() if name != TIED}
    state = {name: draw(names.published(name, names.TEXT_ENCODER), shape).cpu() for name, shape in named.items()}
    # The tied table is missing by intent.
    encoder.load_state_dict(state, strict=False, assign=True)
    encoder.tie_weights()
    return encoder.requires_grad_(False).eval()


def vae_shapes(sizes: Sizes) -> Shapes:
    """Published names and shapes of the VAE's tensors."""
    model = meta_vae(sizes)
    rename = published_name(model)
    return {rename(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write(model: str, folder: Path, dtype: torch.dtype, sparse_algorithm: str | None = None, seed: int = 0) -> None:
    """Write a checkpoint of the size of `model`, a key of `MODELS`; `dtype` is the transformer's."""
    sizes = MODELS[model]
    layout = Layout(True, {}, sizes.kind, KINDS[sizes.kind].boundary)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = functools.partial(random_tensor, generator=torch.Generator(device).manual_seed(seed))
    make_empty(folder)
    config = published.transformer_config(meta_transformer(sizes), TEXT_LENGTH, KINDS[sizes.kind].model_type)
    if sparse_algorithm is not None:
        config["sparse_algo"] = sparse_algorithm
    # In one order, so that a seed gives one checkpoint: transformers, text encoder, VAE, what sees pictures.
    pickles = {
        "text_encoder": (text_encoder_shapes(sizes), torch.bfloat16),
        "vae": (vae_shapes(sizes), torch.float32),
    }
    if sizes.tower is not None:
        pickles["image_encoder"] = image_encoder.published_shapes(meta_picture_tower(sizes.tower)), torch.float16
    files = {one.name: folder / one.published for one in components_of(layout)}
    for file in (files[name] for name in files if name not in pickles):
        file.parent.mkdir(exist_ok=True)
        # Drawn as they are written, so that no more than a file of them is in memory.
        drawn = ((name, draw(name, shape, dtype=dtype).cpu()) for name, shape in transformer_shapes(sizes).items())
        save_shards(drawn, file.parent, file.name)
        save_json(config, file.parent / CONFIG)
    for name, (shapes, kept) in pickles.items():
        save_pickle({key: draw(key, shape, dtype=kept).cpu() for key, shape in shapes.items()}, files[name])
    if KINDS[sizes.kind].experts:
        write_task(sizes.kind, folder)
    small_tokenizer(sizes.vocabulary).save_pretrained(folder / TOKENIZER_FOLDER)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values for a published name, on the generator's device, that keep activations near unit size at any depth."""
    scale = None
    # Rows of the table of tokens are of unit size, and modulations as small as the published program draws them.
    if "modulation" in name:
        scale = shape[-1] ** -0.5
    elif name == "token_embedding.weight":
        scale = 1.0
    elif PICTURE_NORM.fullmatch(name):
        return torch.ones(shape, dtype=dtype, device=generator.device)
    return random_weights.random_tensor(name, shape, dtype, generator, scale)


def small_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with T5's special tokens, trained on captions of simple scenes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    # In T5's order, which gives them its ids 0, 1 and 2.
    special = [PAD_TOKEN, "</s>", "<unk>"]
    size = min(vocabulary, 400)
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
