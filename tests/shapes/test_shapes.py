"""The data set `shapes`: scenes, their pictures, their captions, and the measurements that read them back."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import ROOT

from nabla import InputError
from wan.shapes.attributes import ATTRIBUTES, NOT_SAID, attributes, said
from wan.shapes.captions import caption
from wan.shapes.colours import COLOURS
from wan.shapes.dataset import Shapes
from wan.shapes.drawing import render
from wan.shapes.measure import background_colour, measured, score
from wan.shapes.random_scenes import TAKEN, sample_scene
from wan.shapes.scenes import KINDS, MOTIONS, Background, Scene, Shape, is_held_out
from wan.shapes.variants import variant
from wan.shapes.words import COLOUR_WORDS, NOUNS

WHITE = Background("white", "plain", 0.0, 0, frozenset(("colour", "texture")))


def shape(kind: str = "square", colour: str = "red", motion: str = "right", **changes) -> Shape:
    ways = {"left": ((0.75, 0.5), (0.25, 0.5)), "right": ((0.25, 0.5), (0.75, 0.5)), "still": ((0.5, 0.5), (0.5, 0.5))}
    start, end = ways[motion]
    plain = Shape(
        kind,
        colour,
        "medium",
        "flat",
        motion,
        "none",
        "none",
        start,
        end,
        radius=(0.15, 0.15),
        angle=(0.0, 0.0),
        said=frozenset(("kind", "colour", "motion")),
    )
    return dataclasses.replace(plain, **changes)


def scene_of(*shapes: Shape, relation: str = "apart", background: Background = WHITE) -> Scene:
    return Scene(shapes, background, relation, relation_said=relation != "apart")


def scenes(count: int, split: str = "train") -> list[Scene]:
    return [sample_scene(np.random.default_rng((count, i)), split) for i in range(count)]


def degraded(video: torch.Tensor, seed: int) -> torch.Tensor:
    """Blurred by 1.5 pixels, shifted in colour by up to 5%, with noise of 8 levels."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.exp(-(torch.arange(-4, 5.0) ** 2) / (2 * 1.5**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
    frames = F.pad(video.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), "replicate")
    frames = F.conv2d(F.conv2d(frames, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    frames += 255 * 0.05 * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
    frames += 8 * torch.randn(frames.shape, generator=generator)
    return frames.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_items_depend_on_seed_and_index_alone():
    whole, part = Shapes(3, 6, (48, 32), frames=3), Shapes(3, 2, (48, 32), frames=3, offset=4)
    video, sentence = whole[4]
    assert video.shape == (3, 32, 48, 3) and video.dtype == torch.uint8
    assert torch.equal(video, part[0][0]) and sentence == part[0][1]
    assert sentence == Shapes(3, 5, (64, 64), frames=9).described(4)[1]
    rough, plain = Shapes(3, 9, rough=1.0), Shapes(3, 9)
    assert all(rough.described(n)[0] == plain.described(n)[0] for n in range(9))
    assert sum(rough.described(n)[1] != plain.described(n)[1] for n in range(9)) > 4
    turning = Shapes(3, 9, turning=1.0)
    assert all(any(one.spin != "none" for one in turning.described(n)[0].shapes) for n in range(9))
    both = Shapes(3, 9, turning=1.0, several=1.0)
    for scene in (both.described(n)[0] for n in range(9)):
        assert len(scene.shapes) > 1 and any(one.spin != "none" for one in scene.shapes)
    short = Shapes(3, 9, brief=1.0)
    assert not any(short.described(n)[0].background.said for n in range(9))
    assert [short.described(n)[0].shapes for n in range(9)] == [plain.described(n)[0].shapes for n in range(9)]
    assert len({text for seed in range(3) for _, text in Shapes(seed, 4, (16, 16), frames=1)}) > 8
    with pytest.raises(IndexError):
        whole[6]


def test_training_never_sees_held_out_combinations():
    assert not any(map(is_held_out, scenes(300)))
    assert all(map(is_held_out, scenes(40, "held_out")))
    singles = [scene_of(shape(k, c, m)) for k in KINDS for c in COLOURS for m in ("left", "right", "still")]
    assert 0.04 < sum(map(is_held_out, singles)) / len(singles) < 0.1
    for held_out in (Shapes(0, 1), Shapes(0, 1, split="held_out")):
        assert is_held_out(held_out.described(0)[0]) == (held_out.split == "held_out")


def test_scenes_are_as_rich_as_promised():
    drawn = scenes(600)
    single = [scene for scene in drawn if len(scene.shapes) == 1]
    assert 0.5 < len(single) / len(drawn) < 0.7
    assert 0.6 < np.mean([scene.background.texture == "plain" for scene in drawn]) < 0.9
    assert {shape.motion for scene in single for shape in scene.shapes} == set(MOTIONS)
    assert {scene.relation for scene in drawn} == {"apart", "in front of", "behind"}
    for scene in drawn:
        colours = [shape.colour for shape in scene.shapes] + [scene.background.colour]
        assert len(set(colours)) == len(colours)
        for one in scene.shapes:
            ends = np.array([one.start, one.end])
            assert (ends > one.radius[0]).all() and (ends < 1 - one.radius[0]).all()
            assert one.motion == "still" or np.abs(ends[1] - ends[0]).max() > 0.25


def test_scenes_of_shapes_that_resemble_each_other():
    drawn = [sample_scene(np.random.default_rng((7, i)), alike=1.0) for i in range(400)]
    pairs = [scene.shapes for scene in drawn if len(scene.shapes) > 1 and scene.relation == "apart"]
    shared = {name: np.mean([len({getattr(one, name) for one in pair}) == 1 for pair in pairs]) for name in TAKEN}
    assert all(abs(shared[name] - share) < 0.2 for name, share in TAKEN.items()), shared
    assert not any(map(is_held_out, drawn))
    for scene in drawn:
        assert scene.background.colour not in {one.colour for one in scene.shapes}
        if scene.relation != "apart":
            assert len({one.colour for one in scene.shapes[:2]}) == 2
    texts = [caption(scene, np.random.default_rng(i)).lower() for i, scene in enumerate(drawn)]
    assert sum(bool(re.search(r"\b(two|2|pair of|three|3) [a-z]+ [a-z]+s\b", text)) for text in texts) > 5


def test_pictures_are_the_same_at_every_size():
    for scene in scenes(12):
        small = render(scene, (128, 128), 5).float()
        large = render(scene, (256, 256), 5).float().permute(0, 3, 1, 2)
        assert (F.avg_pool2d(large, 2).permute(0, 2, 3, 1) - small).abs().mean() < 1.5
    with pytest.raises(InputError, match="at least 1"):
        render(scene, (0, 8), 5)


def test_the_nearer_shape_hides_the_other():
    moving, still = shape(motion="right"), shape("circle", "blue", "still")
    for relation, colour in (("in front of", "red"), ("behind", "blue")):
        middle = render(scene_of(moving, still, relation=relation), (64, 64), 3)[1, 32, 32]
        assert tuple(middle.tolist()) == COLOURS[colour]


def test_captions_are_varied_within_a_small_vocabulary():
    sentences = [text for i, scene in enumerate(scenes(1500)) if (text := caption(scene, np.random.default_rng(i)))]
    words = {word for text in sentences for word in re.findall(r"[a-z-]+", text.lower())}
    assert 200 < len(words) < 450
    assert len(set(sentences)) > 0.97 * len(sentences)
    assert not any("  " in text or " ," in text or "{" in text for text in sentences)
    one = scene_of(shape())
    assert len({caption(one, np.random.default_rng(i)) for i in range(300)}) > 200
    assert caption(one, np.random.default_rng(7)) == caption(one, np.random.default_rng(7))


@pytest.mark.parametrize("as_told", [lambda scene, _: scene, variant], ids=["drawn", "variants"])
def test_captions_say_what_they_claim_to_say_and_nothing_else(as_told):
    spellings = {word: colour for colour in COLOURS for word in COLOUR_WORDS.get(colour, (colour,))}
    for i, scene in enumerate(scenes(400)):
        scene = as_told(scene, np.random.default_rng((i, 1)))
        text = caption(scene, np.random.default_rng(i)).lower()
        words, named = re.findall(r"[a-z-]+", text), said(scene)
        colours = {spellings[word] for word in words if word in spellings}
        assert colours == {value for name, value in named.items() if name.endswith("colour")}, text
        kinds = {kind for kind, nouns in NOUNS.items() if re.search(rf"\b({'|'.join(nouns)})(es|s)?\b(?! the)", text)}
        kinds |= {"circle"} if "dot" in words else set()
        told = {value for name, value in named.items() if name.endswith("kind")}
        assert kinds == told, text
        turns = {
            "clockwise" in words,
            bool({"counterclockwise", "counter-clockwise", "anticlockwise", "anti-clockwise"} & set(words)),
        }
        assert any(turns) == any(value in ("clockwise", "counterclockwise") for value in named.values()), text
        assert bool(re.search(r"grow|bigger|larger|expan|increas|swell|enlarg|inflat|scal\w+ up", text)) == (
            "grows" in named.values()
        ), text
        assert bool(re.search(r"shr|smaller|decreas|tinier|contract|scal\w+ down", text)) == (
            "shrinks" in named.values()
        ), text
        assert ("behind" in words or "in front of" in text) or "relation" not in named, text


def test_captions_take_the_forms_of_everyday_english():
    drawn = [variant(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes(4000))]
    texts = [caption(scene, np.random.default_rng(i)).lower() for i, scene in enumerate(drawn)]
    for form in (
        r"\b(while|as|when) an? [^,]*, (an?|the|one) ",
        r"\bboth an? ",
        r"\bboth (of them )?[a-z]+",
        r"\b(two|2) [a-z ]+s[,:] .* one and .* one\b",
        r"\bto (the )?(left|right) [a-z]+s an? ",
        r"\bthe colou?r of the back\w+ (is|should be) [a-z]+",
        r"(background|backdrop|screen|canvas|surface) (that|which) is ",
        r"\b(enters|comes in) .* and (exits|leaves|goes out) ",
        r", (going|passing) (in front of|behind) ",
        r"\b(two|2) (shapes|objects|things|figures): ",
        r"\bone is .*, (and )?the other (one )?is ",
        r"\bthe \w+ is \w+ and the \w+ is \w+",
        r"\bthe \w+ [a-z]+s [^.]* the \w+ (to|from|up|down|left|right)\b",
        r"\bcolour",
        r"\bcolor",
        r"\bcentre\b",
        r"\bgrey\b",
    ):
        assert any(re.search(form, text) for text in texts), form
    assert not any(re.search(r",[,.;:]| ,|&|\ba one\b", text) for text in texts)


def test_variants_show_shapes_alike_and_say_less():
    told = [variant(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes(1500))]
    texts = [caption(scene, np.random.default_rng(i)).lower() for i, scene in enumerate(told)]
    short = [text for text in texts if re.fullmatch(r"(an? )?[a-z]+ [a-z]+\.?", text)]
    pairs = [text for text in texts if re.search(r"\b(two|pair of|2) (red|blue|green|white|black|\w+) \w+s\b", text)]
    assert len(short) > 5 and len(pairs) > 5
    for scene in told:
        assert len(scene.shapes) == int(said(scene)["shapes"])
        assert all(one.said & {"kind", "colour"} for one in scene.shapes)


@pytest.mark.parametrize("motion", ["left", "right"])
def test_captions_of_a_motion_name_its_direction(motion):
    texts = [caption(scene_of(shape(motion=motion)), np.random.default_rng(i)).lower() for i in range(300)]
    other = "left" if motion == "right" else "right"
    for text in texts:
        last = re.findall(f"(?:{motion}|{other})", text)[-1]
        assert last == motion or re.search(f"{motion} .*from the {other}", text), text


def test_attributes_describe_themselves():
    for scene in scenes(50):
        target = attributes(scene)
        assert target.shape == (len(ATTRIBUTES),) and target.dtype == torch.int64
        named = {name: ATTRIBUTES[name][number] for name, number in zip(ATTRIBUTES, target.tolist())}
        assert {name: value for name, value in named.items() if value != NOT_SAID} == said(scene)


def test_measurements_read_degraded_pictures():
    drawn = [scene for scene in scenes(80) if scene.relation == "apart"]
    videos = (degraded(render(scene, (128, 128), 13), i) for i, scene in enumerate(drawn[:24]))
    right = [score(video, said(scene))["all"] for video, scene in zip(videos, drawn)]
    assert sum(right) >= 23
    alike = [sample_scene(np.random.default_rng((3, i)), alike=1.0) for i in range(40)]
    alike = [scene for scene in alike if len({one.colour for one in scene.shapes}) < len(scene.shapes)]
    right = [score(degraded(render(scene, (128, 128), 13), i), said(scene)) for i, scene in enumerate(alike)]
    assert len(right) >= 5 and all(one["all"] and one["count"] for one in right)
    wide = render(drawn[0], (208, 128), 17)
    assert score(wide, said(drawn[0]))["all"] and background_colour(wide) == drawn[0].background.colour


def test_measurements_see_size_spin_growth_and_place():
    turning = shape("star", motion="still", angle=(0.0, -3.0), spin="counterclockwise")
    growing = shape("heart", "green", "left", radius=(0.09, 0.21), growth="grows")
    (star,), (heart,) = (measured(render(scene_of(one), (128, 128), 33)) for one in (turning, growing))
    assert (star.kind, star.motion, star.place, star.spin, star.size) == (
        "star",
        "still",
        "center",
        "counterclockwise",
        "medium",
    )
    assert (heart.kind, heart.colour, heart.motion, heart.growth) == ("heart", "green", "left", "grows")
    assert heart.spin == star.growth == "none"


def test_wrong_videos_score_as_wrong():
    video = render(
        scene_of(shape(), shape("circle", "blue", "still", start=(0.5, 0.85), end=(0.5, 0.85))), (128, 128), 17
    )
    assert all(score(video, said(scene_of(shape(), shape("circle", "blue", "still")))).values())
    for wrong, fault in (
        (shape("star"), "kind"),
        (shape(colour="green"), "colour"),
        (shape(motion="left"), "direction"),
    ):
        results = score(video, said(scene_of(wrong)))
        assert results == {name: name not in (fault, "all", "count") for name in results}
    # Each attribute is there, but on different shapes.
    swapped = score(video, said(scene_of(shape("circle"), shape("square", "blue", "still"))))
    assert swapped == {name: name != "all" for name in swapped}
    blank = torch.full_like(video, 255)
    assert measured(blank) == []
    assert score(blank, said(scene_of(shape()))) == {name: name == "background" for name in swapped}
    with pytest.raises(InputError, match="uint8"):
        measured(video.float())


def test_shapes_of_one_colour_are_told_apart():
    def at(y: float, **changes) -> Shape:
        moving = shape("triangle", "green", **changes)
        return dataclasses.replace(moving, start=(moving.start[0], y), end=(moving.end[0], y))

    above, below = at(0.25), at(0.75, motion="left")
    video = render(scene_of(above, below), (208, 128), 17)
    found = measured(video)
    assert {(one.kind, one.colour) for one in found} == {("triangle", "green")}
    assert sorted(one.motion for one in found) == ["left", "right"]
    assert all(score(video, said(scene_of(above, below))).values())
    # One of them alone is what the sentence says; two of it are not.
    twice = score(video, said(scene_of(above)))
    assert twice == {name: name not in ("kind", "all", "count") for name in twice}
    once = score(render(scene_of(above), (128, 128), 17), said(scene_of(above, below)))
    assert not (once["kind"] or once["count"])
    # One that another hides in part is still one.
    bar = shape("square", "blue", "still", radius=(0.12, 0.12))
    hidden = render(scene_of(shape("circle", radius=(0.2, 0.2)), bar, relation="behind"), (128, 128), 17)
    assert sorted(one.colour for one in measured(hidden)) == ["blue", "red"]


def test_a_shape_in_pieces_is_of_no_kind():
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    pieces = ((x - 64).abs() - 14).square() + (y - 64).square() < 36
    video = torch.full((9, 128, 128, 3), 255, dtype=torch.uint8)
    video[:, pieces] = torch.tensor(COLOURS["red"], dtype=torch.uint8)
    (shape,) = measured(video)
    assert (shape.kind, shape.colour, shape.motion, shape.spin) == ("unclear", "red", "still", "none")


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "test"},
        {"count": -1},
        {"rough": 1.5},
        {"turning": -0.1},
        {"several": "x"},
        {"alike": 2},
        {"brief": None},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=str(*wrong.values())):
        Shapes(**{"seed": 0, "count": 1} | wrong)


def test_the_sheet_of_scenes(tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["draw_shapes.py", "--count", "2", "--size", "32*32", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts/draw_shapes.py"), run_name="__main__")
        return ended.value.code

    sheet = tmp_path / "sheet.png"
    assert run("--out", sheet) == 0 and sheet.stat().st_size > 1000
    for wrong in (("--out", tmp_path / "none" / "sheet.png"), ("--out", sheet, "--count", -1)):
        assert run(*wrong) == 2 and capsys.readouterr().err.startswith("error:")
