"""The kinds of Wan's video models: what each is shown, what runs it, and how its published program samples it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wan.config.geometry import Geometry
from wan.config.model_settings import EXPERTS
from wan.config.sampling_settings import DEFAULT_NEGATIVE_PROMPT
from wan.models.family import Layout, MediaInputs
from wan.models.wan.geometry import GEOMETRY, GEOMETRY_5B
from wan.models.wan.sizes import Size, as_asked, fit_area, fit_source, fit_within


@dataclass(frozen=True)
class Kind:
    """One kind, as `kind` in settings names it.

    what: it is, in messages
    pipeline: the class that makes its videos, as "module:class"
    diffusers_pipeline: the class of diffusers that its checkpoints in diffusers' layout name
    channels: that its transformer takes and gives
    sees_pictures: by CLIP too, which its checkpoints have then
    inputs: what stands beside the prompt
    geometry: how it cuts pixels into latents and tokens
    fit: the size of a video, from that of what is given and the one asked for
    boundary: share of the timesteps from which on the first of two transformers runs; None: there is one
    defaults: a layer of settings for what its published program has otherwise than this one does
    shifts: the same of the shift of timesteps, by sizes (width, height)
    """

    name: str
    what: str
    pipeline: str
    diffusers_pipeline: str
    channels: tuple[int, int] = (16, 16)
    sees_pictures: bool = False
    inputs: MediaInputs = MediaInputs()
    geometry: Geometry = GEOMETRY
    fit: Callable[[Size, Size], Size] = as_asked
    boundary: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shifts: Mapping[tuple[int, int], float] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of its transformers in the order in which they run, where there are two."""
        return () if self.boundary is None else EXPERTS

    @property
    def model_type(self) -> str:
        """What the published program calls it, in configurations of transformers."""
        return self.name.partition("-")[0]


_PICTURE = MediaInputs(required=frozenset({"image"}))
_PIPELINE = "wan.models.wan.{}".format
_TEXT, _IMAGE = _PIPELINE("pipeline:WanT2V"), _PIPELINE("image_to_video:WanI2V")
_SMALL = ((832, 480), (480, 832))
_ALL = (
    Kind(
        "t2v",
        "Wan2.1 text-to-video",
        _TEXT,
        "WanPipeline",
    ),
    Kind(
        "i2v",
        "Wan2.1 image-to-video",
        _IMAGE,
        "WanImageToVideoPipeline",
        channels=(36, 16),
        sees_pictures=True,
        inputs=_PICTURE,
        fit=fit_area,
        defaults={"sampling": {"steps": 40, "shift": 5.0, "negative_prompt": "镜头晃动，" + DEFAULT_NEGATIVE_PROMPT}},
        shifts=dict.fromkeys(_SMALL, 3.0),
    ),
    Kind(
        "flf2v",
        "Wan2.1 first-and-last-frame-to-video",
        _IMAGE,
        "WanImageToVideoPipeline",
        channels=(36, 16),
        sees_pictures=True,
        inputs=MediaInputs(required=frozenset({"image", "last_image"})),
        fit=fit_area,
        defaults={
            "sampling": {
                "steps": 50,
                "shift": 16.0,
                "negative_prompt": "镜头切换，镜头晃动，" + DEFAULT_NEGATIVE_PROMPT,
            }
        },
    ),
    Kind(
        "vace",
        "Wan2.1 VACE",
        _PIPELINE("vace_pipeline:WanVACE"),
        "WanVACEPipeline",
        inputs=MediaInputs(optional=frozenset({"src_video", "src_mask", "src_ref_images"})),
        fit=fit_source,
        defaults={"sampling": {"steps": 50, "shift": 16.0}},
    ),
    Kind(
        "t2v-A14B",
        "Wan2.2 text-to-video",
        _TEXT,
        "WanPipeline",
        boundary=0.875,
        defaults={"sampling": {"steps": 40, "shift": 12.0, "guide_scale": [3.0, 4.0]}},
    ),
    Kind(
        "i2v-A14B",
        "Wan2.2 image-to-video",
        _IMAGE,
        "WanImageToVideoPipeline",
        channels=(36, 16),
        inputs=_PICTURE,
        fit=fit_area,
        boundary=0.9,
        defaults={"sampling": {"steps": 40, "shift": 5.0, "guide_scale": 3.5}},
    ),
    Kind(
        "ti2v-5B",
        "Wan2.2 TI2V-5B",
        _PIPELINE("text_image_to_video:WanTI2V"),
        "WanPipeline",
        channels=(48, 48),
        inputs=MediaInputs(optional=frozenset({"image"})),
        geometry=GEOMETRY_5B,
        fit=fit_within,
        defaults={"video": {"size": (1280, 704), "frame_num": 121, "fps": 24}},
    ),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}


def kind_of(layout: Layout) -> Kind:
    """Of a checkpoint's layout. A folder without a transformer has none: what is trained beside it begins from text."""
    return KINDS[layout.kind or "t2v"]
