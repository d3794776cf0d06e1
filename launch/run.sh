#!/usr/bin/env bash
# Starts a command on every host, or continues a stopped one: run.sh [--dry_run] [COMMAND] [--flag=value ...]
#   NAME=d16 CONFIG=imagenet:d16 BUCKET=gs://mine run.sh --config.a.b=v
#   NAME=d16 WORKDIR=gs://mine/samples run.sh sample --checkpoint gs://mine/runs/d16/checkpoint --num 50000
# A host without the code gets it; on one where the command is at work nothing happens.
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

read_command "$@"
pin_code
there=var_jax/$commit
everywhere "[ -d $there ] || { mkdir -p $there.\$\$ && gcloud storage cat '$code' \
  | tar xz -C $there.\$\$ && mv -T $there.\$\$ $there; } && bash $there/launch/host.sh start \
  $(printf '%q ' "$NAME" "$WORKDIR" "$BUCKET/compiled" "${command[@]}" --distributed)"
