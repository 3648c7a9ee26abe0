"""A drafter for SmolLM2-135M-Instruct, from nothing but the package registry: `python -m train.smollm2`.

responses.jsonl.gz holds what the model (Apache-2.0) wrote to the prompts of prompts.py, and these prompts. Some of them
quote functions of the Python standard library (PSF licence).
"""
