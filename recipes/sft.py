"""Fine-tune a model on prompts and answers: by default a tiny new one learns small word problems, in about a minute.

    python recipes/sft.py
    python recipes/sft.py --data.path pairs.jsonl --data.held-out 100 --epochs 3 --run.name pairs

Llama 3 on your own JSONL of prompts and responses, or of chats ("messages"), on a node of 8 GPUs:
    python recipes/sft.py --run.name llama3-sft --model.path /models/Llama-3.1-8B-Instruct --data.path chats.jsonl \\
        --data.held-out 200 --data.sequence-length 8192 --data.overlong truncate --precision bf16 \\
        --parallel.tp 2 --scaling.num-workers 8 --scaling.use-gpu --global-batch-size 32 --optimizer.lr 1e-5 \\
        --epochs 2 --answers 0
"""

from dataclasses import replace

from raytron.config import (
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SFTConfig,
    SFTDataConfig,
    cli,
)

config = SFTConfig(
    model=ModelConfig(preset="llama-tiny"),
    data=SFTDataConfig(sequence_length=256),
    epochs=3,
    global_batch_size=8,
    micro_batch_size=4,
    optimizer=OptimizerConfig(lr=3e-3, min_lr=0.0, weight_decay=0.0),
    schedule=ScheduleConfig(warmup_steps=10),
    evaluation=EvalConfig(interval=50, batches=8),
    run=RunConfig(name="sft"),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import sft
    from raytron.data import write_word_problems

    if config.data.path is None:
        path = write_word_problems(f"runs/{config.run.name}/problems.jsonl")
        config = replace(config, data=replace(config.data, path=str(path), held_out=100))
    sft.run(config)
