"""Pretrain a Llama 3 (or any preset of `raytron models`) on your text, or on mock data until you name some.

One node of 8 GPUs, then 64 GPUs (on a cluster: `ray job submit --working-dir . -- python recipes/llama3.py ...`):
    python recipes/llama3.py --data.path corpus.jsonl --data.tokenizer /models/Meta-Llama-3-8B
    python recipes/llama3.py --model.preset llama3-70b --parallel.tp 8 --parallel.pp 4 --scaling.num-workers 64

A laptop:
    python recipes/llama3.py --model.preset llama-3m --data.sequence-length 256 --global-batch-size 8 --steps 20 \\
        --scaling.num-workers 2 --scaling.no-use-gpu --run.name laptop
"""

from dataclasses import replace

from raytron.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
    cli,
)  # fmt: skip

config = PretrainConfig(
    model=ModelConfig(preset="llama3-8b"),
    data=DataConfig(sequence_length=8192),
    parallel=ParallelConfig(tp=2),
    optimizer=OptimizerConfig(lr=1.5e-4, min_lr=1e-5, weight_decay=0.1),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=100),
    precision="bf16",
    global_batch_size=128,
    steps=5000,
    evaluation=EvalConfig(interval=500, batches=4),
    scaling=ScalingConfig(num_workers=8, use_gpu=True),
    run=RunConfig(name="llama3", checkpoint_config=CheckpointConfig(interval=500)),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import pretrain
    from raytron.models import resolve

    if not (config.data.path or config.data.blend):  # null:N has one entry more than N, the end of a document
        mock = replace(config.data, mock=True, tokenizer=f"null:{resolve(config.model).vocab_size - 1}")
        config = replace(config, data=mock)
    pretrain.run(config)
