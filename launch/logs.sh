#!/usr/bin/env bash
# Follows the log of one host: logs.sh [--dry_run] [NODE] [WORKER]. Numbers start at 0.
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

run gcloud alpha compute tpus queued-resources ssh "$NAME" "${where[@]}" \
  --node="${1:-0}" --worker="${2:-0}" --command "tail -n 50 -F var_jax/$NAME.log"
