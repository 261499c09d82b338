"""Captions: plain English sentences, in many wordings, that say of a scene what its `said` attributes name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wan.training.scenes import Scene, Shape, chance, choose, one_of
from wan.training.wording import (
    BASE,
    FINITE,
    GROWTH_ACTIONS,
    NOUNS,
    PARTICIPLE,
    PLURAL,
    SPIN_VERBS,
    VERBS,
    background_phrase,
    colour_word,
    conjugate,
    motion_action,
    noun_phrase,
    place_phrase,
    spin_action,
)

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
PASSING = ("pass", "pass", "pass", "go", "move", "travel", "slide")
OTHER_SIDE = {"in front of": "behind", "behind": "in front of"}
PREPOSITIONS = ("on", "on", "on", "on", "over", "against", "in front of", "with")
DEEDS = frozenset(("motion", "spin", "spinning", "growth"))
TURNING = frozenset(verb.split()[0] for verb in SPIN_VERBS)
NUMBERS = {2: "two", 3: "three"}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many sentences for a scene, the same for the same state of `rng`."""
    style = choose(rng, STYLES)
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
    shapes = list(scene.shapes)
    clauses = []
    if style == FINITE and not scene.relation_said and _can_be_introduced(shapes) and chance(rng, 0.12):
        return _introduced(rng, shapes)
    if scene.relation_said:
        clauses.append(_crossing(rng, scene, style))
        shapes = shapes[2:]
    elif len(shapes) > 1 and _move_alike(shapes[0], shapes[1]) and chance(rng, 0.5):
        clauses.append(_together(rng, shapes[:2], style))
        shapes = shapes[2:]
    clauses += [_clause(rng, shape, style) for shape in shapes]
    if style == PARTICIPLE and len(clauses) == 2 and shapes and shapes[-1].said & DEEDS and chance(rng, 0.25):
        return f"{clauses[0]} {one_of(rng, ('while', 'while', 'as'))} {_clause(rng, shapes[-1], FINITE)}"
    if len(clauses) == 3:
        between = ", " if chance(rng, 0.6) else one_of(rng, JOINS[style])
        text = between.join(clauses[:2]) + one_of(rng, (" and ", ", and ", one_of(rng, JOINS[style]))) + clauses[2]
    else:
        text = one_of(rng, JOINS[style]).join(clauses)
    if len(scene.shapes) > 1 and style in (PARTICIPLE, "terse") and chance(rng, 0.08):
        return f"{NUMBERS[len(scene.shapes)]} {one_of(rng, ('shapes', 'objects'))}: {text}"
    return text


def _actions(rng: np.random.Generator, shape: Shape) -> list[str]:
    """What the shape does, each with the verb's base first, in any order."""
    actions = [motion_action(rng, shape)] if "motion" in shape.said else []
    if shape.said & {"spin", "spinning"}:
        spin = spin_action(rng, shape)
        if actions and shape.motion == "still":
            actions = [f"{spin} {one_of(rng, ('in place', 'on the spot', 'without moving'))}"]
        else:
            actions.append(spin)
    if "growth" in shape.said:
        actions.append(one_of(rng, GROWTH_ACTIONS[shape.growth]))
    return [actions[i] for i in rng.permutation(len(actions))]


def _clause(rng: np.random.Generator, shape: Shape, style: str) -> str:
    """A shape and what it does: "a red circle moves right while spinning clockwise"."""
    actions, adjective = _actions(rng, shape), ""
    if len(actions) > 1 and chance(rng, 0.2):
        adjective, actions = _as_adjective(rng, shape, actions)
    subject = noun_phrase(rng, shape, adjective, determined=style != "terse")
    place = f" {place_phrase(rng, shape.place)}" if "place" in shape.said else ""
    if not actions:
        return subject + place
    early = place and chance(rng, 0.5)
    verb, _, path = actions[0].partition(" ")
    if style == PARTICIPLE and chance(rng, 0.12):
        deed = f"{one_of(rng, ('that', 'which'))} {_deed(rng, actions, FINITE)}"
    elif style == "terse" and len(actions) == 1 and verb in VERBS and chance(rng, 0.1):
        deed = path
    else:
        deed = _deed(rng, actions, style)
    comma = "," if style == "terse" and chance(rng, 0.3) else ""
    return f"{subject}{place if early else ''}{comma} {deed}{'' if early else place}"


