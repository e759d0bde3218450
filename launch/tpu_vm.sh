#!/usr/bin/env bash
# Trains on a TPU VM, or on all hosts of a pod slice, which is made if it is not there:
#
#   launch/tpu_vm.sh NAME ZONE ACCELERATOR IMAGE RUNS ARGUMENT...
#   launch/tpu_vm.sh cvt us-west4-a v5litepod-1 IMAGE 10.0.0.2:/runs --config=configs/digits.py
#   launch/tpu_vm.sh cvt us-west4-a v5litepod-256 IMAGE 10.0.0.2:/runs \
#     --config=configs/cvt13_imagenet.py --config.batch_size=4096 --config.data_dir=/runs/data
#
# v4 and v5e need gcloud's alpha commands: gcloud components install alpha.
#
# IMAGE is built from launch/Dockerfile; RUNS is an NFS export (Filestore), mounted as /runs by all
# hosts. SPOT=1 asks for a spot slice. The command stays until training has ended, and ends with its
# exit code. Hosts that are stopped, lost or taken away are started, or made, again, and the run goes
# on; five errors in a row, each within an hour and of hosts that are there, end the command. Ctrl-C
# stops training, which saves. The slice is left to you:
# gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

if [ "$#" -lt 6 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 accelerator=$3 image=$4 runs=$5
shift 5
create=(gcloud compute tpus queued-resources create)
# Of gcloud's releases the alpha alone has autocheckpoint, by which hosts are told of maintenance.
told=(gcloud alpha compute tpus queued-resources create --autocheckpoint-enabled)
case $accelerator in
  v4-*) runtime=tpu-ubuntu2204-base create=("${told[@]}") ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite create=("${told[@]}") ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    printf '%s: v4-N, v5litepod-N, v5p-N or v6e-N is needed\n' "$accelerator" >&2
    exit 2
    ;;
esac
if [ "${SPOT:-0}" = 1 ]; then
  create+=(--spot)
fi

queued() { gcloud compute tpus queued-resources "$@" --zone="$zone" --quiet; }

# Prints the state of the slice, 'none' where there is none, and nothing where nobody answers.
state() {
  local words
  if words=$(queued describe "$name" --format='value(state.state)' 2>&1); then
    printf '%s' "$words"
  elif [[ $words == *NOT_FOUND* ]]; then
    printf none
  else
    printf '%s\n' "$words" >&2
  fi
}

# Waits for the slice, which is asked for if nobody has; one that was taken away is asked for anew.
make_slice() {
  while true; do
    case $(state) in
      ACTIVE) return ;;
      none)
        "${create[@]}" "$name" --node-id="$name" --accelerator-type="$accelerator" \
          --runtime-version="$runtime" --zone="$zone" --quiet
        ;;
      SUSPENDED) queued delete "$name" --force ;;
      FAILED)
        queued describe "$name" >&2
        exit 1
        ;;
    esac
    errors=0
    sleep "${POLL_SECONDS:-30}"
  done
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1" \
    -- -o ServerAliveInterval=30
}

# A container of before may still be there, as it outlives its connection. Grain's processes hand
# images over in /dev/shm, and a step and a checkpoint may take longer than docker's 10 seconds.
on_a_host=$(
  cat <<EOF
mountpoint -q /runs || { sudo mkdir -p /runs && sudo mount -t nfs $(printf %q "$runs") /runs; } || {
  echo 'train.py did not start'
  exit 125
}
sudo docker rm --force cvt >/dev/null 2>&1
sudo docker run --rm --name=cvt --pull=always --init --privileged --net=host --shm-size=64g \
  --stop-timeout=120 --volume=/runs:/runs --env=JAX_COMPILATION_CACHE_DIR=/runs/compiled \
  $(printf '%q ' "$image" --workdir="/runs/$name" --distributed=auto "$@")
code=\$?
echo "train.py ended with \$code"
exit "\$code"
EOF
)

said=$(mktemp) errors=0
trap 'rm -f "$said"' EXIT
trap 'on_all_hosts "sudo docker stop --time=120 cvt"; exit 130' INT TERM
while true; do
  make_slice
  began=$SECONDS
  on_all_hosts "$on_a_host" 2>&1 | tee "$said" || true
  # 0: done; 2: wrong input; 3: a loss that is not finite. Of hosts one may end by another's end.
  for code in 2 3 0; do
    if grep -q "^train.py ended with $code\$" "$said"; then
      exit "$code"
    fi
  done
  # 1: an error after which another try may succeed; docker's own: it did not start, or the image is not of ours.
  if ((SECONDS - began < 3600)) &&
    grep -qE '^train.py (did not start|ended with (1|125|126|127))$' "$said"; then
    errors=$((errors + 1))
  else
    errors=0
  fi
  if ((errors == 5)); then
    printf 'five errors in a row, the last is above: mend it, and start again\n' >&2
    exit 1
  fi
  sleep "${POLL_SECONDS:-30}"
done
