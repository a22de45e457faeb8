#!/usr/bin/env bash
# Trains on a Cloud TPU slice, of one host or many: create, install, run on all workers, follow, begin anew after a
# pre-emption until the run is done, delete.
#
#   export PROJECT=… ZONE=us-west4-a TPU_NAME=… ACCELERATOR_TYPE=v5litepod-64 BUCKET=…
#   export CONFIG=configs/mask75.py:xl RUN_NAME=xl
#   launch/tpu_vm.sh --dry_run up                                    # prints the commands, runs none
#   launch/tpu_vm.sh --provisioning=spot up --config.mesh.fsdp=8
#
# Steps, alone: create, wait, install, train, follow, status, logs, delete. `up` is all of them. What follows the step
# goes to micro_dit.main.
#
# Needs:  gcloud, signed in; quota for the TPU; a bucket in its region, with hierarchical namespace, so that a checkpoint
#         gets its name in one step (https://cloud.google.com/storage/docs/hns-overview). Shards lie in the bucket, or
#         the flags name another folder. On the workers, ~/bucket is the bucket and ~/bucket/$RUN_NAME the work directory.
# Costs:  chips × hours × the price of a chip-hour (https://cloud.google.com/tpu/pricing), from `create` to `delete`,
#         whether or not anything runs; hours: python -m micro_dit.budget. `up` deletes the slice when the run is done.
# Watch:  launch/tpu_vm.sh logs; TensorBoard on the bucket. The run does not depend on this shell: after Ctrl-C, or with
#         the laptop closed, it goes on, and `up` with the same settings takes it up again.
# Stop:   launch/tpu_vm.sh delete. What was trained since the last checkpoint (10 minutes at most) is lost.
#
# --provisioning: on_demand, spot, queued (waits in line for the hardware) or queued_spot.
set -euo pipefail

readonly FAILURES=3 # of the run on hardware that is there, in a row
dry_run=false
provisioning=on_demand

fail() {
  echo "error: $*" >&2
  exit 1
}

# Every gcloud command goes through here.
run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

require() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "$name is not set; see the top of launch/tpu_vm.sh."
  done
}

# https://cloud.google.com/tpu/docs/runtimes
runtime_version() {
  case "$ACCELERATOR_TYPE" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# One of: nothing (there is no such TPU), CREATING, READY, PREEMPTED …, or UNKNOWN if that can't be asked now.
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State
state() {
  local found
  if [[ "$provisioning" == queued* ]]; then
    found=$(gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$TPU_NAME\$" \
      --format='value(state.state)') || found=UNKNOWN
    case "$found" in
      ACTIVE) ;; # its node tells more
      FAILED | SUSPENDED) found=PREEMPTED ;;
      "" | UNKNOWN) ;;
      *) found=CREATING ;;
    esac
    [[ "$found" == ACTIVE ]] || { echo "$found" && return; }
  fi
  found=$(gcloud compute tpus tpu-vm list "${where[@]}" --filter="name~/$TPU_NAME\$" --format='value(state)') \
    || found=UNKNOWN
  echo "$found"
}

create() {
  local kind=() command
  [[ "$provisioning" == *spot ]] && kind=(--spot)
  if [[ "$provisioning" == queued* ]]; then
    command=(queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --runtime-version="$(runtime_version)")
  else
    command=(tpu-vm create "$TPU_NAME" --version="$(runtime_version)")
  fi
  run gcloud compute tpus "${command[@]}" "${where[@]}" --accelerator-type="$ACCELERATOR_TYPE" "${kind[@]}"
}

delete() {
  if [[ "$provisioning" == queued* ]]; then
    run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet # and its node
  else
    run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${where[@]}" --quiet
  fi
}

# Until the hardware is there; status 1 if it is not going to be.
wait_until_ready() {
  $dry_run && return
  local now
  while true; do
    now=$(state)
    case "$now" in
      READY) return 0 ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | UNKNOWN) ;;
      *) return 1 ;;
    esac
    echo "$TPU_NAME: $now"
    sleep "$POLL_SECONDS"
  done
}

on_workers() { # which, command
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

# This working tree goes to every worker, which then runs `worker_install` of this very file.
install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  tar -C "$(dirname "${BASH_SOURCE[0]}")/.." -czf "$archive" \
    --exclude=__pycache__ micro_dit configs launch requirements.txt pyproject.toml README.md LICENSE || return
  local status=0
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:micro_dit.tar.gz" "${where[@]}" --worker=all || status=$?
  rm -f "$archive"
  [[ $status == 0 ]] || return $status
  on_workers all "mkdir -p ~/micro_dit && tar -C ~/micro_dit -xzf micro_dit.tar.gz && $(remote worker_install)"
}

# The command by which a worker runs a step of this file, with what it has to know.
remote() {
  printf 'BUCKET=%q CONFIG=%q RUN_NAME=%q bash ~/micro_dit/launch/tpu_vm.sh' "$BUCKET" "$CONFIG" "$RUN_NAME"
  printf ' %q' "$@"
}

