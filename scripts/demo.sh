#!/usr/bin/env bash
# Set up and make a video on any machine, by the small checkpoint that comes with the program.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
mkdir -p outputs
.venv/bin/python generate.py --prompt "a red circle moves from left to right on a white background" \
    --base_seed 0 --save_file outputs/demo.mp4
