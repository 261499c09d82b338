"""Sentences made rougher without a change of what they say: unknown words, misspelt ones, others left out."""

from __future__ import annotations

import re
import string

import numpy as np

from wan.shapes.scenes import chance, one_of

# Said or not, the sentence means the same.
DISPENSABLE = frozenset("a an the video clip animation short simple please slowly smoothly steadily gently".split())
EXTRAS = (
    "very", "really", "quite", "nice", "beautiful", "cute", "pretty", "just", "perfectly", "single", "lone", "lovely",
    "smooth", "slow", "quick", "quickly", "fast", "constantly", "steady", "continuously", "then", "also", "always",
    "realistic", "minimalist", "cartoon", "elegant", "calm", "happy", "funny", "modern", "abstract", "geometric",
    "clean", "crisp", "some", "this", "that", "my", "bright", "vivid", "gracefully", "quietly", "suddenly", "now",
    "gradually", "certain", "visible", "clearly", "entirely", "completely", "neat", "fine", "over time", "kind of",
)  # fmt: skip
OPENERS = (
    "hello,", "hi!", "ok,", "could you", "can you", "would you", "try to", "i would love to see", "now", "let us see",
    "a high quality video:", "prompt:", "an illustration of", "a cartoon of", "a looping gif of", "a movie in which",
    "footage of", "a minimal animation of", "in this scene,", "in the picture,", "suppose", "we have", "it shows",
    "there's", "here comes", "look at", "produce", "build", "design", "film", "depict", "visualize", "simulate",
)  # fmt: skip
CLOSERS = (
    "please", "thanks", "thank you", "in high quality", "in 4k", "for a few seconds", "at a steady pace", "hd",
    "at constant speed", "throughout the clip", "from start to end", "during the whole video", "in a loop",
    "over and over", "as time goes by", "and nothing else", "smooth motion", "nothing else happens",
    "at low speed", "in one go", "without stopping", "minimal style", "during the clip", "for two seconds",
)  # fmt: skip
SYLLABLES = (
    "ba", "ko", "mi", "ter", "lon", "sa", "vel", "ning", "ka", "der", "pro", "tu", "fen", "gor", "la", "shi", "pa",
    "ment", "zu", "ho", "be", "ran", "tion", "ic", "qua", "ly", "mo", "ne", "wis", "cha",
)  # fmt: skip
SHORTEST_MISSPELT = 4


def roughened(sentence: str, rng: np.random.Generator) -> str:
    """The sentence as somebody else might have typed it, the same for the same state of `rng`."""
    words = sentence.split()
    if chance(rng, 0.3):
        words = [word for word in words if word.lower() not in DISPENSABLE or not chance(rng, 0.3)]
    if chance(rng, 0.4):
        for _ in range(rng.integers(1, 4)):
            extra = one_of(rng, EXTRAS) if chance(rng, 0.6) else made_up(rng)
            words.insert(int(rng.integers(len(words) + 1)), extra)
    if chance(rng, 0.4):
        share = one_of(rng, (0.15, 0.15, 0.5))
        words = [misspelt(word, rng) if chance(rng, share) else word for word in words]
    if chance(rng, 0.12):
        words.insert(0, one_of(rng, OPENERS))
    text = " ".join(words)
    if chance(rng, 0.12):
        text = f"{text.removesuffix('.')}{one_of(rng, (' ', ', ', '. '))}{one_of(rng, CLOSERS)}"
    if chance(rng, 0.1):
        text = text.replace("-", " ")
    if chance(rng, 0.1):
        text = re.sub(r"[.,;:]", "", text)
    elif chance(rng, 0.1):
        text = text.removesuffix(".") + one_of(rng, ("!", "...", "?", " .", "!!"))
    return text


def made_up(rng: np.random.Generator) -> str:
    """A word that means nothing."""
    return "".join(one_of(rng, SYLLABLES) for _ in range(rng.integers(1, 4)))


def misspelt(word: str, rng: np.random.Generator) -> str:
    """A word with one slip after its first letter; short ones, which might become others, stay as they are."""
    if not word.isalpha() or len(word) < SHORTEST_MISSPELT:
        return word
    at = int(rng.integers(1, len(word) - 1))
    head, here, after, tail = word[:at], word[at], word[at + 1], word[at + 2 :]
    # Letters that change places, then one left out, one doubled and, in longer words, one replaced.
    slips = [head + after + here + tail] * 2 + [head + after + tail, head + here + tail]
    slips.append(head + here + here + after + tail)
    if len(word) > SHORTEST_MISSPELT:
        slips.append(head + one_of(rng, string.ascii_lowercase) + after + tail)
        slips.append(head + here + one_of(rng, "aeiou") + after + tail)
    return one_of(rng, slips)


def unrelated(rng: np.random.Generator) -> str:
    """A text that says nothing of shapes; empty half of the time."""
    if chance(rng, 0.5):
        return ""
    words = [one_of(rng, EXTRAS) if chance(rng, 0.5) else made_up(rng) for _ in range(rng.integers(1, 20))]
    return one_of(rng, (" ", ", ")).join(words)
