#!/usr/bin/env bash
# What a machine with a GPU and a torch of its own needs to run bench/gpu.sh from a checkout: bin,
# shared libraries and the test programs that take a device, without torch; under 64 MiB.
#   tools/gpu_bundle.sh BUILD
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
limit_mib=64
rm -rf gpu-bundle
cmake --install "$build" --prefix gpu-bundle >/dev/null
tools/collect_libs.sh gpu-bundle --without-torch >/dev/null
rm -rf gpu-bundle/include gpu-bundle/lib/cmake gpu-bundle/lib/*.a
strip gpu-bundle/lib/ferry/ferry
mkdir gpu-bundle/tests
for program in test_tensor:tensor test_models:models test_pipelines:pipelines; do
  strip -o "gpu-bundle/tests/${program%%:*}" "$build/tests/${program##*:}/${program%%:*}"
done
# The test programs look for fixtures where they were built.
pwd > gpu-bundle/tests/built-at
git -c safe.directory="$PWD" rev-parse --short HEAD > gpu-bundle/commit 2>/dev/null || echo unknown > gpu-bundle/commit
# Newest symbols asked of the other machine's C and C++ libraries.
needs=$(objdump -T gpu-bundle/lib/ferry/ferry gpu-bundle/lib/ferry/*.so* gpu-bundle/tests/test_* 2>/dev/null |
  grep -oE '\((GLIBC|GLIBCXX)_[0-9.]+\)' | tr -d '()' | sort -u -V | awk -F_ '{newest[$1] = $2} END {for (name in newest) printf "%s %s  ", name, newest[name]}')
mib=$(du -sm gpu-bundle | cut -f1)
echo "gpu-bundle: $mib MiB without torch $(cat gpu-bundle/lib/ferry/torch-version); needs $needs"
echo "On a machine with a GPU, in a checkout with this folder: OUT=DIR bench/gpu.sh"
[ "$mib" -lt "$limit_mib" ] || { echo "gpu-bundle: $mib MiB, expected less than $limit_mib" >&2; exit 1; }
