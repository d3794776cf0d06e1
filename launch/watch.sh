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

for mark in .done .refused; do # of an earlier start: one that stayed would end this one
  until said=$(gcloud storage rm "$WORKDIR/$mark" 2>&1) || [[ $said == *"matched no objects"* ]]; do
    echo "$said" >&2
    sleep 60
  done
done
while true; do
  now=$(state) # before the next line: another watch.sh deletes the slice only after the end
  # A host that has ended well says so; what host 0 writes last may be of an earlier command.
  if { gcloud storage ls "$WORKDIR/.done" && gcloud storage ls "$WORKDIR/$last"; } >/dev/null 2>&1
  then
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
