#!/bin/sh
# Run the GPU checks within a time limit, on a machine that needs neither vLLM, DeepSpeed, Ray nor a network.
#
#   scripts/gpu_check.sh first 420 OUT     # GPU, kernels, learner, small engines, learner at the 7B shape
#   scripts/gpu_check.sh second 420 OUT    # engine at the 7B shape with CUDA graphs, publishes, parity probe
#
# If dist/gpu-bundle.tar.xz exists (scripts/gpu_bundle.py), it is unpacked and used; otherwise the packages of $PYTHON
# (default: python3) are. Each step has its share of the time, and a failed step does not stop the next one. Logs and
# figures are in OUT (default: runs/gpu-check), at most eight files. The exit status is the number of failed steps.
# Without a GPU, the same steps run on the CPU with small shapes, as a rehearsal.
set -u
part=${1:-} seconds=${2:-} out=${3:-runs/gpu-check}
case "$part $seconds" in
    "first "[1-9]*|"second "[1-9]*) ;;
    *) echo "gpu_check: got '$part $seconds'; usage: gpu_check.sh first|second SECONDS [OUT]" >&2; exit 64 ;;
esac
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} site=${SITE:-/tmp/vz_ray_site} bundle=dist/gpu-bundle.tar.xz
end=$(($(date +%s) + seconds)) failed=0
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_NO_USAGE_STATS=1

# run_step NAME LIMIT COMMAND...: run a step for at most LIMIT seconds, and no longer than the time that is left.
run_step() {
    name=$1 limit=$2; shift 2
    left=$((end - $(date +%s) - 5))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "gpu_check: $name: skipped, no time is left"
        failed=$((failed + 1))
        return 1
    fi
    step_started=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 3 "$out/$name.log" | cut -c 1-400
    echo "gpu_check: $name: exit status $status after $(($(date +%s) - step_started)) of $limit s"
    [ "$status" = 0 ] || failed=$((failed + 1))
    return "$status"
}

run_tests() {
    name=$1 limit=$2; shift 2
    run_step "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider -m "$marks" "$@"
}

if [ -f "$bundle" ]; then
    rm -rf "$site" "$site.new" && mkdir -p "$site.new" && "$python" -m tarfile -e "$bundle" "$site.new" &&
        mv "$site.new/site" "$site" || { echo "gpu_check: cannot unpack $bundle"; exit 1; }
    echo "gpu_check: unpacked $bundle, $((end - $(date +%s))) s left"
fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    marks=gpu shape=7b learner="--device cuda --dtype bfloat16 --side 252 --min-tokens 32768 --checkpointing --threads 8"
    engine="--graphs --requests 64 --frames 64 --max-model-len 16384 --kv-cache-gib 40" devices=devices
else
    echo "gpu_check: no CUDA GPU; rehearsing on the CPU"
    marks="not gpu and not slow" shape=small learner="--shape tiny" engine="--requests 2 --frames 4" devices=build
fi
[ "$shape" = small ] || learner="--shape $shape $learner"

if [ "$part" = first ]; then
    run_step devices 60 "$python" -m vz_ray.learner.gpu_measurements "$devices"
    run_tests learner 150 tests/gpu/test_attention_kernel.py tests/learner/test_vision_tower.py \
        tests/learner/test_logprobs.py tests/learner/test_lora.py tests/learner/test_skipped_updates.py \
        tests/learner/test_trainer.py tests/learner/test_checkpoint.py
    run_tests engine 150 tests/rollout/test_engine_parity.py tests/rollout/test_probe_detection.py ||
        VLLM_USE_V2_MODEL_RUNNER=0 run_tests engine-v1 90 tests/rollout/test_engine_parity.py
    # shellcheck disable=SC2086 - options are words
    run_step learner-benchmark "$seconds" "$python" -m benchmarks.learner $learner --short
    [ ! -f runs/gpu-check.json ] || cp runs/gpu-check.json "$out"
else
    # shellcheck disable=SC2086
    run_step engine-$shape "$seconds" "$python" -m benchmarks.gpu_smoke_check assets/tiny-base --shape "$shape" $engine --out "$out"
fi
echo "gpu_check: $part part done, $failed steps failed, $((end - $(date +%s))) s left; see $out"
exit "$failed"
