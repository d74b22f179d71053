#!/usr/bin/env bash
# One run on a machine with a GPU: is the device found, do the tests that take a device pass on it,
# is a picture the CPU's, how fast is a resident forward, and what streaming costs beside it and beside Python
# diffusers, where that is installed. JSON goes into $OUT (default out/gpu).
#
# Needs a checkout, gpu-bundle/ in it (`make gpu-bundle`, may come from another machine) or a build,
# and a Python with torch 2.11 for CUDA; nothing is installed and nothing is downloaded.
#   OUT=DIR bench/gpu.sh
#   FERRY_GPU_DEVICE=cpu OUT=DIR bench/gpu.sh   rehearses the script without a GPU; marked as such
# FERRY_GPU_PARTS="tests picture resident streaming" chooses parts, for machines that give little time at once;
# FERRY_GPU_STREAMED=flux-2gb streams a smaller model than flux-dev (24 GB on disk), FERRY_GPU_STREAMED_TOKENS=1024+256
# a smaller picture.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
device=${FERRY_GPU_DEVICE:-cuda}
python=${FERRY_PYTHON:-python3}
export FERRY_PYTHON=$python
if [ -x gpu-bundle/bin/ferry ]; then
  ferry=gpu-bundle/bin/ferry
  with_torch=gpu-bundle/lib/ferry/with_torch
  program() { echo "gpu-bundle/tests/$1"; }
  built_at=$(cat gpu-bundle/tests/built-at)
else
  ferry=build/release/apps/ferry/ferry
  with_torch=env
  program() { echo "build/release/tests/${1#test_}/$1"; }
  built_at=$(pwd)
fi
failed=0
say() { printf '\n== %s\n' "$*"; }
fail() { echo "FAILED: $*"; failed=1; }

say "device and driver"
nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv 2>/dev/null || echo "no nvidia-smi"
"$ferry" doctor --test-size 64MiB "$OUT"
"$ferry" doctor --json --test-size 64MiB "$OUT" > "$OUT/doctor.json" || fail "ferry doctor"
if [ "$device" != cpu ] && ! grep -q '"found": true' "$OUT/doctor.json"; then
  echo "no accelerator for ferry here (see above): nothing was measured" >&2
  exit 3
fi
[ "$device" != cpu ] || echo "REHEARSAL ON THE CPU: nothing below says anything about a GPU"

tests() {
  say "tests on $device"
  if [ ! -d "$built_at/tests/fixtures" ]; then
    mkdir -p "$(dirname "$built_at")" && ln -s "$(pwd)" "$built_at" ||
      fail "the test programs look for $built_at/tests/fixtures; link $built_at to this checkout"
  fi
  run_tests() {  # program, filter
    FERRY_TEST_DEVICE=$device "$with_torch" "$(program "$1")" --gtest_brief=1 --gtest_filter="$2" \
      --gtest_output="json:$OUT/$1.json" 2>&1 | tail -40
    [ "${PIPESTATUS[0]}" = 0 ] || fail "$1 on $device"
  }
  run_tests test_tensor 'OpenAccelerator.*:ParseDevice.*'
  run_tests test_models '*Parity*Float32*:*Parity*BFloat16*:*ModelTester.IsDeterministic*:*ModelTester.RunsInBfloat16*:*AttentionTester*'
  run_tests test_pipelines '*Picture.IsPythonsWithinOneStep*'
}

picture() {
  say "a picture on $device and on the CPU"
  draw() {  # device, dtype
    "$ferry" generate --model models/shapes --prompt "a large red circle on a white background" --seed 1 --steps 8 \
      --max-sequence-length 24 --dtype "$2" --device "$1" --output-type latent --output "$OUT/latents-$1.safetensors" \
      --stats "$OUT/generate-$1-$2.json" || fail "generate on $1 ($2)"
  }
  draw cpu fp32
  cp "$OUT/latents-cpu.safetensors" "$OUT/latents-reference.safetensors"
  draw "$device" fp32
  "$python" bench/compare_tensors.py "$OUT/latents-reference.safetensors" "$OUT/latents-$device.safetensors" 1e-3 \
    --json "$OUT/picture.json" || fail "the picture on $device is not the CPU's"
  "$ferry" generate --model models/shapes --prompt "a large red circle on a white background" --seed 1 --steps 8 \
    --max-sequence-length 24 --device "$device" --output "$OUT/circle.png" || fail "generate a picture on $device"
}

