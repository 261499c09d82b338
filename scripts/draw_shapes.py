"""Draw scenes of the `shapes` data set with their captions on one sheet: a row a scene, frames from first to last."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, run_program, say

FRAMES, MARGIN, TEXT_WIDTH, LINE = 5, 6, 34, 17


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="a .png file")
    parser.add_argument("--count", type=int, default=24, help="how many scenes")
    parser.add_argument("--size", default="128*128", help="width*height")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "held_out"), default="train")
    parser.add_argument("--columns", type=int, default=2, help="scenes side by side")
    args = parser.parse_args()

    from nabla import InputError
    from wan.config.checks import parse_size
    from wan.shapes.dataset import Shapes

    try:
        for name in ("count", "columns"):
            if getattr(args, name) < 1:
                raise InputError(f"{name} {getattr(args, name)} must be 1 or more")
        shapes = Shapes(args.seed, args.count, parse_size(args.size), frames=FRAMES, split=args.split)
        draw(shapes, args.columns).save(args.out)
    except (InputError, OSError, ValueError) as error:
        say(f"error: {error}")
        return 2
    print(f"wrote {args.out}")
    return 0


def draw(shapes, columns: int):
    """A picture of every scene's frames, its caption at their right."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = shapes.size
    font = ImageFont.load_default(13)
    # 7 pixels a letter are enough: this font takes fewer on average.
    cell_width, cell_height = FRAMES * (width + 2) + TEXT_WIDTH * 7 + 2 * MARGIN, height + MARGIN
    rows = -(-len(shapes) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "#dddddd")
    pen = ImageDraw.Draw(sheet)
    for index in range(len(shapes)):
        video, caption = shapes[index]
        x, y = MARGIN + index % columns * cell_width, MARGIN + index // columns * cell_height
        for frame in video:
            sheet.paste(Image.fromarray(frame.numpy()), (x, y))
            x += width + 2
        for line in textwrap.wrap(caption, TEXT_WIDTH):
            pen.text((x + MARGIN, y), line, fill="black", font=font)
            y += LINE
    return sheet


if __name__ == "__main__":
    exit_with(run_program(main))
