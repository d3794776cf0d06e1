#!/usr/bin/env bash
# The same training on GKE, through xpk (pip install xpk). A missing cluster is created.
#   CLUSTER=pod ACCELERATOR=v5litepod-32 SLICES=2 BUCKET=gs://mine xpk.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
CLUSTER=${CLUSTER:-$NAME}
kind=()
if [[ $SPOT == true ]]; then
  kind=(--spot)
fi

run xpk cluster create --cluster "$CLUSTER" "${where[@]}" \
  --tpu-type "$ACCELERATOR" --num-slices "$SLICES" ${kind[@]+"${kind[@]}"}
code=$BUCKET/code/$NAME.tar.gz
run bash -c "git archive --format=tar.gz HEAD | gcloud storage cp - '$code'"
run xpk workload create --cluster "$CLUSTER" --workload "$NAME" "${where[@]}" \
  --tpu-type "$ACCELERATOR" --num-slices "$SLICES" --max-restarts 100 \
  --base-docker-image google/cloud-sdk:slim \
  --command "gcloud storage cat '$code' | tar xz && pip install --break-system-packages -q -e '.[tpu,gcs]' \
    && python3 -m var_jax.train --distributed --config $CONFIG --workdir $WORKDIR $*"
