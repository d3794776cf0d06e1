#!/usr/bin/env bash
# Gives the TPUs back. What is in the bucket stays.
#   NAME=d16 ZONE=us-central1-a delete.sh [--dry_run]
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
