"""What visitors may read: names of files, and no folder of the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.config.inputs import inputs_of
from wan.files.json_files import to_json

# An absolute path of more than a name, on either kind of system.
FOLDERS = re.compile(
    # The lookbehinds leave alone what goes on from a relative path or a scheme, as the // of https:// does.
    r"(?<![\w./\\:])(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\",;:()<>]+)+[/\\](?=[^/\\\s'\",;:()<>])|(?<![\w./:])/(?=\w)"
)


def without_folders(text: str) -> str:
    """Text in which absolute paths are the names of their files; that of the user's folder and this one go first.

    Those two may have spaces in their names, at which nothing tells where a path ends.
    """
    for folder in sorted({str(Path.cwd()), str(Path.home())}, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(re.escape(folder) + r"(?=[/\\])", "", text)
    return FOLDERS.sub("", text)


def name_of(checkpoint: str | None) -> str | None:
    """How visitors know weights: a folder or file by its name, a hub's by its id."""
    if checkpoint is None:
        return None
    path = Path(checkpoint).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else checkpoint


def names_of(transformer: str | Mapping[str, str] | None) -> Any:
    """`name_of` a transformer's file, or of those of experts."""
    if isinstance(transformer, Mapping):
        return {expert: name_of(file) for expert, file in transformer.items()}
    return name_of(transformer)


def sidecar_to_share(sidecar: Mapping[str, Any]) -> str:
    """The text of a video's sidecar for visitors: it names weights by `name_of`, and says no other path."""
    settings = dict(sidecar["settings"])
    if "checkpoint" in settings:
        settings["checkpoint"] = name_of(settings["checkpoint"])
    if "transformer" in settings:
        settings["transformer"] = names_of(settings["transformer"])
    for key, given in inputs_of(settings).items():
        settings[key] = Path(given).name if isinstance(given, str) else [Path(path).name for path in given]
    settings["lora"] = [dict(one, file=name_of(one["file"])) for one in settings.get("lora") or ()]
    return to_json(dict(sidecar, settings=settings))
