#!/usr/bin/env bash
# The tests; arguments go to pytest, say `tests/run.sh -k reward`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/lib/setup.sh"
cd "$root"
exec "$python" -m pytest -o testpaths=tests -q -p no:cacheprovider --durations=8 "$@"
