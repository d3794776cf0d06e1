#!/usr/bin/env bash
# What all scripts here share; they source it. Settings come from the environment.
set -euo pipefail

NAME=${NAME:-var}                  # of the queued resource
ZONE=${ZONE:-us-central1-a}
PROJECT=${PROJECT:-$(gcloud config get project 2>/dev/null || true)}
ACCELERATOR=${ACCELERATOR:-v5litepod-32}
SLICES=${SLICES:-1}
SPOT=${SPOT:-true}
BUCKET=${BUCKET:-gs://BUCKET}      # code, data and checkpoints
CONFIG=${CONFIG:-imagenet:d16}     # of a training
WORKDIR=${WORKDIR:-$BUCKET/runs/$NAME} # the folder that the command writes
COMMIT=${COMMIT:-}                 # of the code; empty: that of the first start

dry_run=false
if [[ ${1:-} == --dry_run ]]; then
  dry_run=true
  shift
fi

# Prints a command as it could be typed, then runs it unless --dry_run is given.
run() {
  printf '%q ' "$@"
  echo
  "$dry_run" || "$@"
}

where=(--zone "$ZONE" --project "$PROJECT")

# Runs a shell line on every host of every slice.
everywhere() {
  run gcloud alpha compute tpus queued-resources ssh "$NAME" "${where[@]}" \
    --node=all --worker=all --command "$1"
}

# The queued resource's state: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, FAILED, ... MISSING only
# where the answer is that there is none, and UNKNOWN where there was no answer.
state() {
  local said
  if said=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

# Reads [COMMAND] [--flag=value ...], where train is the default, into `command`, the words of the
# command line, and `last`, the file that it writes last.
read_command() {
  local name=train
  if [[ ${1:-} =~ ^[a-z] ]]; then
    name=$1
    shift
  fi
  local folder=(--out "$WORKDIR")
  case $name in
    train) last=summary.json folder=(--config "$CONFIG" --workdir "$WORKDIR") ;;
    sample) last=samples.npz ;;
    encode) last=manifest.json ;;
    evaluate) last=metrics.json ;;
    *)
      echo "$name is not of train, sample, encode, evaluate." >&2
      exit 2
      ;;
  esac
  command=(python -m "var_jax.$name" "${folder[@]}" "$@")
}

# Sets `commit`, and `code`, where it lies packed in the bucket. The first start in WORKDIR writes
# the commit down and all later ones take that, whatever the checkout holds by then.
pin_code() {
  local pin=$WORKDIR/.commit git=(git -C "$(dirname "${BASH_SOURCE[0]}")/..") packed
  if "$dry_run"; then
    commit=$("${git[@]}" rev-parse "${COMMIT:-HEAD}")
  elif [[ -n $COMMIT ]]; then
    commit=$("${git[@]}" rev-parse "$COMMIT")
    gcloud storage cp - "$pin" <<<"$commit"
  elif ! commit=$(gcloud storage cat "$pin" 2>/dev/null); then
    if [[ -n $("${git[@]}" status --porcelain --untracked-files=no) ]]; then
      echo "The checkout has changes that are not committed: commit them, or set COMMIT." >&2
      exit 1
    fi
    commit=$("${git[@]}" rev-parse HEAD)
    # Where there is one after all this writes nothing: of two first starts one wins.
    gcloud storage cp --if-generation-match=0 - "$pin" <<<"$commit" || true
    commit=$(gcloud storage cat "$pin")
  fi
  code=$BUCKET/code/$commit.tar.gz
  if ! "$dry_run" && gcloud storage ls "$code" >/dev/null 2>&1; then
    return
  fi
  packed=$(mktemp)
  run "${git[@]}" archive --format=tar.gz -o "$packed" "$commit"
  run gcloud storage cp "$packed" "$code"
  rm "$packed"
}
