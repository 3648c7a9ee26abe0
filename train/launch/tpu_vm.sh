#!/usr/bin/env bash
# Trains on plain TPU VMs: asks for a slice, installs on all its hosts, and starts the same command on each.
#
#   PROJECT=my-project ZONE=us-east5-a \
#     train/launch/tpu_vm.sh [--dry-run] NAME v5p-128 /mnt/run/qwen3.5-397b-a17b-dflash.yaml [key=value ...]
#
# The configuration, the prompts and `out` lie where all hosts see them, as a mounted bucket (gcsfuse) or Filestore.
# On TPU VMs jax.distributed.initialize() asks the metadata server for everything; DFLASH_DISTRIBUTED=1 makes the
# command call it. Run the script again to go on after a preemption: what is there is not made again.
set -euo pipefail

run=()
if [[ "${1:-}" == --dry-run ]]; then run=(printf '%q '); shift; fi
if (($# < 3)); then sed -n '4,5p' "$0" >&2; exit 2; fi
name=$1 tpu_type=$2 config=$3; shift 3
: "${PROJECT:?name of the project}" "${ZONE:?its zone}"
where=(--project "$PROJECT" --zone "$ZONE")
case "$tpu_type" in
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) echo "no TPU VM version is known for $tpu_type; give v5p-N, v5litepod-N or v6e-N" >&2; exit 2 ;;
esac

step() { "${run[@]}" "$@"; if ((${#run[@]})); then echo; fi; }
on_all() { step gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"; }

if ((${#run[@]})) || ! gcloud compute tpus tpu-vm describe "$name" "${where[@]}" > /dev/null 2>&1; then
  step gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$tpu_type" --runtime-version "$version" ${SPOT:+--spot}
  if ! ((${#run[@]})); then
    until gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format 'value(state)' 2> /dev/null | grep -q READY
    do sleep 30; done
  fi
fi
step tar czf /tmp/dflash-jax.tgz --exclude-vcs --exclude '.venv*' --exclude runs .
step gcloud compute tpus tpu-vm scp /tmp/dflash-jax.tgz "$name:dflash-jax.tgz" "${where[@]}" --worker=all
on_all "mkdir -p dflash-jax && tar xzf dflash-jax.tgz -C dflash-jax && pip install -q './dflash-jax[train,tpu]'"
printf -v train '%q ' dflash train drafter "$config" "$@"
on_all "DFLASH_DISTRIBUTED=1 PATH=\$HOME/.local/bin:\$PATH $train"
