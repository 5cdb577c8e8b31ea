"""The embedded world: a text-to-image world small enough for a laptop."""