def _as_adjective(rng: np.random.Generator, shape: Shape, actions: Sequence[str]) -> tuple[str, list[str]]:
    """Say growth, or a spin whose way round is not named, before the noun instead of after it."""
    if "growth" in shape.said:
        verbs, adjective = GROWTH_ACTIONS[shape.growth], "growing" if shape.growth == "grows" else "shrinking"
        return adjective, [action for action in actions if action not in verbs]
    if "spinning" in shape.said:
        others = [action for action in actions if action.split()[0] not in TURNING]
        return (one_of(rng, ("spinning", "rotating", "turning")), others) if others else ("", list(actions))
    return "", list(actions)


def _deed(rng: np.random.Generator, actions: Sequence[str], style: str) -> str:
    """One or more actions in the form that a style asks for."""
    form = PARTICIPLE if style == "terse" else style
    first, *others = actions
    is_progressive = form == FINITE and chance(rng, 0.12) and first.split()[0] not in ("be", "not")
    text = f"is {conjugate(first, PARTICIPLE)}" if is_progressive else conjugate(first, form)
    for other in others:
        joined = [
            f"while {conjugate(other, PARTICIPLE)}",
            f"and {conjugate(other, PARTICIPLE if is_progressive else form)}",
        ]
        if form != BASE:
            joined.append(f"as it {conjugate(other, FINITE)}")
        text += f" {one_of(rng, joined)}"
    return text


def _move_alike(a: Shape, b: Shape) -> bool:
    said = a.said | b.said
    return a.motion == b.motion and "motion" in a.said & b.said and not said & {*DEEDS, "place"} - {"motion"}


def _together(rng: np.random.Generator, shapes: Sequence[Shape], style: str) -> str:
    """Two shapes that do the same: "a red circle and a blue square both move right"."""
    names = " and ".join(noun_phrase(rng, shape, determined=style != "terse") for shape in shapes)
    form = {FINITE: PLURAL, BASE: BASE}.get(style, PARTICIPLE)
    return f"{names}{one_of(rng, (' both', ''))} {conjugate(motion_action(rng, shapes[0]), form)}"


def _crossing(rng: np.random.Generator, scene: Scene, style: str) -> str:
    """The first two shapes, one of which passes in front of or behind the other."""
    first, second = scene.shapes[:2]
    form = PARTICIPLE if style == "terse" else style
    passing = one_of(rng, PASSING)
    if first.motion == "still" or (second.motion != "still" and chance(rng, 0.3)):
        how = OTHER_SIDE[scene.relation]
        join = one_of(rng, (" while ", " and ", " as ") if form == FINITE else (" and ",))
        if not first.said & DEEDS:
            form, join = PARTICIPLE, " with "
        other = noun_phrase(rng, second, determined=style != "terse")
        moving = f", {_deed(rng, actions, PARTICIPLE)}" if (actions := _actions(rng, second)) else ""
        return f"{_clause(rng, first, style)}{join}{other} {conjugate(f'{passing} {how}', form)} it{moving}"
    other = _clause(rng, second, "terse" if style == "terse" else PARTICIPLE)
    actions = _actions(rng, first)
    subject = noun_phrase(rng, first, determined=style != "terse")
    pass_by = f"{passing} {scene.relation}"
    if not actions:
        return f"{subject} {conjugate(pass_by, form)} {other}"
    deed = _deed(rng, actions, form)
    wordings = [
        f"{subject} {deed}, {conjugate('pass ' + scene.relation, PARTICIPLE)} {other}",
        f"{subject} {deed} {scene.relation} {other}",
        f"{subject} {_deed(rng, actions, form)} and {conjugate(pass_by, form)} {other}",
    ]
    if not second.said & DEEDS:
        wordings.append(f"{subject} {conjugate(pass_by, form)} {other} while {_deed(rng, actions, PARTICIPLE)}")
    return one_of(rng, wordings)


