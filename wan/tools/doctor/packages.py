"""Packages that are needed and those that are optional: there, too old, broken or missing.

Imports nothing that may be missing.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROJECT = "wan-nabla"
# Or an installed package, beside which others' files lie.
IS_SOURCE = (ROOT / "scripts" / "setup.sh").is_file() and (ROOT / "pyproject.toml").is_file()
# Where the name to import is not that of the package.
MODULES = {
    "PyYAML": "yaml",
    "pillow": "PIL",
    "imageio-ffmpeg": "imageio_ffmpeg",
    "nvidia-cudnn-frontend": "cudnn",
    "prometheus-client": "prometheus_client",
    "python-multipart": "python_multipart",
}
# Of the optional ones: what for, and how to get it.
OPTIONAL = {
    "nvidia-cudnn-frontend": ("the fastest attention kernel, Hopper and newer", "-r requirements-cudnn.txt"),
    "torchao": ("int8 and 4-bit weights of --memory, any GPU; --fp8, Ada and newer", "-r requirements-fp8.txt"),
    "gguf": ("--transformer FILE.gguf", "-r requirements-gguf.txt"),
    "peft": ("--lora, and training", "peft"),
    "matplotlib": ("--report", "matplotlib"),
    "gradio": ("the web page, app.py", "-r requirements-page.txt"),
    "fastapi": ("the video server, serve.py", "-r requirements-serve.txt"),
    "uvicorn": ("the same", "-r requirements-serve.txt"),
    "python-multipart": ("the same", "-r requirements-serve.txt"),
    "prometheus-client": ("the same", "-r requirements-serve.txt"),
    "ray": ("serve.py over several GPUs or machines, --engine ray", "-r requirements-ray.txt"),
}


# Takes longer to import than all the others together, and the page alone uses it.
SLOW = "gradio"


@dataclass(frozen=True)
class PackageStatus:
    """version: None if it is missing; problem: what is wrong with it, or ""; install: what would mend that"""

    name: str
    purpose: str
    needed: bool
    version: str | None
    problem: str
    install: str


def check_packages(quick: bool = False) -> tuple[PackageStatus, ...]:
    """Those that pyproject.toml names: the needed ones, and what of the optional ones generate.py and app.py use.

    All are imported, but for `SLOW` if `quick`.
    """
    dependencies, extras = _requirements()
    needed = [_look_up(name, versions, "", True, name) for name, versions in map(_split, dependencies)]
    optional = [
        _look_up(name, extras[name], purpose, False, how, imports=not (quick and name == SLOW))
        for name, (purpose, how) in OPTIONAL.items()
    ]
    return *needed, *optional


def _requirements() -> tuple[list[str], dict[str, str]]:
    """What the project needs, and the versions of optional packages, by its file or, installed, its metadata."""
    if IS_SOURCE:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        optional = [line for lines in project["optional-dependencies"].values() for line in lines]
        return project["dependencies"], dict(map(_split, optional))
    # Metadata has all in one list, the optional ones marked as "name>=1; extra == ...".
    lines = [line.partition(";") for line in requires(PROJECT) or []]
    return (
        [line.strip() for line, _, condition in lines if "extra" not in condition],
        dict(_split(line.strip()) for line, _, condition in lines if "extra" in condition),
    )


def needed_faults(found: tuple[PackageStatus, ...]) -> list[str]:
    """One line for each needed package that cannot be used."""
    return [f"{one.name}: {one.problem}; {one.install}" for one in found if one.needed and one.problem]


def _split(requirement: str) -> tuple[str, str]:
    """A package and its versions, as "0.42" or "0.42,<0.43"; the metadata of a package has the ceiling first."""
    name, limits = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
    return name, ",".join(sorted(limits.split(","), reverse=True)).removeprefix(">=")


def _look_up(name: str, versions: str, purpose: str, needed: bool, how: str, imports: bool = True) -> PackageStatus:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    problem = "missing" if found is None else ""
    least = versions.partition(",")[0]
    if found is not None and _numbers(found) < _numbers(least):
        problem = f"{found} is older than {least}"
    if not problem and imports:
        problem = _import_fault(MODULES.get(name, name))
    # The files of requirements are not installed.
    wanted = f'"{name}>={versions}"' if how == name or not IS_SOURCE else how
    return PackageStatus(name, purpose, needed, found, problem, f"pip install {wanted}")


def _import_fault(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that is broken may raise anything, and that is what is asked
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"cannot be imported ({lines[0][:160]})"
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    """The first numbers of a version, to compare."""
    return tuple(_leading_numbers(text))


def _leading_numbers(text: str) -> Iterator[int]:
    for part in text.split("."):
        match = re.match(r"\d+", part)
        if not match:
            return
        yield int(match.group())
