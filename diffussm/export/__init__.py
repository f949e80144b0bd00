"""A trained run as a folder that others can load: safetensors weights, a diffusers pipeline, a model card."""
