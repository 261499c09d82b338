#!/usr/bin/env bash
# Train the checkpoint wan-shapes from nothing, on as many GPUs as can share a batch, into runs/wan-shapes. Cut at any
# moment, it goes on where it stopped. Words after the script's name choose stages: text, vae, 128, 256, 512, both,
# distill, ship. Without the first two the transformer is trained beside the text encoder and the VAE of
# checkpoints/wan-shapes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
stages=${*:-text vae 128 256 512 both distill ship}

spread() {  # over how many processes, a program of training, and its arguments
    local processes=$1
    shift
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$@"
}

sharing() {  # clips in a batch; how many GPUs can take equally many of them
    local processes=$gpus
    while [ $(($1 % processes)) != 0 ]; do processes=$((processes - 1)); done
    [ "$processes" = "$gpus" ] || echo "$processes of $gpus GPUs are used: they share a batch of $1 evenly" >&2
    echo "$processes"
}

part() {  # name, folder of the run that makes it
    local made="$PWD/$2/$1"
    [ -d "$made" ] || made="$PWD/checkpoints/wan-shapes/$1"
    ln -sfn "$made" "runs/shapes_parts/$1"
}

parts() {  # what the transformer is trained beside, in one folder
    mkdir -p runs/shapes_parts
    part vae runs/shapes_vae
    part text_encoder runs/shapes_text
    part tokenizer runs/shapes_text
}

data() {  # size, clips to train on, number of the first, clips to validate on
    local common=(--config training/prepare_shapes.yaml "options.size=$1*$1")
    spread "$gpus" scripts/prepare_data.py "${common[@]}" "out=runs/shapes_$1/train" "options.count=$2" "options.offset=$3"
    spread "$gpus" scripts/prepare_data.py "${common[@]}" "out=runs/shapes_$1/held_out" "options.count=$4" \
        options.split=held_out
}

train() {  # stage, clips in a batch, the most that a GPU takes at once
    local processes micro
    processes=$(sharing "$2")
    micro=$(($2 / processes))
    spread "$processes" scripts/train.py --config "training/shapes_$1.yaml" "micro_batch=$((micro < $3 ? micro : $3))"
}

ship() {  # in place of what was shipped before, to run with the share that was measured to be enough
    rm -rf runs/wan-shapes
    "$python" scripts/convert_checkpoint.py --ckpt_dir runs/shapes_distill/run/latest/ema --layout diffusers \
        --out runs/wan-shapes --dtype float16 --sparse_algo keep-0.7
}

for stage in $stages; do
    case $stage in
        text) "$python" scripts/train_text.py --config training/shapes_text.yaml ;;
        vae) spread "$(sharing 16)" scripts/train_vae.py --config training/shapes_vae.yaml ;;
        128) parts; data 128 24000 0 256; train 128 256 256 ;;
        256) parts; data 256 40000 200000 128; train 256 128 128 ;;
        512) parts; data 512 3000 400000 64; train 512 64 16 ;;
        both) train both 64 32 ;;
        distill) train distill 16 16 ;;
        ship) ship ;;
        *) echo "error: stage $stage is not one of text, vae, 128, 256, 512, both, distill, ship" >&2; exit 2 ;;
    esac
done
