#!/bin/bash
# The video server over all GPUs of a Slurm job: sbatch docs/serve_slurm.sh, from the project's folder.
#SBATCH --job-name=videos --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --time=7-00:00:00
set -euo pipefail

source .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_AUTH_MODE=token
# A token of Ray's, in a home folder that all machines see.
ray get-auth-token --generate > /dev/null

# Ray on every machine; once all are there, the server on the first one.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" -- \
    python serve.py --config nabla_0.7.yaml --engine ray --replicas 8 --gpus_per_replica 2 \
    --host 0.0.0.0 --allowed_host "$head" --api_key_file tokens.txt --save_dir videos
