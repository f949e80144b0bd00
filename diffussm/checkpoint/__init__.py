"""Checkpoints as data: safetensors by parameter name, a manifest last, on disk or in a bucket."""
