#!/bin/sh
# Makes the virtual environment of the parity tools (tools/parity/.venv); does nothing if it is
# already there with the right versions. Usage: tools/parity/setup.sh [python3]
set -eu
case "${1:-}" in -h|--help) sed -n 2,3p "$0"; exit 0 ;; esac
here=$(cd "$(dirname "$0")" && pwd)
venv="$here/.venv"
[ -x "$venv/bin/python" ] || "${1:-python3}" -m venv "$venv"
if cmp -s "$here/requirements.txt" "$venv/requirements.installed"; then
    echo "tools/parity/.venv is up to date"
    exit 0
fi
echo "installing the Python reference into tools/parity/.venv (about 5 GB with torch's CUDA parts)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
cp "$here/requirements.txt" "$venv/requirements.installed"
