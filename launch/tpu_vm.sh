#!/usr/bin/env bash
# Trains on a Cloud TPU slice with one or more hosts: creates the slice, installs the package, trains on all workers,
# recreates the slice after a preemption, and deletes it when the run is done.
#
#   export PROJECT=… ZONE=us-west4-a TPU_NAME=… ACCELERATOR_TYPE=v5litepod-64 BUCKET=…
#   export CONFIG=configs/mask75.py:xl RUN_NAME=xl
#   launch/tpu_vm.sh --dry_run up                                    # only prints the commands
#   launch/tpu_vm.sh --provisioning=spot up --config.mesh.fsdp=8
#
# `up` runs all steps. Single steps: create, wait, install, train, follow, status, logs, delete. Arguments after the
# step are passed to micro_dit.main.
#
# Needs:  gcloud, logged in; quota for the TPU; a bucket in its region with a hierarchical namespace, for atomic renaming
#         of checkpoints (https://cloud.google.com/storage/docs/hns-overview). The workers mount the bucket at
#         ~/bucket, and the work directory is ~/bucket/$RUN_NAME. Put the shards in the bucket, or set their folder by a
#         flag.
# Costs:  chips × hours × price per chip-hour (https://cloud.google.com/tpu/pricing), from `create` to `delete`, even if
#         idle. `python -m micro_dit.budget` estimates the hours. `up` deletes the slice when the run is done.
# Watch:  launch/tpu_vm.sh logs; TensorBoard on the bucket. The run does not depend on this shell: it continues after
#         Ctrl-C or a lost connection, and `up` with the same settings follows it again.
# Stop:   launch/tpu_vm.sh delete. This loses the progress since the last checkpoint (at most 10 minutes).
#
# --provisioning: on_demand, spot, queued (waits until hardware is available) or queued_spot.
set -euo pipefail

readonly FAILURES=3 # consecutive failures after which `up` gives up
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

# Prints the state of the TPU (CREATING, READY, PREEMPTED …), nothing if it does not exist, or UNKNOWN if gcloud fails.
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State
state() {
  local found
  if [[ "$provisioning" == queued* ]]; then
    found=$(gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$TPU_NAME\$" \
      --format='value(state.state)') || found=UNKNOWN
    case "$found" in
      ACTIVE) ;; # the state of its node, below, is more precise
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
    # --force also deletes the node.
    run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${where[@]}" --quiet
  fi
}

# Waits until the TPU is ready; returns 1 if it cannot become ready.
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

on_workers() { # arguments: worker index or "all", command
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

# Copies this working tree to every worker, and runs `worker_install` of this file there.
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

# Prints the command for a worker to run a step of this file, with the variables that it needs.
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

# Prints the exit status of until_done.py on worker 0, "running", "none" after a reboot, or nothing if unreachable.
status() {
  on_workers 0 "$(remote worker_status)" | tail -n 1
}

# Waits until the run ends; returns the status of until_done.py, or 75 if the hardware is gone.
follow() {
  $dry_run && return
  local now found
  while true; do
    found=$(status || true)
    [[ "$found" =~ ^[0-9]+$ ]] && return "$found"
    [[ "$found" != none ]] || return 75
    now=$(state)
    case "$now" in
      READY | UNKNOWN) echo "$TPU_NAME: ${found:-unreachable}" ;;
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
      "") create || echo "$TPU_NAME: creation failed" >&2 ;;
      PREEMPTED | STOPPED | TERMINATED) { delete && create; } || echo "$TPU_NAME: creation failed" >&2 ;;
    esac
    if ! wait_until_ready; then
      [[ -n "$(state)" ]] || failures=$((failures + 1))
      [[ $failures -lt $FAILURES ]] || fail "$TPU_NAME could not be created. Use --provisioning=queued to wait for it."
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
      echo "$TPU_NAME: stopped ($now); resuming from the last checkpoint"
      failures=0
    else
      failures=$((failures + 1))
      echo "$TPU_NAME: failed with status $result" >&2
      if [[ $failures -ge $FAILURES ]]; then
        fail "The run failed $FAILURES times; see launch/tpu_vm.sh logs. To stop paying, run launch/tpu_vm.sh delete."
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
  python3 -m pip install -q --user uv # provides Python 3.12, because the image's Python is older
  python3 -m uv venv -q --allow-existing --python=3.12 .venv
  python3 -m uv pip install -q --python=.venv/bin/python --torch-backend=cpu -r requirements.txt 'jax[tpu]'
}

# Starts the run in the background, so that it outlives the connection; does nothing if it is already running.
worker_train() {
  cd ~/micro_dit
  if [[ "$(worker_status)" == running ]]; then
    return
  fi
  rm -f exit_status
  mkdir -p "$HOME/bucket/$RUN_NAME"
  # With --cluster, each host finds the others through the TPU's metadata.
  local command=(.venv/bin/python launch/until_done.py .venv/bin/python -m micro_dit.main --cluster
    --config="$CONFIG" --workdir="$HOME/bucket/$RUN_NAME" "$@")
  # shellcheck disable=SC2016 # expanded by the inner shell
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
      *) fail "Unknown option $1. Use --dry_run or --provisioning=on_demand|spot|queued|queued_spot." ;;
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
    *) fail "Unknown step '$step'. Use up, create, wait, install, train, follow, status, logs or delete." ;;
  esac
}

main "$@"
