#!/usr/bin/env bash
# The tests; arguments go to pytest, say `tests/run.sh -k reward`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/lib/setup.sh"
cd "$root"
# Two files at a time, each on one thread: on two cores that takes little more than half as long.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
parallel=""
if "$python" -c "import xdist" 2>/dev/null; then parallel="-n 2 --dist loadfile"; fi
# shellcheck disable=SC2086
exec "$python" -m pytest -o testpaths=tests -o tmp_path_retention_policy=failed -q -p no:cacheprovider --durations=8 $parallel "$@"
