"""Human pairs and prompts from outside: formats, folders of shards, the hub."""
