#!/usr/bin/env bash
# The steps of action.yml, so that they run anywhere:
#
#   tools/action.sh install     the package of this checkout, on a PyTorch without CUDA
#   tools/action.sh quantise    MODEL to OUTPUT by CALIB, EVAL, CONFIG and ARGUMENTS
#
# quantise keeps its reports in the folder REPORTS, adds the summary to GITHUB_STEP_SUMMARY and
# exit-code and reports to GITHUB_OUTPUT, and ends with the exit code of the command. Layers that
# are finished stay in .attnround until the output is written.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

install() {
    python -m pip install --extra-index-url https://download.pytorch.org/whl/cpu "$root"
}

quantise() {
    local reports="${REPORTS:-quantised}" code=0 form
    local -a command=(python -m onnx_attnround quantize)
    mkdir -p "$reports"
    [[ -z "${MODEL:-}" ]] || command+=("$MODEL")
    [[ -z "${OUTPUT:-}" ]] || command+=("$OUTPUT")
    [[ -z "${CALIB:-}" ]] || command+=(--calib "$CALIB")
    [[ -z "${EVAL:-}" ]] || command+=(--eval "$EVAL")
    [[ -z "${CONFIG:-}" ]] || command+=(--config "$CONFIG")
    for form in report.html report.json report.md gates.xml; do
        command+=(--report "$reports/$form")
    done
    command+=(--format github --work-dir .attnround)
    # Split as a shell does, quotes included; nothing in it is run.
    if [[ -n "${ARGUMENTS:-}" ]]; then
        while IFS= read -r -d '' word; do
            command+=("$word")
        done < <(python -c 'import os, shlex
for word in shlex.split(os.environ["ARGUMENTS"]): print(word, end="\0")')
    fi
    "${command[@]}" || code=$?
    if [[ -f "$reports/report.md" ]]; then
        cat "$reports/report.md" >>"${GITHUB_STEP_SUMMARY:-/dev/null}"
    fi
    printf 'exit-code=%s\nreports=%s\n' "$code" "$reports" >>"${GITHUB_OUTPUT:-/dev/null}"
    return "$code"
}

case "${1:-}" in
    install | quantise) "$1" ;;
    *)
        echo "usage: tools/action.sh install|quantise" >&2
        exit 2
        ;;
esac
