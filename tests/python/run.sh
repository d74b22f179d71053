#!/bin/sh
# run.sh BUILD/python [PYTEST ARGUMENTS]: the tests of the Python package against what was built
# there. Exits with 77 where there is no Python to run them with. FERRY_TEST_PYTHON names one; the
# default is that of tools/parity/.venv.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
package=$1
shift
python=$root/tools/parity/.venv/bin/python
[ -x "$python" ] || python=${FERRY_TEST_PYTHON:-}
skip() {
  echo "skipped: $1"
  exit 77
}
[ -n "$python" ] || skip "no tools/parity/.venv (tools/parity/setup.sh makes it), and FERRY_TEST_PYTHON names no other Python"
"$python" -c 'import numpy, pytest, safetensors, torch' 2>/dev/null || skip "$python lacks torch, numpy, safetensors or pytest"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
[ -e "$package/ferry/_C$suffix" ] || skip "$package/ferry has no _C$suffix: it was built for another Python than $python"
export PYTHONPATH="$package:$(dirname "$package")/tests/python" PYTHONDONTWRITEBYTECODE=1
if [ $# -gt 0 ]; then exec "$python" -m pytest -p no:cacheprovider "$@"; fi
exec "$python" -m pytest -p no:cacheprovider -q "$root/tests/python"
