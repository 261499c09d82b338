"""Training of the small text encoder of the `shapes` data set, from settings to a folder that our loader takes."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from nabla import InputError
from wan.config.config_files import read_settings
from wan.config.model_settings import DTYPES
from wan.files.atomic import atomic_path, lock_folder, remove
from wan.models.wan.layout import TEXT_LENGTH
from wan.shapes.attributes import ATTRIBUTES
from wan.shapes.dataset import Shapes
from wan.shapes.reader import EncoderSettings, Reader
from wan.shapes.sentences import CaptionBatch, Sentences, encoded, of_shapes, read_sentences, with_classes
from wan.shapes.tokenizer import train_tokenizer
from wan.training.data_workers import load_items
from wan.training.loop import TrainingLoop
from wan.training.metrics import Metrics
from wan.training.schema import (
    check_choice,
    check_continues,
    check_counts,
    check_numbers,
    check_texts,
    check_whole,
    from_mapping,
    to_plain,
)
from wan.training.shutdown import Diverged
from wan.training.state_file import check_step, load_state, save_state
from wan.training.write_errors import state_write

log = logging.getLogger("wan")

SETTINGS_FILE, STATE_FILE = "settings.yaml", "state.pt"
TOKENIZER, TEXT_ENCODER = "tokenizer", "text_encoder"
PRECISIONS = ("bfloat16", "float32")
BETAS = (0.9, 0.98)
# How much faster the biases of attention by distance learn.
POSITION_RATE = 10
VALIDATION_BATCH = 256
# What may change between a run and its continuation.
CHANGEABLE = ("out", "log_every", "save_every", "validate_every", "held_out", "sentences", "workers", "dtype")


@dataclass(frozen=True)
class TextSettings:
    """Everything that decides the training of a text encoder.

    out: folder of the run, in which `text_encoder` and `tokenizer` are the result
    vocabulary: most pieces of the tokenizer, which learns them from `tokenizer_captions` captions
    batch_size: sentences a step; warmup: steps before the learning rate falls along a cosine to 0
    precision: of the forward and backward pass, above float32 weights; dtype: of the weights of the result
    held_out: captions of the held-out split by which it is judged; sentences: a file of others, see `read_sentences`
    """

    out: str
    steps: int
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    vocabulary: int = 960
    tokenizer_captions: int = 10000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    clip: float = 1.0
    seed: int = 0
    precision: str = "bfloat16"
    dtype: str = "float32"
    held_out: int = 1000
    sentences: str | None = None
    log_every: int = 20
    save_every: int = 200
    validate_every: int = 1000
    workers: int = 0

    def __post_init__(self) -> None:
        check_texts(self, "out", *(["sentences"] if self.sentences is not None else []))
        check_counts(self, "steps", "vocabulary", "tokenizer_captions", "batch_size", "held_out")
        check_counts(self, "log_every", "save_every", "validate_every")
        check_counts(self, "warmup", "workers", least=0)
        check_whole("seed", self.seed)
        check_numbers(self, "lr", "clip", above=0)
        check_choice(self, "precision", PRECISIONS)
        check_choice(self, "dtype", DTYPES)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TextSettings:
        """Settings from the content of a YAML file; raises `InputError` for unknown or missing keys and bad values."""
        return from_mapping(cls, settings, "the settings of train_text", {"encoder": EncoderSettings})


class TextTrainer(TrainingLoop):
    """One run, on a GPU if there is one. It goes on from the state in the folder `settings.out`, if there is one.

    Raises `InputError` for settings that do not fit what is in the folder.
    """

    def __init__(self, settings: TextSettings):
        super().__init__(settings.steps, settings.save_every)
        self.settings, self.folder = settings, Path(settings.out).expanduser().resolve()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Before anything is written or trained.
        self.tests = {"held_out": with_classes(of_shapes(settings.held_out, settings.seed))}
        if settings.sentences is not None:
            self.tests["sentences"] = with_classes(read_sentences(Path(settings.sentences)))
        self.was_signalled = False
        self._begin()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / TOKENIZER)
        torch.manual_seed(settings.seed)
        self.model = Reader(settings.encoder, len(self.tokenizer)).to(self.device)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = self._build_optimizer()
        self.schedule = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps
        )
        if (self.folder / STATE_FILE).is_file():
            load_state(self.folder / STATE_FILE, self.device, self._take)
            log.info("going on from step %d of %s", self.step, self.folder)

    def _build_optimizer(self) -> torch.optim.AdamW:
        biases = self.model.position_biases()
        # `is`, since `in` would compare tensors number by number.
        others = [weight for weight in self.weights if not any(weight is bias for bias in biases)]
        # The schedule scales both rates alike; the one that rows tell is the first group's.
        groups = [{"params": others}, {"params": biases, "lr": POSITION_RATE * self.settings.lr}]
        return torch.optim.AdamW(groups, self.settings.lr, BETAS, weight_decay=0.0)

    def _begin(self) -> None:
        """The folder with its settings and tokenizer, or, if these are there already, a check that they fit."""
        settings, path = self.settings, self.folder / SETTINGS_FILE
        if path.is_file():
            earlier = TextSettings.from_dict(read_settings(path))
            check_continues(settings, earlier, CHANGEABLE)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.folder)
            if not (self.folder / TOKENIZER).is_dir():
                shapes = Shapes(settings.seed, settings.tokenizer_captions)
                # Of training scenes only, in which no held-out combination is named.
                captions = (shapes.described(index)[1] for index in range(len(shapes)))
                tokenizer = train_tokenizer(captions, settings.vocabulary, TEXT_LENGTH)
                with state_write(self.folder), atomic_path(self.folder / TOKENIZER) as partial:
                    tokenizer.save_pretrained(partial)
            with atomic_path(path) as partial:
                partial.write_text(yaml.safe_dump(to_plain(asdict(settings)), sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise InputError(f"out {self.folder} cannot be written ({error.strerror}); choose another") from None

    def run(self, minutes: float = math.inf) -> bool:
        """Train to the last step, or for so many minutes, and write the encoder as it is then; whether all is done.

        Raises `Diverged`, `Stopped` after SIGTERM, or `InputError` for a negative time.
        """
        if not minutes >= 0:
            raise InputError(f"minutes {minutes} is no length of time; give 0 or more")
        self.deadline = time.monotonic() + 60 * minutes
        self.metrics = Metrics(self.folder, self.step)
        if self.step < self.steps:
            with self.signal, contextlib.closing(self._batches()) as batches:
                self._train(batches)
            if self.was_signalled:
                raise self._stopped()
        self._export()
        return self.step == self.steps

    def _batches(self) -> Generator[CaptionBatch, None, None]:
        data = Sentences(self.tokenizer, self.settings.seed, self.settings.batch_size)
        return load_items(data, range(self.step, self.settings.steps), self.settings.workers, context="spawn")

    def _step(self, batches: Iterator[CaptionBatch]) -> dict[str, Any]:
        if self.unwritten is not None:
            # One process trains, so there are no others to tell first.
            raise self.unwritten
        batch = next(batches).to(self.device)
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            loss = self.model.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        row = {"step": self.step + 1, "loss": loss.item(), "lr": self.schedule.get_last_lr()[0]}
        row["grad_norm"] = norm.item()
        # Before the optimizer takes it, so the last state is from before too.
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise Diverged(
                f"step {row['step']}: loss {row['loss']} and gradient norm {row['grad_norm']} are not finite"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        # A signal after this look, while a run whose time is up measures and saves, does not end it otherwise.
        self.was_signalled = self.signal.asked
        self.stops = self._asks_to_stop
        return row | {"seconds": time.perf_counter() - start}

    def _evaluate(self) -> dict[str, Any]:
        """Shares of sentences whose attributes are read rightly: by test and attribute, and the worst of each test."""
        is_due = self._ends or self.step % self.settings.validate_every == 0
        # Whoever sent a signal is not kept waiting.
        if not is_due or self.was_signalled:
            return {}
        shares = {name: self.accuracies(*test) for name, test in self.tests.items()}
        return {f"worst_{name}": min(share.values()) for name, share in shares.items()} | {"accuracy": shares}

    def accuracies(self, texts: list[str], targets: Tensor) -> dict[str, float]:
        """The share of sentences of which each attribute is read as `targets` (sentences, attributes) say."""
        right = []
        for first in range(0, len(texts), VALIDATION_BATCH):
            part = slice(first, first + VALIDATION_BATCH)
            right.append(self.model.are_correct(encoded(self.tokenizer, texts[part], targets[part]).to(self.device)))
        return dict(zip(ATTRIBUTES, torch.cat(right).float().mean(0).tolist()))

    def _log_line(self, row: dict[str, Any]) -> str | None:
        if not self._ends and self.step % self.settings.log_every:
            return None
        return ", ".join(f"{key} {value:.5g}" for key, value in row.items() if key != "accuracy")

    def _save(self) -> None:
        if self.unwritten is not None:
            raise self.unwritten
        state = {name: part.state_dict() for name, part in self._parts().items()}
        save_state(state | {"step": self.step}, self.folder / STATE_FILE)

    def _take(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = check_step(state, self.steps)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def _export(self) -> None:
        """The encoder alone, in diffusers' layout beside the tokenizer."""
        # A new one, so that rounding to `dtype` leaves the weights that training goes on with.
        encoder = UMT5EncoderModel(self.model.encoder.config)
        encoder.load_state_dict(self.model.encoder.state_dict())
        with atomic_path(self.folder / TEXT_ENCODER) as partial:
            encoder.to(getattr(torch, self.settings.dtype)).save_pretrained(partial)
            # A folder cannot be moved over one that holds files.
            remove(self.folder / TEXT_ENCODER)
