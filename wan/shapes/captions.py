"""Captions: plain English sentences, in many wordings, that say of a scene what its `said` attributes name."""

from __future__ import annotations

import re

import numpy as np

from wan.shapes.clauses import DEEDS, actions_of, clause, crossing, deed, goes_only, without_verb_again
from wan.shapes.groups import (
    can_be_introduced,
    can_be_recalled,
    counted,
    do_the_same,
    enumerated,
    introduction,
    looks_apart,
    together,
    without_colour,
)
from wan.shapes.scenes import Scene, Shape, chance, choose, one_of
from wan.shapes.wording import background_phrase, background_statement, colour_word, noun_of, noun_phrase
from wan.shapes.words import BASE, FINITE, PARTICIPLE

STYLES = {FINITE: 0.44, PARTICIPLE: 0.36, BASE: 0.05, "terse": 0.15}
OPENERS = {
    FINITE: (
        "in this video,", "in the video,", "in this clip,", "a video where", "a video in which", "a clip where",
        "an animation where", "an animation in which", "create a video where", "make a clip in which",
        "make a video where", "the video shows how", "we see how", "generate a video in which",
        "i want a video where", "imagine a scene where", "render a clip where",
    ),
    PARTICIPLE: (
        "a video of", "a video of", "a short video of", "a clip of", "a short clip of", "an animation of",
        "a short animation of", "an animation showing", "a video showing", "a clip showing", "show", "show", "show me",
        "please show", "generate", "generate a video of", "create", "create a video of", "make", "make a video of",
        "make an animation of", "draw", "render", "animate", "display", "give me", "i want to see", "i want",
        "i would like to see", "we see", "you can see", "the video shows", "this clip shows", "the animation shows",
        "a scene with", "a video with", "a simple video of", "a simple animation of",
        "can you make", "please make", "please animate", "could you show", "i need a video of", "i would like",
        "here is", "picture", "imagine",
    ),
    BASE: ("make", "let", "have", "watch", "we see", "make"),
    "terse": ("video of", "animation of", "short clip of", "video:", "show"),
}  # fmt: skip
JOINS = {
    FINITE: (" while ", " while ", " and ", " and ", ", and ", " as ", ", while ", ". ", "; "),
    PARTICIPLE: (" and ", " and ", " and ", ", ", " together with ", " with "),
    BASE: (" and ", ", and "),
    "terse": (", ", ", ", " and ", "; "),
}
PREPOSITIONS = ("on", "on", "on", "on", "over", "against", "in front of", "with")
BRITISH = {"color": "colour", "center": "centre", "gray": "grey"}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many sentences for a scene, the same for the same state of `rng`."""
    style = choose(rng, STYLES)
    # Sentences of these styles need a verb for each shape.
    if style in (FINITE, BASE) and not all(_has_action(scene, shape) for shape in scene.shapes):
        style = PARTICIPLE
    if len(scene.shapes) == 1 and style == FINITE and chance(rng, 0.16):
        text = _two_sentences(rng, scene)
    else:
        text = _with_background(rng, scene, style, _body(rng, scene, style))
    return _punctuated(rng, text)


def _has_action(scene: Scene, shape: Shape) -> bool:
    crosses = scene.relation_said and shape in scene.shapes[:2]
    return crosses or bool(shape.said & DEEDS)


def _body(rng: np.random.Generator, scene: Scene, style: str) -> str:
    """All shapes, with what they do; no background."""
    shapes, told, rest = scene.shapes, [], scene.shapes
    if scene.relation_said:
        told, rest = [crossing(rng, scene, style)], shapes[2:]
    elif len(shapes) > 1:
        if style == PARTICIPLE and chance(rng, 0.25) and can_be_introduced(shapes):
            return introduction(rng, shapes)
        if style == FINITE and chance(rng, 0.12) and can_be_recalled(shapes):
            return looks_apart(rng, shapes)
        if style in (FINITE, PARTICIPLE) and all(map(goes_only, shapes)) and chance(rng, 0.25):
            return without_verb_again(rng, [noun_phrase(rng, shape) for shape in shapes], shapes, style)
        alike = next((count for count in (3, 2) if count <= len(shapes) and do_the_same(shapes[:count])), 0)
        if alike and chance(rng, 0.7):
            told, rest = [together(rng, shapes[:alike], style)], shapes[alike:]
    # Each shape with the one that was told before it, which decides on "another" and "a blue one".
    told += [clause(rng, shape, style, before) for before, shape in zip((None, *rest), rest)]
    before, last = (None, *rest)[-2:] if rest else (None, None)
    if style == PARTICIPLE and len(told) == 2 and last and last.said & DEEDS and chance(rng, 0.25):
        return f"{told[0]} {one_of(rng, ('while', 'while', 'as'))} {clause(rng, last, FINITE, before)}"
    return _joined(rng, scene, style, told)


def _joined(rng: np.random.Generator, scene: Scene, style: str, told: list[str]) -> str:
    """Clauses made one text."""
    if style == FINITE and len(told) == 2 and ". " not in told[0] and chance(rng, 0.25):
        return f"{one_of(rng, ('while', 'while', 'while', 'as', 'when'))} {told[0]}, {told[1]}"
    is_listed = len(told) == len(scene.shapes) > 1
    if is_listed and style == PARTICIPLE and not told[1].startswith("another") and chance(rng, 0.1):
        return f"{counted(rng, scene.shapes)}{one_of(rng, (', ', '. ', ': '))}{enumerated(rng, told)}"
    if len(told) == 3:
        between = ", " if chance(rng, 0.6) else one_of(rng, JOINS[style])
        text = between.join(told[:2]) + one_of(rng, (" and ", ", and ", one_of(rng, JOINS[style]))) + told[2]
    else:
        text = one_of(rng, JOINS[style]).join(told)
    if is_listed and style in (PARTICIPLE, "terse") and chance(rng, 0.15):
        return f"{counted(rng, scene.shapes)}{one_of(rng, (': ', ': ', ', '))}{text}"
    return text


def _with_background(rng: np.random.Generator, scene: Scene, style: str, body: str) -> str:
    """Openers and the background, before or after the shapes."""
    background = scene.background
    # "A circle move right" is a sentence only after "make" and the like.
    opener = one_of(rng, OPENERS[style]) if style == BASE or chance(rng, 0.35) else ""
    if not opener and style == PARTICIPLE and chance(rng, 0.12):
        opener = "there is" if len(scene.shapes) == 1 else "there are"
    opened = f"{opener} {body}".strip()
    phrase = background_phrase(rng, background, determined=style != "terse")
    if not phrase:
        return opened
    is_plain = background.texture == "plain"
    if style == "terse":
        if is_plain and chance(rng, 0.12):
            return f"{opened}, background{one_of(rng, ('', ':'))} {colour_word(rng, background.colour)}"
        after = (f"{opened}, {phrase}", f"{opened}, {phrase}", f"{opened} on {phrase}", f"{opened}. {phrase}")
        return f"{phrase}, {body}" if chance(rng, 0.2) else one_of(rng, after)
    if chance(rng, 0.08):
        statement = background_statement(rng, background)
        joins = (". ", ". ", ", ", " and ") if style == FINITE and not opener else (". ",)
        return one_of(rng, joins).join((statement, opened) if chance(rng, 0.4) else (opened, statement))
    if style == PARTICIPLE and chance(rng, 0.08):
        return f"{phrase} with {body}"
    where = f"{one_of(rng, PREPOSITIONS)} {phrase}"
    if is_plain and chance(rng, 0.08):
        where = f"{one_of(rng, ('on', 'against', 'over'))} {colour_word(rng, background.colour)}"
    if not opener and not where.startswith("with") and chance(rng, 0.2):
        return f"{where}, {body}"
    if chance(rng, 0.06):
        return f"{opened}. {one_of(rng, ('it is', 'this is', 'all'))} {where}"
    return f"{opened} {where}"


def _two_sentences(rng: np.random.Generator, scene: Scene) -> str:
    """ "A red circle on a white background. It moves to the right." """
    (shape,) = scene.shapes
    where = background_phrase(rng, scene.background)
    does = deed(rng, actions_of(rng, shape), FINITE)
    if "colour" in shape.said and chance(rng, 0.4):
        subject = f"the {noun_phrase(rng, without_colour(shape), determined=False)} is {colour_word(rng, shape.colour)}"
        join = one_of(rng, (". it", " and it", " and"))
        return f"{subject}{join} {does}" + (f"{one_of(rng, ('', '. it is'))} on {where}" if where else "")
    subject = noun_phrase(rng, shape) + (f" on {where}" if where else "")
    again = f"the {noun_of(rng, shape)}" if "kind" in shape.said and chance(rng, 0.3) else "it"
    return f"{subject}. {again} {does}"


def _punctuated(rng: np.random.Generator, text: str) -> str:
    """With capitals and a full stop, or without; in American spelling or in British."""
    # Asides end in a comma, which is too many before another mark or at the end.
    text = re.sub(r",(?=[,.;:]|$)", "", text.replace(" ,", ","))
    if chance(rng, 0.3):
        text = re.sub("color|center|gray", lambda found: BRITISH[found[0]], text)
    if chance(rng, 0.5):
        sentences = [sentence[0].upper() + sentence[1:] for sentence in text.split(". ")]
        text = ". ".join(sentences)
    return f"{text}." if chance(rng, 0.5) else text
