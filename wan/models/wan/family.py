"""Wan's video models, as the machinery knows it."""

from __future__ import annotations

from wan.checkpoints.locate import CONFIG
from wan.models.family import FEATURES, Family
from wan.models.wan import layout
from wan.models.wan.kinds import kind_of
from wan.models.wan.names import NAMING
from wan.models.wan.recognise import recognise

WAN = Family(
    name=layout.NAME,
    recognise=recognise,
    landmarks=(CONFIG, layout.VAE_FILE),
    hub_files=layout.HUB_FILES,
    components_of=layout.components_of,
    tokenizers={"tokenizer": layout.TOKENIZER_FOLDER},
    facts=layout.facts,
    naming=NAMING,
    kinds_of=layout.kinds_of,
    inputs_of=layout.inputs_of,
    transformers=tuple(
        f"wan.models.wan.processor:{name}" for name in ("TRANSFORMER", "VACE_TRANSFORMER", "ANIMATE_TRANSFORMER")
    ),
    pipeline_of=lambda own: kind_of(own).pipeline,
    memory="wan.models.wan.memory:weigh_run",
    geometry_of=lambda own: kind_of(own).geometry,
    fit_size=lambda own, given, asked: kind_of(own).fit(given, asked),
    defaults=layout.defaults_of,
    training="wan.models.wan.training:TRAINING",
    features=FEATURES - {"expand_prompt"},
)
