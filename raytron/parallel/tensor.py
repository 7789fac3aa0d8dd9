"""Tensor-parallel layers: each owns its share of some canonical tensors and declares which.

Column-, row- and vocabulary-parallel layers of Megatron-LM (Shoeybi et al. 2019) with sequence parallelism (Korthikanti
et al. 2022). Hidden states are `x_TD`: tokens flattened, so that under sequence parallelism a rank's share is a
contiguous run of rows whatever the batch, and gathering or scattering it copies nothing extra.

Sharding lives in the layers: a `Part` on every parameter says which box of which canonical (Hugging Face) tensor lies
at which offset and strides of it, who counts it in norms, and whether its gradient is still to be summed over tp. The
layout algebra, initialisation, saving and gradient reduction all read that one declaration.

Legend: T tokens (of all samples), B batch, S sequence, D hidden, F features, V vocabulary; a suffix `t` marks the share
of one tp rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.parallel import collectives
from raytron.parallel.boxes import Box
from raytron.parallel.collectives import Axis
from raytron.parallel.weight_grad import WeightGradQueue

__all__ = [
    "ColumnParallelLinear",
    "ParallelLinear",
    "Part",
    "Replicated",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "initialize_",
    "parameter",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_entropy",
]

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Part:
    """One canonical tensor's share of a local parameter.

    Attributes:
        name, shape: the canonical tensor.
        box: which of its elements are here.
        offset, strides: where, in elements inside the local parameter.
        replicas: how many consecutive tp ranks hold this same box.
        replica: this rank's position among them; the first counts the elements in norms.
        partial: each replica computes only a share of the gradient, so they are to be summed.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    offset: int
    strides: tuple[int, ...]
    replicas: int = 1
    replica: int = 0
    partial: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    def view(self, local: Tensor) -> Tensor:
        """The part's elements of the local parameter (or of anything shaped like it), a view of shape `size`."""
        return local.as_strided(self.size, self.strides, local.storage_offset() + self.offset)


def parameter(
    shape: Sequence[int],
    parts: Sequence[Part],
    *,
    decay: bool,
    std: float | None,
    uniform: bool = False,
    added: bool = False,
) -> nn.Parameter:
    """A local parameter (on the current default device and dtype) that declares its parts.

    `decay` says whether weight decay applies. `std` is that of its initial distribution, normal or `uniform`; None
    starts at ones. `added` is what a pretrained model does not bring: adapters, and a new head; in a model that has
    adapters nothing else is trained.
    """
    param = nn.Parameter(torch.empty(tuple(shape)))
    param.parts, param.decay, param.initial_std = tuple(p for p in parts if all(p.size)), decay, std
    param.uniform, param.added = uniform, added
    return param


def rows(name: str, shape: tuple[int, ...], start: int, stop: int, offset: int = 0, **kw) -> Part:
    """The part that holds rows [start, stop) of a canonical tensor, packed from `offset` of the local parameter."""
    box = ((start, stop), *((0, n) for n in shape[1:]))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Part(name, shape, box, offset, strides, **kw)


ROWS_PER_DRAW = 256


@torch.no_grad()
def initialize_(param: nn.Parameter, seed: int) -> None:
    """Fill a parameter so that every canonical element depends only on (seed, tensor name, position).

    Rows are drawn in blocks with a generator each, so a rank draws only the blocks it holds a row of, and any layout
    starts from the same weights. Padding stays zero.
    """
    param.zero_()
    for part in param.parts:
        view = part.view(param.data)
        if param.initial_std is None:
            view.fill_(1.0)
        elif param.initial_std > 0:
            _draw_rows(view, part, param.initial_std, param.uniform, seed)


def _draw_rows(view: Tensor, part: Part, std: float, uniform: bool, seed: int) -> None:
    (start, stop), *rest = part.box
    bound = math.sqrt(3) * std  # of the uniform distribution with that deviation
    columns = tuple(slice(a, b) for a, b in rest)
    for block in range(start // ROWS_PER_DRAW, -(-stop // ROWS_PER_DRAW)):
        first, last = block * ROWS_PER_DRAW, min((block + 1) * ROWS_PER_DRAW, part.shape[0])
        key = hashlib.blake2b(f"{seed}/{part.name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") & (2**63 - 1))
        drawn = torch.empty((last - first, *part.shape[1:]), dtype=torch.float32)
        drawn.uniform_(-bound, bound, generator=generator) if uniform else drawn.normal_(0.0, std, generator=generator)
        low, high = max(first, start), min(last, stop)
        view[low - start : high - start].copy_(drawn[(slice(low - first, high - first), *columns)])


