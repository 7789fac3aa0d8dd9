"""Pretrain a 3M Llama on Python's own library, on four shard actors (TP 2 x PP 2), and read what it writes.

python recipes/quickstart.py                       # a few minutes on two CPU cores
python recipes/quickstart.py --steps 2000 --run.name longer
"""

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
    model=ModelConfig(preset="llama-3m"),
    data=DataConfig(path="runs/quickstart/corpus.jsonl", tokenizer="bpe:4096", sequence_length=256, split="98,2,0"),
    parallel=ParallelConfig(tp=2, pp=2),
    optimizer=OptimizerConfig(lr=4e-3, min_lr=4e-4),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=20),
    global_batch_size=16,
    micro_batch_size=4,
    steps=300,
    evaluation=EvalConfig(interval=100, batches=8),
    scaling=ScalingConfig(num_workers=4),
    run=RunConfig(name="quickstart", checkpoint_config=CheckpointConfig(interval=100)),
)

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron import pretrain
    from raytron.data import load_tokenizer, write_stdlib_corpus
    from raytron.inference import sample
    from raytron.models import from_pretrained

    write_stdlib_corpus("runs/quickstart/corpus.jsonl")
    result = pretrain.run(config)
    directory = f"{result.checkpoint.path}/model"
    model, tokenizer = from_pretrained(directory), load_tokenizer(directory)
    prompt = "def read(self, size=-1):\n"
    text = sample(model, tokenizer.encode(prompt), 100, temperature=0.7, stop=tokenizer.eod)
    print(f"\nThe model continues:\n\n{prompt}{tokenizer.decode(text)}")
