# Sourced by run_sail.sh and tests/run.sh: sets $python, making .venv and installing the pins on first use.
# SAIL_ACTIVE=1 uses the environment that is active already, as it is.

# glibc then keeps freed memory for the next tensor: 15% faster on a CPU.
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-2000000000}

if [ -n "${SAIL_ACTIVE:-}" ]; then
    python=python
else
    python="$root/.venv/bin/python"
    stamp="$root/.venv/.installed"
    pins=$(cat "$root/requirements.txt" "$root/lib/setup.sh" | cksum)
    if [ ! -x "$python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$pins" ]; then
        echo "set-up: installing into $root/.venv (once; about 3 minutes and 5.4 GB) ..."
        [ -x "$python" ] || "${SAIL_PYTHON:-python3}" -m venv "$root/.venv"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
        # These two pin old stacks they do not need for what is used of them here, so without their dependencies.
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps hpsv2==1.2.0 image-reward==1.5 clint==0.5.1
        echo "$pins" > "$stamp"
        echo "set-up: done"
    fi
fi
