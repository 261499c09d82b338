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
    components=layout.COMPONENTS,
    companions=layout.COMPANIONS,
    tokenizers=layout.TOKENIZERS,
    tokenizer_parts=layout.TOKENIZER_PARTS,
    facts=layout.facts,
    layout_of_file=layout.layout_of_file,
    kinds_of=layout.kinds_of,
    picture_kinds=layout.PICTURE_KINDS,
    algorithms_at_other_sizes=layout.algorithms_at_other_sizes,
    naming=NAMING,
    transformers=("wan.models.kandinsky.processor:TRANSFORMER",),
    pipeline="wan.models.kandinsky.pipeline:Kandinsky5",
    memory="wan.models.kandinsky.memory:weigh_run",
    geometry=GEOMETRY,
    training="wan.models.kandinsky.training:TRAINING",
    defaults=layout.defaults_of,
    fit_picture=fit_picture,
    features=FEATURES - {"gguf"},
)
