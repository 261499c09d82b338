"""How a family cuts pixels into latents and those into tokens, and what sizes and counts of frames that allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nabla import InputError
from nabla.checks import is_count, is_number


@dataclass(frozen=True)
class Geometry:
    """Axes are (frames, rows, columns). The default is what most families have.

    vae_stride: pixels to one latent; the first frame has a latent of its own
    patch: latents to one token
    """

    vae_stride: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def multiples(self) -> tuple[int, int]:
        """(rows, columns) of pixels that a picture must be whole multiples of, so that nothing is cropped."""
        _, rows, columns = (stride * patch for stride, patch in zip(self.vae_stride, self.patch))
        return rows, columns

    def latents_size(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a video of `size` (width, height)."""
        (width, height), (t, h, w) = size, self.vae_stride
        return (frame_num - 1) // t + 1, height // h, width // w

    def token_grid(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens that a transformer sees of a video of `size` (width, height)."""
        return self.grid_of(self.latents_size(size, frame_num))

    def grid_of(self, latents_size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of latents of (frames, height, width)."""
        (frames, height, width), (t, h, w) = latents_size, self.patch
        return frames // t, height // h, width // w

    def size_of(self, latents_size: Sequence[int]) -> tuple[int, int]:
        """(width, height) in pixels of the video of latents of (frames, height, width)."""
        (_, height, width), (_, h, w) = latents_size, self.vae_stride
        return width * w, height * h

    def frames_of(self, latents: int) -> int:
        """Frames of the video of so many latent ones."""
        return (latents - 1) * self.vae_stride[0] + 1

    def most_frames(self, limit: int) -> int:
        """The longest video of at most `limit` frames."""
        return self.frames_of((limit - 1) // self.vae_stride[0] + 1)

    def check_video(self, size: tuple[int, int], frame_num: int) -> None:
        """Raise `InputError` unless a video of `size` (width, height) and `frame_num` frames can be made, uncropped."""
        (width, height), (rows, columns) = size, self.multiples
        if not width or not height or width % columns or height % rows:
            near = "*".join(str(max(n // m, 1) * m) for n, m in ((width, columns), (height, rows)))
            raise InputError(
                f"size {width}*{height}: both must be positive multiples of {rows}; the nearest below is {near}"
            )
        step = self.vae_stride[0]
        if not is_count(frame_num) or frame_num % step != 1:
            # No length is nearest to what is no number; 77 and 81 are common ones.
            below = max(0, int(frame_num) - 1) // step * step + 1 if is_number(frame_num) else 77
            raise InputError(f"frame_num {frame_num!r} is not of the form {step}n+1; use {below} or {below + step}")

    def check_whole(self, size: tuple[int, int], frame_num: int) -> None:
        """Raise `InputError` for a video of `size` (width, height) of which the VAE would drop frames or crop sides."""
        (width, height), (t, h, w) = size, self.vae_stride
        if frame_num % t != 1 or height % h or width % w:
            raise InputError(
                f"a video of {frame_num} frames of {width}*{height} cannot be encoded whole; "
                f"frames must be {t}n+1, sizes multiples of {h}"
            )

    def check_positions(self, size: tuple[int, int], frame_num: int, most: int) -> None:
        """Raise `InputError` for a video longer on some axis than a rotary table of `most` positions."""
        if max(self.token_grid(size, frame_num)) > most:
            rows, columns = self.multiples
            raise InputError(
                f"{frame_num} frames of {'*'.join(map(str, size))} are too many; "
                f"at most {self.frames_of(most)} of {most * columns}*{most * rows}"
            )


DEFAULT_GEOMETRY = Geometry()
