#!/usr/bin/env bash
# What run.sh calls on each host, in the code of the pinned commit:
#   host.sh start|work NAME WORKDIR COMPILED COMMAND [--flag=value ...]
# `start` installs Python 3.11 and jax for TPU once, and starts `work` unless it is there.
set -euo pipefail
mode=$1 name=$2 workdir=$3 compiled=$4
here=$(cd "$(dirname "$0")/.." && pwd)
log=$here/../$name.log
cd "$here"

if [[ $mode == start ]]; then
  exec 9>.lock
  flock 9 # of two at once the second finds all done
  if [[ ! -e .venv/ready ]]; then
    python3 -m pip install -q --user uv
    ~/.local/bin/uv venv -q --allow-existing --python 3.11 .venv
    ~/.local/bin/uv pip install -q -p .venv/bin/python -e '.[tpu,gcs,report,features,lpips]'
    touch .venv/ready
  fi
  # tmux outlives the connection; it must not take the lock along.
  tmux has-session -t "=$name" 2>/dev/null \
    || tmux new-session -d -s "$name" bash launch/host.sh work "${@:2}" 9>&-
  exit
fi

# Compiled programs stay in the bucket: after a preemption nothing is compiled again.
export JAX_COMPILATION_CACHE_DIR=$compiled
PATH=$here/.venv/bin:$PATH
code=0
"${@:5}" 2>&1 | tee -a "$log" || code=${PIPESTATUS[0]}
echo "$(date '+%F %T') ended with exit code $code" >>"$log"
# watch.sh ends by these. What is refused (2, and nothing else) would be refused again: it reads why.
case $code in
  0) date | gcloud storage cp - "$workdir/.done" ;;
  2) tail -n 2 "$log" | head -n 1 | gcloud storage cp - "$workdir/.refused" ;;
esac
