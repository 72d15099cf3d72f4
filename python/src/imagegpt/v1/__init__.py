"""Messages and stubs of the worker's contract, generated from proto/imagegpt/v1."""
