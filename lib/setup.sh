# Sourced by run_sail.sh and tests/run.sh: sets $python, making .venv and installing the pins on first use.
# SAIL_ACTIVE=1 uses the environment that is active already, as it is; SAIL_WHEELS=FOLDER installs from a folder of wheels,
# without a network. What either of them lacks is told in one line (lib/environment.py).

# glibc then keeps freed memory for the next tensor: 15% faster on a CPU.
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-2000000000}

# Threads that wait by spinning take the processors from each other as soon as another program is at
# work. After 10,000 turns they sleep: nothing is lost on an idle machine (.15 s for a forward and a
# backward pass of the world's UNet, 2 cores; with threads that always sleep .25), and with one busy
# program beside it takes .5 s, not 1.5 to 4.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ]; then export GOMP_SPINCOUNT=10000; fi

# A container may be given less of the processors than it sees (cgroups, version 2 or 1).
threads_of_quota() {
    local quota=max period=1
    if [ -r "$1/cpu.max" ]; then
        read -r quota period < "$1/cpu.max"
    elif [ -r "$1/cpu/cpu.cfs_quota_us" ]; then
        quota=$(cat "$1/cpu/cpu.cfs_quota_us") period=$(cat "$1/cpu/cpu.cfs_period_us")
    fi
    if [ "${quota/max/-1}" -gt 0 ]; then echo $(((quota + period - 1) / period)); fi
}
threads=$(threads_of_quota /sys/fs/cgroup)
if [ -z "${OMP_NUM_THREADS:-}" ] && [ -n "$threads" ] && [ "$threads" -lt "$(nproc)" ]; then
    export OMP_NUM_THREADS=$threads
fi

if [ -n "${SAIL_ACTIVE:-}" ]; then
    python=python
    if ! command -v python >/dev/null; then
        echo "error: SAIL_ACTIVE=1, but there is no program \`python\` here; activate an environment, or leave it out" >&2
        exit 2
    fi
    python "$root/lib/environment.py" "${1:-}" >&2
else
    python="$root/.venv/bin/python"
    stamp="$root/.venv/.installed"
    pins=$(cat "$root/requirements.txt" "$root/lib/setup.sh" | cksum)
    # These two pin old stacks they do not need for what is used of them here, so without their dependencies.
    alone="hpsv2==1.2.0 image-reward==1.5 clint==0.5.1"
    if [ ! -x "$python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$pins" ]; then
        echo "set-up: installing into $root/.venv (once; about 3 minutes and 6.4 GB) ..."
        # Where making it was interrupted, it has no pip: it is made anew.
        "$python" -m pip --version >/dev/null 2>&1 || "${SAIL_PYTHON:-python3}" -m venv --clear "$root/.venv"
        wheels=()
        if [ -n "${SAIL_WHEELS:-}" ]; then
            # shellcheck disable=SC2086
            "$python" "$root/lib/environment.py" --wheels "$SAIL_WHEELS" "$root/requirements.txt" $alone
            wheels=(--no-index --find-links "$SAIL_WHEELS")
        fi
        install() { "$python" -m pip install --quiet --disable-pip-version-check ${wheels[@]+"${wheels[@]}"} "$@"; }
        install -r "$root/requirements.txt"
        # shellcheck disable=SC2086
        install --no-deps $alone
        echo "$pins" > "$stamp"
        echo "set-up: done"
    fi
fi
