"""The storeys of the house: imports go only downward, none goes in a circle. `python tests/test_imports.py` counts."""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

# Packages and modules by storey, from the ground up; the longest name that fits a module counts. A module may import
# those of its own storey and of those below.
STOREYS = (
    ("nabla",),
    (
        "wan.attention",
        "wan.caches",
        "wan.checkpoints",
        "wan.config",
        "wan.files",
        "wan.memory",
        "wan.observe",
        "wan.parallel",
        "wan.quantize",
        "wan.sampling",
    ),
    ("wan", "wan.models"),  # `wan` itself is the names that it offers, of this storey and those below
    ("wan.run", "wan.training"),
    ("wan.serve", "wan.shapes", "wan.tools"),
    ("app", "generate", "integrations", "scripts", "serve", "wan.client", "wan.doctor"),
)
GROUND, MACHINERY, MODELS, PROGRAMS = 1, 2, 3, len(STOREYS)
FOR_NABLA = {"torch", "triton", "cudnn"} | sys.stdlib_module_names
# Classes of a family, and the modules of diffusers and transformers that have them.
OF_A_FAMILY = re.compile(
    r"(Wan|UMT5|Kandinsky)[A-Z0-9]|AutoencoderKLWan|.*\b(transformer_wan|autoencoder_kl_wan|umt5|transformer_kandinsky)\b"
)

WORDS_OF_A_FAMILY = re.compile(r"Wan2|VACE|Kandinsky|I2V|A14B|UMT5")


@dataclass(frozen=True)
class Import:
    """name: the module, or a name in it, as far as it is written; typing: it is for a type checker alone"""

    name: str
    line: int
    typing: bool


