#!/usr/bin/env bash
# Ends training on every host; it saves first, and run.sh continues from there.
#   NAME=d16 ZONE=us-central1-a stop.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

# Python alone: the tmux around it has the command in its arguments too, and would take it along.
python="'^python -m [v]ar_jax.train'"
everywhere "pkill -TERM -f $python; while pgrep -f $python >/dev/null; do sleep 1; done"
