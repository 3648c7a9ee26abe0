"""The sampling rules in plain numpy and float64, one token at a time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def penalised(
    logits: np.ndarray, settings: Mapping[str, Any], prompt: Sequence[int], generated: Sequence[int]
) -> np.ndarray:
    """Logits [V] with bias and penalties after `prompt` and `generated`."""
    logits = np.array(logits, np.float64)
    for token, bias in (settings.get("logit_bias") or {}).items():
        logits[token] += bias
    factor = settings.get("repetition_penalty", 1.0)
    for token in {*prompt, *generated}:
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(generated).items():
        logits[token] -= settings.get("frequency_penalty", 0.0) * count + settings.get("presence_penalty", 0.0)
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def filtered(logits: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Probabilities [V] of temperature, top-k, top-p and min-p; equal logits stay or go together."""
    temperature = settings.get("temperature", 0.0)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    scaled = (logits - logits.max()) / temperature
    top_k = settings.get("top_k", 0)
    if 0 < top_k < len(logits):
        scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
    top_p = settings.get("top_p", 1.0)
    if top_p < 1:
        scaled[above(softmax(scaled)) >= top_p] = -np.inf
    probabilities = softmax(scaled)
    probabilities[probabilities < settings.get("min_p", 0.0) * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def above(probabilities: np.ndarray) -> np.ndarray:
    """The mass of the tokens that are more probable than each token."""
    return np.array([probabilities[probabilities > p].sum() for p in probabilities])


def probabilities(
    logits: np.ndarray, settings: Mapping[str, Any], prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> np.ndarray:
    """What plain sampling draws the next token from."""
    return filtered(penalised(logits, settings, prompt, generated), settings)
