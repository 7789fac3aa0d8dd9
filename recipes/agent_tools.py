"""A policy in several turns: it guesses a number and is told higher or lower, or calls a calculator as a tool.

    python recipes/agent_tools.py
    python recipes/agent_tools.py --task.name calculator --steps 200 --run.name calculator

What the environment says is part of the context and masked from the loss. Your own: a class with `reset` and `step`
(raytron.rl.environments), in a task given as `rl.run(config, task=...)`.
"""

from raytron.config import EngineConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, cli
from raytron.rl.config import AlgorithmConfig, RLConfig, RLEvalConfig, RolloutConfig, TaskConfig

config = RLConfig(
    model=ModelConfig(preset="llama-tiny"),
    task=TaskConfig(name="higher-lower"),
    algorithm=AlgorithmConfig(name="grpo", clip_high=0.28, entropy_coefficient=0.1),
    rollout=RolloutConfig(engine=EngineConfig(max_num_seqs=512, max_batched_tokens=4096, kv_cache_mb=64)),
    prompts=16,
    group_size=32,
    steps=100,
    optimizer=OptimizerConfig(lr=2e-3, min_lr=0.0, beta2=0.99, weight_decay=0.0),
    schedule=ScheduleConfig(kind="constant"),
    evaluation=RLEvalConfig(interval=25),
    run=RunConfig(name="agent"),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import rl

    rl.run(config)
