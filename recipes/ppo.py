"""Reinforce a policy with PPO and a critic: a tiny one learns to copy four digits, in a few minutes on a laptop.

python recipes/ppo.py
python recipes/ppo.py --task.name reverse --algorithm.lam 0.95 --run.name reverse
"""

from raytron.config import EngineConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, cli
from raytron.rl.config import AlgorithmConfig, RLConfig, RLEvalConfig, RolloutConfig, TaskConfig

config = RLConfig(
    model=ModelConfig(preset="llama-tiny"),
    task=TaskConfig(name="copy"),
    algorithm=AlgorithmConfig(name="ppo", clip_high=0.28, entropy_coefficient=0.03),
    rollout=RolloutConfig(engine=EngineConfig(max_num_seqs=512, max_batched_tokens=4096, kv_cache_mb=64)),
    prompts=32,
    group_size=16,
    steps=250,
    optimizer=OptimizerConfig(lr=2e-3, min_lr=0.0, beta2=0.99, weight_decay=0.0),
    critic=OptimizerConfig(lr=3e-3, min_lr=0.0, weight_decay=0.0),
    schedule=ScheduleConfig(kind="linear"),
    evaluation=RLEvalConfig(interval=50),
    run=RunConfig(name="ppo"),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import rl

    rl.run(config)
