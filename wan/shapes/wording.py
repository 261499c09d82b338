"""Phrases for what scenes show: noun phrases, verb phrases in four forms, and backgrounds.

A phrase names exactly the attributes in `said`, so whatever it says can be seen in the picture.
"""

from __future__ import annotations

import numpy as np

from wan.shapes.scenes import PATTERNS, Background, Shape, chance, one_of
from wan.shapes.words import (
    ADVERBS,
    ANY_NOUNS,
    BASE,
    COLOUR_ASIDES,
    COLOUR_TAILS,
    COLOUR_WORDS,
    DIAGONAL_PATHS,
    DOUBLED,
    DOWN_VERBS,
    ENTRANCES,
    FINITE,
    NOUNS,
    OPPOSITE,
    PARTICIPLE,
    PATTERN_TAILS,
    PLACE_PHRASES,
    PLURAL,
    SHADING_WORDS,
    SIDE_PATHS,
    SIZE_WORDS,
    SMALL_NOUNS,
    SPIN_VERBS,
    SPIN_WORDS,
    STILL_ACTIONS,
    TEXTURE_TAILS,
    TEXTURE_WORDS,
    UP_VERBS,
    VERBS,
    VERTICAL_PATHS,
)


def conjugate(phrase: str, form: str) -> str:
    """A phrase that begins with the base of a verb, or with "not" and one, put into a form; "&" joins two of them."""
    if "&" in phrase:
        return " and ".join(conjugate(part, form) for part in phrase.split(" & "))
    verb, _, rest = phrase.partition(" ")
    if verb == "not":
        negated = {FINITE: f"does not {rest}", PLURAL: f"do not {rest}", BASE: phrase}
        return negated.get(form) or f"not {conjugate(rest, form)}"
    if verb == "be":
        return {FINITE: f"is {rest}", PLURAL: f"are {rest}", PARTICIPLE: rest, BASE: phrase}[form]
    if form == FINITE:
        verb = verb[:-1] + "ies" if verb == "fly" else verb + ("es" if verb.endswith(("s", "o", "x")) else "s")
    elif form == PARTICIPLE:
        stem = verb + verb[-1] if verb in DOUBLED else verb.removesuffix("e")
        verb = stem + "ing"
    return f"{verb} {rest}".rstrip()


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def article(phrase: str) -> str:
    """With "a" or "an", save for "one in red" and the like."""
    if phrase.startswith("one"):
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def colour_word(rng: np.random.Generator, colour: str) -> str:
    return one_of(rng, COLOUR_WORDS.get(colour, (colour,)))


def noun_of(rng: np.random.Generator, shape: Shape) -> str:
    return one_of(rng, NOUNS[shape.kind] if "kind" in shape.said else ANY_NOUNS)


def noun_phrase(
    rng: np.random.Generator, shape: Shape, adjective: str = "", determined: bool = True, noun: str = ""
) -> str:
    """Such as "a large red striped circle"; `adjective` may be "spinning" or the like, and `noun` "one" or a plural."""
    said = shape.said
    is_named = not noun
    noun = noun or noun_of(rng, shape)
    if is_named and shape.size == "small" and noun in SMALL_NOUNS and chance(rng, 0.1):
        noun = SMALL_NOUNS[noun]
    colour = colour_word(rng, shape.colour) if "colour" in said else ""
    shading, tails = "", []
    if "shading" in said:
        if shape.shading in PATTERNS and chance(rng, 0.25):
            tails.append(one_of(rng, PATTERN_TAILS[shape.shading]))
        else:
            shading = one_of(rng, SHADING_WORDS[shape.shading])
    if colour and chance(rng, 0.07):
        tails.append(one_of(rng, COLOUR_TAILS if chance(rng, 0.8) else COLOUR_ASIDES).format(colour))
        colour = ""
    elif colour and chance(rng, 0.03):
        colour += " colored"
    looks = [shading, colour] if chance(rng, 0.7) else [colour, shading]
    size = one_of(rng, SIZE_WORDS[shape.size]) if "size" in said else ""
    front = [size, adjective] if chance(rng, 0.7) else [adjective, size]
    words = " ".join(filter(None, (*front, *looks, noun, *tails)))
    if not determined:
        return words
    return f"{one_of(rng, ('the', 'one'))} {words}" if chance(rng, 0.08) else article(words)


def plural_phrase(rng: np.random.Generator, shape: Shape) -> str:
    """Such as "large red circles"."""
    # `COLOUR_TAILS` and `COLOUR_ASIDES` are written for one shape.
    words = noun_phrase(rng, shape, determined=False, noun=plural(noun_of(rng, shape)))
    return words.replace(" is ", " are ")