@dataclass(frozen=True)
class Module:
    name: str
    file: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.file.stem == "__init__" else self.name.rpartition(".")[0]

    def imports(self) -> Iterator[Import]:
        """All of them: at the top, in functions, and those that only a type checker follows."""
        typing = {id(one) for node in ast.walk(self.tree) if _is_for_types(node) for one in ast.walk(node)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self.package.split(".")[: -node.level + 1 or None] if node.level else []
                whole = ".".join([*base, *filter(None, [node.module])])
                names = [f"{whole}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from (Import(name, node.lineno, id(node) in typing) for name in names)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def read_modules(root: Path) -> dict[str, Module]:
    """All modules but the tests, by dotted name; `nabla.backends` stands for its `__init__`."""
    files = [*root.glob("*.py"), *(file for top in ("nabla", "wan", "scripts") for file in (root / top).rglob("*.py"))]
    files += (root / "integrations").rglob("*.py")
    found = {}
    for file in sorted(files):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, file, ast.parse(file.read_text(encoding="utf-8")))
    return found


def arrows(modules: Mapping[str, Module], typing: bool) -> Iterator[tuple[str, str, int]]:
    """Who imports whom in which line, with or without imports for types alone."""
    for module in modules.values():
        for one in module.imports():
            target = _longest(one.name, modules)
            if target not in (None, module.name) and (typing or not one.typing):
                yield module.name, target, one.line


def _longest(name: str, names: Container[str]) -> str | None:
    """That of the names which is this one or a package that it is in, the innermost."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name or None


def place_of(module: str) -> tuple[int, str]:
    """The storey, from 1, and the place in it."""
    places = {place: number for number, storey in enumerate(STOREYS, 1) for place in storey}
    place = _longest(module, places)
    assert place, f"{module} has no storey"
    return places[place], place


def circles(modules: Mapping[str, Module], typing: bool = False) -> list[tuple[str, ...]]:
    """Groups of modules that reach each other. What is for types alone never runs: it leads nowhere unless `typing`."""
    follows: dict[str, set[str]] = {name: set() for name in modules}
    for source, target, _ in arrows(modules, typing):
        follows[source].add(target)
    reached = {name: _reach(name, follows) for name in follows}
    groups = {tuple(sorted(two for two in reached[one] if one in reached[two])) for one in reached}
    return sorted(group for group in groups if group)


def _reach(start: str, follows: Mapping[str, set[str]]) -> set[str]:
    seen, waiting = set(), list(follows[start])
    while waiting:
        if (one := waiting.pop()) not in seen:
            seen.add(one)
            waiting += follows[one]
    return seen


def faults(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """What breaks a rule: the rule and the packages, and where."""
    found: dict[str, list[str]] = {}

    def add(rule: str, source: str, target: str, where: str) -> None:
        found.setdefault(f"{place_of(source)[1]} {rule} {target}", []).append(where)

    for source, target, line in arrows(modules, typing=True):
        (storey, _), (its_storey, its_place) = place_of(source), place_of(target)
        where = f"{source}:{line} imports {target}"
        if its_storey > storey:
            add("looks up to", source, its_place, where)
        elif its_storey == PROGRAMS and _program_of(target) != _program_of(source):
            add("imports the program", source, its_place, where)
        elif _family_of(target) and _family_of(source) and _family_of(source) != _family_of(target):
            add("imports the family", source, _family_of(target), where)
    for module in modules.values():
        storey, _ = place_of(module.name)
        others = [(one.name, one.line) for one in module.imports() if _longest(one.name, modules) is None]
        for name, line in others:
            top = name.partition(".")[0]
            if storey == GROUND and top not in FOR_NABLA:
                add("needs more than torch:", module.name, top, f"{module.name}:{line}")
        # Such as diffusers.WanTransformer3DModel.
        others += [(node.attr, node.lineno) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
        for name, line in others:
            if storey <= MACHINERY and any(OF_A_FAMILY.match(part) for part in (name, name.rpartition(".")[2])):
                add("names a class of", module.name, "a family", f"{module.name}:{line} {name}")
    return found


def _program_of(module: str) -> str:
    """A program of several files, such as a node of ComfyUI, is its folder."""
    return module.rpartition(".")[0] if module.startswith("integrations.") else module


def _family_of(module: str) -> str:
    """The folder in wan/models, or ""."""
    parts = module.split(".")
    is_folder = len(parts) > 2 and (ROOT / "wan" / "models" / parts[2]).is_dir()
    return parts[2] if is_folder and parts[:2] == ["wan", "models"] else ""


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_modules(ROOT)


def test_every_import_goes_downward_and_machinery_knows_no_model(modules):
    assert faults(modules) == {}


def test_machinery_has_no_word_for_a_model():
    for place in STOREYS[MACHINERY - 1]:
        for file in (ROOT / place.replace(".", "/")).glob("*.py"):
            assert not WORDS_OF_A_FAMILY.findall(file.read_text(encoding="utf-8")), file


def test_no_imports_go_in_a_circle(modules):
    assert circles(modules) == []


def test_all_that_the_table_names_is_there():
    for place in {place for storey in STOREYS for place in storey} - {"serve", "wan.client"}:
        path = ROOT / place.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), place


@pytest.mark.parametrize(
    "file, text, fault",
    [
        ("nabla/a.py", "import numpy", "nabla needs more than torch: numpy"),
        ("nabla/a.py", "def f():\n    from wan.files import b", "nabla looks up to wan.files"),
        ("wan/files/a.py", "if TYPE_CHECKING:\n    from wan.models.b import C", "wan.files looks up to wan.models"),
        ("wan/files/a.py", "from diffusers import WanTransformer3DModel", "wan.files names a class of a family"),
        ("wan/files/a.py", "import diffusers\ndiffusers.AutoencoderKLWan", "wan.files names a class of a family"),
        ("wan/files/a.py", "import diffusers.models.transformers.transformer_wan as x", "wan.files names a class"),
        ("wan/files/a.py", "from transformers import UMT5EncoderModel", "wan.files names a class of a family"),
        ("wan/files/a.py", "from .. import run", "wan.files looks up to wan.run"),
        ("wan/models/wan/a.py", "from ..kandinsky.b import C", "wan.models imports the family kandinsky"),
        ("scripts/a.py", "import generate", "scripts imports the program generate"),
        ("wan/tools/a.py", "import generate", "wan.tools looks up to generate"),
        ("wan/tools/a.py", "from wan.run.b import c\nfrom diffusers import WanTransformer3DModel", None),
        ("nabla/a.py", "import triton, torch.nn, math\nfrom nabla import b", None),
    ],
)
def test_a_breach_is_found(tmp_path, monkeypatch, file, text, fault):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for path in (file, "generate.py", "nabla/b.py", "wan/files/b.py", "wan/models/b.py", "wan/run/__init__.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for path in ("wan/__init__.py", "wan/run/b.py", "wan/models/wan/__init__.py", "wan/models/kandinsky/b.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / file).write_text(text)
    found = list(faults(read_modules(tmp_path)))
    assert len(found) == (fault is not None) and all(one.startswith(fault or "") for one in found), found


def test_a_circle_is_found_through_functions_but_not_through_types(tmp_path):
    (tmp_path / "nabla").mkdir()
    (tmp_path / "nabla" / "a.py").write_text("from nabla.b import x\n")
    (tmp_path / "nabla" / "b.py").write_text("def f():\n    import nabla.c\n")
    (tmp_path / "nabla" / "c.py").write_text("from . import a\n")
    assert circles(read_modules(tmp_path)) == [("nabla.a", "nabla.b", "nabla.c")]
    (tmp_path / "nabla" / "c.py").write_text("if TYPE_CHECKING:\n    from . import a\n")
    assert circles(read_modules(tmp_path)) == []


def floors(modules: Mapping[str, Module]) -> int:
    """The most modules of which each imports the next; a circle is one."""
    follows: dict[str, set[str]] = {name: set() for name in modules}
    group = {name: name for name in modules} | {name: one[0] for one in circles(modules) for name in one}
    for source, target, _ in arrows(modules, typing=False):
        if group[source] != group[target]:
            follows[group[source]].add(group[target])

    @cache
    def height(name: str) -> int:
        return 1 + max(map(height, follows[name]), default=0)

    return max(map(height, follows))


def numbers(root: Path) -> dict[str, object]:
    """What a reader of the whole would like to know of it in a line."""
    modules = read_modules(root)
    lines = {name: len(module.file.read_text(encoding="utf-8").splitlines()) for name, module in modules.items()}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, module in modules.items()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    longest, longest_function = max(lines, key=lines.get), max(functions, key=functions.get)
    upward = [(source, target) for source, target, _ in arrows(modules, typing=True) if _is_upward(source, target)]
    return {
        "files": len(modules),
        "lines": sum(lines.values()),
        "storeys": len({place_of(name)[0] for name in modules}),
        "longest chain": floors(modules),
        "arrows": len(set((source, target) for source, target, _ in arrows(modules, typing=True))),
        "upward arrows": len(set(upward)),
        "circles": len(circles(modules)),
        "with types": len(circles(modules, typing=True)),
        "longest file": f"{lines[longest]} {longest}",
        "median function": statistics.median(functions.values()),
        "longest function": f"{functions[longest_function]} {longest_function}",
    }


def _is_upward(source: str, target: str) -> bool:
    return place_of(source)[0] < place_of(target)[0]


if __name__ == "__main__":
    for what, number in numbers(Path(sys.argv[1]) if sys.argv[1:] else ROOT).items():
        print(f"{what:18}{number}")
