"""A training loop one reads in a minute: no driver, no Ray. Mock data, so there is nothing to prepare.

One process, then two that share the samples of a batch, then two that share every layer: the same steps, but for
rounding.
    python recipes/simple_loop.py
    torchrun --standalone --nproc-per-node 2 recipes/simple_loop.py
    torchrun --standalone --nproc-per-node 2 recipes/simple_loop.py --parallel.tp 2
"""

import os

from raytron.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, cli

config = TrainConfig(
    optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4),
    schedule=ScheduleConfig(warmup_steps=10),
    global_batch_size=4,
    micro_batch_size=2,
    steps=50,
)
data = DataConfig(mock=True, tokenizer="null:1023", sequence_length=128, cache_path="runs/simple-loop")

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from raytron.data import GlobalBatches, build_datasets, prepare
    from raytron.models import build
    from raytron.parallel import Mesh
    from raytron.parallel.collectives import World
    from raytron.training import DTYPES, TrainEngine

    tp, pp = config.parallel.tp, config.parallel.pp
    dp = max(1, int(os.environ.get("WORLD_SIZE", "1")) // (tp * pp))
    world = World.from_env(Mesh(dp=dp, pp=pp, tp=tp))
    model = build("llama-3m", world, parallel=config.parallel, dtype=DTYPES[config.precision], seed=config.seed)
    engine = TrainEngine(model, config)

    train, _, _ = build_datasets(data, prepare(data), config.steps * config.global_batch_size)
    batches = GlobalBatches(train, config.global_batch_size, config.micro_batch_size, data.sequence_length)
    for _ in range(config.steps):
        result = engine.step(batches.read(engine.counters.consumed_samples, world.coords.dp, dp))
        if world.rank == 0:
            print(f"step {result.step:4}  loss {result.loss:.4f}  gradient norm {result.grad_norm:.3f}", flush=True)
    world.close()
