"""When and why does SAIL work? `./run_sail.sh study` asks, over several run seeds."""
