#!/usr/bin/env bash
# clang-tidy with the allow-list in .clang-tidy, warnings as errors, over all our sources.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
command -v run-clang-tidy >/dev/null || { echo "tidy: apt-get install clang-tidy" >&2; exit 1; }
# clang cannot read gcc's precompiled header: a database without it.
mkdir -p build/tidy
sed -E 's/ -Winvalid-pch//; s/ -include [^ ]*cmake_pch.hxx//; s/ -fopenmp//' "$build/compile_commands.json" > build/tidy/compile_commands.json
run-clang-tidy -quiet -p build/tidy "$(pwd)/(src|apps)/.*" 2>/dev/null
