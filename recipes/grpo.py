"""Reinforce a policy with GRPO: by default a tiny one learns to echo a digit, in a minute on a laptop.

    python recipes/grpo.py
    python recipes/grpo.py --task.name copy --steps 150 --group-size 16 --optimizer.lr 2e-3 --run.name copy

Llama 3 on grade-school mathematics, on a node of 8 GPUs (4 train, 4 answer):
    python recipes/grpo.py --run.name gsm8k --model.path /models/Llama-3.2-1B-Instruct --precision bf16 \\
        --task.name gsm8k --task.options path gsm8k/train.jsonl tokenizer /models/Llama-3.2-1B-Instruct \\
        --scaling.num-workers 4 --scaling.use-gpu --rollout.engines 4 --rollout.gpus 1 --rollout.engine.engine vllm \\
        --prompts 128 --group-size 16 --micro-batch-tokens 32768 --optimizer.lr 1e-6 \\
        --schedule.kind constant --algorithm.entropy-coefficient 0
"""

from raytron.config import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    cli,
)
from raytron.rl.config import AlgorithmConfig, RLConfig, RLEvalConfig, RolloutConfig, TaskConfig

config = RLConfig(
    model=ModelConfig(preset="llama-tiny"),
    task=TaskConfig(name="echo-digit"),
    algorithm=AlgorithmConfig(name="grpo", clip_high=0.28, entropy_coefficient=0.1),
    rollout=RolloutConfig(engine=EngineConfig(max_num_seqs=256, max_batched_tokens=4096, kv_cache_mb=64)),
    prompts=32,
    group_size=8,
    steps=60,
    optimizer=OptimizerConfig(lr=3e-3, min_lr=0.0, beta2=0.99, weight_decay=0.0),
    schedule=ScheduleConfig(kind="linear"),
    evaluation=RLEvalConfig(interval=20),
    run=RunConfig(name="grpo", checkpoint_config=CheckpointConfig(interval=20)),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import rl

    rl.run(config)
