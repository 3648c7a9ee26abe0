"""Checkpoints in and out: Hugging Face folders of safetensors, one name table per model family."""
