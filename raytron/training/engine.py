"""One rank of a training run: forward, backward, and a step that commits by a vote. No Ray, no global state.

The step has the phases of the commit protocol, each a method, so that a controller can redo or finish a step after a
fault instead of guessing where it stood:

    forward_backward   gradients of this rank's micro-batches, reduced over dp; nothing is mutated but the gradients
    vote               one all-reduce: norm, finiteness, loss, tokens; every rank takes the same decision
    update             local, no collectives; the shard then belongs to the next version
    gather             updated weights to the ranks that do not own them (repeatable)
    publish            the replicated record moves on

Losses are summed, not averaged, until the vote has counted the global batch's tokens; the optimizer divides. So no rank
needs to see another's loss mask, and any split into micro-batches or dp ranks computes the same step. What is summed
is an `Objective`'s affair (losses.py): next-token prediction, or what RL makes of the log-probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from raytron.config import StepConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models.base import ALIGN, ShardedModel, rank_name
from raytron.parallel.collectives import Axis
from raytron.parallel.data import GradientReducer, held_intervals, shard_intervals
from raytron.parallel.layout import Layout, Place
from raytron.parallel.pipeline import Pipeline
from raytron.parallel.schedules import schedule as pipeline_schedule
from raytron.parallel.tensor import ParallelLinear
from raytron.parallel.weight_grad import WeightGradQueue
from raytron.training.agreement import reconcile
from raytron.training.commit import Finish, Resolution, Standing, Vote
from raytron.training.guard import Culprit, Guard, Verdict, find_culprit, square_sum
from raytron.training.losses import NextToken, Objective
from raytron.training.optimizer import FlatAdamW
from raytron.training.recheck import Recheck
from raytron.training.recompute import apply_recompute
from raytron.training.schedule import learning_rate
from raytron.training.shards import gradient_buckets, optimizer_layout

__all__ = ["DTYPES", "Judge", "Record", "StepResult", "TrainEngine", "Vote"]

Judge = Callable[[Tensor, MicroBatch, int, Axis], Tensor]  # logits_TVt, micro-batch, id of the first column, tp axis

# precision -> dtype of weights; gradients and masters are fp32, or fp64 where weights are
DTYPES = {"fp32": torch.float32, "bf16-amp": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass
class Record:
    """The run's replicated state besides tensors: a few numbers, the same on every rank."""

    step: int = 0
    updates: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    nan_steps: int = 0
    norm_mean: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """One committed step. `skipped` says why its update was left out; `culprit` what went bad first; `sums` are the
    objective's, over the whole global batch; `verdict` is on numbers that were doubted, skipped or not."""

    step: int
    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    skipped: str | None = None
    culprit: str | None = None
    sums: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None


