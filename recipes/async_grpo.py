"""GRPO with engines that run ahead of the trainer: answers are at most two versions old, and change weights in flight.

    python recipes/async_grpo.py
    python recipes/async_grpo.py --max-staleness 1 --rollout.engines 1

What was sampled by older weights is corrected for by the ratio to the engine's own log-probabilities.
"""

from raytron.config import EngineConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, cli
from raytron.rl.config import AlgorithmConfig, RLConfig, RLEvalConfig, RolloutConfig, TaskConfig

config = RLConfig(
    model=ModelConfig(preset="llama-tiny"),
    task=TaskConfig(name="copy"),
    algorithm=AlgorithmConfig(name="grpo", clip_high=0.28, entropy_coefficient=0.02),
    rollout=RolloutConfig(engines=2, engine=EngineConfig(max_num_seqs=256, max_batched_tokens=4096, kv_cache_mb=64)),
    max_staleness=2,
    prompts=32,
    group_size=16,
    steps=250,
    optimizer=OptimizerConfig(lr=2e-3, min_lr=0.0, beta2=0.99, weight_decay=0.0),
    schedule=ScheduleConfig(kind="linear"),
    evaluation=RLEvalConfig(interval=50),
    run=RunConfig(name="async-grpo"),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import rl

    rl.run(config)
