"""Each kind of Wan by its own config, as a user runs it, on random weights in both layouts; and every config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.config.settings import DEFAULT_NEGATIVE_PROMPT, resolve
from wan.models.family import Layout
from wan.models.wan.family import WAN
from wan.models.wan.kinds import KINDS
from wan.sampling.solvers import make_solver


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.glob("wan2[12]_*.yaml")), ids=lambda file: file.stem)
def test_configs_of_the_wan_family_run_what_their_names_say(file):
    settings = resolve(read_settings(file.name), {"prompt": "a cat"})
    version, task, size, *rest = file.stem.split("_")
    hub = f"Wan-AI/{version[:4].title()}.{version[4]}-{task}-{size}".lower()
    assert settings.checkpoint.lower().replace("-14b-", "-") == hub
    kind = next(kind for kind in KINDS.values() if settings.checkpoint in kind.hub_ids)
    assert settings.model.kind == kind.name
    # As published, but for what the name says besides.
    own = WAN.defaults(Layout(True, {}, kind.name), settings.video.size)
    published = resolve(read_settings(file.name) | {"sampling": {}}, own, {"prompt": "a cat"}).sampling
    few = rest == ["turbo"]
    assert (settings.sampling == replace(published, negative_prompt=DEFAULT_NEGATIVE_PROMPT)) is not few
    assert settings.video == resolve(own, {"checkpoint": "x", "prompt": "a cat"}).video or kind.name != "ti2v-5B"
    assert settings.attention.algorithm == ("keep-0.2" if rest[:1] == ["keep"] else "dense")
    if few:
        timesteps = make_solver("euler", 4, settings.sampling.shift).timesteps
        assert settings.sampling.guide_scale == 1
        assert (timesteps >= 1000 * kind.boundary).tolist() == [True, True, False, False]
    elif rest:
        assert "not tuned for it" in file.read_text().splitlines()[0]
        dense = read_settings(f"{file.stem.removesuffix('_keep_0.2')}.yaml")
        assert read_settings(file.name) | {"attention": dense["attention"]} == dense
