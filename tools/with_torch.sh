#!/bin/sh
# Runs a program of this tree against a libtorch that is not in it:
#   with_torch PROGRAM [ARGUMENTS ...]
# Taken is the torch that FERRY_TORCH_DIR names (a libtorch, a site-packages folder or a Python
# environment), else the one that python3 imports. Set FERRY_PYTHON for another interpreter.
here=$(dirname "$(readlink -f "$0")")
torch=
for folder in "$FERRY_TORCH_DIR" "$FERRY_TORCH_DIR/torch" "$FERRY_TORCH_DIR"/lib/python3*/site-packages/torch; do
  [ -n "$FERRY_TORCH_DIR" ] && [ -e "$folder/lib/libtorch_cpu.so" ] && torch=$folder && break
done
if [ -z "$torch" ] && [ -n "$FERRY_TORCH_DIR" ]; then
  echo "ferry: no libtorch in FERRY_TORCH_DIR=$FERRY_TORCH_DIR (looked for lib/libtorch_cpu.so there, in torch/ and in lib/python3*/site-packages/torch)" >&2
  exit 1
fi
if [ -z "$torch" ]; then
  torch=$("${FERRY_PYTHON:-python3}" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])' 2>/dev/null)
fi
if [ -z "$torch" ]; then
  echo "ferry: no libtorch: set FERRY_TORCH_DIR to a libtorch or a Python environment with torch $(cat "$here/torch-version")" >&2
  exit 1
fi
wanted=$(cat "$here/torch-version")
got=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$torch/version.py" 2>/dev/null)
[ -n "$got" ] || got=$(sed -n 's/^\([0-9.]*\).*/\1/p' "$torch/build-version" 2>/dev/null)
if [ -n "$got" ] && [ "$got" != "$wanted" ]; then
  echo "ferry: $torch is torch $got; this build needs $wanted (set FERRY_TORCH_DIR)" >&2
  exit 1
fi
FERRY_TORCH_DIR=$torch
LD_LIBRARY_PATH=$torch/lib:$here${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export FERRY_TORCH_DIR LD_LIBRARY_PATH
exec "$@"
