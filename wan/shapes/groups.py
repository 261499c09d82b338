"""Several shapes told together: named as a group, introduced before what each does, or counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wan.shapes.clauses import DEEDS, actions_of, deed, goes_only, looks, without_verb_again
from wan.shapes.scenes import Shape, chance, one_of
from wan.shapes.wording import colour_word, conjugate, motion_action, noun_of, noun_phrase, plural, plural_phrase
from wan.shapes.words import BASE, FINITE, PARTICIPLE, PLURAL

NUMBERS = {2: ("two", "two", "two", "a pair of", "2"), 3: ("three", "three", "3")}
EVERY, NONE = {2: "both", 3: "all"}, {2: "neither", 3: "none"}
ORDINALS = ("first", "second", "third")
ANY_SHAPES = ("shapes", "shapes", "objects", "things", "figures")


def do_the_same(shapes: Sequence[Shape]) -> bool:
    """Whether what captions say of the shapes beside their looks is the same motion, or nothing."""
    said = {shape.said & {"place", *DEEDS} for shape in shapes}
    return said == {frozenset()} or (said == {frozenset(("motion",))} and len({shape.motion for shape in shapes}) == 1)


def together(rng: np.random.Generator, shapes: Sequence[Shape], style: str) -> str:
    """Shapes that do the same: "a red circle and a blue square both move right"."""
    names, every = named(rng, shapes, style), EVERY[len(shapes)]
    if "motion" not in shapes[0].said:
        return names
    action = motion_action(rng, shapes[0])
    if style == BASE:
        return f"{names} {one_of(rng, ('', f'{every} '))}{conjugate(action, BASE)}"
    do, doing = conjugate(action, PLURAL), conjugate(action, PARTICIPLE)
    if style == FINITE:
        wordings = [f"{names} {do}", f"{names} {every} {do}"]
        if names.startswith(("a ", "an ")) and len(shapes) == 2:
            wordings.append(f"both {names} {do}")
        return one_of(rng, wordings)
    they = one_of(rng, ("they", f"they {every}", every, f"{every} of them"))
    wordings = [
        f"{names} {doing}",
        f"{names} {every} {doing}",
        f"{names}, {every} {doing}",
        f"{names}, {every} of them {doing}",
        f"{names}. {they} {do}",
    ]
    if shapes[0].motion == "still":
        wordings.append(f"{names}, {NONE[len(shapes)]} of them moving")
    return one_of(rng, wordings)


def named(rng: np.random.Generator, shapes: Sequence[Shape], style: str = FINITE) -> str:
    """Such as "a red circle and a blue square", "two red circles" or "two circles, a red one and a blue one,"."""
    number = one_of(rng, NUMBERS[len(shapes)])
    # "Two red circles", without a word on which is which.
    if all(looks(shape) == looks(shapes[0]) for shape in shapes):
        return f"{number} {plural_phrase(rng, shapes[0])}"
    heading, noun, end = "", "", ""
    if _share(shapes, "kind") and all("colour" in shape.said for shape in shapes) and chance(rng, 0.6):
        heading = f"{number} {plural(noun_of(rng, shapes[0]))}{one_of(rng, (', ', ': '))}"
        noun, end = "one", ","
    names = [noun_phrase(rng, shape, determined=style != "terse", noun=noun) for shape in shapes]
    return f"{heading}{listed(names)}{end}"


def listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def can_be_introduced(shapes: Sequence[Shape]) -> bool:
    """Whether there is something to say of each beside its looks, which a sentence of its own can say."""
    return all(shape.said & DEEDS and "place" not in shape.said for shape in shapes)


def introduction(rng: np.random.Generator, shapes: Sequence[Shape]) -> str:
    """ "A red circle and a blue square. The circle moves left, the square moves right." """
    if len(shapes) == 2 and chance(rng, 0.1):
        names = ["one", one_of(rng, ("the other", "the other one"))]
    elif _differ(shapes, "kind"):
        names = [f"the {noun_of(rng, shape)}" for shape in shapes]
    elif _differ(shapes, "colour"):
        names = [f"the {colour_word(rng, shape.colour)} one" for shape in shapes]
    else:
        names = [f"the {ordinal}{one_of(rng, ('', ' one'))}" for ordinal in ORDINALS[: len(shapes)]]
    heading = f"{counted(rng, shapes)}{one_of(rng, (': ', ', '))}" if chance(rng, 0.2) else ""
    return f"{heading}{named(rng, shapes)}. {_what_each_does(rng, names, shapes)}"


def can_be_recalled(shapes: Sequence[Shape]) -> bool:
    """Whether "the square" and the like tell the shapes apart once their colours are left out."""
    return can_be_introduced(shapes) and _differ(shapes, "kind") and all("colour" in shape.said for shape in shapes)


def looks_apart(rng: np.random.Generator, shapes: Sequence[Shape]) -> str:
    """ "The circle is red and the square is blue. The circle goes up, the square goes down.", or the looks last."""
    bare = [noun_phrase(rng, without_colour(shape), determined=False) for shape in shapes]
    are = listed([f"the {name} is {colour_word(rng, shape.colour)}" for name, shape in zip(bare, shapes)])
    if do_the_same(shapes) and chance(rng, 0.7):
        return f"{are}. {EVERY[len(shapes)]} {conjugate(motion_action(rng, shapes[0]), PLURAL)}"
    deeds = _what_each_does(rng, [f"the {noun_of(rng, shape)}" for shape in shapes], shapes)
    return one_of(rng, (". ", "; ", ", ")).join((deeds, are) if chance(rng, 0.5) else (are, deeds))


def _what_each_does(rng: np.random.Generator, names: Sequence[str], shapes: Sequence[Shape]) -> str:
    if all(map(goes_only, shapes)) and chance(rng, 0.3):
        return without_verb_again(rng, names, shapes, FINITE)
    deeds = [f"{name} {deed(rng, actions_of(rng, shape), FINITE)}" for name, shape in zip(names, shapes)]
    return one_of(rng, (", ", ", ", ". ", " and ", " while ")).join(deeds)


def counted(rng: np.random.Generator, shapes: Sequence[Shape]) -> str:
    """Such as "two shapes"."""
    return f"{one_of(rng, NUMBERS[len(shapes)])} {one_of(rng, ANY_SHAPES)}"


def enumerated(rng: np.random.Generator, clauses: Sequence[str]) -> str:
    """Clauses of one shape each, numbered: "two shapes, one is a red square going left, the other is ..."."""
    if len(clauses) == 2 and chance(rng, 0.6):
        others = one_of(rng, ("the other is", "the other one is", "and the other is", "another is"))
        return f"one is {clauses[0]}, {others} {clauses[1]}"
    return ", ".join(f"{ordinal} {text}" for ordinal, text in zip(ORDINALS, clauses))


def without_colour(shape: Shape) -> Shape:
    return replace(shape, said=shape.said - {"colour"})


def _share(shapes: Sequence[Shape], name: str) -> bool:
    return all(name in shape.said for shape in shapes) and len({getattr(shape, name) for shape in shapes}) == 1


def _differ(shapes: Sequence[Shape], name: str) -> bool:
    return all(name in shape.said for shape in shapes) and len({getattr(shape, name) for shape in shapes}) == len(
        shapes
    )