def path_phrase(rng: np.random.Generator, motion: str) -> str:
    """Such as "from left to right"; `motion` is not "still"."""
    *vertical, way = motion.split()
    if vertical:
        up = vertical[0] == "up"
        to, near = ("top", "upper") if up else ("bottom", "lower")
        names = {"v": vertical[0], "h": way, "other": OPPOSITE[way], "to": to, "of": OPPOSITE[to]}
        return one_of(rng, DIAGONAL_PATHS).format(near=near, far=OPPOSITE[near], **names)
    if way in ("left", "right"):
        return one_of(rng, SIDE_PATHS).format(to=way, of=OPPOSITE[way])
    to = "top" if way == "up" else "bottom"
    return one_of(rng, VERTICAL_PATHS).format(v=way, to=to, of=OPPOSITE[to])


def motion_action(rng: np.random.Generator, shape: Shape) -> str:
    """What the shape does, with the verb's base first: "move to the right", "fall", "stay still"."""
    if shape.motion == "still":
        return one_of(rng, STILL_ACTIONS)
    if chance(rng, 0.06):
        return entrance(rng, shape.motion)
    path = path_phrase(rng, shape.motion)
    verb = "roll" if shape.kind == "circle" and chance(rng, 0.06) else one_of(rng, VERBS)
    if shape.motion in ("up", "down") and chance(rng, 0.35):
        verb = one_of(rng, UP_VERBS if shape.motion == "up" else DOWN_VERBS)
        if " " in verb or chance(rng, 0.45):
            path = ""
    elif path.startswith("from") and chance(rng, 0.1):
        verb = one_of(rng, ("cross the screen", "cross the frame", "pass"))
    if chance(rng, 0.08):
        verb = f"{verb} {one_of(rng, ADVERBS)}"
    return f"{verb} {path}".strip()


def entrance(rng: np.random.Generator, motion: str) -> str:
    """Such as "enter from the left & exit on the right"."""
    names = {"up": "top", "down": "bottom"}
    ways = [names.get(way, way) for way in motion.split()]
    preposition = "on" if ways[0] in ("left", "right") else "at"
    of, to = " ".join(OPPOSITE[way] for way in ways), " ".join(ways)
    into = f"{one_of(rng, ('from', 'from', preposition))} the {of}"
    return one_of(rng, ENTRANCES).format(**{"in": into, "out": f"{preposition} the {to}"})


def spin_action(rng: np.random.Generator, shape: Shape) -> str:
    verb = one_of(rng, SPIN_VERBS)
    return f"{verb} {one_of(rng, SPIN_WORDS[shape.spin])}" if "spin" in shape.said else verb


def place_phrase(rng: np.random.Generator, place: str) -> str:
    if " " not in place:
        return one_of(rng, PLACE_PHRASES[place])
    vertical, side = place.split()
    vertical = one_of(rng, (vertical, vertical, "upper" if vertical == "top" else "lower"))
    corner = f"{vertical} {side}"
    return one_of(rng, (f"in the {corner} corner", f"in the {corner} corner", f"at the {corner}", f"in the {corner}"))


def background_phrase(rng: np.random.Generator, background: Background, determined: bool = True) -> str:
    """Such as "a plain white background"; "" if nothing of it is said."""
    if not background.said:
        return ""
    colour = colour_word(rng, background.colour) if "colour" in background.said else ""
    place = one_of(rng, ("background",) * 8 + ("backdrop", "backdrop", "screen", "canvas", "surface"))
    if background.texture == "plain" and chance(rng, 0.06):
        phrase = f"{place} {one_of(rng, COLOUR_TAILS).format(colour)}"
    elif background.texture == "plain":
        words = f"{one_of(rng, ('plain', 'solid', 'simple'))} {colour}" if chance(rng, 0.15) else colour
        phrase = f"{words} {place}"
    elif chance(rng, 0.25):
        tail = f"{colour} {one_of(rng, TEXTURE_TAILS[background.texture])}".strip()
        phrase = f"{place} with {tail if tail.endswith(('s', 'noise')) else article(tail)}"
    else:
        texture = one_of(rng, TEXTURE_WORDS[background.texture])
        looks = f"{colour} {texture}" if chance(rng, 0.7) else f"{texture} {colour}"
        phrase = f"{looks.strip()} {place}"
    return article(phrase) if determined else phrase


def background_statement(rng: np.random.Generator, background: Background) -> str:
    """Such as "the background is white"; something of it must be said."""
    place = one_of(rng, ("background", "background", "background", "backdrop"))
    colour = colour_word(rng, background.colour) if "colour" in background.said else ""
    if background.texture == "plain":
        subject = one_of(rng, (f"the {place}",) * 3 + (f"the color of the {place}", f"the {place} color"))
        if chance(rng, 0.12):
            return f"{one_of(rng, ('make', 'keep', 'set'))} the {place} {colour}"
        return f"{subject} {one_of(rng, ('is', 'is', 'is', 'should be', 'stays', 'has to be'))} {colour}"
    texture = one_of(rng, TEXTURE_WORDS[background.texture])
    # Nouns, of which a background is one; the others are adjectives.
    if texture == "gradient" or texture.endswith("board"):
        return f"the {place} is {article(f'{colour} {texture}'.strip())}"
    return f"the {place} is {f'{colour} and ' if colour else ''}{texture}"
