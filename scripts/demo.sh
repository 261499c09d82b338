#!/usr/bin/env bash
# Set up and make a video on any machine. The checkpoint is a tiny one with random weights, made on the spot: the whole
# program runs, but the picture means nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
checkpoint=checkpoints/random-nano
[ -f "$checkpoint/config.json" ] || .venv/bin/python scripts/make_random_checkpoint.py --model nano --out "$checkpoint"
mkdir -p outputs
.venv/bin/python generate.py --prompt "A red circle moves from left to right on a white background" \
    --config nabla_0.7.yaml --ckpt_dir "$checkpoint" --size "192*192" --frame_num 17 --sample_steps 10 --base_seed 0 \
    --save_file outputs/demo.mp4
echo "The weights are random, so outputs/demo.mp4 shows coloured noise; the README says how to get the real ones."
