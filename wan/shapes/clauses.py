"""Clauses: what one shape does, or how two cross."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wan.shapes.attributes import said_of
from wan.shapes.scenes import Scene, Shape, chance, one_of
from wan.shapes.wording import (
    conjugate,
    motion_action,
    noun_phrase,
    path_phrase,
    place_phrase,
    spin_action,
)
from wan.shapes.words import BASE, FINITE, GROWTH_ACTIONS, PARTICIPLE, SPIN_VERBS, VERBS

PASSING = ("pass", "pass", "pass", "go", "go", "move", "travel", "slide", "come")
HIDING = ("hide", "disappear")
OTHER_SIDE = {"in front of": "behind", "behind": "in front of"}
DEEDS = frozenset(("motion", "spin", "spinning", "growth"))
TURNING = frozenset(verb.split()[0] for verb in SPIN_VERBS)


def actions_of(rng: np.random.Generator, shape: Shape) -> list[str]:
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


def clause(rng: np.random.Generator, shape: Shape, style: str, before: Shape | None = None) -> str:
    """A shape and what it does: "a red circle moves right while spinning clockwise"; `before` was told before it."""
    if (style == FINITE or (style == "terse" and not before)) and goes_only(shape) and chance(rng, 0.08):
        return _path_first(rng, shape, style)
    actions, adjective = actions_of(rng, shape), ""
    if len(actions) > 1 and chance(rng, 0.2):
        adjective, actions = _as_adjective(rng, shape, actions)
    subject = _subject(rng, shape, adjective, style, before)
    place = f" {place_phrase(rng, shape.place)}" if "place" in shape.said else ""
    if not actions:
        return subject + place
    early = place and chance(rng, 0.5)
    verb, _, path = actions[0].partition(" ")
    if style == PARTICIPLE and chance(rng, 0.12):
        does = f"{one_of(rng, ('that', 'which'))} {deed(rng, actions, FINITE)}"
    elif style == "terse" and len(actions) == 1 and verb in VERBS and chance(rng, 0.2):
        does = path
    else:
        does = deed(rng, actions, style)
    comma = "," if style == "terse" and chance(rng, 0.3) else ""
    return f"{subject}{place if early else ''}{comma} {does}{'' if early else place}"


def _subject(rng: np.random.Generator, shape: Shape, adjective: str, style: str, before: Shape | None) -> str:
    """Such as "a blue circle"; "a blue one" or "another blue circle" where one like it was told before."""
    if before and looks(before) == looks(shape) and style != "terse":
        return f"another {noun_phrase(rng, shape, adjective, determined=False)}"
    same_kind = before and "kind" in shape.said & before.said and shape.kind == before.kind
    noun = "one" if same_kind and "colour" in shape.said & before.said and chance(rng, 0.4) else ""
    return noun_phrase(rng, shape, adjective, determined=style != "terse", noun=noun)


def looks(shape: Shape) -> dict[str, str]:
    """What captions say of the shape beside where it is and what it does."""
    return {name: value for name, value in said_of(shape).items() if name not in ("place", *DEEDS)}


def goes_only(shape: Shape) -> bool:
    """Whether captions say of the shape, beside its looks, that it moves some way and nothing else."""
    return shape.said & {"place", *DEEDS} == {"motion"} and shape.motion != "still"


def _path_first(rng: np.random.Generator, shape: Shape, style: str) -> str:
    """ "From left to right goes a red circle", or "left to right: red circle"."""
    # "Up goes a circle" is English, "right goes a circle" is not.
    while " " not in (path := path_phrase(rng, shape.motion)) and path not in ("up", "down"):
        pass
    if style == "terse":
        return f"{path}: {noun_phrase(rng, shape, determined=False)}"
    return f"{path} {conjugate(one_of(rng, VERBS), FINITE)} {noun_phrase(rng, shape)}"


def without_verb_again(rng: np.random.Generator, subjects: Sequence[str], shapes: Sequence[Shape], form: str) -> str:
    """ "A red circle goes left and a blue square right", for shapes that go only."""
    verb = conjugate(one_of(rng, VERBS), form)
    paths = [path_phrase(rng, shape.motion) for shape in shapes]
    others = (f"{subject} {path}" for subject, path in zip(subjects[1:], paths[1:]))
    return one_of(rng, (" and ", ", ", ", and ")).join((f"{subjects[0]} {verb} {paths[0]}", *others))


def _as_adjective(rng: np.random.Generator, shape: Shape, actions: Sequence[str]) -> tuple[str, list[str]]:
    """Say growth, or a spin whose way round is not named, before the noun instead of after it."""
    if "growth" in shape.said:
        verbs, adjective = GROWTH_ACTIONS[shape.growth], "growing" if shape.growth == "grows" else "shrinking"
        return adjective, [action for action in actions if action not in verbs]
    if "spinning" in shape.said:
        others = [action for action in actions if action.split()[0] not in TURNING]
        return (one_of(rng, ("spinning", "rotating", "turning")), others) if others else ("", list(actions))
    return "", list(actions)


def deed(rng: np.random.Generator, actions: Sequence[str], style: str) -> str:
    """One or more actions in the form that a style asks for."""
    form = PARTICIPLE if style == "terse" else style
    first, *others = actions
    # "Is moving" for "moves"; "be still" and "not move" have no such form.
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


def crossing(rng: np.random.Generator, scene: Scene, style: str) -> str:
    """The first two shapes, one of which passes in front of or behind the other."""
    first, second = scene.shapes[:2]
    form = PARTICIPLE if style == "terse" else style
    # A shape that stays where it is passes by none: the other one does.
    if first.motion == "still" or (second.motion != "still" and chance(rng, 0.3)):
        return _crossed(rng, scene, style)
    other = clause(rng, second, style if style == "terse" else PARTICIPLE, before=first)
    actions = actions_of(rng, first)
    subject = noun_phrase(rng, first, determined=style != "terse")
    pass_by = f"{_passing(rng, scene.relation, form)} {scene.relation}"
    if not actions:
        if form == PARTICIPLE and chance(rng, 0.3):
            return f"{subject} {scene.relation} {other}"
        return f"{subject} {conjugate(pass_by, form)} {other}"
    does = deed(rng, actions, form)
    wordings = [
        f"{subject} {does}, {conjugate(pass_by, PARTICIPLE)} {other}",
        f"{subject} {does} {scene.relation} {other}",
        f"{subject} {does} and {conjugate(pass_by, form)} {other}",
    ]
    if form == FINITE:
        wordings.append(
            f"{subject} {does}{one_of(rng, ('. it', ', and it', ', it'))} {conjugate(pass_by, form)} {other}"
        )
    if not second.said & DEEDS:
        meanwhile = one_of(rng, (f"while {deed(rng, actions, PARTICIPLE)}", f"as it {deed(rng, actions, FINITE)}"))
        wordings.append(f"{subject} {conjugate(pass_by, form)} {other} {meanwhile}")
    return one_of(rng, wordings)


def _crossed(rng: np.random.Generator, scene: Scene, style: str) -> str:
    """The second shape passes the first: "a red circle stays still while a blue square passes behind it"."""
    first, second = scene.shapes[:2]
    form = PARTICIPLE if style == "terse" else style
    join = one_of(rng, (" while ", " and ", " as ") if form == FINITE else (" and ",))
    if not first.said & DEEDS:
        form, join = PARTICIPLE, " with "
    how = OTHER_SIDE[scene.relation]
    other = noun_phrase(rng, second, determined=style != "terse")
    moving = f", {deed(rng, actions, PARTICIPLE)}" if (actions := actions_of(rng, second)) else ""
    return f"{clause(rng, first, style)}{join}{other} {conjugate(f'{_passing(rng, how, form)} {how}', form)} it{moving}"


def _passing(rng: np.random.Generator, how: str, form: str) -> str:
    verbs = (*PASSING, *HIDING) if how == "behind" else PASSING
    # "Make a ring cross behind a star" would read as two shapes, a ring and a cross.
    return one_of(rng, verbs if form == BASE else (*verbs, "cross"))
