#!/usr/bin/env bash
# Checks an installed tree as its users meet it: installs from BUILD into a scratch folder, moves the
# tree, makes a picture from there with the checkout's libtorch out of sight, and builds both examples
# in a folder outside the checkout. About a minute, most of it torch's headers.
#   tools/check_install.sh BUILD
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$(pwd)
build=$(cd "$1" && pwd)
torch=$(ls -d "$checkout"/.venv/lib/python3*/site-packages/torch 2>/dev/null | head -1)
torch=${torch:-$TORCH_DIR}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { echo "check-install: $*"; }

# With rights to mount, the checkout's libtorch is hidden; always, nothing may be loaded from it.
hidden() {
  if [ -d "$checkout/.venv" ] && unshare -m true 2>/dev/null; then
    unshare -m sh -c 'mount -t tmpfs none "$0/.venv" && exec "$@"' "$checkout" "$@"
  else
    "$@"
  fi
}
draw() {  # program, picture
  hidden "$1" generate --model "$checkout/models/shapes" --prompt "a large red circle on a white background" --seed 1 \
    --steps 4 --max-sequence-length 24 --weights-memory 2MiB --quiet --output "$2"
  [ -s "$2" ] || { say "no picture in $2"; exit 1; }
}

say "install and move"
cmake --install "$build" --prefix "$work/first" >/dev/null
tools/collect_libs.sh "$work/first"
mkdir "$work/a folder"
mv "$work/first" "$work/a folder/moved"
moved="$work/a folder/moved"

say "bin/ferry with the libtorch of the tree"
draw "$moved/bin/ferry" "$work/moved.png"
loaded=$(hidden "$moved/bin/ferry" doctor --json --test-size 16MiB "$work" | python3 -c 'import json, sys; print(json.load(sys.stdin)["libtorch"]["path"])')
[ "$(dirname "$(readlink -f "$loaded")")" = "$moved/lib/ferry" ] || { say "libtorch came from $loaded"; exit 1; }

say "without torch in the tree: FERRY_TORCH_DIR"
cmake --install "$build" --prefix "$work/bare" >/dev/null
tools/collect_libs.sh "$work/bare" --without-torch
if FERRY_TORCH_DIR="$work" "$work/bare/bin/ferry" --version 2>"$work/message"; then
  say "a FERRY_TORCH_DIR without torch was taken"; exit 1
fi
grep -q "no libtorch in FERRY_TORCH_DIR" "$work/message" || { cat "$work/message"; exit 1; }
cp -rs "$torch" "$work/torch"  # a torch elsewhere: links to the checkout's
[ ! -e "$(dirname "$torch")/nvidia" ] || ln -s "$(dirname "$torch")/nvidia" "$work/nvidia"
FERRY_TORCH_DIR="$work/torch" "$work/bare/bin/ferry" generate --model models/shapes --prompt "a large red circle on a white background" \
  --seed 1 --steps 4 --max-sequence-length 24 --weights-memory 2MiB --quiet --output "$work/bare.png"
cmp "$work/moved.png" "$work/bare.png"

say "programs against find_package(ferry), outside the checkout"
mkdir "$work/user"
cp examples/*.cpp "$work/user"
cat > "$work/user/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.22)
project(user LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(ferry REQUIRED)
add_executable(facade generate.cpp)
target_link_libraries(facade PRIVATE ferry::ferry)
if(ferry_HAS_TORCH_HEADERS)
  add_executable(full forward.cpp)
  target_link_libraries(full PRIVATE ferry::ferry)
endif()
CMAKE
hidden cmake -S "$work/user" -B "$work/user/facade-only" -G Ninja -DCMAKE_PREFIX_PATH="$moved" >/dev/null
hidden cmake --build "$work/user/facade-only"
hidden "$work/user/facade-only/facade" "$checkout/models/shapes" "a large red circle on a white background" "$work/facade.png" >/dev/null
[ ! -e "$work/user/facade-only/full" ] || { say "found torch headers in the tree"; exit 1; }
cmake -S "$work/user" -B "$work/user/all" -G Ninja -DCMAKE_PREFIX_PATH="$moved" -DTORCH_DIR="$torch" >/dev/null
cmake --build "$work/user/all"
"$work/user/all/full" models/shapes/transformer 2MiB
"$work/user/all/facade" models/shapes "a large red circle on a white background" "$work/all.png" >/dev/null
cmp "$work/facade.png" "$work/all.png"
say "good"
