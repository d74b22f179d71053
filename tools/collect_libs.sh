#!/usr/bin/env bash
# Completes an installed tree so that it can be moved: copies the shared libraries that bin/ferry
# loads and a plain Debian does not have into lib/ferry, libtorch included. With --without-torch all
# but libtorch: bin/ferry becomes a launcher (tools/with_torch.sh) that takes the torch which
# FERRY_TORCH_DIR names or python3 imports.
#   tools/collect_libs.sh PREFIX [--without-torch]
set -euo pipefail
prefix=$(cd "$1" && pwd)
mode=${2:-}
cd "$(dirname "$0")/.."
lib="$prefix/lib/ferry"
mkdir -p "$lib"
for torch in "${TORCH_DIR:-none}" "${TORCH_DIR:-none}"/lib/python3*/site-packages/torch .venv/lib/python3*/site-packages/torch; do
  [ ! -e "$torch/lib/libtorch_cpu.so" ] || break
done
[ -e "$torch/lib/libtorch_cpu.so" ] || { echo "collect_libs: no libtorch in .venv (make deps) nor in TORCH_DIR" >&2; exit 1; }
torch=$(cd "$torch" && pwd)  # ldd tells paths as they were given
version=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$torch/version.py")
nvidia=$(dirname "$torch")/nvidia
export LD_LIBRARY_PATH="$torch/lib:$(printf '%s:' "$nvidia"/*/lib)${LD_LIBRARY_PATH:-}"

libraries=$(ldd "$prefix/bin/ferry")
if absent=$(grep 'not found' <<<"$libraries"); then
  echo "collect_libs: bin/ferry needs libraries that are not here:" >&2
  echo "$absent" >&2
  exit 1
fi
find "$lib" -name '*.so*' -delete
awk '$3 ~ /^\// {print $3}' <<<"$libraries" | while read -r library; do
  name=$(basename "$library")
  case "$name" in
    libc.so*|libm.so*|libdl.so*|libutil.so*|libpthread.so*|librt.so*|ld-linux*|libgcc_s.so*|libstdc++.so*) continue ;;
  esac
  case "$library" in
    */torch/*|*/nvidia/*) [ "$mode" = --without-torch ] && continue ;;
  esac
  cp -Lf "$library" "$lib/$name"
done

size() { du -shc "$@" | tail -1 | cut -f1; }
if [ "$mode" = --without-torch ]; then
  mv "$prefix/bin/ferry" "$lib/ferry"
  install -m 755 tools/with_torch.sh "$lib/with_torch"
  echo "$version" > "$lib/torch-version"
  cat > "$prefix/bin/ferry" <<'LAUNCHER'
#!/bin/sh
# libtorch is not in this tree: lib/ferry/with_torch finds it.
lib=$(dirname "$(readlink -f "$0")")/../lib/ferry
exec "$lib/with_torch" "$lib/ferry" "$@"
LAUNCHER
  chmod 755 "$prefix/bin/ferry"
  echo "$prefix: $(size "$prefix"), libtorch is not in it"
  echo "bin/ferry takes the torch $version that FERRY_TORCH_DIR names (a libtorch or a Python environment), else the one python3 imports"
else
  rm -f "$lib/ferry" "$lib/with_torch" "$lib/torch-version"
  echo "$prefix: $(size "$prefix"), of which libtorch $version $(size "$lib"/libtorch* "$lib"/libc10*) and other libraries $(size $(ls "$lib"/*.so* | grep -v -e libtorch -e libc10)) in lib/ferry"
  echo "libtorch was copied into it: bin/ferry runs without this checkout, also after the tree was moved"
  [ ! -e "$torch/lib/libtorch_cuda.so" ] || echo "for a GPU it also wants libtorch_cuda.so: set FERRY_TORCH_DIR to a torch $version with CUDA ($torch holds $(size "$torch"))"
fi
