"""Reading shapes, colours and motions off a video by plain image measurements, to score a generator by what it shows.

The background is a line of colours between the tones at the frame's border; what lies off it is foreground. Its colours
tell which pixels are whose, and shapes of one colour are told apart where they stay apart. A kind is the silhouette
that fits best over all rotations; motion, growth and spin are straight lines fitted over time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import InputError
from wan.shapes.attributes import MOST_SHAPES, said_of_shapes
from wan.shapes.colours import COLOURS, GLOW, SHADE, mix, pattern_tone, texture_tone
from wan.shapes.scenes import MOTIONS, SIZES, STEPS, place_of
from wan.shapes.separate import separated
from wan.shapes.silhouettes import SYMMETRIES, best_kind, centroids, pixel_grid, unit_area

# Videos are measured at this many pixels on the shorter side.
WORKING_SIZE = 128
# Distances between colours, in 8-bit levels over three channels.
FOREGROUND_DISTANCE, EXPLAINED_DISTANCE = 42.0, 40.0
NEAR_SHARE = 0.9  # of the border that is taken for background, should a shape touch it
# A shape's colour is read, and its edge drawn, where the distance to the background reaches these shares of the
# highest within PURE_RADIUS pixels.
PURE_SHARE, EDGE_SHARE, PURE_RADIUS = 0.8, 0.4, 3
LEAST_SHARE = 0.06  # of the foreground, for a colour to count as a shape of its own
LEAST_PIXELS = 60  # in a frame, at the working size
LEAST_FIT, UNCLEAR = 0.7, "unclear"  # a worse silhouette is of no kind
STILL_TRAVEL = 0.12  # of the frame
SPIN_LEAST = 1.0  # radians in the clip
CLEAR_SHARE = 0.9  # of the best fit, for frames in which a shape counts as whole
GROWTH_LEAST = 1.35  # last radius over first, or first over last
MOST_SAMPLES = 20000


@dataclass(frozen=True)
class MeasuredShape:
    """A shape that was seen, in the words of `Shape`; `spin` is "none" too where the outline does not show it.

    kind: `UNCLEAR` if no silhouette fits
    travel: how far its centre goes in the clip, (right, down), in shares of width and height
    fit: how well the silhouette of its kind fits, at most 1
    """

    kind: str
    colour: str
    size: str
    motion: str
    place: str
    spin: str
    growth: str
    travel: tuple[float, float]
    fit: float


def measured(video: Tensor) -> list[MeasuredShape]:
    """The shapes seen in (frames, height, width, 3) uint8, of at most three colours.

    Two or three of one colour are told apart if they are of like size and lie apart most of the time.

    Raises `InputError` for a tensor of another form.
    """
    # Axes below: (frames, height, width) for masks and distances, with 3 colours last for pixels.
    frames = _at_working_size(video)
    distance = _distance_to_background(frames)
    # Shares of what is highest nearby rather than in the whole frame, so that the edges of a dull shape are found as
    # those of a bright one are.
    highest = F.max_pool2d(distance, 2 * PURE_RADIUS + 1, 1, PURE_RADIUS)
    foreground = (distance > FOREGROUND_DISTANCE) & (distance > EDGE_SHARE * highest)
    pure = foreground & (distance > PURE_SHARE * highest)
    # Only pixels well within shapes have a colour of theirs; those at edges are mixed with the background's.
    colours = _colours_present(frames[pure])
    if not colours:
        return []
    nearest = _family_distances(frames[pure], colours).argmin(1)
    # (colours, frames, height, width)
    owned = torch.zeros(len(colours), *pure.shape, device=pure.device)
    owned[:, pure] = F.one_hot(nearest, len(colours)).T.float()
    # Mixtures at edges may have any colour, so they go with the pure pixels around them.
    around = F.avg_pool2d(owned, 2 * PURE_RADIUS + 1, 1, PURE_RADIUS)
    masks = (around == around.amax(0)) & foreground
    found = [
        _describe(part, colour) for mask, colour in zip(masks, colours) for part in separated(mask.float(), MOST_SHAPES)
    ]
    return [shape for shape in found if shape is not None]


def score(video: Tensor, named: Mapping[str, str]) -> dict[str, bool]:
    """Whether (frames, height, width, 3) uint8 shows what a sentence says; `named` is as `attributes.said` gives it.

    "colour", "kind" and "direction" hold if every shape has a found one of its own that fits in this attribute,
    "all" if every shape has one that fits in all three at once, "count" if nothing more is found than these, and
    "background" if its colour is right. What is not said is right whatever it is. A shape of which there is
    another of the same colour, more than is said, is not one of its kind.
    """
    found, wanted = measured(video), said_of_shapes(named)
    results = {"colour": ("colour",), "kind": ("kind",), "direction": ("motion",), "all": ("colour", "kind", "motion")}
    background = named.get("background colour")
    return {name: _is_shown(found, wanted, attributes) for name, attributes in results.items()} | {
        "count": len(found) == len(wanted),
        "background": background is None or background_colour(video) == background,
    }


def _is_shown(found: list[MeasuredShape], wanted: list[Mapping[str, str]], attributes: tuple[str, ...]) -> bool:
    def fits(shape: MeasuredShape, said: Mapping[str, str]) -> bool:
        return all(name not in said or getattr(shape, name) == said[name] for name in attributes)

    def is_doubled(chosen: tuple[MeasuredShape, ...]) -> bool:
        colours = {shape.colour for shape, said in zip(chosen, wanted) if "kind" in said}
        # Of several of one colour it cannot be told which was meant.
        seen, meant = (sum(shape.colour in colours for shape in shapes) for shapes in (found, chosen))
        return "kind" in attributes and seen > meant

    return any(
        all(map(fits, chosen, wanted)) and not is_doubled(chosen)
        for chosen in itertools.permutations(found, len(wanted))
    )


def background_colour(video: Tensor) -> str:
    """The name of the background's colour, plain or textured, of (frames, height, width, 3) uint8."""
    # Distances (pixels, colours) to the line from each colour to its second tone, which a texture alternates with.
    border = _border(_at_working_size(video))
    base, tones = (border.new_tensor(list(map(tone, COLOURS))) for tone in (COLOURS.__getitem__, texture_tone))
    return tuple(COLOURS)[_to_segments(border, base, tones).mean(0).argmin()]


