#!/usr/bin/env bash
# Starts training on every host, or continues a stopped run: the command is the same.
#   NAME=d16 CONFIG=imagenet:d16 BUCKET=gs://mine run.sh [--dry_run] [--config.a.b=v ...]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

# Compiled programs stay in the bucket: after a preemption nothing is compiled again.
command="JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled python -m var_jax.train --distributed \
  --config $CONFIG --workdir $WORKDIR $*"
# What the command refuses (exit code 2) would be refused again: watch.sh reads why, and ends.
after="[ \${PIPESTATUS[0]} != 2 ] || tail -n 1 train.log | gcloud storage cp - $WORKDIR/refused.txt"
# tmux outlives the connection; a session that is still there is not started twice.
everywhere "cd var_jax && . .venv/bin/activate && { tmux has-session -t train 2>/dev/null \
  || tmux new-session -d -s train bash -c \"$command 2>&1 | tee -a train.log; ${after//\$/\\$}\"; }"
