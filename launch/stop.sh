#!/usr/bin/env bash
# Ends training on every host; it saves first, and run.sh goes on from there.
#   NAME=d16 ZONE=us-central1-a stop.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

everywhere "pkill -TERM -f [v]ar_jax.train; while pgrep -f [v]ar_jax.train >/dev/null; do sleep 1; done"
