#!/usr/bin/env bash
# Asks for TPU slices through a queued resource and waits until they are there.
#   NAME=d16 ZONE=us-central1-a ACCELERATOR=v5litepod-32 [SLICES=2] [SPOT=false] create.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

case $ACCELERATOR in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    echo "ACCELERATOR=$ACCELERATOR is not of v5litepod-N, v5p-N, v6e-N." >&2
    exit 2
    ;;
esac

nodes=(--node-id "$NAME")
if ((SLICES > 1)); then
  nodes=(--node-prefix "$NAME" --node-count "$SLICES")
fi
kind=()
if [[ $SPOT == true ]]; then
  kind=(--spot)
fi

run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${nodes[@]}" \
  --accelerator-type "$ACCELERATOR" --runtime-version "$runtime" ${kind[@]+"${kind[@]}"}

until "$dry_run"; do
  now=$(state)
  echo "$(date +%T) $NAME is $now"
  case $now in
    ACTIVE) break ;;
    FAILED | SUSPENDED | MISSING) exit 1 ;;
  esac
  sleep 30
done
