"""Words for what scenes show: noun phrases, verb phrases in three forms, and backgrounds.

A phrase names exactly the attributes in `said`, so whatever it says can be seen in the picture.
"""

from __future__ import annotations

import numpy as np

from wan.training.scenes import PATTERNS, Background, Shape, chance, one_of

# Forms of a verb phrase: "it moves", "they move", "moving", "let it move".
FINITE, PLURAL, PARTICIPLE, BASE = "finite", "plural", "participle", "base"

NOUNS = {
    "circle": ("circle", "circle", "circle", "circle", "disc", "disk", "ball", "ball", "round shape", "sphere"),
    "square": ("square", "square", "square", "square", "box", "block", "cube"),
    "triangle": ("triangle", "triangle", "triangle", "triangle", "triangular shape", "pyramid"),
    "star": ("star", "star", "star", "star shape", "five-pointed star"),
    "diamond": ("diamond", "diamond", "diamond", "diamond", "rhombus", "diamond shape", "lozenge"),
    "ring": ("ring", "ring", "ring", "ring", "hoop", "donut", "doughnut"),
    "cross": ("cross", "cross", "cross", "plus sign", "plus", "plus symbol", "cross shape"),
    "heart": ("heart", "heart", "heart", "heart", "heart shape", "love heart"),
}
ANY_NOUNS = ("shape", "object", "thing", "figure", "item")
SMALL_NOUNS = {"circle": "dot"}
COLOUR_WORDS = {
    "gray": ("gray", "gray", "grey"),
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "cyan", "turquoise", "aqua", "teal"),
    "red": ("red",) * 10 + ("crimson", "scarlet"),
    "yellow": ("yellow",) * 10 + ("golden", "gold"),
    "green": ("green",) * 10 + ("emerald",),
}
COLOUR_TAILS = ("in {}", "colored {}", "that is {}", "which is {}", "{} in color", "of {} color")
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny", "mini"),
    "medium": ("medium", "medium-sized", "medium sized", "mid-sized"),
    "large": ("large", "large", "big", "big", "huge", "giant", "enormous"),
}
SHADING_WORDS = {
    "flat": ("flat", "solid"),
    "shaded": ("shaded", "shiny", "glossy"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted", "polka-dot"),
    "checkered": ("checkered", "checkered", "checked", "chequered"),
}
PATTERN_TAILS = {
    "striped": ("with stripes", "with a striped pattern", "covered in stripes"),
    "dotted": ("with dots", "with a dotted pattern", "with spots", "covered in dots"),
    "checkered": ("with a checkered pattern", "with a checkerboard pattern", "with checks"),
}
PLACE_PHRASES = {
    "center": ("in the center", "in the middle", "at the center", "in the middle of the screen", "in the centre"),
    "left": ("on the left", "on the left side", "at the left", "at the left edge", "on the left-hand side"),
    "right": ("on the right", "on the right side", "at the right", "at the right edge", "on the right-hand side"),
    "top": ("at the top", "near the top", "at the top of the screen", "at the top of the frame"),
    "bottom": ("at the bottom", "near the bottom", "at the bottom of the screen", "at the bottom of the frame"),
}
VERBS = (
    "move", "move", "move", "move", "slide", "slide", "glide", "drift", "travel", "go", "go", "float", "fly", "shift",
    "head", "sail", "run", "scroll", "crawl", "race", "pass",
)  # fmt: skip
UP_VERBS = ("rise", "rise", "climb", "ascend", "float up", "go up", "soar")
DOWN_VERBS = ("fall", "fall", "drop", "sink", "descend", "fall down", "go down", "come down", "plunge")
SIDE_PATHS = (
    "to the {to}", "to the {to}", "{to}", "{to}wards", "{to}ward", "from {of} to {to}", "from {of} to {to}",
    "from the {of} to the {to}", "from the {of} side to the {to} side", "towards the {to}", "toward the {to}",
    "to {to}", "towards {to}", "toward the {to} side", "across the screen to the {to}", "{of} to {to}",
    "across the frame from {of} to {to}", "horizontally to the {to}", "horizontally from {of} to {to}",
    "to the {to} side of the screen", "from the {of} edge to the {to} edge", "over to the {to}", "across to the {to}",
    "in from the {of} and out to the {to}", "sideways to the {to}", "starting on the {of} and ending on the {to}",
)  # fmt: skip
VERTICAL_PATHS = (
    "{v}", "{v}", "{v}wards", "{v}ward", "straight {v}", "vertically {v}wards", "{v} the screen", "to the {to}",
    "from {of} to {to}", "from {of} to {to}", "from the {of} to the {to}", "towards the {to}", "toward the {to}",
    "to the {to} of the frame", "from the {of} {v}", "{of} to {to}", "towards the {to} edge", "{v} the frame",
    "from the {of} edge to the {to} edge", "starting at the {of} and ending at the {to}", "all the way {v}",
)  # fmt: skip
DIAGONAL_PATHS = (
    "diagonally {v} and to the {h}", "diagonally {v} and to the {h}", "{v} and to the {h}", "{v} and {h}",
    "{h} and {v}", "to the {h} and {v}", "to the {near} {h}", "to the {to} {h}", "towards the {to} {h} corner",
    "toward the {near} {h} corner", "diagonally to the {near} {h}", "diagonally to the {to} {h}",
    "diagonally {v}wards to the {h}", "from the {of} {other} to the {to} {h}", "from {of} {other} to {to} {h}",
    "from the {far} {other} to the {near} {h}", "from the {of} {other} corner to the {to} {h} corner",
    "diagonally from {of} {other} to {to} {h}", "diagonally towards the {to} {h}", "diagonally {v} {h}",
    "diagonally from the {far} {other} corner to the {near} {h} corner", "{v}wards and {h}wards", "{v}ward and {h}ward",
    "{v}-{h}", "at an angle {v} and to the {h}", "{v} and over to the {h}", "into the {to} {h} corner",
)  # fmt: skip
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"}
STILL_ACTIONS = (
    "stay still", "stay still", "stand still", "remain still", "stay in place", "sit still", "rest", "not move",
    "not move", "be motionless", "be stationary", "remain motionless", "stay in one place", "hold still",
    "stay put", "be at rest", "be static", "stay motionless", "hover in place", "be still", "not move at all",
    "keep still", "be fixed in place",
)  # fmt: skip
SPIN_VERBS = (
    "spin", "spin", "rotate", "rotate", "turn", "spin around", "rotate around its center",
    "turn around its center", "revolve", "twirl", "whirl", "pivot", "spin on its axis",
)  # fmt: skip
SPIN_WORDS = {
    "clockwise": ("clockwise", "clockwise", "in a clockwise direction"),
    "counterclockwise": (
        "counterclockwise",
        "counterclockwise",
        "counter-clockwise",
        "anticlockwise",
        "anti-clockwise",
    ),
}
GROWTH_ACTIONS = {
    "grows": (
        "grow", "grow", "get bigger", "get larger", "become bigger", "become larger", "expand", "grow larger",
        "increase in size", "grow from small to large", "grow in size", "swell", "enlarge", "inflate", "scale up",
    ),
    "shrinks": (
        "shrink", "shrink", "get smaller", "become smaller", "decrease in size", "shrink from large to small",
        "shrink in size", "contract", "scale down", "get tinier",
    ),
}  # fmt: skip
ADVERBS = ("slowly", "smoothly", "steadily", "gently")
DOUBLED = ("spin", "drop", "sit", "get", "run")
TEXTURE_WORDS = {
    "gradient": ("gradient",),
    "striped": ("striped", "stripy"),
    "checkered": ("checkered", "checkerboard", "checked", "chessboard"),
    "cloudy": ("cloudy", "noisy"),
}
TEXTURE_TAILS = {
    "gradient": ("gradient", "color gradient"),
    "striped": ("stripes", "stripes"),
    "checkered": ("checks", "checkerboard pattern"),
    "cloudy": ("clouds", "noise"),
}


def conjugate(phrase: str, form: str) -> str:
    """A phrase that begins with the base of a verb, or with "not" and one, put into a form."""
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


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def colour_word(rng: np.random.Generator, colour: str) -> str:
    return one_of(rng, COLOUR_WORDS.get(colour, (colour,)))


def noun_phrase(rng: np.random.Generator, shape: Shape, adjective: str = "", determined: bool = True) -> str:
    """Such as "a large red striped circle"; `adjective` may be "spinning" or the like."""
    said = shape.said
    noun = one_of(rng, NOUNS[shape.kind] if "kind" in said else ANY_NOUNS)
    if shape.size == "small" and noun in SMALL_NOUNS and chance(rng, 0.1):
        noun = SMALL_NOUNS[noun]
    colour = colour_word(rng, shape.colour) if "colour" in said else ""
    shading, tails = "", []
    if "shading" in said:
        if shape.shading in PATTERNS and chance(rng, 0.25):
            tails.append(one_of(rng, PATTERN_TAILS[shape.shading]))
        else:
            shading = one_of(rng, SHADING_WORDS[shape.shading])
    if colour and chance(rng, 0.07):
        tails.append(one_of(rng, COLOUR_TAILS).format(colour))
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
    if background.texture == "plain":
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
