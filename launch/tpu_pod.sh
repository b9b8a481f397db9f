#!/usr/bin/env bash
# A run on a Cloud TPU slice, without Kubernetes: asks for the slice, runs the image on all of
# its hosts, and starts again whatever may be started again. Runs on your own machine, in tmux:
#   PROJECT=my-project ZONE=us-central2-b TPU=glm ACCELERATOR=v4-32 \
#     IMAGE=us-central2-docker.pkg.dev/my-project/images/glm_jax:tpu \
#     bash launch/tpu_pod.sh --gin_file=RUN.gin --gin.MODEL_DIR="'gs://BUCKET/runs/a'"
# To fill in: those five; IMAGE is launch/Dockerfile's, pushed to Artifact Registry. OPTIONS (--spot)
# are the queued resource's. Data and MODEL_DIR are in buckets. KEEP=1 keeps the slice at the end.
# Run: against a gcloud that records what it is asked; list, create and delete also by gcloud 528,
# against a stand-in for its server. Not run: on a TPU.
set -uo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${TPU:?}" "${ACCELERATOR:?}" "${IMAGE:?}"
read -ra options <<< "${OPTIONS---spot}"
most_deaths=${MOST_DEATHS:-20} seconds=${POLL_SECONDS:-30} deaths=0
log=$(mktemp) && trap 'rm -f "$log"' EXIT

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

leave() { # leave CODE: gives the slice back
  echo "+ train left with $1" >&2
  [[ -n ${KEEP:-} ]] || tpus queued-resources delete "$TPU" --force
  exit "$1"
}

wait_for_slice() { # asks for it where there is none, or where it was taken away
  local state
  while true; do
    state=$(tpus queued-resources list --filter="name~/$TPU\$" --format='value(state.state)') || exit 69
    echo "+ slice $TPU: ${state:-not asked for}" >&2
    case $state in
      ACTIVE) return ;;
      FAILED) leave 69 ;;
      SUSPENDED) tpus queued-resources delete "$TPU" --force ;;
      '') tpus queued-resources create "$TPU" --node-id="$TPU" --accelerator-type="$ACCELERATOR" \
        --runtime-version="${RUNTIME:-tpu-ubuntu2204-base}" "${options[@]}" || exit 69 ;;
    esac
    sleep "$seconds"
  done
}

# On every host: what an earlier attempt has left may save and ends, then the image runs.
image=$(printf '%q' "$IMAGE")
command="sudo docker stop --time=130 glm_jax; sudo docker rm --force glm_jax
sudo gcloud auth configure-docker ${image%%/*} --quiet && sudo docker pull --quiet $image &&
sudo docker run --name=glm_jax --privileged --net=host $image --multiprocess $(printf '%q ' "$@")
code=\$?; echo \"glm_jax left with \$code\"; exit \$code"

while true; do
  wait_for_slice
  tpus tpu-vm ssh "$TPU" --worker=all --command="{ $command; } 2>&1" | tee "$log"
  ((PIPESTATUS[0] != 0)) || leave 0
  # gcloud tells the code of one host: what must not be tried again may be another's.
  mapfile -t codes < <(sed -n 's/^glm_jax left with //p' "$log")
  for code in "${codes[@]}"; do
    ((code == 0 || code == 42 || code > 128)) || leave "$code"
  done
  # No 42: a process died, or a host is gone.
  [[ " ${codes[*]} " == *' 42 '* ]] || ((++deaths <= most_deaths)) || leave 75
  sleep "$seconds"
done
