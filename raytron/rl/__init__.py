"""Reinforcement learning: rollouts, rewards, algorithms, and the loop that joins them."""

__all__: list[str] = []
