#!/usr/bin/env bash
# Keeps a run on spot TPUs alive: after a preemption it creates the slice again, sets up and
# continues. Leave it running on any machine with gcloud. It takes the flags of run.sh, and ends with
# the run, or with exit code 2 once the run is refused.
#   NAME=d16 CONFIG=imagenet:d16 BUCKET=gs://mine watch.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
here=$(dirname "$0")
flag=
if "$dry_run"; then
  flag=--dry_run
fi

# shellcheck disable=SC2086 # $flag may be no word at all
again() {
  "$here/create.sh" $flag && "$here/setup.sh" $flag && "$here/run.sh" $flag "$@"
}

if "$dry_run"; then
  again "$@"
  "$here/delete.sh" --dry_run
  exit
fi

gcloud storage rm "$WORKDIR/refused.txt" >/dev/null 2>&1 || true # of an earlier start
# summary.json is what a run writes last.
until gcloud storage ls "$WORKDIR/summary.json" >/dev/null 2>&1; do
  if gcloud storage cat "$WORKDIR/refused.txt" 2>/dev/null; then
    "$here/delete.sh"
    exit 2
  fi
  case $(state) in
    ACTIVE) "$here/run.sh" "$@" >/dev/null || { "$here/setup.sh" && "$here/run.sh" "$@"; } || true ;;
    MISSING) again "$@" || true ;;
    FAILED | SUSPENDED) "$here/delete.sh" || true ;;
  esac
  sleep 60
done
"$here/delete.sh"
