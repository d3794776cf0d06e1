#!/usr/bin/env bash
# Runs a command on all GPUs of this host: gpu.sh [--dry_run] [COMMAND] [--flag=value ...]. One
# process drives all.
#   CONFIG=imagenet:d16 WORKDIR=runs/d16 gpu.sh
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

read_command "$@"
run env XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 "${command[@]}"
