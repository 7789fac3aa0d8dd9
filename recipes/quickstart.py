"""Pretrain a 3M Llama on Python's own library, on four shard actors (TP 2 x PP 2), serve it and ask it something; then
reinforce a tiny policy until it echoes a digit.

A few minutes on two CPU cores; then longer, or on your own text:
    python recipes/quickstart.py
    python recipes/quickstart.py --steps 2000 --run.name longer
    python recipes/quickstart.py --data.path notes.txt --run.name notes
"""

from dataclasses import replace

from raytron.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
    cli,
)
from raytron.rl.config import RLConfig, RolloutConfig, TaskConfig

config = PretrainConfig(
    model=ModelConfig(preset="llama-3m"),
    data=DataConfig(tokenizer="bpe:1024", sequence_length=256, split="98,2,0"),
    parallel=ParallelConfig(tp=2, pp=2),
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4),
    schedule=ScheduleConfig(warmup_steps=10),
    global_batch_size=8,
    micro_batch_size=4,
    steps=180,
    evaluation=EvalConfig(interval=90, batches=8),
    scaling=ScalingConfig(num_workers=4),
    run=RunConfig(name="quickstart", checkpoint_config=CheckpointConfig(interval=90)),
)

policy = RLConfig(
    model=ModelConfig(preset="llama-tiny"),
    task=TaskConfig(name="echo-digit"),
    rollout=RolloutConfig(engine=EngineConfig(max_num_seqs=256, max_batched_tokens=4096, kv_cache_mb=64)),
    steps=40,
    optimizer=OptimizerConfig(lr=3e-3, min_lr=0.0, weight_decay=0.0),
    schedule=ScheduleConfig(kind="constant"),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import pretrain, rl
    from raytron.data import write_stdlib_corpus
    from raytron.serving.app import ask_once

    if not (config.data.path or config.data.blend):
        corpus = write_stdlib_corpus(f"runs/{config.run.name}/corpus.jsonl")
        config = replace(config, data=replace(config.data, path=str(corpus)))
    result = pretrain.run(config)
    if result.checkpoint is None:
        raise SystemExit("no checkpoint was saved, so there is no model to write with")
    prompt = "class Reader:\n    def read(self, size=-1):\n        "
    text = ask_once(f"{result.checkpoint.path}/model", prompt, max_tokens=100)
    print(f"\nThe model continues:\n\n{prompt}{text}\n\nNow a policy that knows nothing learns to echo a digit:\n")
    rl.run(replace(policy, run=replace(config.run, name=f"{config.run.name}-rl")))
