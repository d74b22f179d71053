#!/usr/bin/env bash
# All benchmarks, one after the other; figures are ratios within one run.
set -euo pipefail
cd "$(dirname "$0")/.."
ferry=$1
build=$(dirname "$(dirname "$(dirname "$ferry")")")
[ -x tools/parity/.venv/bin/python ] || tools/parity/setup.sh
"$build/bench/io/bench_io"
"$build/bench/overlap/bench_overlap"
tools/parity/.venv/bin/python bench/kernels/torchao_kernels.py --bench "$build/bench/kernels/bench_kernels"
tools/parity/.venv/bin/python bench/end_to_end/run.py --ferry "$ferry" --limit "$build/bench/end_to_end/bench_limit"
# Writes 12 GB.
tools/parity/.venv/bin/python bench/end_to_end/pipeline.py --ferry "$ferry"
