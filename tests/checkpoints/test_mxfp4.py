"""The MXFP4 experts of gpt-oss: decoded exactly, and into the place of their dequantised copies."""

import numpy as np
import pytest

from dflash_jax.checkpoints import load_target
from dflash_jax.checkpoints.mxfp4 import VALUES, dequantise
from tests.checkpoints.folders import assert_same, change, change_config, target_folder


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest MXFP4 of [..., 32 n]: blocks [..., n, 16], scales [..., n] and the values they stand for."""
    groups = values.reshape(*values.shape[:-1], -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6)).astype(int)
    scaled = groups / 2.0 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - VALUES).argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    decoded = VALUES[codes] * 2.0 ** exponents[..., None]
    return blocks, (exponents + 127).astype(np.uint8), decoded.reshape(values.shape).astype(np.float32)


def pack(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The checkpoint with its experts in MXFP4 [E, out, in], and with what those decode to [E, in, out]."""
    packed, plain = {}, {}
    for key, value in tensors.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[key + "_blocks"], packed[key + "_scales"], decoded = quantise(value.swapaxes(1, 2))
            plain[key] = decoded.swapaxes(1, 2)
        else:
            packed[key] = plain[key] = value
    return packed, plain


def test_packed_and_dequantised_checkpoints_load_to_the_same(tmp_path):
    for name in ("packed", "plain"):
        target_folder(tmp_path / name, "gpt_oss")
    change(tmp_path / "packed", lambda t: pack(t)[0])
    change(tmp_path / "plain", lambda t: pack(t)[1])
    change_config(tmp_path / "packed", lambda c: c | {"quantization_config": {"quant_method": "mxfp4"}})
    packed, plain = (load_target(tmp_path / name)[1] for name in ("packed", "plain"))
    assert_same(packed, plain)
    assert len(np.unique(np.abs(packed.layers[0].mlp.experts.down[...]))) < 64  # quantised indeed


def test_decoding_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (2, 6, 3), dtype=np.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    ours = dequantise(blocks.reshape(-1), scales.reshape(-1)).reshape(2, 6, 96)
    np.testing.assert_array_equal(ours.swapaxes(1, 2), theirs.numpy())
