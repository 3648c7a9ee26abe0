"""Reading a config.json key by key, so that a key nobody asked for is noticed."""

from collections.abc import Iterable
from typing import Any

from dflash_jax.errors import InputError

_REQUIRED = object()

# Keys that describe the file, the training or the tokenizer, never the forward computation.
HARMLESS = frozenset((
    "_name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation", "architectures", "auto_map",
    "transformers_version", "tokenizer_class", "dtype", "torch_dtype", "use_cache", "cache_implementation",
    "output_hidden_states", "output_attentions", "output_router_logits", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range", "attention_dropout",
    "router_aux_loss_coef", "pad_token_id", "bos_token_id", "pretraining_tp", "initial_context_length",
    "max_window_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "num_nextn_predict_layers",
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "language_model_only", "is_decoder", "is_llama_config", "torchscript", "use_bfloat16", "pruned_heads", "prefix",
    "tie_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "finetuning_task", "tf_legacy_loss",
    "task_specific_params", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "unsloth_fixed", "unsloth_version",
))  # fmt: skip


def is_harmless(key: str) -> bool:
    """Whether a key cannot change the logits: names, ids that only text handling uses, old generation settings."""
    return key in HARMLESS or key.startswith(("_", "transformers.")) or key.endswith("_token_id")


# Keys that would change the computation, with the only values that are computed here.
FIXED = {
    "hidden_act": ("silu", "swish"),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
    "mamba_ssm_dtype": ("float32",),
    "swiglu_alpha": (1.702,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "mlp_bias": (False,),  # where the family may have one it is read
}


class Reader:
    """One JSON object of a configuration. A null value counts as absent.

    `where` opens every message; `finish` refuses the keys that were neither read nor known to be harmless.
    """

    def __init__(self, values: dict[str, Any], where: str):
        self._values = {key: value for key, value in values.items() if value is not None}
        self._unread = set(self._values)
        self._where = where

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def error(self, message: str) -> InputError:
        """An error about this object, to be raised."""
        return InputError(f"{self._where}: {message}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Any value; InputError when it is absent and has no default."""
        self._unread.discard(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise self.error(
                f"{key} is missing; the model cannot be built without it, take config.json from the original checkpoint"
            )
        return value

    def integer(self, key: str, default: Any = _REQUIRED, at_least: int = 1) -> int:
        """A whole number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise self.error(f"{key} is {value!r}, a whole number of at least {at_least} is needed")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A whole or fractional number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} is {value!r}, a number is needed")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, true or false is needed")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of token or layer ids; a single number counts as a list of one."""
        value = self.get(key, default)
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self.error(f"{key} is {value!r}, whole numbers of at least 0 are needed")
        return tuple(items)

    def mapping(self, key: str) -> dict[str, Any]:
        """A nested object, empty when absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(f"{key} is {value!r}, a JSON object is needed")
        return value

    def either(self, keys: Iterable[str], default: Any = _REQUIRED) -> int:
        """A number that goes by several names; names that are given together must agree."""
        keys = tuple(keys)
        given = {key: self.integer(key) for key in keys if key in self}
        if len(set(given.values())) > 1:
            raise self.error(f"{given} disagree, keep one of them")
        return next(iter(given.values())) if given else self.integer(keys[0], default)

    def finish(self, prefix: str = "") -> None:
        """Refuse what nobody asked for; `prefix` stands before the keys in the message."""
        for key in sorted(self._unread & FIXED.keys()):
            if self._values[key] not in FIXED[key]:
                accepted = " or ".join(repr(value) for value in FIXED[key])
                raise self.error(f"{prefix}{key} is {self._values[key]!r}, only {accepted} is supported")
        unknown = [prefix + key for key in sorted(self._unread - FIXED.keys()) if not is_harmless(key)]
        if unknown:
            raise self.error(
                f"not understood: {', '.join(unknown)}; these may change the computation, "
                "remove them from config.json if they do not"
            )
