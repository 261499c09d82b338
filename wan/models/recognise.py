"""Which family a checkpoint is of: a folder, a repository of the hub, or a single file of weights."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from wan.checkpoints.file_errors import CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG, INDEX, check_no_lora, download, explain, list_files
from wan.checkpoints.single_file import open_transformer
from wan.models.family import Family, Layout
from wan.models.registry import FAMILIES


def recognise(folder: Path) -> tuple[Family, Layout]:
    """The family of the checkpoint in a folder, and its layout; raises `CheckpointError` if there is none of any."""
    has_index = exists(folder / INDEX)
    if not has_index:
        check_no_lora(folder)
    for family in FAMILIES:
        if (layout := family.recognise(folder)) is not None:
            return family, layout
    if not has_index and not exists(folder / CONFIG):
        raise explain(folder, [family.landmarks for family in FAMILIES])
    kind = read_json_object(folder / (INDEX if has_index else CONFIG)).get("_class_name")
    known = " and ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{folder} is a {kind}; only {known} checkpoints are supported")


def recognise_with(folder: Path, file: Path) -> tuple[Family, Layout]:
    """`recognise` of a folder whose transformer is replaced by a file, and so may be all that it lacks."""
    try:
        family, layout = recognise(folder)
    except CheckpointError:
        # What says nothing of itself is told by the file alone; what says something is known, or refused for it.
        if exists(folder / INDEX) or exists(folder / CONFIG):
            raise
        told = family_of_file(file)
        if told.layout_of_file is None:
            raise
        return told, told.layout_of_file(file)
    if layout.published and family.layout_of_file is not None:
        layout = family.layout_of_file(file)
    return family, layout


def family_of_file(file: str | Path) -> Family:
    """The family whose transformer a single file is; raises as `open_transformer` does unless it is one of any."""
    refusals = []
    for family in FAMILIES:
        try:
            open_transformer(file, family.naming)
            return family
        except CheckpointError as error:
            refusals.append(error)
    raise refusals[0]


def family_on_hub(name: str) -> Family:
    """The family of a hub id, found out without the download of its weights."""
    # The configurations first: a model of another kind should not cost its whole download.
    configurations = [pattern for family in FAMILIES for pattern in family.hub_files.configurations]
    folder = download(name, configurations)
    try:
        return recognise(folder)[0]
    except CheckpointError:
        # There is none in some layouts, of which the names of files tell.
        names = list_files(name) if any(family.hub_landmarks for family in FAMILIES) else []
        for family in FAMILIES:
            if any(fnmatch(file, pattern) for file in names for pattern in family.hub_landmarks):
                return family
        raise