train() {
  on_workers all "$(remote worker_train "$@")"
}

logs() {
  on_workers 0 'tail -n 100 -F ~/micro_dit/train.log'
}

# The exit status of until_done.py on worker 0, "running", "none" after a reboot, or nothing if it can't be reached.
status() {
  on_workers 0 "$(remote worker_status)" | tail -n 1
}

# Until the run ends; the status of until_done.py, or 75 if the hardware is gone.
follow() {
  $dry_run && return
  local now found
  while true; do
    found=$(status || true)
    [[ "$found" =~ ^[0-9]+$ ]] && return "$found"
    [[ "$found" != none ]] || return 75
    now=$(state)
    case "$now" in
      READY | UNKNOWN) echo "$TPU_NAME: ${found:-can not be reached now}" ;;
      *) echo "$TPU_NAME: ${now:-gone}" && return 75 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

up() {
  local failures=0 now result
  while true; do
    now=""
    $dry_run || now=$(state)
    case "$now" in
      "") create || echo "$TPU_NAME: could not be created" >&2 ;;
      PREEMPTED | STOPPED | TERMINATED) { delete && create; } || echo "$TPU_NAME: could not be created" >&2 ;;
    esac
    if ! wait_until_ready; then
      [[ -n "$(state)" ]] || failures=$((failures + 1))
      [[ $failures -lt $FAILURES ]] || fail "$TPU_NAME could not be created; --provisioning=queued waits in line for it."
      sleep "$POLL_SECONDS"
      continue
    fi
    result=0
    { install && train "$@" && follow; } || result=$?
    if [[ $result == 0 ]]; then
      delete
      return
    fi
    now=$(state)
    if [[ $result == 75 || "$now" != READY ]]; then
      echo "$TPU_NAME: stopped ($now); going on from the last checkpoint"
      failures=0
    else
      failures=$((failures + 1))
      echo "$TPU_NAME: failed with status $result" >&2
      if [[ $failures -ge $FAILURES ]]; then
        fail "the run fails (launch/tpu_vm.sh logs); $TPU_NAME is still there and costs money (launch/tpu_vm.sh delete)."
      fi
    fi
    sleep "$POLL_SECONDS"
  done
}

# ---- On each worker --------------------------------------------------------------------------------------------------

worker_install() {
  if ! command -v gcsfuse >/dev/null; then # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -q && sudo apt-get install -qy gcsfuse
  fi
  mkdir -p ~/bucket
  mountpoint -q ~/bucket || gcsfuse --implicit-dirs "$BUCKET" ~/bucket
  cd ~/micro_dit
  python3 -m pip install -q --user uv # the image's Python is too old
  python3 -m uv venv -q --allow-existing --python=3.12 .venv
  python3 -m uv pip install -q --python=.venv/bin/python --torch-backend=cpu -r requirements.txt 'jax[tpu]'
}

# In the background, so that it does not end with the connection. A run that is under way is left alone.
worker_train() {
  cd ~/micro_dit
  if [[ "$(worker_status)" == running ]]; then
    return
  fi
  rm -f exit_status
  mkdir -p "$HOME/bucket/$RUN_NAME"
  # Every host takes part: --cluster asks the TPU for the others.
  local command=(.venv/bin/python launch/until_done.py .venv/bin/python -m micro_dit.main --cluster
    --config="$CONFIG" --workdir="$HOME/bucket/$RUN_NAME" "$@")
  # shellcheck disable=SC2016 # to be expanded there
  setsid nohup bash -c '"$@"; echo $? >exit_status' train "${command[@]}" >>train.log 2>&1 </dev/null &
  echo $! >pid
}

worker_status() {
  cd ~/micro_dit
  if [[ -f exit_status ]]; then
    cat exit_status
  elif [[ -f pid ]] && kill -0 "$(cat pid)" 2>/dev/null; then
    echo running
  else
    echo none
  fi
}

# ----------------------------------------------------------------------------------------------------------------------

main() {
  while [[ "${1:-}" == --* ]]; do
    case "$1" in
      --dry_run) dry_run=true ;;
      --provisioning=on_demand | --provisioning=spot | --provisioning=queued | --provisioning=queued_spot)
        provisioning=${1#*=}
        ;;
      *) fail "unknown option $1; options come before the step: --dry_run, --provisioning=on_demand|spot|queued|queued_spot." ;;
    esac
    shift
  done
  local step=${1:-}
  [[ $# -eq 0 ]] || shift
  case "$step" in
    worker_install | worker_train | worker_status) "$step" "$@" ;;
    up | create | wait | install | train | follow | status | logs | delete)
      require PROJECT ZONE TPU_NAME ACCELERATOR_TYPE BUCKET CONFIG RUN_NAME
      where=(--project="$PROJECT" --zone="$ZONE")
      POLL_SECONDS=${POLL_SECONDS:-60}
      [[ "$step" != wait ]] || step=wait_until_ready
      "$step" "$@"
      ;;
    *) fail "no such step: '$step'; use up, create, wait, install, train, follow, status, logs or delete." ;;
  esac
}

main "$@"
