"""The words of captions: what each attribute of a scene is called, and the patterns of short phrases."""

from __future__ import annotations

# Forms of a verb phrase: "it moves", "they move", "moving", "let it move".
FINITE, PLURAL, PARTICIPLE, BASE = "finite", "plural", "participle", "base"

# A phrase is drawn as often as it stands in its list, here and wherever phrases are listed: usual ones stand there more
# than once.
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
COLOUR_ASIDES = (", which is {},", ", {},", ", colored {},")
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
# Both verbs of each are conjugated; {in} and {out} are such as "from the left" and "on the right".
ENTRANCES = (
    "enter {in} & exit {out}", "enter {in} & leave {out}", "come in {in} & go out {out}", "come in {in} & leave {out}",
    "appear {in} & disappear {out}", "start {in} & end {out}", "start {in} & end up {out}", "begin {in} & stop {out}",
)  # fmt: skip
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"}
STILL_ACTIONS = (
    "stay still", "stay still", "stand still", "remain still", "stay in place", "sit still", "rest", "not move",
    "not move", "be motionless", "be stationary", "remain motionless", "stay in one place", "hold still",
    "stay put", "be at rest", "be static", "stay motionless", "hover in place", "be still", "not move at all",
    "keep still", "be fixed in place", "stand in place",
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
DOUBLED = ("spin", "drop", "sit", "get", "run", "begin", "stop")
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
