"""A frozen teacher: its targets, the fingerprint of its cache, and what a cache costs and gains."""
