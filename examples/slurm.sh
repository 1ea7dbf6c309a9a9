#!/bin/bash
# Two machines of eight GPUs, put back into the queue until the run is finished: sbatch examples/slurm.sh
#SBATCH --job-name=dino
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

IMAGES=${IMAGES:-/shared/imagenet/train}
RUN=${RUN:-/shared/runs/dino} # a folder that all machines see

# A process for each GPU, started by Slurm itself: its SIGTERM, five minutes before the end, reaches each of them once.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train/pretrain.py "$@"' process \
    --config "${RECIPE:-configs/dino_vits16_imagenet_300ep.yaml}" "data.root=$IMAGES" "run.dir=$RUN" "$@"

# Here the run is finished, or has saved because time was up. A failure has ended this script before.
if [[ $(dino runs "$RUN") != *finished* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
