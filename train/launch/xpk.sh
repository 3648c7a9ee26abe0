#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a JobSet that xpk makes (pip install xpk).
#
#   CLUSTER=my-cluster ZONE=us-east5-a PROJECT=my-project IMAGE=gcr.io/my-project/dflash-jax \
#     train/launch/xpk.sh [--dry-run] v5p-128 /gcs/recipes/qwen3.5-397b-a17b-dflash.yaml [key=value ...]
#
# The image holds this repository, installed with the extras train and tpu. IMAGE is to be pushed beforehand; the
# configuration, the prompts and `out` lie on a bucket that all pods mount. GKE tells every pod the names of the others:
# jax.distributed.initialize() needs no arguments there, and DFLASH_DISTRIBUTED=1 makes the command call it.
# A pod that is evicted gets SIGTERM, saves, and the JobSet starts the same command again, which goes on.
set -euo pipefail

run=()
if [[ "${1:-}" == --dry-run ]]; then run=(printf '%q '); shift; fi
if (($# < 2)); then sed -n '4,5p' "$0" >&2; exit 2; fi
tpu_type=$1 config=$2; shift 2
: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${PROJECT:?its project}" "${IMAGE:?container image}"

printf -v train '%q ' dflash train drafter "$config" "$@"
"${run[@]}" xpk workload create \
  --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" \
  --workload "${WORKLOAD:-dflash-$(date +%m%d-%H%M)}" \
  --tpu-type "$tpu_type" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" --max-restarts 100 \
  --termination-grace-period-seconds 120 \
  --env DFLASH_DISTRIBUTED=1 \
  --command "$train"
