"""Drawing of scenes: signed distances, shadings and textures, on any device and at any size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import InputError
from wan.shapes.colours import COLOURS, GLOW, SHADE, Colour, pattern_tone, texture_tone
from wan.shapes.scenes import Background, Scene, Shape

# Of backgrounds, in shares of the shorter side; of shapes, in radii.
BACKGROUND_PERIOD, STRIPE_PERIOD, DOT_PERIOD, CHECK_PERIOD = 0.25, 0.56, 0.62, 0.8
CLOUD_GRIDS = ((4, 1.0), (8, 0.5))


def render(
    scene: Scene, size: tuple[int, int] = (256, 256), frames: int = 33, device: torch.device | str = "cpu"
) -> Tensor:
    """The clip of a scene, (frames, height, width, 3) uint8 on `device`; `size` is (width, height).

    Raises `InputError` for a size or a number of frames below 1.
    """
    if min(*size, frames) < 1:
        raise InputError(f"size {size} and frames {frames}: each must be at least 1")
    still = draw_background(scene.background, size, torch.device(device))
    clip = still.expand(frames, *still.shape).contiguous()
    for shape in scene.back_to_front:
        _draw_shape(clip, shape)
    return clip


def draw_background(background: Background, size: tuple[int, int], device: torch.device) -> Tensor:
    """(height, width, 3) uint8."""
    width, height = size
    base = _levels(COLOURS[background.colour], device)
    if background.texture == "plain":
        return base.to(torch.uint8).expand(height, width, 3)
    short = min(size)
    # Centres of pixels from the middle of the frame, in shorter sides.
    y = (torch.arange(height, device=device) + 0.5 - height / 2)[:, None] / short
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / short
    along = x * math.cos(background.angle) + y * math.sin(background.angle)
    if background.texture == "gradient":
        # How far the frame reaches along the gradient, which so goes from 0 to 1 within it.
        extent = (abs(math.cos(background.angle)) * width + abs(math.sin(background.angle)) * height) / short
        share = along / extent + 0.5
    elif background.texture == "striped":
        share = bands(along, BACKGROUND_PERIOD, short)
    elif background.texture == "checkered":
        share = checks(x, y, 2 * BACKGROUND_PERIOD, short)
    else:
        share = _clouds(background.seed, size).to(device)
    return _mix(base, _levels(texture_tone(background.colour), device), share).round().to(torch.uint8)


def _clouds(seed: int, size: tuple[int, int]) -> Tensor:
    """Smooth noise in [0, 1], (height, width)."""
    # On the CPU and on grids of fixed size, so that clouds are the same on every device and at every size.
    generator = torch.Generator().manual_seed(seed)
    noise = sum(
        weight * F.interpolate(torch.rand(1, 1, grid, grid, generator=generator), size[::-1], mode="bicubic")
        for grid, weight in CLOUD_GRIDS
    )[0, 0]
    # Stretched, since interpolated noise rarely comes near 0 and 1.
    return (noise / sum(weight for _, weight in CLOUD_GRIDS) * 2 - 0.5).clamp(0, 1)


def _draw_shape(clip: Tensor, shape: Shape) -> None:
    """Draw into (frames, height, width, 3) uint8, within a window that follows the shape."""
    frames, height, width, _ = clip.shape
    short, device = min(height, width), clip.device
    time = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.zeros(1, device=device)
    centre = torch.stack([_between(ends, time) for ends in zip(shape.start, shape.end)], 1)
    centre = centre * torch.tensor([width, height], device=device)
    radius, angle = (_between(ends, time)[:, None, None] for ends in (shape.radius, shape.angle))
    # Outlines reach at most 1.2 radii from the centre (`random_scenes.REACH`), and the edge's pixel beyond.
    side = math.ceil(2.4 * max(shape.radius) * short) + 3
    # (frames, side) each: the window follows the centre, and stays within the frame.
    columns, rows = (
        torch.arange(min(side, length), device=device)
        + (centre[:, axis, None] - side / 2).floor().clamp(0, max(length - side, 0)).long()
        for axis, length in ((0, width), (1, height))
    )
    # In radii from the centre: x is (frames, 1, columns), y (frames, rows, 1).
    x = ((columns + 0.5 - centre[:, :1])[:, None, :] / short / radius).float()
    y = ((rows + 0.5 - centre[:, 1:])[:, :, None] / short / radius).float()
    # The point in the shape's own axes, so turned back; with y down, a growing angle is clockwise.
    turned_x, turned_y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    pixels = radius * short  # a radius, in pixels
    # How much of a pixel lies inside, from the signed distance of its centre: edges are one pixel wide.
    cover = (0.5 - OUTLINES[shape.kind](turned_x, turned_y) * pixels).clamp(0, 1)
    paint = _paint(shape, (x, y), (turned_x, turned_y), pixels)
    at = (torch.arange(frames, device=device)[:, None, None], rows[:, :, None], columns[:, None, :])
    clip[at] = _mix(clip[at].float(), paint, cover).round().to(torch.uint8)


def _paint(shape: Shape, upright: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor], pixels: Tensor) -> Tensor:
    """Colours of a window, broadcastable to (frames, rows, columns, 3); light stands still, patterns turn along."""
    base = _levels(COLOURS[shape.colour], pixels.device)
    if shape.shading == "flat":
        return base
    x, y = upright
    if shape.shading == "shaded":
        # From where light falls, the upper left.
        depth = ((x + 0.4).square() + (y + 0.45).square()).sqrt() / 1.7
        glow, shade = (1 - 1.6 * depth).clamp(min=0).square(), depth.clamp(max=1).square()
        return _mix(_mix(base, base * (1 - SHADE), shade), torch.full_like(base, 255), GLOW * glow)
    tone = _levels(pattern_tone(shape.colour), pixels.device)
    x, y = turned
    if shape.shading == "striped":
        return _mix(base, tone, bands(x * math.sqrt(0.5) + y * math.sqrt(0.5), STRIPE_PERIOD, pixels))
    if shape.shading == "checkered":
        return _mix(base, tone, checks(x, y, CHECK_PERIOD, pixels))
    # From the nearest of dots on a square grid.
    nearest_x, nearest_y = (a - (a / DOT_PERIOD).round() * DOT_PERIOD for a in turned)
    distance = (nearest_x.square() + nearest_y.square()).sqrt() - 0.3 * DOT_PERIOD
    return _mix(base, tone, (0.5 - distance * pixels).clamp(0, 1))


def _levels(colour: Colour, device: torch.device) -> Tensor:
    """(3,) float32."""
    return torch.tensor(colour, dtype=torch.float32, device=device)


def bands(along: Tensor, period: float, pixels: float | Tensor) -> Tensor:
    """0 and 1 in turn, half a period each, with edges one pixel wide; `pixels` is how many a unit of length has."""
    return (_to_edge(along, period) * pixels + 0.5).clamp(0, 1)


def checks(x: Tensor, y: Tensor, period: float, pixels: float | Tensor) -> Tensor:
    """A checkerboard of 0 and 1 with smooth edges; a square is half a period wide."""
    # 1 and -1 in turn; their product is a checkerboard of them.
    across, down = ((2 * bands(a, period, pixels) - 1) for a in (x, y))
    return (across * down + 1) / 2


def _to_edge(along: Tensor, period: float) -> Tensor:
    """Distance to the nearest edge between bands, negative in the bands of 0."""
    return period / 4 - ((along / period).frac().abs() - 0.5).abs() * period


def _between(ends: tuple[float, float], time: Tensor) -> Tensor:
    """Values on the way from the first to the last, at times (frames,) from 0 to 1."""
    return ends[0] + (ends[1] - ends[0]) * time


def _mix(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """Colours (..., 3) between a and b; `share` has one axis less."""
    return a + (b - a) * (share[..., None] if isinstance(share, Tensor) else share)


# Outlines: signed distances in radii to shapes of about equal areas; negative inside, y is down, exact at the outline.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 0.95


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return ((x * x + y * y).sqrt() - 0.8).abs() - 0.24


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.78, 0.78) - 0.06


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0)) - 0.05


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    x, y = x.abs() - half_width, y.abs() - half_height
    outside = (x.clamp(min=0).square() + y.clamp(min=0).square()).sqrt()
    return outside + torch.maximum(x, y).clamp(max=0)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = x.abs() * math.sin(math.pi / 3) - y * 0.5
    return torch.maximum(slope, y) - 0.58


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    width, height = 0.76, 1.18
    return (x.abs() * height + y.abs() * width - width * height) / math.hypot(width, height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: each sector folded onto the straight edge from a point to the notch beside it."""
    point, notch, sector = 1.18, 0.56, math.pi / 5
    from_point = torch.atan2(x, -y).abs()
    folded = (torch.remainder(from_point + sector, 2 * sector) - sector).abs()
    length = (x * x + y * y).sqrt()
    along, across = length * folded.cos(), length * folded.sin()
    to_notch = (notch * math.cos(sector) - point, notch * math.sin(sector))
    return (across * -to_notch[0] + (along - point) * to_notch[1]) / math.hypot(*to_notch)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner with a half disc on each of its upper sides."""
    half, x, y = 0.56, x.abs(), y - 0.06
    box = (x + y.abs()) * math.sqrt(0.5) - half
    disc = ((x - half * math.sqrt(0.5)).square() + (y + half * math.sqrt(0.5)).square()).sqrt() - half
    return torch.minimum(box, disc)


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}
