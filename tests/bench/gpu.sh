#!/usr/bin/env bash
# Everything that a GPU is to prove and to measure, without a network.
#
#   tests/bench/gpu.sh                            all steps; results in runs/gpu/results.md and results.jsonl
#   tests/bench/gpu.sh --rehearse                 the same code on a CPU, shrunken, in a minute
#   tests/bench/gpu.sh --only a,c-sd15            steps by the beginnings of their names
#   tests/bench/gpu.sh --minutes 9                begins no step that would not be through by then
#   tests/bench/gpu.sh --out FOLDER --again       another folder; also what is done already
#   SAIL_WHEELS=FOLDER tests/bench/gpu.sh         packages that are missing come from a folder of wheels
#
# The same command again takes what is left, and last what has failed. It uses the active Python where its torch sees a
# card, and else the project's own (lib/setup.sh). Packages are added to an environment of its own in the --out folder; the
# active one, and the settings of the card, stay as they are.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

out="$root/runs/gpu" rehearse=""
for word in "$@"; do
    case $word in
    --help | -h)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        exit;;
    --rehearse) rehearse=1;;
    --out=*) out=${word#*=};;
    esac
    if [ "${last:-}" = --out ]; then out=$word; fi
    last=$word
done
case $out in /*) ;; *) out="$PWD/$out";; esac

# The name of the card that a Python's torch sees, or nothing.
card_of() {
    "$1" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null || true
}

card=""
python=$(command -v python || command -v python3 || true)
if [ -z "$rehearse" ] && [ -n "$python" ]; then card=$(card_of "$python"); fi
if [ -z "$card" ]; then
    set_aside=("$@")                                            # lib/setup.sh looks at the first argument
    set --
    source "$root/lib/setup.sh"
    set -- ${set_aside[@]+"${set_aside[@]}"}
    if [ -z "$rehearse" ]; then card=$(card_of "$python"); fi
fi

# The names of the packages that this Python lacks: those of requirements.txt, and what they need beside what all have.
lacking() {
    "$1" - "$root/requirements.txt" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

names = [line.partition("==")[0] for line in Path(sys.argv[1]).read_text().split()]
for name in [*names, "hpsv2", "image-reward", "clint", "ftfy", "wcwidth", "importlib_metadata"]:
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
PYTHON
}

# An environment on top of the active one: --system-site-packages alone would lead past an active venv.
if [ -n "${SAIL_WHEELS:-}" ] && [ -n "$(lacking "$python")" ]; then
    wheels=$(cd "$SAIL_WHEELS" && pwd)
    mkdir -p "$out"
    "$python" -m venv --without-pip --system-site-packages "$out/venv"
    below=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    own=$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$below" > "$own/below.pth"
    for name in $(lacking "$out/venv/bin/python"); do
        "$python" -m pip --python "$out/venv/bin/python" install --quiet --disable-pip-version-check --no-index --no-deps \
            --find-links "$wheels" "$name" || echo "$name is not in $SAIL_WHEELS: what needs it will say so" >&2
    done
    python="$out/venv/bin/python"
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
cd "$root"
exec "$python" -m tests.bench.gpu "$@" --card "$card" --out "$out"
