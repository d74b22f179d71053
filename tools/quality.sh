#!/usr/bin/env bash
# The quick checks: format, layers, tests mirror the sources, models follow the conventions.
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
run() {
  echo "quality: $1"
  shift
  "$@" || failed=1
}
run "format" tools/format.sh --check
run "layers" tools/check_layers
run "mirror" tools/check_mirror
run "models" tools/check_models
exit $failed
