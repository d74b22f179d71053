#!/usr/bin/env bash
# Completes an installed tree so that it can be moved: copies the shared libraries that bin/ferry
# loads and a plain Debian does not have into lib/ferry, libtorch included (about 500 MB), or with
# --without-torch all but libtorch, for a machine that has torch (start it there with
# LD_LIBRARY_PATH=$FERRY_TORCH_DIR/lib).
#   tools/collect_libs.sh PREFIX [--without-torch]
set -euo pipefail
prefix=$(cd "$1" && pwd)
mode=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$prefix/lib/ferry"
torch=$(ls -d .venv/lib/python3*/site-packages/torch 2>/dev/null || echo "${TORCH_DIR:-}")
nvidia=$(dirname "$torch")/nvidia
export LD_LIBRARY_PATH="$torch/lib:$(ls -d "$nvidia"/*/lib 2>/dev/null | tr '\n' ':')${LD_LIBRARY_PATH:-}"
ldd "$prefix/bin/ferry" | awk '$3 ~ /^\// {print $3}' | while read -r library; do
  name=$(basename "$library")
  case "$name" in
    libc.so*|libm.so*|libdl.so*|libpthread.so*|librt.so*|ld-linux*|libgcc_s.so*|libstdc++.so*) continue ;;
  esac
  case "$library" in
    */torch/*|*/nvidia/*) [ "$mode" = --without-torch ] && continue ;;
  esac
  cp -Lf "$library" "$prefix/lib/ferry/$name"
done
echo "$prefix: $(du -sh "$prefix" | cut -f1), of which libraries $(du -sh "$prefix/lib/ferry" | cut -f1) in lib/ferry"
if [ "$mode" = --without-torch ]; then
  echo "libtorch is not in it: set LD_LIBRARY_PATH to the lib folder of a torch $(ls -d .venv/lib/python3*/site-packages/torch-*.dist-info 2>/dev/null | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -1)"
else
  echo "libtorch is in it: bin/ferry runs without this checkout"
fi
