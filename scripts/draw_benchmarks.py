"""Draw what benchmark.py printed as bars, a group for each size of video: time, peak memory and speed-up.

python scripts/benchmark.py forward | tee forward.txt; python scripts/draw_benchmarks.py forward.txt --out forward.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, ImageDraw, ImageFont

from wan.observe.console import exit_with, run_program, say

WIDTH, LABEL, NOTE, BAR, GAP, MARGIN = 1040, 170, 250, 20, 6, 16
COLOURS = {"dense": "#9aa5b1", "keep": "#2b6cb0", "nabla": "#2f855a"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="outputs of benchmark.py")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    args = parser.parse_args()
    try:
        rows = [row for file in args.files for row in read_rows(file)]
        drawn = draw(rows)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        files = ", ".join(map(str, args.files))
        say(f"error: {files} do not all end in a line of JSON by benchmark.py ({error})")
        return 2
    try:
        drawn.save(args.out)
    except (OSError, ValueError) as error:
        say(f"error: {args.out} cannot be written ({error}); give a .png in a folder that is there")
        return 2
    return 0


def read_rows(file: Path) -> list[dict[str, Any]]:
    # A table for people comes before it.
    return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["rows"]


def draw(rows: list[dict[str, Any]]) -> Image.Image:
    groups = group(rows)
    height = MARGIN + sum(2 * MARGIN + BAR + len(members) * (BAR + GAP) for _, members in groups)
    image = Image.new("RGB", (WIDTH, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    scale = (WIDTH - LABEL - NOTE - 2 * MARGIN) / max(row["ms"] for row in rows)
    top = MARGIN
    for name, members in groups:
        pen.text((MARGIN, top), name, fill="black", font=font)
        top += BAR + GAP
        for row in members:
            what = row["what"].split(": ")[1]
            colour = next((colour for key, colour in COLOURS.items() if what.startswith(key)), "#b7791f")
            length = row["ms"] * scale
            pen.text((MARGIN + 10, top + 1), what, fill="#333333", font=font)
            pen.rectangle((MARGIN + LABEL, top, MARGIN + LABEL + length, top + BAR - 2), fill=colour)
            pen.text((MARGIN + LABEL + length + 8, top + 1), note(row), fill="#333333", font=font)
            top += BAR + GAP
        top += 2 * MARGIN - GAP
    return image


def group(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by size of video and precision, in the order in which these come first."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        # Rows are named as "1280x720x81: dense, cudnn" is.
        name, what = row["what"].split(": ")
        groups.setdefault((name, what.endswith("fp8")), []).append(row)
    return [(name, members) for (name, _), members in groups.items()]


def note(row: dict[str, Any]) -> str:
    parts = [f"{row['ms']:,.0f} ms"]
    parts += [f"{row['speedup']:.2f}x"] if "speedup" in row else []
    parts += [f"{row['peak_gib']} GiB"] if "peak_gib" in row else []
    return ", ".join(parts)


if __name__ == "__main__":
    exit_with(run_program(main))
