#!/usr/bin/env bash
# Applies jobset_tpu.yaml or jobset_gpu.yaml with names from the environment, shows its logs, or deletes it:
#
#   launch/gke.sh [--dry_run] tpu|gpu apply|logs|delete
#
# Needs kubectl with access to your cluster. The tops of the YAML files list requirements, variables and costs.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

run=()
if [[ "${1:-}" == --dry_run ]]; then
  run=(echo)
  shift
fi
[[ "${1:-}" == tpu || "${1:-}" == gpu ]] \
  || fail "The first argument must be tpu or gpu: launch/gke.sh [--dry_run] tpu|gpu apply|logs|delete."
file=$(dirname "${BASH_SOURCE[0]}")/jobset_$1.yaml
for name in IMAGE BUCKET RUN_NAME CONFIG; do
  [[ -n "${!name:-}" ]] || fail "$name is not set; see the top of $file."
done
[[ "$RUN_NAME" =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] \
  || fail "RUN_NAME=$RUN_NAME must start with a letter and have at most 32 lower-case letters, digits and inner hyphens."

manifest() {
  local text name
  text=$(<"$file")
  for name in IMAGE BUCKET RUN_NAME CONFIG; do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}

case "${2:-}" in
  apply) if [[ ${#run[@]} -gt 0 ]]; then manifest; else manifest | kubectl apply -f -; fi ;;
  logs) "${run[@]}" kubectl logs -f -c train -l "jobset.sigs.k8s.io/jobset-name=$RUN_NAME,batch.kubernetes.io/job-completion-index=0" ;;
  delete) "${run[@]}" kubectl delete jobset "$RUN_NAME" ;;
  *) fail "Unknown step '${2:-}'. Use apply, logs or delete." ;;
esac
