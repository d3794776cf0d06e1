#!/usr/bin/env bash
# Trains on all GPUs of this host: gpu.sh [--dry_run] [--config.a.b=v ...]. One process drives all.
#   CONFIG=imagenet:d16 WORKDIR=runs/d16 gpu.sh
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

run env XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
  python -m var_jax.train --config "$CONFIG" --workdir "$WORKDIR" "$@"
