"""The peer's side of elastic.py: Ray Train v2 and DDP on a cluster of its own, while a drill is done to it.

    python -m _elastic.peer FOLDER DRILL

As fast to come back as it can be made from outside: polled ten times a second, no watcher and no logs that cost a
process or a file, a rank whose collective fails leaves at once (its peers then need not wait for gloo's time-out, and
the controller not for theirs), checkpoints written in the background from a copy and read through the page cache, no
package imported in a worker but torch. A plain Llama rather than that of transformers, which takes seconds to import.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _elastic.drill import BATCH, LENGTH, RANKS, Deeds, Drill, Ledger, nodes

TUNED = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # 2
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2",  # 60: so long it waits for seats that are not there
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less to start
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # 30
}
MONITOR_S = 1.0  # 60: how often it looks for nodes that came


class Block(nn.Module):
    """Grouped-query attention and SwiGLU."""

    def __init__(self, hidden: int, ffn: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, hidden // heads
        self.input_norm, self.post_norm = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)
        self.qkv = nn.Linear(hidden, (heads + 2 * groups) * self.size, bias=False)
        self.out, self.down = nn.Linear(hidden, hidden, bias=False), nn.Linear(ffn, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)

    def forward(self, x_BTH: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        parts = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in self.qkv(self.input_norm(x_BTH)).split(parts, -1)
        )
        q, k = (
            t * cos_TK + torch.cat((-t[..., self.size // 2 :], t[..., : self.size // 2]), -1) * sin_TK for t in (q, k)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_BTH = x_BTH + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.post_norm(x_BTH)).chunk(2, -1)
        return x_BTH + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """The same sizes as ours. Returns the loss."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        shape = (hidden, sizes["intermediate_size"], heads, sizes["num_key_value_heads"])
        self.embed = nn.Embedding(sizes["vocab_size"], hidden)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(sizes["num_hidden_layers"]))
        self.norm, self.head = nn.RMSNorm(hidden, 1e-5), nn.Linear(hidden, sizes["vocab_size"], bias=False)
        size = hidden // heads
        turns = torch.outer(torch.arange(LENGTH), sizes["rope_theta"] ** -(torch.arange(0, size, 2) / size)).repeat(
            1, 2
        )
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTH = self.embed(tokens_BT[:, :-1])
        for block in self.blocks:
            x_BTH = block(x_BTH, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x_BTH)).flatten(0, 1), tokens_BT[:, 1:].flatten())


class Training:
    """One worker's."""

    def __init__(self, told: dict[str, Any]) -> None:
        import ray.train

        torch.set_num_threads(1)
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        self.folder, self.drill = told["folder"], Drill.read(told["drill"])
        self.ledger = Ledger(self.folder)
        self.ledger.seat(self.rank, self.ranks)
        torch.manual_seed(0)
        self.data = torch.load(Path(self.folder, "data.pt"), mmap=True)
        self.model = Llama(self.drill.sizes)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.step = self.restore(ray.train.get_checkpoint())
        self.parallel = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def restore(self, checkpoint: Any) -> int:
        """Go on from a checkpoint, if there is one; its step."""
        if checkpoint is None:
            return 0
        state = torch.load(Path(checkpoint.path, "state.pt"), mmap=True)
        self.model.load_state_dict(state["model"], assign=False)
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def run(self) -> None:
        """Steps until there is a file named stop."""
        going = True
        while going:
            start = time.time()
            going = self.train_step()
            self.step += 1
            if self.rank == 0:
                self.ledger.step(self.step, start, self.ranks)
            if self.step % self.drill.interval == 0:
                self.save()

    def train_step(self) -> bool:
        """One step; whether to go on."""
        first = self.step * BATCH % len(self.data) + self.rank * BATCH // self.ranks
        tokens_BT = self.data[first : first + BATCH // self.ranks]
        loss = self.parallel(tokens_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        agreed = torch.tensor([loss.item(), float(Path(self.folder, "stop").exists())])
        torch.distributed.all_reduce(agreed)
        return not agreed[1]

    def save(self) -> None:
        """Copy the state, and write it while the steps go on."""
        import ray.train
        from ray.train import Checkpoint
        from ray.train.v2.api.report_config import CheckpointUploadMode

        if self.rank:
            ray.train.report({}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        path = Path(self.folder, "run", f"checkpoint-{self.step}-{time.time()}")
        state = {"step": self.step, "model": _copied(self.model.state_dict())}
        state["optimizer"] = _copied(self.optimizer.state_dict())

        def write(checkpoint: Checkpoint, name: str) -> Checkpoint:
            path.mkdir(parents=True)
            torch.save(state, path / "state.pt")
            return checkpoint

        ray.train.report(
            {},
            checkpoint=Checkpoint(path),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=write,
        )


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


def train(told: dict[str, Any]) -> None:
    """What every worker runs."""
    try:
        Training(told).run()
    except RuntimeError:  # a peer is gone
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main(folder: str, drill: Drill) -> None:
    os.environ.update(TUNED)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    torch.save(torch.randint(0, drill.sizes["vocab_size"], (64 * BATCH, LENGTH + 1)), Path(folder, "data.pt"))
    elastic = drill.fewest < RANKS
    scaling = ScalingConfig(
        num_workers=(drill.fewest, RANKS) if elastic else RANKS, elastic_resize_monitor_interval_s=MONITOR_S
    )
    run = RunConfig("run", folder, None, FailureConfig(max_failures=-1), CheckpointConfig(num_to_keep=2))
    told = {"folder": folder, "drill": drill.text()}
    with nodes(drill.nodes) as cluster, Deeds(cluster, folder, drill, lambda: True, Path(folder, "stop").touch):
        trainer = TorchTrainer(
            train,
            train_loop_config=told,
            scaling_config=scaling,
            run_config=run,
            torch_config=TorchConfig(timeout_s=30),
        )
        trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1], Drill.read(sys.argv[2]))