class Replicated(nn.Module):
    """A weight every tp rank holds whole, e.g. a norm's.

    `partial` says that each rank sees only some tokens or heads, so its gradient is a share of the whole.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        tp: Axis,
        *,
        partial: bool,
        std: float | None = None,
        added: bool = False,
    ) -> None:
        super().__init__()
        part = rows(name, shape, 0, shape[0], replicas=tp.size, replica=tp.index, partial=partial and tp.size > 1)
        self.weight = parameter(shape, [part], decay=False, std=std, added=added)


class _DeferredLinear(torch.autograd.Function):
    """y = x W^T + b in x's dtype, whose weight gradient may be left for later (zero bubble, Qi et al. 2023)."""

    @staticmethod
    def forward(ctx, x, weight, bias, queue, product):
        low = weight.to(x.dtype)  # no copy unless autocast keeps the weight wider
        ctx.save_for_backward(x, low)
        ctx.params, ctx.queue, ctx.product = (weight, bias), queue, product
        return product(x, low, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, low = ctx.saved_tensors
        params, product = ctx.params, ctx.product
        grad_x = product(grad, low.mT) if ctx.needs_input_grad[0] else None
        if not params[0].requires_grad:
            return grad_x, None, None, None, None
        if ctx.queue.active:
            ctx.queue.push(lambda: _accumulate(params, x, grad, product))
            return grad_x, None, None, None, None
        return grad_x, *_weight_grads(params, x, grad, product), None, None


def _weight_grads(params: tuple[nn.Parameter, nn.Parameter | None], x: Tensor, grad: Tensor, product: Product) -> tuple:
    weight, bias = params
    grad_weight = product(grad.mT, x.mT).to(weight.dtype)
    return grad_weight, None if bias is None else grad.sum(0, dtype=bias.dtype)


def _accumulate(params: tuple[nn.Parameter, nn.Parameter | None], x: Tensor, grad: Tensor, product: Product) -> None:
    """What autograd's accumulation would have done, the engine's hook on a parameter (`after_accumulate`) included."""
    for param, value in zip(params, _weight_grads(params, x, grad, product), strict=True):
        if value is not None:
            param.grad = value if param.grad is None else param.grad.add_(value)
            if (hook := getattr(param, "after_accumulate", None)) is not None:
                hook(param)


class ParallelLinear(nn.Module):
    """What column and row share: the tp line, sequence parallelism, and three seams.

    Attributes:
        product: (x, weight, bias) -> x W^T + b; the seam where another number format comes in.
        queue: where weight gradients wait that a zero-bubble schedule computes later; None computes them at once.
        adapter: (x, y, product) -> y and what is added to it, see `raytron.models.layers.lora`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.queue: WeightGradQueue | None = None
        self.product: Product = F.linear
        self.adapter: nn.Module | None = None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.queue is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.queue is None:
            y = self.product(x, self.weight, bias)
        else:
            y = _DeferredLinear.apply(x, self.weight, bias, self.queue, self.product)
        return y if self.adapter is None else self.adapter(x, y, self.product)


class ColumnParallelLinear(ParallelLinear):
    """Several linear maps of one input, stacked, each cut by output rows over tp.

    Args:
        prefix: canonical module prefix; part names are prefix + name + ".weight" (".bias").
        outputs: (name, rows in all, first row here, rows here, replicas, replica) for each stacked map, see `Cut`.
        in_features: D.

    Forward: x_TD (its share of tokens under sequence parallelism) -> y_TF, F the sum of the local rows.
    """

    def __init__(
        self,
        prefix: str,
        outputs: Sequence[Cut],
        in_features: int,
        tp: Axis,
        *,
        sequence_parallel: bool,
        std: float,
        bias: bool = False,
    ) -> None:
        super().__init__(tp, sequence_parallel)
        weight_parts, bias_parts, row = [], [], 0
        for out in outputs:
            share = {"replicas": out.replicas, "replica": out.replica, "partial": out.replicas > 1}
            name = f"{prefix}{out.name}"
            end = out.start + out.rows
            shape = (out.total, in_features)
            weight_parts.append(rows(f"{name}.weight", shape, out.start, end, row * in_features, **share))
            bias_parts.append(rows(f"{name}.bias", (out.total,), out.start, end, row, **share))
            row += out.rows
        self.sizes = [out.rows for out in outputs]
        self.weight = parameter((row, in_features), weight_parts, decay=True, std=std)
        self.bias = parameter((row,), bias_parts, decay=False, std=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        enter = collectives.gather_rows if self.sequence_parallel else collectives.copy
        return self.linear(enter(x, self.tp), self.bias)


@dataclass(frozen=True)
class Cut:
    """One output of a `ColumnParallelLinear`: rows [start, start + rows) of `total`, held by `replicas` ranks."""

    name: str
    total: int
    start: int
    rows: int
    replicas: int = 1
    replica: int = 0

    @classmethod
    def even(cls, name: str, total: int, tp: Axis, unit: int = 1) -> Cut:
        """Cut `total` rows in blocks of `unit` (a head) over tp; with fewer blocks than ranks, blocks are replicated.

        Raises ValueError where neither divides the other.
        """
        blocks = total // unit
        if blocks % tp.size == 0:
            per = total // tp.size
            return cls(name, total, tp.index * per, per)
        if tp.size % blocks:
            raise ValueError(
                f"{name}: {blocks} heads (or blocks of rows) cannot be cut over tp={tp.size}; choose a tp that divides "
                f"{blocks}" + (", or a multiple of it" if unit > 1 else "")
            )
        replicas = tp.size // blocks
        return cls(name, total, tp.index // replicas * unit, unit, replicas, tp.index % replicas)


class RowParallelLinear(ParallelLinear):
    """A linear map cut by input columns over tp; the partial products are summed.

    Forward: x_TFt -> y_TD, under sequence parallelism this rank's share of the tokens.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, tp: Axis, *, sequence_parallel: bool, std: float
    ) -> None:
        super().__init__(tp, sequence_parallel)
        if in_features % tp.size:
            raise ValueError(f"{name}: {in_features} input features cannot be cut over tp={tp.size}")
        per = in_features // tp.size
        box = ((0, out_features), (tp.index * per, (tp.index + 1) * per))
        part = Part(f"{name}.weight", (out_features, in_features), box, 0, (per, 1))
        self.weight = parameter((out_features, per), [part], decay=True, std=std)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        leave = collectives.scatter_rows if self.sequence_parallel else collectives.reduce
        return leave(self.linear(x, None), self.tp)


