"""A drafter for SmolLM2-135M-Instruct, from nothing but the package registry: `python -m train.smollm2`."""
