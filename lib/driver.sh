# Sourced by run_sail.sh, which has set $python, $root and $run: locks the run folder, and defines
# `launch`, which runs a stage of the run. Ctrl-C and signals are answered here.

# The lock lies on a file descriptor that all stages have too (lib/lock.py): while one of them works
# on the folder, nobody else does.
exec 7<> "$run/.lock"
export SAIL_DRIVER=$$
"$python" -m lib.lock "$run" "$0 $*"                            # and removes what a kill left

# Ctrl-C, a closed terminal and TERM end the stage, which says how to go on. It also ends by itself
# where this script is killed.
job=""
stop() {
    trap "" INT TERM HUP
    if [ -n "$job" ]; then
        kill -TERM "$job" 2>/dev/null || true
        wait "$job" || true
    fi
    exit "$1"
}
finish() {
    local code=$?
    if [ "$code" = 137 ]; then
        echo "error: a stage was killed (by a system that lacks memory?); the same command continues from here" >&2
    fi
    exec 8>&-                                                   # the stages' Python ends, too
    wait
}
trap finish EXIT
trap "stop 130" INT
trap "stop 143" TERM
trap "stop 129" HUP

# accelerate warns at every stage of what it is not told. What the user says comes behind it and
# holds, as does a configuration file.
hub=${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}
if [[ ${SAIL_LAUNCH:-} == "accelerate launch "* && $SAIL_LAUNCH != *--config_file* ]] &&
    [ ! -e "$hub/accelerate/default_config.yaml" ]; then
    told="--num_machines 1 --mixed_precision no --dynamo_backend no"
    SAIL_LAUNCH="accelerate launch $told ${SAIL_LAUNCH#accelerate launch }"
fi

# A stage is `python 0X_stage.py ... --run=RUN`. On Linux one Python that has imported torch forks
# them all, so that only the first of them waits for the import (lib/warm.py); SAIL_LAUNCH starts
# them its own way.
if [ -n "${SAIL_LAUNCH:-}" ] || [ "$(uname)" != Linux ]; then
    [ "$python" = python ] || PATH="${python%/*}:$PATH"         # for SAIL_LAUNCH="accelerate launch ..."
    launch() {
        ${SAIL_LAUNCH:-"$python"} "$root/$1" "${@:2}" "--run=$run" &
        job=$!
        wait "$job"
    }
else
    pipes=$(mktemp -d)
    mkfifo "$pipes/stages" "$pipes/codes"
    "$python" -m lib.warm < "$pipes/stages" 3> "$pipes/codes" &
    job=$!
    exec 8> "$pipes/stages" 9< "$pipes/codes"
    rm -r "$pipes"
    launch() {
        printf '%s\n' "$root/$1" "${@:2}" "--run=$run" "" >&8
        read -r code <&9 || { code=0; wait "$job" || code=$?; } # that Python itself was killed
        return "$code"
    }
fi
