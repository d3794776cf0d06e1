#!/usr/bin/env bash
# Puts the committed code on every host, with Python 3.11 and jax for TPU.
#   NAME=d16 ZONE=us-central1-a BUCKET=gs://mine setup.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

code=$BUCKET/code/$NAME.tar.gz
run bash -c "git archive --format=tar.gz HEAD | gcloud storage cp - '$code'"
everywhere "mkdir -p var_jax && gcloud storage cat '$code' | tar xz -C var_jax \
  && cd var_jax && python3 -m pip install -q --user uv \
  && ~/.local/bin/uv venv -q --clear --python 3.11 .venv \
  && ~/.local/bin/uv pip install -q -p .venv/bin/python -e '.[tpu,gcs]'"
