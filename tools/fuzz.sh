#!/usr/bin/env bash
# Fuzzes each parser of foreign bytes with libFuzzer (clang) for the given seconds, from the
# committed corpus. Stops at the first finding; the input is left in build/fuzz/findings.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-300}
command -v clang++ >/dev/null || { echo "fuzz: clang++ is needed: apt-get install clang" >&2; exit 1; }
cmake --preset fuzz >/dev/null
targets=$(cd tests/fuzz && ls ./*_fuzz.cpp | sed 's|^\./\(.*\)_fuzz.cpp|fuzz_\1|')
cmake --build build/fuzz --target $targets
mkdir -p build/fuzz/findings
for target in $targets; do
  echo "fuzz: $target, $seconds s"
  corpus=build/fuzz/corpus/$target
  mkdir -p "$corpus"
  seeds=tests/fuzz/corpus/${target#fuzz_}
  # libtorch is not instrumented: its vectors are no container overflows, its caches no leaks.
  case $target in
    fuzz_config | fuzz_weight_index | fuzz_quant_metadata) export OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0 ;;
    *) unset ASAN_OPTIONS ;;
  esac
  "build/fuzz/tests/fuzz/$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 \
    -artifact_prefix=build/fuzz/findings/ "$corpus" $([ -d "$seeds" ] && echo "$seeds") 2>&1 | tail -8
done
