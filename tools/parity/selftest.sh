#!/bin/sh
# Checks the comparing tools against a stand-in for ferry written in Python: all agree with it, and
# all notice when it is perturbed. About three minutes. Usage: tools/parity/selftest.sh
set -u
case "${1:-}" in -h|--help) sed -n 2,3p "$0"; exit 0 ;; esac
cd "$(dirname "$0")" || exit 2
PATH="$PWD/.venv/bin:$PATH"
export PATH
failed=0
expect() { # expected status, text that has to be printed, description, command...
    wanted=$1 text=$2 what=$3; shift 3
    "$@" >.selftest.log 2>&1
    status=$?
    if [ $status -eq "$wanted" ] && grep -q "$text" .selftest.log; then echo "ok   $what"; else
        echo "FAIL $what: exit status $status, expected $wanted and '$text'"; tail -20 .selftest.log; failed=1; fi
}
groups="--class FluxTransformer2DModel --class AutoencoderKL --class T5EncoderModel --class FluxPipeline"
# shellcheck disable=SC2086
expect 0 "^ok  *FluxPipeline" "run.py agrees with Python" python run.py --ferry python_ferry.py --seed 3 --count 2 $groups
expect 0 "^ok  *T5" "traits.py agrees with Python" python traits.py --ferry python_ferry.py T5EncoderModel AutoencoderKL
expect 0 "no difference" "find_difference.py finds nothing" python find_difference.py T5EncoderModel --ferry python_ferry.py
export FERRY_PERTURB=encoder
expect 1 "^MISS AutoencoderKL" "run.py sees a perturbed autoencoder" python run.py --ferry python_ferry.py --count 1 --class AutoencoderKL
expect 1 "^MISS t5-json" "run.py sees a wrong id" python run.py --ferry python_ferry.py --class tokenizers
expect 1 "^MISS FluxPipeline" "run.py sees a wrong picture" python run.py --ferry python_ferry.py --count 1 --class FluxPipeline
export FERRY_PERTURB=encoder.block.0.layer.1.DenseReluDense.wo
expect 1 "first difference: $FERRY_PERTURB " "find_difference.py finds the submodule" \
    python find_difference.py T5EncoderModel --ferry python_ferry.py
rm -f .selftest.log
exit $failed
