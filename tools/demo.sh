#!/usr/bin/env bash
# Makes a few pictures with models/shapes, the weights streamed under a budget smaller than they are.
set -euo pipefail
cd "$(dirname "$0")/.."
ferry=$1
mkdir -p out
echo "demo: three pictures with models/shapes ($(du -shL --apparent-size models/shapes | cut -f1)), its weights streamed from disk under 2 MiB"
draw() {  # file, seed, prompt
  echo "== $3"
  "$ferry" generate --model models/shapes --prompt "$3" --seed "$2" --steps 8 --true-cfg-scale 2 --negative-prompt "" \
    --max-sequence-length 24 --weights-memory 2MiB --output "out/$1"
}
draw red-circle.png 1 "a large red circle on a white background"
draw blue-star.png 2 "a blue star in the top left on a beige background"
draw green-ring.png 3 "a large green ring on a black background"
echo
echo "The pictures are in $(pwd)/out:"
ls -1 out/*.png
