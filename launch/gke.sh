#!/usr/bin/env bash
# Fills in launch/jobset_tpu.yaml or jobset_gpu.yaml from the environment: launch/gke.sh [--dry_run] tpu|gpu apply|logs|delete
#
# Needs kubectl, connected to your cluster. What the rest is, needs, and costs is at the top of those files.
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
[[ "${1:-}" == tpu || "${1:-}" == gpu ]] || fail "say which: launch/gke.sh [--dry_run] tpu|gpu apply|logs|delete."
file=$(dirname "${BASH_SOURCE[0]}")/jobset_$1.yaml
for name in IMAGE BUCKET RUN_NAME CONFIG; do
  [[ -n "${!name:-}" ]] || fail "$name is not set; see the top of $file."
done
[[ "$RUN_NAME" =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] || fail "RUN_NAME=$RUN_NAME should be lower case letters, digits and -."

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
  *) fail "no such step: '${2:-}'; use apply, logs or delete." ;;
esac
