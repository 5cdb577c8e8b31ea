#!/usr/bin/env bash
# SAIL from human pairs to the table.
#
#   ./run_sail.sh                                 the embedded world, on a CPU, in minutes
#   ./run_sail.sh tiny --run runs/no-mixup --alpha 1.0 --iters 5
#   ./run_sail.sh study                           rivals, controls and ablations over several run seeds: hours
#   ./run_sail.sh --run runs/edit --from runs/tiny     an edited stage, from another run's human pairs and Iter0
#   ./run_sail.sh --redo-from iter1               make again what the run has from round 1 on
#   ./run_sail.sh compare runs/a runs/b           two runs: settings, results and pictures side by side
#   ./run_sail.sh rival spo --run runs/tiny       a rival of the table, trained on a run's human pairs; or mapo, ...
#   ./run_sail.sh label                           label pairs in a page; ./run_sail.sh tiny --run runs/mine --pairs runs/taste learns
#   ./run_sail.sh duel --run RUN base Iter3       judge two models of a run blind, in the same page
#   ./run_sail.sh sd15 --plan                     what a run would cost, before anything is spent
#   ./run_sail.sh sd15 --check                    what a run would need and does not have
#   ./run_sail.sh --help                          every setting, its meaning, and the paper's value
#
# SAIL_LAUNCH="accelerate launch --num_processes 8" ./run_sail.sh sd15 shares every stage among 8 GPUs; two processes on a
# CPU: SAIL_LAUNCH="accelerate launch --multi_gpu --num_processes 2".
# The same command after Ctrl-C, a crash or a power cut continues where it was. SAIL_ACTIVE=1 uses the active Python
# environment instead of making .venv; SAIL_WHEELS=FOLDER installs from a folder of wheels, without a network.
set -euo pipefail
{   # bash reads on to the closing brace before it begins: an edit of this file disturbs no run
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/lib/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ "${1:-}" = study ]; then exec "$python" -m lib.study "${@:2}"; fi
if [ "${1:-}" = compare ]; then exec "$python" -m lib.eval.compare "${@:2}"; fi
if [ "${1:-}" = rival ]; then exec "$python" -m lib.rivals "${@:2}"; fi
if [ "${1:-}" = label ]; then exec "$python" -m lib.taste.label "${@:2}"; fi
if [ "${1:-}" = duel ]; then exec "$python" -m lib.taste.duel "${@:2}"; fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then set -- --preset "$@"; fi
again=()                                                        # arguments of lib.again
for word in "$@"; do
    case ${last:-} in --from | --redo-from) again+=("$last=$word");; esac
    last=$word
    case $word in
    --from=* | --redo-from=*) again+=("$word");;
    --help | -h)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$root/run_sail.sh"
        exec "$python" -m lib.settings --help;;
    --plan)
        exec "$python" -m lib.plan "$@";;
    --check)
        exec "$python" -m lib.preflight "$@";;
    esac
done

answer=$("$python" -m lib.settings "$@")                        # makes or checks <run>/config.json
{ read -r iters; read -r draws; } <<< "$answer"
run=${answer#*$'\n'*$'\n'}
run=${run%/}

source "$root/lib/driver.sh"                                    # locks it, and defines `launch STAGE ...`
echo "run folder: $run"
"$python" -m lib.again ${again[@]+"${again[@]}"} "--run=$run"  # --from, --redo-from; has the code changed?

seed="seed/pairs.parquet seed/holdout.parquet benchmarks.parquet prompts.parquet"

# Each stage runs unless what it makes is there; it resumes within itself.
stage() {
    for made in $1; do [ -e "$run/$made" ] || { launch "${@:2}"; break; }; done
}
stage "$seed" 01_seed.py                                        # human pairs and prompts
stage iter0/unet 04_train_dpo.py --iter 0                       # Iter0: Diffusion-DPO on the human pairs
for ((k = 1; k <= iters; k++)); do
    if [ "$draws" = 1 ]; then                                   # human pairs alone need no candidates
        stage "iter$k/candidates.parquet" 02_generate.py --iter "$k"    # N per new prompt, from model k-1
        # Where few of one's own pairs are held out, all of them tell how good a judge Iter0 is.
        [ "$k" != 1 ] || stage iter1/pairs.parquet lib/crossfit.py
        stage "iter$k/pairs.parquet" 03_rank.py --iter "$k"             # its own ranking: best and worst
    fi
    stage "iter$k/unet" 04_train_dpo.py --iter "$k"             # model k, from the mix of human and own pairs
done
launch 05_eval.py                                               # scores, table, curves, page
rm -f "$run/.redo"                                              # of --redo-from (lib/again.py)
exit
}
