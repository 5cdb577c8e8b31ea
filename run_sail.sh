#!/usr/bin/env bash
# SAIL from human pairs to the table.
#
#   ./run_sail.sh                                 the embedded world, on a CPU, in minutes
#   ./run_sail.sh tiny --run runs/no-mixup --alpha 1.0 --iters 5
#   ./run_sail.sh study                           rivals, controls and ablations over several run seeds: hours
#   ./run_sail.sh sd15 --plan                     what a run would cost, before anything is spent
#   ./run_sail.sh --help                          every setting, its meaning, and the paper's value
#
# SAIL_LAUNCH="accelerate launch --num_processes 8" ./run_sail.sh sd15 shares every stage among 8 GPUs; two processes on a
# CPU: SAIL_LAUNCH="accelerate launch --multi_gpu --num_processes 2".
# The same command after Ctrl-C, a crash or a power cut continues where it was. SAIL_ACTIVE=1 uses the active Python
# environment instead of making .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/lib/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ "${1:-}" = study ]; then exec "$python" -m lib.study "${@:2}"; fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then set -- --preset "$@"; fi
case " $* " in
*" --help "* | *" -h "*)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$root/run_sail.sh"
    exec "$python" -m lib.settings --help;;
*" --plan "*)
    exec "$python" -m lib.plan "$@";;
esac

line=$("$python" -m lib.settings "$@")                          # makes or checks <run>/config.json
read -r iters alpha run <<< "$line"
find "$run" -name '.*.tmp' -type f -delete                      # what a kill left half-written
echo "run folder: $run"

# A stage is `python 0X_stage.py ... --run RUN`. On Linux without a GPU one Python that has imported torch forks them all,
# so that only the first of them waits for the import (lib/warm.py); SAIL_LAUNCH starts them its own way.
if [ -n "${SAIL_LAUNCH:-}" ] || [ "$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then
    [ "$python" = python ] || PATH="${python%/*}:$PATH"         # for SAIL_LAUNCH="accelerate launch ..."
    launch() { ${SAIL_LAUNCH:-"$python"} "$root/$1" "${@:2}" --run "$run"; }
else
    pipes=$(mktemp -d)
    mkfifo "$pipes/stages" "$pipes/codes"
    "$python" -m lib.warm < "$pipes/stages" 3> "$pipes/codes" &
    exec 8> "$pipes/stages" 9< "$pipes/codes"
    rm -r "$pipes"
    launch() { printf '%s\n' "$root/$1" "${@:2}" --run "$run" "" >&8 && read -r code <&9 && return "$code"; }
fi

# Each stage runs unless what it makes last is there; it resumes within itself.
stage() { [ -e "$run/$1" ] || launch "${@:2}"; }
stage prompts.parquet 01_seed.py                                # human pairs and prompts
stage iter0/unet 04_train_dpo.py --iter 0                       # Iter0: Diffusion-DPO on the human pairs
for ((k = 1; k <= iters; k++)); do
    if [ "$alpha" != 0.0 ]; then                                # human pairs alone need no candidates
        stage "iter$k/candidates.parquet" 02_generate.py --iter "$k"    # N per new prompt, from model k-1
        stage "iter$k/pairs.parquet" 03_rank.py --iter "$k"             # its own ranking: best and worst
    fi
    stage "iter$k/unet" 04_train_dpo.py --iter "$k"             # model k, from the mix of human and own pairs
done
launch 05_eval.py                                               # scores, table, curves, page
