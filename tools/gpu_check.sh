#!/usr/bin/env bash
# What is asked of a machine with one NVIDIA GPU: one command, under four minutes, no network.
#
#   tools/gpu_check.sh [--dry-run] [--out FOLDER]
#
# Runs the tests marked `gpu`, then tools/gpu_check.py: 4-bit weights of two networks on the GPU
# against the CPU, a ResNet-18 at 224 with 1,024 images, and where its time goes. PYTHON is to have the
# package's dependencies, with PyTorch and onnxruntime-gpu for the CUDA of that machine.
# ATTNROUND_DATA names the networks of CIFAR-10; without, those of models/ stand in. --dry-run goes
# the same way on the CPU, with those small ones. What is printed is kept in FOLDER (build/gpu),
# with tables. The exit code is 1 if something fails.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
out=build/gpu
dry=()
within() { timeout "$@"; }
while (($#)); do
    case $1 in
    --dry-run)
        dry=(--dry-run)
        within() { "${@:2}"; }
        ;;
    --out)
        out=$2
        shift
        ;;
    *)
        echo "no such option: $1; see the head of $0" >&2
        exit 2
        ;;
    esac
    shift
done
mkdir -p "$out"
{
    status=0
    within 60 "$python" -m pytest -q -m gpu -rs tests/runtime || status=1
    within 175 "$python" tools/gpu_check.py --out "$out" "${dry[@]}" || status=1
    echo "gpu check: $([[ $status == 0 ]] && echo passed || echo FAILED) after $SECONDS s"
    exit "$status"
} 2>&1 | tee "$out/log.txt"
