"""A target that is a table, drafters that are a worse table, and the exact distribution of what they should say.

The next token's logits depend on the last two tokens, so a marginal over two steps sees a wrong history, a wrong row
and a wrong seam between rounds.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.decoding import acceptance
from dflash_jax.decoding.masks import TokenMask
from dflash_jax.decoding.noise import Purpose, gumbel
from dflash_jax.decoding.proposal import Candidates, Proposal
from dflash_jax.decoding.sampling import History, Sampling
from dflash_jax.models.head import Head
from pallas_kernels.head_sampling import Projection
from tests.decoding import reference

VOCAB = 8
CHOICES = 5  # candidates a row
PROMPT = (2, 5)
STOP, LEAST = 3, 2  # where there are rules
HEAD = Head(jnp.eye(VOCAB), Projection("dv"))  # hidden rows are logits


@dataclass(frozen=True)
class Toy:
    """Tables [V, V, V] of logits after (token before last, last token)."""

    seed: int = 0

    @cached_property
    def target(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(size=(VOCAB,) * 3).astype(np.float32) * 1.5

    @cached_property
    def drafter(self) -> np.ndarray:
        noise = np.random.default_rng(self.seed + 1).normal(size=(VOCAB,) * 3).astype(np.float32)
        return self.target + noise

    def exact(self, settings: dict, steps: int, rules: np.ndarray | None = None) -> np.ndarray:
        """The joint distribution [V] * steps of the first tokens under plain sampling.

        `rules` [V, V]: whether the second token may follow the first. STOP is none of the first LEAST tokens then.
        """
        joint = np.zeros((VOCAB,) * steps)

        def extend(generated: tuple[int, ...], mass: float) -> None:
            if len(generated) == steps:
                joint[generated] = mass
            elif mass > 0:
                logits = self.target[(*PROMPT, *generated)[-2:]]
                if rules is not None:
                    logits = np.where(rules[(*PROMPT, *generated)[-1]], logits, -np.inf)
                    logits[STOP] = -np.inf if len(generated) < LEAST else logits[STOP]
                following = reference.probabilities(logits, settings, PROMPT, generated)
                for token in range(VOCAB):
                    extend((*generated, token), mass * following[token])

        extend((), 1.0)
        return joint


def propose(toy: Toy, kind: str, width: int, before: jax.Array, anchor: jax.Array, positions, seed) -> Proposal:
    """Drafts of an imperfect drafter: `argmax`, or `candidates` that are drawn; `ragged` leaves some of those out."""
    noise = gumbel(seed, positions, CHOICES, Purpose.DRAFT)
    tokens, ids, probs = [anchor], [], []
    for row in range(width - 1):
        logits = jnp.asarray(toy.drafter)[before, tokens[-1]]
        values, choices = jax.lax.top_k(logits, CHOICES)
        slot = jnp.argmax(values + noise[:, row] * (kind != "argmax"), axis=-1)
        before = tokens[-1]
        tokens.append(jnp.take_along_axis(choices, slot[:, None], axis=1)[:, 0].astype(jnp.int32))
        ids.append(choices)
        probs.append(jax.nn.softmax(values, axis=-1))
    drafts = jnp.stack(tokens, axis=1)
    if kind == "ragged":
        lengths = (seed.astype(jnp.int32) % 7 + positions[:, 0]) % width
        drafts = jnp.where(jnp.arange(width) <= lengths[:, None], drafts, -1)
    if kind == "argmax" or width == 1:
        return Proposal(drafts)
    return Proposal(drafts, Candidates(jnp.stack(ids, axis=1).astype(jnp.int32), jnp.stack(probs, axis=1)))


def masked(rules: np.ndarray, tokens: jax.Array, positions: jax.Array) -> TokenMask:
    """What may follow each row of a proposal; nothing is left out behind a draft that breaks the rules."""
    follows = jnp.asarray(rules)[tokens[:, :-1], tokens[:, 1:]]
    usable = jnp.pad(jnp.cumprod(follows, axis=1), ((0, 0), (1, 0)), constant_values=1)
    words = jnp.asarray((rules * 2 ** np.arange(VOCAB)).sum(1).astype(np.uint32))[tokens]
    words = jnp.where(usable > 0, words, jnp.uint32(0xFFFFFFFF))[..., None]
    return TokenMask(jnp.full((len(tokens), 1), STOP), positions < len(PROMPT) + LEAST, words)


def one_round(toy: Toy, kind: str, width: int, rules, tokens: jax.Array, length: jax.Array, sampling, history):
    """Propose, look the target up, accept and commit: tokens [B, T] and length [B] of prompt and output."""
    each, rows = jnp.arange(len(length))[:, None], jnp.arange(width)
    before, anchor = tokens[each[:, 0], length - 2], tokens[each[:, 0], length - 1]
    positions = length[:, None] + rows
    proposal = propose(toy, kind, width, before, anchor, positions, sampling.seed)
    previous = jnp.concatenate([before[:, None], proposal.tokens[:, :-1]], axis=1)
    # An absent draft gets logits of noughts, as any would do: nothing may depend on them.
    logits = jnp.where((proposal.tokens >= 0)[..., None], jnp.asarray(toy.target)[previous, proposal.tokens], 0.0)
    mask = None if rules is None else masked(rules, proposal.tokens, positions)
    accepted = acceptance.decide(HEAD, logits, proposal, positions, sampling, history, mask)
    emitted = rows < accepted.count[:, None]
    places = jnp.where(emitted, positions, tokens.shape[1])
    tokens = tokens.at[each, places].set(accepted.emitted, mode="drop")
    return tokens, length + accepted.count, history and history.add(accepted.emitted, emitted), accepted.count


def speculate(
    toy: Toy, kind: str, width: int, sampling: Sampling, steps: int, rules: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """The first `steps` tokens [B, steps] of every request of `sampling`, and the mean tokens a round."""
    batch = sampling.seed.shape[0]
    tokens = jnp.zeros((batch, len(PROMPT) + steps + width), jnp.int32).at[:, : len(PROMPT)].set(jnp.array(PROMPT))
    length = jnp.full(batch, len(PROMPT), jnp.int32)
    history = History.start(tokens, length, VOCAB) if sampling.plan.penalties else None
    step = jax.jit(partial(one_round, toy, kind, width, rules))
    counts = []
    for _ in range(steps):
        tokens, length, history, count = step(tokens, length, sampling, history)
        counts.append(float(count.mean()))
    return np.asarray(tokens[:, len(PROMPT) : len(PROMPT) + steps]), float(np.mean(counts))
