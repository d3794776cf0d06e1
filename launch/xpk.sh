#!/usr/bin/env bash
# The same on GKE, through xpk (pip install xpk): xpk.sh [--dry_run] [COMMAND] [--flag=value ...]. A
# missing cluster is created.
#   CLUSTER=pod ACCELERATOR=v5litepod-32 SLICES=2 BUCKET=gs://mine xpk.sh
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
CLUSTER=${CLUSTER:-$NAME}
kind=()
if [[ $SPOT == true ]]; then
  kind=(--spot)
fi

read_command "$@"
run xpk cluster create --cluster "$CLUSTER" "${where[@]}" \
  --tpu-type "$ACCELERATOR" --num-slices "$SLICES" ${kind[@]+"${kind[@]}"}
pin_code
run xpk workload create --cluster "$CLUSTER" --workload "$NAME" "${where[@]}" \
  --tpu-type "$ACCELERATOR" --num-slices "$SLICES" --max-restarts 100 \
  --base-docker-image google/cloud-sdk:slim \
  --command "gcloud storage cat '$code' | tar xz && pip install --break-system-packages -q -e '.[tpu,gcs,report,features,lpips]' \
    && { JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled $(printf '%q ' "${command[@]/#python/python3}" --distributed) \
    || [ \$? -eq 2 ]; }" # what is refused would be refused at each restart
