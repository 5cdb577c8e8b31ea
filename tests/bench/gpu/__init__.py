"""Everything that a GPU is to prove and to measure, as one command: tests/bench/gpu.sh."""
