#!/usr/bin/env bash
# clang-tidy with the allow-list in .clang-tidy, warnings as errors, over all our sources or those of
# some folders.
#   tools/tidy.sh BUILD [FOLDER ...]      e.g. tools/tidy.sh build/release src/ferry/base
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
command -v run-clang-tidy >/dev/null || { echo "tidy: apt-get install clang-tidy" >&2; exit 1; }
# clang cannot read gcc's precompiled header: a database without it.
mkdir -p build/tidy
sed -E 's/ -Winvalid-pch//; s/ -include [^ ]*cmake_pch.hxx//; s/ -fopenmp//' "$build/compile_commands.json" > build/tidy/compile_commands.json
[ $# -gt 0 ] || set -- src apps
for folder in "$@"; do
  echo "tidy: $folder"
  # What it says about warnings it left out goes to stderr.
  run-clang-tidy -quiet -j "${JOBS:-$(nproc)}" -p build/tidy "$(pwd)/$folder/.*" 2>/dev/null
done
echo "tidy: clean"
