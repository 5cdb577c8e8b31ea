"""What a run will cost, told before anything is spent: `./run_sail.sh sd15 --plan`."""
