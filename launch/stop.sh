#!/usr/bin/env bash
# Ends the command on every host; a training saves first. run.sh continues from there.
#   NAME=d16 ZONE=us-central1-a stop.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

# Python alone: the shells around it have the command in their arguments too.
python="'^python -m [v]ar_jax'"
everywhere "pkill -TERM -f $python; while pgrep -f $python >/dev/null; do sleep 1; done"
