#!/usr/bin/env bash
# Submits a command to Slurm, one process on each node for all of its GPUs:
# slurm.sh [--dry_run] [COMMAND] [--flag=value ...]
#   NODES=4 GPUS=8 [CPUS_PER_GPU=8] CONFIG=imagenet:d16 WORKDIR=/shared/d16 slurm.sh
# Before the time limit Slurm sends SIGTERM: the run saves and ends with 130, the job is queued again.
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
NODES=${NODES:-1}
GPUS=${GPUS:-8}
# For decoding images. Slurm gives a task one CPU unless asked, and srun (22.05) inherits no other.
cpus=$((GPUS * ${CPUS_PER_GPU:-8}))
# Under Slurm jax takes one GPU a process unless this says otherwise.
devices=$(seq -s, 0 $((GPUS - 1)))

read_command "$@"
run sbatch --job-name "$NAME" --nodes "$NODES" --ntasks-per-node 1 --gpus-per-node "$GPUS" \
  --cpus-per-task "$cpus" --time "${TIME:-24:00:00}" --signal TERM@120 \
  --requeue --open-mode append --output "$NAME.log" \
  --wrap "JAX_LOCAL_DEVICE_IDS=$devices XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
    srun --cpus-per-task $cpus $(printf '%q ' "${command[@]}" --distributed) \
    ; code=\$?; [ \$code -ne 130 ] || scontrol requeue \$SLURM_JOB_ID; exit \$code"