def _with_background(rng: np.random.Generator, scene: Scene, style: str, body: str) -> str:
    """Openers and the background, before or after the shapes."""
    phrase = background_phrase(rng, scene.background, determined=style != "terse")
    opener = one_of(rng, OPENERS[style]) if style == BASE or chance(rng, 0.35) else ""
    if not opener and style == PARTICIPLE and chance(rng, 0.12):
        opener = "there is" if len(scene.shapes) == 1 else "there are"
    opened = f"{opener} {body}".strip()
    if not phrase:
        return opened
    if style == "terse":
        after = (f"{opened}, {phrase}", f"{opened}, {phrase}", f"{opened} on {phrase}", f"{opened}. {phrase}")
        return f"{phrase}, {body}" if chance(rng, 0.2) else one_of(rng, after)
    if style == PARTICIPLE and chance(rng, 0.08):
        return f"{phrase} with {body}"
    background = scene.background
    where = f"{one_of(rng, PREPOSITIONS)} {phrase}"
    if background.texture == "plain" and chance(rng, 0.08):
        where = f"{one_of(rng, ('on', 'against', 'over'))} {colour_word(rng, background.colour)}"
    if not opener and not where.startswith("with") and chance(rng, 0.2):
        return f"{where}, {body}"
    if chance(rng, 0.06):
        return f"{opened}. {one_of(rng, ('it is', 'this is', 'all'))} {where}"
    if background.texture == "plain" and chance(rng, 0.08):
        statement = one_of(rng, ("is", "is", "should be", "stays", "has to be"))
        return f"{opened}. the background {statement} {colour_word(rng, background.colour)}"
    return f"{opened} {where}"


def _two_sentences(rng: np.random.Generator, scene: Scene) -> str:
    """ "A red circle on a white background. It moves to the right." """
    (shape,) = scene.shapes
    where = background_phrase(rng, scene.background)
    deed = _deed(rng, _actions(rng, shape), FINITE)
    if "colour" in shape.said and chance(rng, 0.4):
        subject = (
            f"the {noun_phrase(rng, _without_colour(shape), determined=False)} is {colour_word(rng, shape.colour)}"
        )
        join = one_of(rng, (". it", " and it", " and"))
        return f"{subject}{join} {deed}" + (f"{one_of(rng, ('', '. it is'))} on {where}" if where else "")
    subject = noun_phrase(rng, shape) + (f" on {where}" if where else "")
    again = f"the {one_of(rng, NOUNS[shape.kind])}" if "kind" in shape.said and chance(rng, 0.3) else "it"
    return f"{subject}. {again} {deed}"


def _without_colour(shape: Shape) -> Shape:
    return replace(shape, said=shape.said - {"colour"})


def _can_be_introduced(shapes: Sequence[Shape]) -> bool:
    """Whether their kinds tell them apart, and there is something to say of each beside its looks."""
    kinds = {
        shape.kind for shape in shapes if "kind" in shape.said and shape.said & DEEDS and "place" not in shape.said
    }
    return len(shapes) > 1 and len(kinds) == len(shapes)


def _introduced(rng: np.random.Generator, shapes: Sequence[Shape]) -> str:
    """ "A red circle and a blue square. The circle moves left, the square moves right." """
    names = [noun_phrase(rng, shape) for shape in shapes]
    deeds = [f"the {one_of(rng, NOUNS[shape.kind])} {_deed(rng, _actions(rng, shape), FINITE)}" for shape in shapes]
    between = one_of(rng, (", ", ". ", " and ", " while "))
    return f"{', '.join(names[:-1])} and {names[-1]}. {between.join(deeds)}"


def _punctuated(rng: np.random.Generator, text: str) -> str:
    """With capitals and a full stop, or without."""
    if chance(rng, 0.5):
        sentences = [sentence[0].upper() + sentence[1:] for sentence in text.split(". ")]
        text = ". ".join(sentences)
    return f"{text}." if chance(rng, 0.5) else text
