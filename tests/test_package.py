"""What is installed: all modules and their data, with configs, a doctor and commands that work without the source."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOOL = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    return ROOT / TOOL["package-dir"].get(package, package.replace(".", "/"))


def data_of(package: str) -> set[Path]:
    return {file for ending in TOOL["package-data"].get(package, ()) for file in folder_of(package).glob(ending)}


def test_every_module_and_file_is_packaged():
    packaged = {folder_of(package) for package in TOOL["packages"]}
    files = {file for name in ("nabla", "wan", "configs") for file in (ROOT / name).rglob("*") if file.is_file()}
    files = {file for file in files if file.suffix != ".pyc"}
    assert {file.parent for file in files} == packaged
    data = set().union(*map(data_of, TOOL["packages"]))
    assert {file for file in files if file.suffix != ".py"} == data


@pytest.mark.parametrize("package", ["nabla", "wan"])
def test_type_checkers_of_users_read_the_annotations(package):
    assert (ROOT / package / "py.typed").read_text() == "" and ROOT / package / "py.typed" in data_of(package)


def test_what_the_tests_run_with_is_in_the_supported_range():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    ranges = map(Requirement, [*PROJECT["project"]["dependencies"], *extras["test"], *extras["lint"]])
    outside = {str(one): pins.get(one.name) for one in ranges if pins.get(one.name, "") not in one.specifier}
    assert not outside


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"].values())
def test_commands_are_functions_of_modules_that_are_packaged(command):
    module, _, function = command.partition(":")
    assert module in TOOL["py-modules"] and callable(getattr(importlib.import_module(module), function))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as site-packages are, with what an installation puts there."""
    site = tmp_path_factory.mktemp("site")
    for package in TOOL["packages"]:
        folder = site / package.replace(".", "/")
        folder.mkdir(parents=True)
        for file in (*folder_of(package).glob("*.py"), *data_of(package)):
            shutil.copy(file, folder)
    for module in TOOL["py-modules"]:
        shutil.copy(ROOT / f"{module}.py", site)
    project = PROJECT["project"]
    lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {one}" for one in project["dependencies"]]
    for extra, ones in project["optional-dependencies"].items():
        lines += [f'Requires-Dist: {one}; extra == "{extra}"' for one in ones]
    information = site / "wan_nabla-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("\n".join(lines) + "\n")
    # Of another package, which a doctor must not take for the program's.
    (site / "pyproject.toml").write_text('[project]\nname = "other"\n')
    return site


def run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_the_doctor_of_an_installed_package_advises_what_is_there(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "wan.doctor", "--quick", "--json", "--device", "cpu")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["ok"] and "generate.py" not in str(said["advice"]) and "requirements" not in done.stdout
    assert "checkpoints/wan-shapes" not in [one["name"] for one in said["checkpoints"]]


def test_configs_of_an_installed_package_are_found_and_no_checkpoint_is_said(installed, tmp_path):
    program = "import wan\nfrom wan.config.config_files import read_settings\nwan.WanT2V\n"
    program += "print(wan.__file__, read_settings('nabla_0.7.yaml'))"
    done = run(installed, tmp_path, "-c", program)
    assert str(installed) in done.stdout and "ai-forever/Wan2.1-T2V-14B-NABLA-0.7" in done.stdout, done.stderr[-2000:]
    done = run(installed, tmp_path, "-m", "generate", "--prompt", "a", "--device", "cpu")
    assert done.returncode == 2 and "no checkpoint is named" in done.stderr and "Traceback" not in done.stderr
