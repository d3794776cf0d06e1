#!/usr/bin/env bash
# What all scripts here share; they source it. Settings come from the environment.
set -euo pipefail

NAME=${NAME:-var}                  # of the queued resource
ZONE=${ZONE:-us-central1-a}
PROJECT=${PROJECT:-$(gcloud config get project 2>/dev/null || true)}
ACCELERATOR=${ACCELERATOR:-v5litepod-32}
SLICES=${SLICES:-1}
SPOT=${SPOT:-true}
BUCKET=${BUCKET:-gs://BUCKET}      # code, data and checkpoints
CONFIG=${CONFIG:-imagenet:d16}
WORKDIR=${WORKDIR:-$BUCKET/runs/$NAME}

dry_run=false
if [[ ${1:-} == --dry_run ]]; then
  dry_run=true
  shift
fi

# Prints a command as it could be typed, then runs it unless --dry_run is given.
run() {
  printf '%q ' "$@"
  echo
  "$dry_run" || "$@"
}

where=(--zone "$ZONE" --project "$PROJECT")

# Runs a shell line on every host of every slice.
everywhere() {
  run gcloud alpha compute tpus queued-resources ssh "$NAME" "${where[@]}" \
    --node=all --worker=all --command "$1"
}

# The queued resource's state: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, FAILED, ... or MISSING.
state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo MISSING
}