def _at_working_size(video: Tensor) -> Tensor:
    """(frames, height, width, 3) float32, smoothed a little against noise."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != torch.uint8:
        raise InputError(f"a video of {tuple(video.shape)} {video.dtype}: give (frames, height, width, 3) torch.uint8")
    frames = video.permute(0, 3, 1, 2).float()
    scale = WORKING_SIZE / min(frames.shape[2:])
    if scale != 1:
        size = [round(length * scale) for length in frames.shape[2:]]
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    # A binomial filter, applied to each colour by itself.
    kernel = torch.tensor([0.25, 0.5, 0.25], device=frames.device)
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(frames, (1, 1, 1, 1), "replicate"), kernel, groups=3).permute(0, 2, 3, 1)


def _border(frames: Tensor) -> Tensor:
    """Pixels (n, 3) of a band along the frame's edges."""
    band = 3
    sides = frames[:, :band], frames[:, -band:], frames[:, :, :band], frames[:, :, -band:]
    return torch.cat([side.reshape(-1, 3) for side in sides])


def _distance_to_background(frames: Tensor) -> Tensor:
    """How far each pixel's colour is from the line between the background's tones, (frames, height, width)."""
    border = _border(frames)
    border = border[:: max(1, len(border) // MOST_SAMPLES)]
    # A shape that touches the border is far from the median, unless it fills half of it.
    far = (border - border.median(0).values).norm(dim=1)
    near = border[far <= far.quantile(NEAR_SHARE)]
    middle = near.mean(0)
    # The direction in which the tones differ most: eigenvalues ascend, so the last vector. Between the outer
    # percentiles lies the segment of the background's own colours.
    axis = torch.linalg.eigh((near - middle).T @ (near - middle)).eigenvectors[:, -1]
    extent = ((near - middle) @ axis).quantile(torch.tensor([0.02, 0.98], device=near.device))
    low, high = middle + extent[:, None] * axis
    return _to_segments(frames.reshape(-1, 3), low[None], high[None])[:, 0].reshape(frames.shape[:3])


def _to_segments(pixels: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Distances (n, m) of pixels (n, 3) to segments between starts (m, 3) and ends (m, 3)."""
    way = ends - starts
    offset = pixels[:, None] - starts
    # Where on the segment the nearest point is; a segment without length, a plain background, is that point.
    share = ((offset * way).sum(-1) / way.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)
    return (offset - share[..., None] * way).norm(dim=-1)


def _family_distances(pixels: Tensor, colours: Sequence[str]) -> Tensor:
    """Distances (n, colours) of pixels (n, 3) to each colour with all its shades and tones."""
    base = pixels.new_tensor([COLOURS[colour] for colour in colours])
    distances = [
        _to_segments(pixels, base, pixels.new_tensor([tone(colour) for colour in colours]))
        for tone in (lambda c: mix(COLOURS[c], 0, SHADE), lambda c: mix(COLOURS[c], 255, GLOW), pattern_tone)
    ]
    return torch.stack(distances).amin(0)


def _colours_present(pixels: Tensor) -> list[str]:
    """The colours that explain the pixels (n, 3), the one that explains most first."""
    chosen: list[str] = []
    if len(pixels) < LEAST_PIXELS:
        return chosen
    distances = _family_distances(pixels[:: max(1, len(pixels) // MOST_SAMPLES)], tuple(COLOURS))
    left = torch.ones(len(distances), dtype=torch.bool, device=pixels.device)
    # Greedily: the colour that explains the most of what is left, until little is.
    while left.float().mean() > LEAST_SHARE and len(chosen) < MOST_SHAPES:
        # A pixel counts for a colour the more, the nearer it is.
        best = int((1 - distances[left] / EXPLAINED_DISTANCE).clamp(min=0).sum(0).argmax())
        explained = left & (distances[:, best] < EXPLAINED_DISTANCE)
        if explained.float().mean() < LEAST_SHARE:
            break
        chosen.append(tuple(COLOURS)[best])
        left &= ~explained
    return chosen


def _describe(mask: Tensor, colour: str) -> MeasuredShape | None:
    """What the shape with the mask (frames, height, width) is and does; None if it is seen too little."""
    mask = _without_specks(mask)
    area = mask.sum((1, 2))
    # Frames in which another shape hides most of it would bend its path.
    seen = area > max(LEAST_PIXELS, 0.3 * float(area.median()))
    if seen.sum() < max(2, len(mask) // 4):
        return None
    times = torch.linspace(0, 1, len(mask), device=mask.device)[seen]
    mask, area = mask[seen], area[seen]
    centres = centroids(mask)
    kind, fits, angles = best_kind(mask, centres, area)
    best = fits.max()
    # Radius, growth and rotation are read where the silhouette is whole.
    clear = fits >= best - (1 - CLEAR_SHARE) * best.abs()
    radii = (area / unit_area(kind)).sqrt()[clear] / min(mask.shape[1:])
    path = _line(times, centres / centres.new_tensor([mask.shape[2], mask.shape[1]]))
    travel = tuple((path[1] - path[0]).tolist())
    return MeasuredShape(
        kind=kind if best > LEAST_FIT else UNCLEAR,
        colour=colour,
        # In logarithms, as sizes are ratios.
        size=min(SIZES, key=lambda size: abs(math.log(float(radii.median()) / SIZES[size]))),
        motion=_motion(travel),
        place=place_of(path[0].tolist()),
        spin=_spin(times[clear], angles[clear], SYMMETRIES[kind]),
        growth=_growth(_line(times[clear], radii.log()[:, None])),
        travel=travel,
        fit=float(fits[clear].mean()),
    )


def _without_specks(mask: Tensor) -> Tensor:
    """The mask (frames, height, width) without what 3x3 neighbourhoods outvote and what lies far from its middle."""
    mask = (F.avg_pool2d(mask, 3, 1, 1) > 0.5).float()
    offsets = torch.stack(pixel_grid(mask), -1) - centroids(mask)[:, None, None]
    # Twice the radius of the disc of the same area.
    reach = 2 * (mask.sum((1, 2)) / math.pi).sqrt()
    return mask * (offsets.norm(dim=-1) < reach[:, None, None])


def _line(times: Tensor, values: Tensor) -> Tensor:
    """Straight lines through values (n, m) at times (n,): their values (2, m) at times 0 and 1."""
    offsets, middle = times - times.mean(), values.mean(0)
    slope = offsets @ (values - middle) / offsets.square().sum().clamp(min=1e-6)
    return torch.stack([middle - slope * times.mean(), middle + slope * (1 - times.mean())])


def _motion(travel: tuple[float, float]) -> str:
    """The motion whose direction is nearest."""
    length = math.hypot(*travel)
    if length < STILL_TRAVEL:
        return "still"

    def along(motion: str) -> float:
        step = STEPS[motion]
        return (travel[0] * step[0] + travel[1] * step[1]) / math.hypot(*step)

    return max((motion for motion in MOTIONS if motion != "still"), key=along)


def _growth(log_radius: Tensor) -> str:
    """log_radius: (2, 1), at the first and at the last frame"""
    ratio = math.exp(float(log_radius[1] - log_radius[0]))
    return "grows" if ratio > GROWTH_LEAST else "shrinks" if ratio < 1 / GROWTH_LEAST else "none"


def _spin(times: Tensor, angles: Tensor, symmetry: int) -> str:
    """Which way angles (n,) at times (n,) turn, each known but for multiples of a full turn over `symmetry`."""
    if not symmetry:
        return "none"
    period = 2 * math.pi / symmetry
    # The shorter way round from frame to frame, which is right as long as a shape turns less than half a period between
    # two.
    steps = torch.remainder(angles.diff() + period / 2, period) - period / 2
    turned = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    first, last = _line(times, turned[:, None])[:, 0].tolist()
    return "none" if abs(last - first) < SPIN_LEAST else "clockwise" if last > first else "counterclockwise"
