"""Under torchrun: generate.py, with pictures that make small videos of Kandinsky-5, whatever size is asked for."""

from __future__ import annotations

import sys

import generate
from wan.models.kandinsky import picture

picture.SD_AREA = 64 * 48

if __name__ == "__main__":
    sys.exit(generate.main(sys.argv[1:]))
