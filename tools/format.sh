#!/usr/bin/env bash
# clang-format over our C++: --all rewrites, --changed rewrites what differs from HEAD, --check tells.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:---check}
# Also as root in a checkout that is a user's: else git refuses, and nothing would be checked.
git() { command git -c safe.directory="$PWD" "$@"; }
list() { git ls-files --cached --others --exclude-standard '*.h' '*.cpp'; }
case "$mode" in
  --all) list | xargs -r clang-format -i ;;
  --changed) { git diff --name-only HEAD -- '*.h' '*.cpp'; git ls-files --others --exclude-standard '*.h' '*.cpp'; } |
    sort -u | while read -r file; do [ -f "$file" ] && clang-format -i "$file"; done ;;
  --check)
    bad=$(list | xargs -r clang-format --dry-run -Werror 2>&1 | grep -oE '^[^:]+:[0-9]+' | cut -d: -f1 | sort -u || true)
    [ -z "$bad" ] || { printf 'not formatted (make style mends it):\n%s\n' "$bad"; exit 1; } ;;
  *) echo "usage: tools/format.sh --all|--changed|--check" >&2; exit 2 ;;
esac
