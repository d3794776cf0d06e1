#!/usr/bin/env bash
# Submits training to Slurm, a process a GPU; JAX finds the others by itself.
#   NODES=4 GPUS=8 CONFIG=configs/imagenet.py:d16 WORKDIR=/shared/d16 slurm.sh [--dry_run]
# Before the time limit Slurm sends SIGTERM: the run saves and ends with 130, the job is queued again.
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
NODES=${NODES:-1}
GPUS=${GPUS:-8}

run sbatch --job-name "$NAME" --nodes "$NODES" --ntasks-per-node "$GPUS" --gpus-per-node "$GPUS" \
  --time "${TIME:-24:00:00}" --signal TERM@120 --requeue --open-mode append --output "$NAME.log" \
  --wrap "srun python -m var_jax.train --distributed --config $CONFIG --workdir $WORKDIR $* \
    ; code=\$?; [ \$code -ne 130 ] || scontrol requeue \$SLURM_JOB_ID; exit \$code"
