#!/usr/bin/env bash
# SAIL from the human seed to the table.
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

if [ "${1:-}" = study ]; then shift; exec "$python" "$root/lib/study.py" "$@"; fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then set -- --preset "$@"; fi
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$root/run_sail.sh"; PYTHONPATH="$root" exec "$python" -m lib.settings --help;;
*" --plan "*) PYTHONPATH="$root" exec "$python" -m lib.plan "$@";;
esac

line=$(PYTHONPATH="$root" "$python" -m lib.settings "$@")        # makes or checks <run>/config.json
read -r iters alpha run <<< "$line"
find "$run" -name '.*.tmp' -type f -delete                      # what a kill left half-written
echo "run folder: $run"

# Each stage runs unless what it makes last is there; it resumes within itself.
[ "$python" = python ] || PATH="${python%/*}:$PATH"              # for SAIL_LAUNCH="accelerate launch --num_processes 8"
launch() { ${SAIL_LAUNCH:-"$python"} "$root/$1" "${@:2}" --run "$run"; }
stage() { [ -e "$run/$1" ] || launch "${@:2}"; }
stage prompts.parquet 01_seed.py                                # human pairs and prompts
stage iter0/unet 04_train_dpo.py --iter 0                       # Iter0: Diffusion-DPO on the seed
for ((k = 1; k <= iters; k++)); do
    if [ "$alpha" != 0.0 ]; then                                # seed-only training needs no candidates
        stage "iter$k/candidates.parquet" 02_generate.py --iter "$k"    # N per new prompt, from model k-1
        stage "iter$k/pairs.parquet" 03_rank.py --iter "$k"             # its own ranking: best and worst
    fi
    stage "iter$k/unet" 04_train_dpo.py --iter "$k"             # model k, from the mix of human and own pairs
done
launch 05_eval.py                                               # scores, table, curves, page