def vocabulary_share(vocab_size: int, tp: Axis, multiple: int = 8) -> tuple[int, int, int]:
    """(first row, real rows, rows with padding) of this rank: ceil(V / tp) rounded up to `multiple` on every rank."""
    padded = -(-vocab_size // (tp.size * multiple)) * multiple
    start = min(tp.index * padded, vocab_size)
    return start, min(padded, vocab_size - start), padded


class VocabParallelEmbedding(nn.Module):
    """Token embedding cut by vocabulary rows over tp.

    Forward: tokens_T int64 -> x_TD, under sequence parallelism this rank's share of the tokens.
    """

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, tp: Axis, *, sequence_parallel: bool, std: float
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.start, self.real, padded = vocabulary_share(vocab_size, tp)
        part = rows(f"{name}.weight", (vocab_size, hidden_size), self.start, self.start + self.real)
        self.weight = parameter((padded, hidden_size), [part], decay=True, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        here = (tokens >= self.start) & (tokens < self.start + self.real)
        x = F.embedding((tokens - self.start).masked_fill(~here, 0), self.weight)
        x = x.masked_fill(~here.unsqueeze(-1), 0.0)
        return collectives.scatter_rows(x, self.tp) if self.sequence_parallel else collectives.reduce(x, self.tp)


class VocabParallelHead(ParallelLinear):
    """The output projection cut by vocabulary rows over tp; give `tied` to share an embedding's weight.

    Forward: x_TD -> logits_TVt, the padding columns cut off (a rank may hold none).
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tp: Axis,
        *,
        sequence_parallel: bool,
        std: float,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__(tp, sequence_parallel)
        self.start, self.real, padded = vocabulary_share(vocab_size, tp)
        part = rows(f"{name}.weight", (vocab_size, hidden_size), self.start, self.start + self.real)
        self.weight = tied.weight if tied else parameter((padded, hidden_size), [part], decay=True, std=std)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        enter = collectives.gather_rows if self.sequence_parallel else collectives.copy
        return self.linear(enter(x, self.tp), None)[..., : self.real]


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] from kept log-probabilities: no dense gradient of the picked entries is made."""

    @staticmethod
    def forward(ctx, logits, labels):
        half = logits.dtype in (torch.bfloat16, torch.float16)
        logs = torch.log_softmax(logits, -1, dtype=torch.float32 if half else None)
        ctx.save_for_backward(logs, labels)
        ctx.dtype = logits.dtype
        return -logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logs, labels = ctx.saved_tensors
        grad_logits = logs.exp().mul_(grad.unsqueeze(-1))
        grad_logits.scatter_add_(-1, labels.unsqueeze(-1), -grad.unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, start, tp):
        x = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        top = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
        tp.all_reduce_(top, "max")
        exp = torch.exp(x - top.unsqueeze(-1))
        local = labels - start
        here = (local >= 0) & (local < x.shape[-1])
        safe = local.masked_fill(~here, 0)
        picked = x.gather(-1, safe.unsqueeze(-1)).squeeze(-1) if x.shape[-1] else torch.zeros_like(top)
        sums = torch.stack((exp.sum(-1), picked.masked_fill(~here, 0.0)))
        tp.all_reduce_(sums)
        ctx.save_for_backward(exp, sums[0], safe, here)
        ctx.dtype = logits.dtype
        return sums[0].log() + top - sums[1]

    @staticmethod
    def backward(ctx, grad):
        exp, total, safe, here = ctx.saved_tensors
        grad_logits = exp * (grad / total).unsqueeze(-1)
        if exp.shape[-1]:
            grad_logits.scatter_add_(-1, safe.unsqueeze(-1), -grad.masked_fill(~here, 0.0).unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, start: int, tp: Axis) -> Tensor:
    """Per-token negative log-likelihood, in nats, over a vocabulary cut over tp.

    Args:
        logits: [T, Vt], this rank's columns, `start` the first one's id; computed in fp32 (fp64 stays).
        labels: [T] int64 in [0, V).

    Returns: [T], the same on every tp rank.
    """
    if tp.size == 1:
        if torch.compiler.is_compiling():  # the compiler fuses this, and would not fuse our backward's scatter
            return F.cross_entropy(
                logits.float() if logits.dtype == torch.bfloat16 else logits, labels, reduction="none"
            )
        return _CrossEntropy.apply(logits, labels)
    return _VocabParallelCrossEntropy.apply(logits, labels, start, tp)


class _VocabParallelEntropy(torch.autograd.Function):
    """H = log Z - sum p x, so dH/dx_i = -p_i (log p_i + H)."""

    @staticmethod
    def forward(ctx, logits, tp):
        x = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        top = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
        tp.all_reduce_(top, "max")
        shifted = x - top.unsqueeze(-1)
        exp = torch.exp(shifted)
        # A forbidden token (-inf) adds nothing: 0 x -inf would be NaN.
        sums = torch.stack((exp.sum(-1), (exp * shifted.clamp(min=-1e30)).sum(-1)))
        tp.all_reduce_(sums)
        entropy = sums[0].log() - sums[1] / sums[0]
        ctx.save_for_backward(shifted, exp, sums[0], entropy)
        ctx.dtype = logits.dtype
        return entropy

    @staticmethod
    def backward(ctx, grad):
        shifted, exp, total, entropy = ctx.saved_tensors
        log_p = shifted.clamp(min=-1e30) - total.log().unsqueeze(-1)
        grad_logits = -(exp / total.unsqueeze(-1)) * (log_p + entropy.unsqueeze(-1)) * grad.unsqueeze(-1)
        return grad_logits.to(ctx.dtype), None


def vocab_parallel_entropy(logits: Tensor, tp: Axis) -> Tensor:
    """Entropy of softmax(logits) in nats, over a vocabulary cut over tp.

    Args:
        logits: [T, Vt], this rank's columns; computed in fp32 (fp64 stays).

    Returns: [T], the same on every tp rank.
    """
    return _VocabParallelEntropy.apply(logits, tp)