resident() {
  say "flux-2gb resident on $device"
  model=$OUT/resident-model
  "$ferry" random FluxTransformer2DModel --config "${FERRY_GPU_MODEL:-flux-2gb}" --dtype bf16 --seed 1 --out "$model" || fail "ferry random"
  for tokens in ${FERRY_GPU_TOKENS:-256+64 1024+256 4096+512}; do
    "$python" bench/flux_inputs.py "$model/config.json" "${tokens%+*}" "${tokens#*+}" "$OUT/inputs.safetensors" || fail "inputs"
    "$ferry" forward "$model" --inputs "$OUT/inputs.safetensors" --output "$OUT/sample.safetensors" --device "$device" \
      --repeat 10 --stats "$OUT/forward-$tokens.json" --quiet || fail "forward of $tokens tokens on $device"
    "$python" - "$OUT/forward-$tokens.json" <<'PY'
import json, statistics, sys
s = json.load(open(sys.argv[1]))
print(f"{s['device']}: first {s['forward_seconds'][0]:.3f} s, median {statistics.median(s['forward_seconds'][1:]) * 1e3:.1f} ms, "
      f"peak there {s.get('peak_device_bytes', 0) / 2**20:.0f} MiB, load {s['load_seconds']:.2f} s")
PY
    if [ "$tokens" = 256+64 ]; then
      "$ferry" forward "$model" --inputs "$OUT/inputs.safetensors" --output "$OUT/sample-cpu.safetensors" --device cpu \
        --quiet || fail "forward on the CPU"
      # bfloat16 on two kinds of hardware: as far apart as two roundings.
      "$python" bench/compare_tensors.py "$OUT/sample-cpu.safetensors" "$OUT/sample.safetensors" 0.03 \
        --json "$OUT/forward-parity.json" || fail "the forward on $device is not the CPU's"
    fi
  done
}

streaming() {
  say "streaming to $device"
  streamed=$OUT/streamed-model
  "$ferry" random FluxTransformer2DModel --config "${FERRY_GPU_STREAMED:-flux-dev}" --dtype bf16 --seed 1 --out "$streamed" --quiet || fail "ferry random"
  tokens=${FERRY_GPU_STREAMED_TOKENS:-4096+512}
  "$python" bench/flux_inputs.py "$streamed/config.json" "${tokens%+*}" "${tokens#*+}" "$OUT/inputs.safetensors" || fail "inputs"
  "$python" bench/streaming.py --ferry "$ferry" --python "$python" --device "$device" --model "$streamed" \
    --inputs "$OUT/inputs.safetensors" --json "$OUT/streaming.json" --work "$OUT" || fail "streaming to $device"
}

for part in ${FERRY_GPU_PARTS:-tests picture resident streaming}; do "$part"; done

rm -rf "$OUT"/*-model "$OUT"/*.safetensors
"$python" - "$OUT" "$device" "$failed" "$(cat gpu-bundle/commit 2>/dev/null || git rev-parse --short HEAD)" <<'PY'
import glob, json, os, sys
out, device, failed, commit = sys.argv[1:]
parts = {os.path.basename(p)[:-5]: json.load(open(p)) for p in sorted(glob.glob(out + "/*.json"))
         if os.path.basename(p) != "gpu.json" and not os.path.basename(p).startswith("test_")}
tests = {os.path.basename(p)[:-5]: {k: json.load(open(p))[k] for k in ("tests", "failures", "errors")}
         for p in sorted(glob.glob(out + "/test_*.json"))}
json.dump({"device": device, "rehearsal": device == "cpu", "passed": failed == "0", "commit": commit, "tests": tests,
           **parts}, open(out + "/gpu.json", "w"), indent=2)
PY
say "$([ $failed = 0 ] && echo passed || echo FAILED) on $device; $OUT/gpu.json"
exit $failed
