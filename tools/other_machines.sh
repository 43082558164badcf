#!/usr/bin/env bash
# The tests of the parts on CPUs and with libraries that this machine does not have.
#
#   tools/other_machines.sh [instructions] [emulated] [newest] [oldest]      all by default
#
# instructions  torch, oneDNN and OpenBLAS held to older instruction sets, one after the other
# emulated      an Intel Haswell, without AVX-512 and VNNI, in qemu-x86_64 (Debian's qemu-user)
# newest        the newest dependencies that pip finds, in build/newest
# oldest        the oldest that pyproject.toml allows, in build/oldest
#
# Prints a line for each run; the exit code is 1 if one fails. PYTHON makes the environments.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=.venv/bin/python
failed=0

# What the emulator can do in some minutes: the arithmetic.
arithmetic=(tests/rounding tests/qdq tests/calibrate tests/shadow)

tests() { # NAME PYTHON... -- FOLDER...
    local name=$1 begin=$SECONDS python=() summary
    shift
    while (($#)) && [[ $1 != -- ]]; do
        python+=("$1")
        shift
    done
    shift
    if summary=$("${python[@]}" -m pytest -q -m "not slow" -p no:cacheprovider "$@" 2>&1); then
        echo "passed in $((SECONDS - begin)) s: $name: $(tail -n 1 <<<"$summary")"
    else
        failed=1
        echo "FAILED: $name"
        tail -n 40 <<<"$summary"
    fi
}

instructions() {
    local setting
    for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
        ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem; do
        tests "$setting" env "$setting" "$here" --
    done
}

emulated() {
    if ! command -v qemu-x86_64 >/dev/null; then
        echo "skipped: emulated: qemu-x86_64 is not here"
        return
    fi
    tests "Haswell-v4: ${arithmetic[*]}" \
        qemu-x86_64 -cpu Haswell-v4 "$here" -- "${arithmetic[@]}"
}

newest() {
    local python=build/newest/bin/python
    environment build/newest /dev/null
    tests "newest: $(versions "$python")" "$python" --
}

oldest() {
    local python=build/oldest/bin/python
    "$here" tools/oldest_versions.py >build/oldest.txt
    environment build/oldest build/oldest.txt
    tests "oldest: $(versions "$python")" "$python" --
}

environment() { # FOLDER CONSTRAINTS
    [[ -f $1/installed ]] && return
    "${PYTHON:-python3}" -m venv "$1"
    # torch goes first, as in the Makefile.
    "$1/bin/python" -m pip install -q --upgrade -c "$2" torch &&
        "$1/bin/python" -m pip install -q --upgrade -c "$2" -e ".[dev]" &&
        touch "$1/installed"
}

versions() { # PYTHON
    "$1" -c 'from importlib.metadata import distributions
wanted = {"numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "protobuf", "torch"}
found = {d.metadata["Name"].lower(): d.version for d in distributions()}
print(", ".join(f"{name} {found[name]}" for name in sorted(wanted & found.keys())))'
}

mkdir -p build
(($#)) || set -- instructions emulated newest oldest
for part in "$@"; do
    case $part in
    instructions | emulated | newest | oldest) "$part" ;;
    *)
        echo "no such part: $part; see the head of $0" >&2
        exit 2
        ;;
    esac
done
exit "$failed"
