"""Models small enough to train in a test."""

from train.target import Architecture

TARGET = Architecture(
    hidden_size=16, periods=1, period=3, num_heads=2, num_kv_heads=1, head_dim=8, delta_k_heads=1, delta_v_heads=2,
    delta_head_dim=8, num_experts=4, expert_size=8, shared_expert_size=8,
)  # fmt: skip
