#!/bin/bash
# Curate on two machines of eight GPUs: sbatch examples/slurm_curate.sh. Killed, it goes on where it was.
#SBATCH --job-name=dino-curate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

IMAGES=${IMAGES:-/shared/images}
WEIGHTS=${WEIGHTS:-dinov2_vits14}
RUN=${RUN:-/shared/runs/curated} # a folder that all machines see

# Accelerate once on each machine; it starts a process for each GPU there.
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER
srun bash -c 'exec accelerate launch --config_file configs/accelerate/nodes.yaml --num_machines "$SLURM_NNODES" \
    --num_processes $((8 * SLURM_NNODES)) --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" \
    train/curate.py "$@"' machine "data.root=$IMAGES" "weights=$WEIGHTS" "run.dir=$RUN" "$@"
