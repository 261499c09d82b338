"""The documentation: links lead somewhere, named files are there, commands and configs are as programs take them."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from places import ROOT

import serve
from wan.config.config_files import read_settings
from wan.config.settings import resolve
from wan.run.flags import make_parser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "integrations").rglob("*.md"))
PROGRAM = re.compile(r"(?:python|torchrun|accelerate launch)\b.*?\s((?:scripts/)?[a-z_]+\.py)\b(.*)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as they are made from them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(\s*([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each_page
def test_files_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:wan|nabla|scripts|tests|configs|checkpoints/wan-shapes)/[\w./-]*\w/?", text)
    names = {name.removesuffix(".").split("::")[0] for name in named}
    assert not {name for name in names if not (ROOT / name).exists()}


def test_files_of_the_tree_are_in_their_folders():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```\n6 ")[2].partition("```")[0]
    folder = ROOT
    for line in tree.splitlines():
        # A folder begins its line, but for the number of a storey; what follows is in it.
        if found := re.match(r"(?:\d| ) *([\w/]+/|[\w/]+\.py)(?= )", line[:28]):
            folder = ROOT / found[1] if found[1].endswith("/") else ROOT
        missing = {name for name in re.findall(r"[\w/]+\.py\b", line) if not (folder / name).is_file()}
        assert not missing, (folder, missing)


@cache
def flags() -> set[str]:
    """All that any program of the project takes."""
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "wan").rglob("*.py")]
    return set().union(*(re.findall(r'"(--\w+)"', file.read_text(encoding="utf-8")) for file in files))


@each_page
def test_commands_are_of_programs_that_are_there_and_have_these_flags(page):
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for program, arguments in filter(None, (found and found.groups() for found in map(PROGRAM.search, lines))):
        assert (ROOT / program).is_file(), program
        unknown = set(re.findall(r"(--\w+)", arguments.partition("#")[0])) - flags()
        assert not unknown, (program, unknown)


def test_every_flag_of_generate_is_in_the_table():
    table = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    known = {flag for action in make_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    # `--log` is `--log_file`, see docs/multi_gpu.md.
    assert known - {"--help", "--log"} <= set(re.findall(r"--\w+", table))


def test_the_index_names_every_page():
    links = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert links == {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"}


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_every_config_is_in_the_readme():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Configs")[2].partition("## ")[0]
    assert set(re.findall(r"`([\w.]+\.yaml)`", table)) == {file.name for file in (ROOT / "configs").glob("*.yaml")}


def test_the_example_with_all_keys_has_all_and_is_read(tmp_path):
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    (tmp_path / "example.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    given = read_settings(tmp_path / "example.yaml")
    known = resolve(given).to_dict()
    assert given.keys() == known.keys()
    assert all(given[section].keys() == known[section].keys() for section in ("sampling", "video"))


def test_examples_of_clusters_start_the_server_with_flags_that_it_takes():
    job = next(yaml.safe_load_all((ROOT / "docs" / "serve_kuberay.yaml").read_text(encoding="utf-8")))
    slurm = (ROOT / "docs" / "serve_slurm.sh").read_text(encoding="utf-8").partition(" -- \\\n")[2]
    for command in (job["spec"]["entrypoint"], slurm.replace("\\\n", " ")):
        python, program, *flags = shlex.split(command)
        assert (python, Path(program).name) == ("python", "serve.py")
        assert serve.parse_args(flags).engine == "ray"