class TrainEngine:
    """Trains one rank's part of a model.

    Args:
        model: from `raytron.models.build` or `from_pretrained`, with this rank's world.
        config: what to do. `config.precision` must fit the model's dtype (`DTYPES`).
        objective: what to minimise; by default next-token prediction, which takes a `TrainConfig`.

    Attributes:
        counters: the replicated numbers; with the buffers they are the whole state of a run (see `record`).
        weights: what is trained of `model.weights`: all of it, or the adapters at its end.
        grads: flat gradient buffer beside `weights`: sums over tokens, not yet divided.
        intervals: what of the two this rank's optimizer owns: its own shard, then with twins the one it mirrors.
        shard, owned: intervals and elements of its own shard; without ZeRO the share of the sums that it counts.
        phases_s: host seconds of the last step's phases.
        phase, since: what this rank is in (`commit.PHASES`), and since when by `time.monotonic`.
        whole: whether all weights are of one version, or only what `intervals` says (after `conclude`).

    Raises:
        ValueError: a batch, layer or token count the mesh does not divide; a model of another dtype.
    """

    def __init__(self, model: ShardedModel, config: StepConfig, objective: Objective | None = None) -> None:
        self.model, self.config, self.world = model, config, model.world
        self.objective = objective or NextToken(config.compile)
        self.mesh, self.counters = self.world.mesh, Record()
        self.phases_s: dict[str, float] = {}
        self.whole = True
        self._vote: Vote | None = None  # of the step under way, once passed
        self._last: Vote | None = None  # of the step published last
        self._samples: int | None = None
        self._verdict: Verdict | None = None  # on the step under way
        self._enter("between")
        if model.weights.dtype != DTYPES[config.precision]:
            raise ValueError(
                f"precision {config.precision} needs {DTYPES[config.precision]} weights, the model has "
                f"{model.weights.dtype}; build it with dtype=DTYPES[precision]"
            )
        self._barriers: list[Callable[[], None]] = []
        wide = torch.float64 if config.precision == "fp64" else torch.float32
        self.weights = model.weights[model.frozen :]
        self.grads = torch.zeros_like(self.weights, dtype=wide)
        self._attach_gradients()
        self._cut_shards()
        decay_end = model.decay_end - model.frozen
        self.adamw = FlatAdamW(config.optimizer, self.weights, self.grads, self.intervals, decay_end)
        self._guard = Guard(config.guard)
        apply_recompute(model, config.recompute)
        model.compiled = config.compile
        if config.compile:
            for chunk in model.chunks:
                chunk.compile(dynamic=False)
        self._late = {*self._sums.params} | ({self._twin} if self._twin is not None else set())
        self._pipelines: dict[int, Pipeline] = {}
        self._reported: list[Tensor] = []
        fixed = isinstance(config, TrainConfig) and not self.objective.normalized
        seat = (self.mesh.dp, self.world.coords.dp)
        self.micro_batches = config.micro_batches(*seat, uneven=True) if fixed else None
        if self.micro_batches and self._piped:
            self._pipeline(self.micro_batches)

    # What this rank owns

    def _cut_shards(self) -> None:
        total, dp, parallel = self.weights.numel(), self.world.axis("dp"), self.config.parallel
        self.scatter = parallel.zero and dp.size > 1
        self.twins = self.scatter and parallel.twins
        self._cuts = gradient_buckets(total, parallel, self.grads.element_size(), self.mesh)
        self.shard = shard_intervals(self._cuts, dp.size, dp.index)
        held = held_intervals(self._cuts, dp.size, dp.index, self.twins)
        self.intervals = held if self.scatter else [(0, total)]
        self.owned = sum(stop - start for start, stop in self.shard) if self.scatter else total
        spans = [(slot.offset, slot.offset + slot.numel) for slot in self.model.trained]
        self._reducer = GradientReducer(self.grads, spans, self._cuts, dp, self.scatter, self.twins)
        self._counted, self._copied = (
            _intersect(self._counted_intervals(copies), self.shard) for copies in (False, True)
        )
        self._sums = _TensorSums(self.model, self.grads, self.world.axis("tp"))

    def _counted_intervals(self, copies: bool) -> list[tuple[int, int]]:
        """Flat intervals of the elements that this rank, of its tp and pp peers, counts in norms; or of its copies of
        what others count."""
        twin = self._twin if self.world.coords.pp else None
        out: list[tuple[int, int]] = []
        end = 0  # of the part before, whoever counts it
        for slot in self.model.trained:
            for part in slot.param.parts:
                start = slot.offset + part.offset
                gap, end = start - end, start + math.prod(part.size)
                if (part.replica or slot.param is twin) != copies:
                    continue
                if out and start - out[-1][1] == gap < ALIGN:  # what lies between is an alignment's, and zero
                    out[-1] = (out[-1][0], end)
                else:
                    out.append((start, end))
        return out

    @property
    def _twin(self) -> nn.Parameter | None:
        """A trained parameter whose twin is at the other end of the pipeline, if this rank holds one."""
        twin = self.model.tied_ends()
        return twin if twin in self._index else None

    def optimizer_layout(
        self, place: Callable[[int], Place] = rank_name, version: int = 0, mirrors: bool = True
    ) -> Layout:
        """See `shards.optimizer_layout`."""
        return optimizer_layout(self.model, self.config.parallel, place, version, mirrors)

    # Gradients

    def _attach_gradients(self) -> None:
        """Make autograd accumulate into the flat buffer: directly, or through a hook where weights are narrower."""
        self._index = {slot.param: i for i, slot in enumerate(self.model.trained)}
        self._last_micro = self._overlap = False
        for slot in self.model.trained:
            view = self.grads[slot.offset : slot.offset + slot.numel].view(slot.param.shape)
            hook = self._make_hook(slot.param, view)
            slot.param.register_post_accumulate_grad_hook(hook)
            slot.param.after_accumulate = hook
            if view.dtype == slot.param.dtype:
                slot.param.grad = view

    def _make_hook(self, param: nn.Parameter, view: Tensor) -> Callable[[Tensor], None]:
        narrow, index = view.dtype != param.dtype, self._index[param]

        def accumulated(param: Tensor) -> None:
            self.world.check()  # after a fault nobody waits for the rest of a backward
            if narrow:
                view.add_(param.grad)
                param.grad = None
            if self._last_micro and param not in self._late:
                self._reducer.ready(index)

        return accumulated

    @property
    def _piped(self) -> bool:
        return self.world.axis("pp").size * self.config.parallel.virtual_stages > 1

    def _pipeline(self, micro_batches: int) -> Pipeline:
        """The executor for so many micro-batches; all stages come here for a new number together."""
        if micro_batches not in self._pipelines:
            parallel, axis = self.config.parallel, self.world.axis("pp")
            plan = pipeline_schedule(parallel.schedule, axis.size, micro_batches, parallel.virtual_stages)
            queue = WeightGradQueue() if parallel.schedule == "zero-bubble" else None
            for module in self.model.modules():
                if isinstance(module, ParallelLinear):
                    module.queue = module.queue or queue
                    queue = module.queue
            self._pipelines[micro_batches] = Pipeline(axis, plan, device=self.world.device, weight_grads=queue)
        return self._pipelines[micro_batches]

    def _autocast(self):
        if self.config.precision != "bf16-amp":
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _forward(self, batch: MicroBatch, chunk: int, hidden: Tensor | None, judge: Judge) -> Tensor:
        """One chunk of one micro-batch: hidden states, or from the last what `judge` makes of the logits."""
        self.world.check()
        module, (size, length) = self.model.chunks[chunk], batch.tokens_BS.shape
        seq = self.model.sequences(size, length, batch.position_ids_BS, batch.document_ids_BS, batch.parent_ids_BS)
        with self._autocast():
            out = module(batch.tokens_BS.reshape(-1) if hidden is None else hidden, seq)
        return judge(out, batch, module.head.start, self.world.axis("tp")) if module.last else out

    def _minimise(self, logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis) -> Tensor:
        """The objective's loss sum; its further sums are noted."""
        loss, sums = self.objective(logits_TVt, batch, start, tp)
        if sums is not None:
            self._reported.append(sums)
        return loss

    def _shape(self, batches: Sequence[MicroBatch]) -> Callable[[int], tuple[int, int]]:
        split = self.world.axis("tp").size if self.config.parallel.sequence_parallel else 1
        return lambda micro: (batches[micro].tokens_BS.numel() // split, self.model.arch.hidden_size)

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Gradients of this rank's micro-batches into `grads`, reduced over dp, tp replicas and tied ends.

        Returns this rank's [loss sum, tokens, the objective's sums ...] in float64: zero where another rank counts the
        same tokens.
        """
        batches = self.placed(batches)
        self._check(batches)
        losses = self.accumulate(batches, overlap=True)
        self.reduce()
        return self.count(losses, batches)

    def accumulate(self, batches: Sequence[MicroBatch], overlap: bool = False) -> list[Tensor]:
        """This replica's gradients of placed micro-batches (any number) into `grads`, not reduced over dp, and their
        losses. overlap: reduce meanwhile what is complete; the rest is then for `reduce`. Collective over a replica."""
        assert self.whole, "weights are of two versions: the task has to be reshaped first"
        self._enter("forward_backward")
        assert self.grads.untyped_storage().nbytes(), "the engine is asleep; wake it"
        self.grads.zero_()
        self._reducer.begin()
        self._reported.clear()
        self._overlap = overlap
        run = self._run_pipeline if self._piped else self._run_whole
        losses = run(batches) if batches else []
        self._last_micro = False
        self._sums.all_reduce()
        self._exchange_tied_ends()
        return losses

    def reduce(self) -> None:
        """Sum over dp what `accumulate` left."""
        for index in range(len(self.model.trained)):
            self._reducer.ready(index)
        self._reducer.finish()
        self._enter("vote")

    def placed(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches on this rank's device."""
        device = self.world.device
        if device.type == "cpu":
            return list(batches)
        return [batch.map(lambda tensor: tensor.to(device, non_blocking=True)) for batch in batches]

    def _run_whole(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        losses = []
        for i, batch in enumerate(batches):
            loss = self._forward(batch, 0, None, self._minimise)
            self._last_micro = self._overlap and i == len(batches) - 1
            loss.backward()
            losses.append(loss.detach())
        return losses

    def _run_pipeline(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        return self._pipeline(len(batches)).run(
            lambda chunk, micro, hidden: self._forward(batches[micro], chunk, hidden, self._minimise),
            shape=self._shape(batches),
            dtype=self.model.weights.dtype,
            on_chunk_done=self._chunk_done,
        )

    def _chunk_done(self, chunk: int) -> None:
        if not self._overlap:
            return
        shared = {*self.model.chunks[0].parameters()} & {*self.model.chunks[-1].parameters()}
        for param in self.model.chunks[chunk].parameters():
            late = param in self._late or (len(self.model.chunks) > 1 and param in shared)
            if param in self._index and not late:
                self._reducer.ready(self._index[param])

    def _exchange_tied_ends(self) -> None:
        """Add the two ends' gradients of a tied embedding; a + b = b + a, so both hold the same bits."""
        if self._twin is None:
            return
        axis, slot = self.world.axis("pp"), self.model.trained[self._index[self._twin]]
        mine = self.grads[slot.offset : slot.offset + slot.numel]
        other, peer = torch.empty_like(mine), axis.size - 1 - axis.index
        sent, received = axis.isend(mine, peer), axis.irecv(other, peer)
        sent.wait()
        received.wait()
        mine.add_(other)

    def _check(self, batches: Sequence[MicroBatch]) -> None:
        if self.micro_batches not in (None, len(batches)):
            raise ValueError(f"got {len(batches)} micro-batches, this rank runs {self.micro_batches} in a step")
        tp = self.world.axis("tp").size
        tokens = next((n for batch in batches if (n := batch.tokens_BS.numel()) % tp), 0)
        if self.config.parallel.sequence_parallel and tokens:
            raise ValueError(
                f"micro_batch_size x sequence_length = {tokens} tokens are not divisible by parallel.tp {tp}; change "
                "one of them, or turn parallel.sequence_parallel off"
            )

    def count(self, losses: Sequence[Tensor], batches: Sequence[MicroBatch]) -> Tensor:
        """[loss sum, tokens, the objective's sums ...] of what was just run; zero where another rank counts them."""
        names = self.objective.sums
        if not losses or self.world.coords.tp:
            return torch.zeros(2 + len(names), dtype=torch.float64)
        loss = torch.stack([loss.double() for loss in losses]).sum().cpu()
        tokens = sum(float(batch.loss_mask_BS.sum()) for batch in batches)
        counts = torch.stack((loss, torch.tensor(tokens, dtype=torch.float64)))
        return torch.cat((counts, torch.stack(self._reported).double().sum(0).cpu())) if names else counts

    # The step

    def step(self, batches: Sequence[MicroBatch], samples: int | None = None) -> StepResult:
        """One whole step on this rank's micro-batches (see `GlobalBatches`). Collective over the world.

        samples: in the global batch; the same on every rank, `config.global_batch_size` unless given.

        Raises TrainingStopped after too many skipped steps in a row.
        """
        self._samples, self._verdict = samples, None
        self.phases_s.clear()
        with self._timed("forward_backward"):
            counts = self.forward_backward(batches)
        if self._compares():
            with self._timed("agreement"):
                counts = self._agreed(batches, counts)
        with self._timed("vote"):
            vote = self.vote(counts, last=False)
        culprit = self._culprit(counts) if vote.skip == "non-finite" else None
        if not self.passed:
            with self._timed("recheck"):
                vote, self._verdict = Recheck(self, batches, vote).run(counts)
        lr = self._learning_rate()
        if vote.skip is None:
            with self._timed("update"):
                self.update(vote, lr)
            with self._timed("gather"):
                self.gather()
        return self.publish(vote, lr, culprit, samples)

    def _learning_rate(self) -> float:
        """Of the step after the published one."""
        return learning_rate(self.counters.step, self.config.steps, self.config.optimizer, self.config.schedule)

    def _culprit(self, counts: Tensor) -> Culprit | None:
        """What went bad first. Besides the loss, what ZeRO left of this replica's own gradients says whose it was (with
        twins at dp 2 nothing is left)."""
        edges = [0, *(edge for interval in sorted(self.intervals) for edge in interval), self.grads.numel()]
        own = [counts, *(self.grads[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))]
        at_fault = not all(torch.isfinite(numbers).all() for numbers in own)
        return find_culprit(self.model, self.grads, self.world, at_fault)

    def _enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases_s[phase] = time.perf_counter() - start

    def _compares(self) -> bool:
        """Whether replicas are compared in the step under way."""
        every = self.config.guard.agreement_interval
        return bool(every) and (self.counters.step + 1) % every == 0

    def _agreed(self, batches: Sequence[MicroBatch], counts: Tensor) -> Tensor:
        """Compare replicas before anything is made of the gradients; where a few held wrong numbers these have been
        brought from the others, and the batch is done again."""
        self._verdict = reconcile(self)
        return counts if self._verdict is None else self.forward_backward(batches)

    def vote(self, counts: Tensor, last: bool = True) -> Vote:
        """All ranks agree on loss, norm, tokens and whether to apply the step. One all-reduce of a few float64.

        last: it is passed whatever came out. Otherwise a doubtful one is not: all do the batch again (recheck.py), and
        whoever is lost meanwhile leaves a step that nobody voted on.
        """
        squares = sum((square_sum(self.grads[a:b]) for a, b in self._counted), torch.zeros((), dtype=torch.float64))
        for a, b in self._copied:  # another rank counts them, but here they may be bad all the same
            squares += 0.0 * square_sum(self.grads[a:b])
        ballot = torch.cat((counts, squares.reshape(1)))
        loss_sum, tokens, *sums, square = self.world.axis("world").all_reduce_(ballot).tolist()
        if tokens == 0:
            raise ValueError("no token of the global batch counts for the loss; check the data's loss mask")
        divisor = 1.0 if self.objective.normalized else tokens
        norm = math.sqrt(square) / divisor if square >= 0 else math.nan
        loss = loss_sum / divisor
        named = dict(zip(self.objective.sums, sums, strict=True))
        skip = self._guard.judge(loss, norm, self.counters)
        vote = Vote(loss, norm, int(tokens), skip, divisor, named)
        doubted = not last and self.doubt(vote) is not None
        self._vote = None if doubted else vote
        return vote

    def doubt(self, vote: Vote) -> str | None:
        """See `Guard.doubt`."""
        return self._guard.doubt(vote.grad_norm, vote.skip, self.counters)

    @property
    def passed(self) -> bool:
        """Whether the vote of the step under way was passed."""
        return self._vote is not None

    def update(self, vote: Vote, lr: float) -> None:
        """Apply the gradients to what this rank owns. Local."""
        self.settle()
        clip = self.config.optimizer.clip_grad
        shrink = max(1.0, (vote.grad_norm + 1e-6) / clip) if clip > 0 else 1.0
        self._enter("update")
        self.adamw.step(lr, self.counters.updates + 1, vote.divisor * shrink)
        self._enter("gather")

    def gather(self) -> None:
        """Bring updated weights to every dp rank."""
        if not self.scatter:
            return
        axis = self.world.axis("dp")
        handles = [axis.all_gather_into_(self.weights[a:b], async_op=True) for a, b in self._cuts]
        for handle in handles:
            handle.wait()

    def publish(self, vote: Vote, lr: float, culprit: Culprit | None = None, samples: int | None = None) -> StepResult:
        """Move the record on: the version every rank's bytes now belong to is `counters.step`."""
        record = self.counters
        record.step += 1
        record.consumed_samples += self.config.global_batch_size if samples is None else samples
        record.consumed_tokens += vote.tokens
        self._guard.count(record, vote.skip, vote.grad_norm)
        self._vote, self._last = None, vote
        self._enter("between")
        blame = str(culprit) if culprit and vote.skip else None
        told = (vote.skip, blame, vote.sums, self._verdict)
        result = StepResult(record.step, vote.loss, vote.grad_norm, vote.tokens, lr, *told)
        self._guard.check(record, result.culprit)
        return result

    # After a fault (commit.py)

    def standing(self) -> Standing:
        """Where this rank is, once nothing runs on it any more."""
        return Standing(self.counters.step, self.phase, self._vote, self._last, self.whole)

    def conclude(self, resolution: Resolution) -> StepResult | None:
        """Do this rank's part of what `resolve` found. Local: no collectives, and no other rank is needed.

        After it everything that `intervals` names is of version `resolution.step`, as is the record. The other weights
        are too, unless `whole` says otherwise; then only a new engine, on a new mesh, goes on (reshape.py).

        Returns the step's result where it was finished here, None where nothing was left to do.

        Raises TrainingStopped like `step`.
        """
        behind = resolution.step - self.counters.step
        assert behind in (0, 1), f"at step {self.counters.step} there is no way to version {resolution.step}"
        vote, phase = self._vote, self.phase
        if not behind:
            self._vote = None
            self._enter("between")
            return None
        assert isinstance(resolution, Finish), f"a step is begun anew while a rank is at {resolution.step - 1}"
        assert phase in ("vote", "gather"), f"version {resolution.step} was voted on without this rank, in {phase}"
        assert vote is None or vote.skip == resolution.vote.skip
        lr = self._learning_rate()
        if resolution.vote.skip is None:
            if phase == "vote":
                self.update(resolution.vote, lr)
            self.whole = not self.scatter
        return self.publish(resolution.vote, lr, None, self._samples)

    # Turns with others on the same device

    def sleep(self) -> None:
        """Give back the memory that only a step needs, until `wake`: gradients, and on a GPU the optimizer's state,
        which waits in host memory. Weights stay: they can be scored with, saved and published meanwhile."""
        self.settle()
        self.adamw.shelve()
        self.grads.untyped_storage().resize_(0)  # parameters and reducer go on viewing it
        if self.grads.is_cuda:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take it anew; without `sleep` nothing happens."""
        self.adamw.unshelve()
        storage = self.grads.untyped_storage()
        if storage.nbytes() != self.grads.nbytes:
            storage.resize_(self.grads.nbytes)

    def tear(self) -> None:
        """What this rank holds is wrong, and about to be overwritten: found here, it counts among the lost."""
        self.settle()
        self._enter("update")

    def settle(self) -> None:
        """Wait for whoever still reads the weights (see `add_barrier`); after it they may change."""
        for barrier in self._barriers:
            barrier()

    def add_barrier(self, barrier: Callable[[], None]) -> None:
        """Call `barrier` before weights or optimizer state change: an asynchronous save finishes its copy there."""
        self._barriers.append(barrier)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """[loss sum, tokens, the objective's sums ...] of this rank's micro-batches summed over the world, float64.
        Collective."""
        self._reported.clear()
        losses = self.score(batches, self._minimise)
        return self.world.axis("world").all_reduce_(self.count(losses, batches))

    @torch.no_grad()
    def score(self, batches: Sequence[MicroBatch], judge: Judge) -> list[Tensor]:
        """What `judge(logits_TVt, micro-batch, first column's id, tp axis)` makes of each micro-batch; no gradients.

        Collective over a replica. The results are on the ranks of the last stage; others return nothing.
        """
        batches = self.placed(batches)
        self._check(batches)
        if not self._piped:
            return [self._forward(batch, 0, None, judge) for batch in batches]
        return self._pipeline(len(batches)).evaluate(
            lambda chunk, micro, hidden: self._forward(batches[micro], chunk, hidden, judge),
            shape=self._shape(batches),
            dtype=self.model.weights.dtype,
        )

    # State

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """This rank's optimizer buffers by name, each laid out as `optimizer_layout` says; fill in place to restore."""
        return self.adamw.state

    @property
    def saved_optimizer(self) -> dict[str, Tensor]:
        """The same without what is mirrored here, which its owner saves."""
        return {name: flat[: self.owned] for name, flat in self.adamw.state.items()}

    @property
    def record(self) -> dict[str, int | float]:
        """The replicated numbers, JSON-ready; assign a saved one to restore it."""
        return asdict(self.counters)

    @record.setter
    def record(self, saved: dict[str, int | float]) -> None:
        self.counters = Record(**saved)


class _TensorSums:
    """Sums over tp the gradients of weights that several ranks hold and each computed a share of.

    One flat buffer and one all-reduce for all of them. A weight held by `replicas` of the ranks takes tp / replicas
    slots of the buffer, so that a key/value head shared by two ranks is summed over just those two.
    """

    def __init__(self, model: ShardedModel, grads: Tensor, tp) -> None:
        self._tp, self._places, self.params, end = tp, [], set(), 0
        for slot in model.trained:
            for part in slot.param.parts:
                if not part.partial:
                    continue
                self.params.add(slot.param)
                size, groups = math.prod(part.size), tp.size // part.replicas
                start = slot.offset + part.offset
                at = end + tp.index // part.replicas * size
                self._places.append((grads[start : start + size], at, at + size))
                end += groups * size
        self._buffer = grads.new_zeros(end)

    def all_reduce(self) -> None:
        if not self._places:
            return
        self._buffer.zero_()
        for grad, start, stop in self._places:
            self._buffer[start:stop] = grad
        self._tp.all_reduce_(self._buffer)
        for grad, start, stop in self._places:
            grad.copy_(self._buffer[start:stop])


def _intersect(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    pairs = ((max(p[0], q[0]), min(p[1], q[1])) for p in a for q in b)
    return [(start, stop) for start, stop in pairs if start < stop]
