"""Draw which blocks each head keeps: one panel a layer and head, from the last step of a small video."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.observe.console import exit_with, positive, run_program

PANEL, MARGIN, LINE = 192, 12, 18


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_dir", required=True)
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    parser.add_argument("--sparse_algo", default="nabla-0.5_sta-3-1-1")
    parser.add_argument("--prompt", default="A red circle moves from left to right on a white background")
    parser.add_argument("--steps", type=positive, default=4)
    args = parser.parse_args()

    import torch

    import nabla
    from nabla.rotary import rotate
    from wan import WanT2V
    from wan.files.video import check_writable

    check_writable(args.out, "--out")
    pipe = WanT2V.from_pretrained(args.ckpt_dir, nabla.NablaConfig.parse(args.sparse_algo))
    layers = len(pipe.transformer.blocks)
    masks: list[torch.Tensor] = []
    attend = nabla.attend

    def attend_and_keep(q, k, v, plan, rotary, *kept):
        # Chosen once more, of queries and keys as attention has them; of the batch the prompt alone.
        masks.append(nabla.select_blocks(rotate(q, rotary), rotate(k, rotary), plan.grid, plan.config)[0])
        return attend(q, k, v, plan, rotary, *kept)

    # Layers look it up in the module at each call.
    nabla.attend = attend_and_keep
    video = pipe.generate(args.prompt, size=(256, 256), frame_num=33, steps=args.steps)
    # On a CPU a step is two forwards, the prompt's and then the negative one's: these are of the last one of the
    # prompt.
    draw(masks[-2 * layers : -layers], video[len(video) // 2], args)
    print(f"wrote {args.out}")
    return 0


def draw(masks, frame, args) -> None:
    """Panels of masks, each (heads, N, N) bool, one row a layer, with a frame of the video before them."""
    import numpy as np
    from PIL import Image, ImageDraw

    from wan.files.video import write_image

    heads = len(masks[0])
    width = MARGIN + (1 + heads) * (PANEL + MARGIN)
    height = MARGIN + len(masks) * (PANEL + LINE + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)

    def put(column: int, row: int, picture: Image.Image, text: str) -> None:
        x, y = MARGIN + column * (PANEL + MARGIN), MARGIN + row * (PANEL + LINE + MARGIN)
        sheet.paste(picture.resize((PANEL, PANEL), Image.Resampling.NEAREST), (x, y + LINE))
        pen.rectangle((x, y + LINE, x + PANEL, y + LINE + PANEL), outline="black")
        pen.text((x, y), text, fill="black")

    put(0, 0, Image.fromarray(frame), f"{args.sparse_algo}, one frame")
    for row, mask in enumerate(masks):
        for head, kept in enumerate(mask):
            shade = np.where(kept.numpy()[..., None], (24, 78, 119), (232, 240, 244)).astype(np.uint8)
            put(1 + head, row, Image.fromarray(shade), f"layer {row}, head {head}: {kept.float().mean():.0%} kept")
    write_image(args.out, np.asarray(sheet))


if __name__ == "__main__":
    exit_with(run_program(main))
