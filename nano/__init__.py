"""What exists only because the real weights are 20 GB: a small world to learn editing in. `python -m nano --help`."""
