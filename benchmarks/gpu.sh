#!/usr/bin/env bash
# All that wants a GPU, measured in at most eight minutes on a machine that has one, Python 3.12 with torch 2.11, and no
# network. Before, where there is a network: make gpu-wheels; then take this folder there, build/gpu/wheels with it.
#
#     bash benchmarks/gpu.sh                          # prints a table, writes benchmarks/results/<machine>-gpu.json
#     bash benchmarks/gpu.sh --device cpu --quick     # rehearses it on any machine
#
# PYTHON names another interpreter than .venv's or, where there is none, python3.
set -euo pipefail

fail() {
    echo "gpu.sh: $1" >&2
    exit 2
}

device=cuda
passed=()
while (($#)); do
    case $1 in
        --device)
            [[ ${2-} == cpu || ${2-} == cuda ]] || fail "--device takes cpu or cuda, not '${2-}'"
            device=$2
            shift ;;
        --out)
            [[ -n ${2-} ]] || fail "--out takes a folder"
            passed+=(--out "$(realpath -m -- "$2")")
            shift ;;
        --quick) passed+=(--quick) ;;
        *) fail "unknown option $1; there are --device cpu|cuda, --quick and --out FOLDER" ;;
    esac
    shift
done

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ -n ${PYTHON-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
wheels=build/gpu/wheels
ours=$(compgen -G "$wheels/mvmr-*.whl") ||
    fail "there are no wheels in $wheels: run 'make gpu-wheels' where there is a network, and bring the folder along"
[[ $ours != *$'\n'* ]] || fail "there are several wheels of mvmr in $wheels: run 'make gpu-wheels' again"
status=0
"$python" -c 'import sys, torch; sys.exit(0 if sys.argv[1] == "cpu" or torch.cuda.is_available() else 3)' "$device" \
    2> /dev/null || status=$?
[[ $status != 3 ]] || fail "torch finds no GPU here; to rehearse without one: --device cpu --quick"
[[ $status == 0 ]] ||
    fail "$python can't import torch, which is not among the wheels: name one that can, PYTHON=/path/to/python"

# An environment of its own in front of what is installed here: nothing here changes, and what is here already, torch
# above all, is used where it is new enough. (Not --system-site-packages, which passes over the environment that
# $python may itself be of.)
environment=build/gpu/environment
rm -rf $environment
"$python" -m venv --without-pip $environment
"$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    > "$(echo $environment/lib/python3.*/site-packages)/here.pth"
install() {
    PIP_CONFIG_FILE=/dev/null timeout 15 "$python" -m pip --isolated --python $environment/bin/python install --quiet \
        --disable-pip-version-check --no-index --no-deps --no-compile "$@" ||
        fail "the wheels in $wheels can't be installed: are they for this Python? 'make gpu-wheels GPU_PYTHON=3.12'"
}
# Each by itself: pip would else look into what the torch here says it needs, which is not our business.
install --find-links $wheels --requirement benchmarks/gpu.txt --requirement $wheels/needed.txt
install --force-reinstall "$ours"

exec $environment/bin/python benchmarks/gpu_run.py --device "$device" ${passed[@]+"${passed[@]}"}
