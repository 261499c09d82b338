"""Kandinsky-5, as the machinery knows it."""

from __future__ import annotations

from wan.models.family import FEATURES, Family
from wan.models.kandinsky import layout
from wan.models.kandinsky.geometry import GEOMETRY
from wan.models.kandinsky.names import NAMING
from wan.models.kandinsky.picture import fit_picture

KANDINSKY = Family(
    name=layout.NAME,
    recognise=layout.recognise,
    landmarks=(layout.MODEL_FOLDER, "text_encoder2"),
    hub_files=layout.HUB_FILES,
    hub_landmarks=layout.HUB_LANDMARKS,
    components_of=lambda own: layout.COMPONENTS,
    companions=layout.COMPANIONS,
    tokenizers=layout.TOKENIZERS,
    tokenizer_parts=layout.TOKENIZER_PARTS,
    facts=layout.facts,
    layout_of_file=layout.layout_of_file,
    kinds_of=layout.kinds_of,
    inputs_of=layout.inputs_of,
    algorithms_at_other_sizes=layout.algorithms_at_other_sizes,
    naming=NAMING,
    transformers=("wan.models.kandinsky.processor:TRANSFORMER",),
    pipeline_of=lambda own: "wan.models.kandinsky.pipeline:Kandinsky5",
    memory="wan.models.kandinsky.memory:weigh_run",
    geometry_of=lambda own: GEOMETRY,
    training="wan.models.kandinsky.training:TRAINING",
    defaults=layout.defaults_of,
    fit_size=lambda own, given, asked: fit_picture(given, asked),
    features=FEATURES - {"gguf"},
)
