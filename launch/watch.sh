#!/usr/bin/env bash
# Keeps a command on spot TPUs alive: after a preemption it creates the slice again and continues,
# with the code of the first start. Leave it running on any machine with gcloud. It takes the
# arguments of run.sh; it deletes the slice and ends when the command is done, or, with exit code 2,
# when it is refused. No answer of gcloud counts as "unknown", and is asked for again.
#   NAME=d16 CONFIG=imagenet:d16 BUCKET=gs://mine watch.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
here=$(dirname "$0")
read_command "$@"

if "$dry_run"; then
  "$here/create.sh" --dry_run
  "$here/run.sh" --dry_run "$@"
  "$here/delete.sh" --dry_run
  exit
fi

pin_code # or says here what keeps it from that, before anything costs money

# Deletes the slice for good: a slice that is left behind costs money.
give_back() {
  until [[ $(state) == MISSING ]]; do
    "$here/delete.sh" || true
    sleep 60
  done
}

gcloud storage rm "$WORKDIR/.refused" >/dev/null 2>&1 || true # of an earlier start
while true; do
  now=$(state) # before the next line: another watch.sh deletes the slice only after the end
  if gcloud storage ls "$WORKDIR/$last" >/dev/null 2>&1; then
    give_back
    exit
  fi
  if gcloud storage cat "$WORKDIR/.refused" 2>/dev/null; then
    give_back
    exit 2
  fi
  case $now in
    ACTIVE) "$here/run.sh" "$@" >/dev/null || true ;;
    MISSING) "$here/create.sh" && "$here/run.sh" "$@" || true ;;
    FAILED | SUSPENDED) "$here/delete.sh" || true ;;
  esac
  sleep 60
done
