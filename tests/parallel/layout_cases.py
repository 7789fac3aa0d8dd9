"""Layouts for tests: a builder, the oracle, random layouts for hypothesis, and the hard cases of real models.

Every family below is a function of its parallel sizes; any two of one family must reshard into each other.
"""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from raytron.parallel.boxes import whole
from raytron.parallel.layout import Layout, Piece, Spec
from raytron.parallel.storage import allocate, torch_dtype, view


class Builder:
    """Collects pieces; every place has one flat buffer that grows as things are added."""

    def __init__(self, tensors, buffer="weights", version=7):
        self.tensors = {n: s if isinstance(s, Spec) else Spec(tuple(s)) for n, s in tensors.items()}
        self.buffer, self.version = buffer, version
        self.size, self.pieces = defaultdict(int), defaultdict(dict)

    def reserve(self, place, n):
        at = self.size[place]
        self.size[place] += n
        return at

    def put(self, name, box, place, offset, strides):
        """One place's piece; equal ones are merged to one piece of several places."""
        self.pieces[name].setdefault((tuple(box), offset, tuple(strides)), []).append(place)

    def add(self, name, box, place, order=None):
        """A contiguous piece at the end of the buffer; `order` lists dimensions widest stride first."""
        sizes = [hi - lo for lo, hi in box]
        strides, step = [0] * len(sizes), 1
        for d in reversed(order or range(len(sizes))):
            strides[d], step = step, step * sizes[d]
        self.put(name, box, place, self.reserve(place, step), strides)

    def build(self):
        pieces = {
            name: tuple(Piece(box, self.buffer, at, strides, tuple(held)) for (box, at, strides), held in found.items())
            for name, found in self.pieces.items()
        }
        sizes = {(place, self.buffer): n for place, n in self.size.items()}
        return Layout(self.version, self.tensors, pieces, sizes).check()


# The oracle


def canonical(tensors, seed=0):
    """Random canonical tensors: every bit pattern of integers and bytes, ordinary numbers for floats."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, spec in tensors.items():
        values = torch.randn(spec.shape, generator=generator, dtype=torch.float64) * 3
        out[name] = (values > 0) if spec.dtype == "bool" else values.to(torch_dtype(spec.dtype))
    return out


def fill(layout, tensors):
    """Buffers of every place, with the canonical values in every piece."""
    buffers = allocate(layout)
    for name, piece in layout:
        values = tensors[name][tuple(slice(lo, hi) for lo, hi in piece.box)]
        for place in piece.places:
            view(buffers[place, piece.buffer], piece.box, piece.spot()).copy_(values)
    return buffers


def raw(tensor):
    """Bits as bytes, so that equality is of bits for every dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_holds(layout, buffers, tensors):
    """Every piece at every place has the canonical bits, and the padding is zero."""
    for key, flat in fill(layout, tensors).items():
        assert torch.equal(raw(buffers[key]), raw(flat)), key


def floor(source, target):
    """Bytes each target place needs less what it holds, element by element."""
    held = {}
    for name, piece in source:
        for place in piece.places:
            mask = held.setdefault((name, place), np.zeros(source.tensors[name].shape, bool))
            mask[tuple(slice(lo, hi) for lo, hi in piece.box)] = True
    total = 0
    for name, piece in target:
        spec = target.tensors[name]
        for place in piece.places:
            mask = held.get((name, place), np.zeros(spec.shape, bool))
            total += int((~mask[tuple(slice(lo, hi) for lo, hi in piece.box)]).sum()) * spec.itemsize
    return total


# Random layouts


DTYPES = ("float32", "bfloat16", "float64", "uint8", "bool", "float8_e4m3fn", "int16")


@st.composite
def specs(draw, dtypes=DTYPES):
    """One to three small tensors of one dtype (a flat buffer has one dtype), zero to three dimensions."""
    dtype = draw(st.sampled_from(dtypes))
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=3))
    return {f"t{i}": Spec(tuple(shape), dtype) for i, shape in enumerate(shapes)}


@st.composite
def layouts(draw, tensors, places=("a", "b", "c", "d"), buffer="weights"):
    """Any cuts, replicas, gaps, orders of dimensions and pitches; covers every tensor."""
    builder = Builder(tensors, buffer)
    for name, spec in tensors.items():
        for box in draw(grids(spec.shape)):
            order = draw(st.permutations(range(len(box))))
            pitch = draw(st.integers(0, 2))
            strides, step = [0] * len(box), 1
            for d in reversed(order):
                strides[d], step = step, step * (box[d][1] - box[d][0]) + pitch
            span = 1 + sum((hi - lo - 1) * s for (lo, hi), s in zip(box, strides, strict=True))
            for place in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True)):
                builder.put(name, box, place, builder.reserve(place, span + pitch), strides)
    return builder.build()


@st.composite
def grids(draw, shape):
    """Boxes that partition a shape, by cuts per dimension."""
    boxes = [()]
    for n in shape:
        cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=2))) if n > 1 else []
        ranges = list(zip([0, *cuts], [*cuts, n], strict=True))
        boxes = [(*box, r) for box in boxes for r in ranges]
    return boxes


# The hard cases


def share(n, parts, i):
    return n * i // parts, n * (i + 1) // parts


def fused_qkv(tp=1, dp=1, heads=8, kv=2, dim=2, hidden=6):
    """q, k, v rows fused per rank; with fewer KV heads than ranks, each KV head is replicated."""
    b = Builder({"q": (heads * dim, hidden), "k": (kv * dim, hidden), "v": (kv * dim, hidden)})
    for d in range(dp):
        for t in range(tp):
            place = f"actor-{d * tp + t}"
            lo, hi = share(heads, tp, t)
            b.add("q", ((lo * dim, hi * dim), (0, hidden)), place)
            for name in "kv":
                lo, hi = share(kv, tp, t) if kv >= tp else (t * kv // tp, t * kv // tp + 1)
                b.add(name, ((lo * dim, hi * dim), (0, hidden)), place)
    return b.build()


def grouped_qkv(tp=1, heads=8, kv=4, dim=2, hidden=6):
    """Megatron's order: for each KV group its query heads, its key, its value; every group a piece."""
    b = Builder({"q": (heads * dim, hidden), "k": (kv * dim, hidden), "v": (kv * dim, hidden)})
    per = heads // kv
    for t in range(tp):
        for g in range(*share(kv, tp, t)):
            b.add("q", ((g * per * dim, (g + 1) * per * dim), (0, hidden)), f"actor-{t}")
            b.add("k", ((g * dim, (g + 1) * dim), (0, hidden)), f"actor-{t}")
            b.add("v", ((g * dim, (g + 1) * dim), (0, hidden)), f"actor-{t}")
    return b.build()


def gate_up(tp=1, ffn=12, hidden=5, interleaved=False, transposed=False):
    """gate and up in one matrix [2 x ffn, hidden]: one after the other, or row by row; or that matrix transposed."""
    b = Builder({"gate": (ffn, hidden), "up": (ffn, hidden)})
    for t in range(tp):
        lo, hi = share(ffn, tp, t)
        rows, at = hi - lo, b.reserve(f"actor-{t}", 2 * (hi - lo) * hidden)
        row, column = (1, 2 * rows) if transposed else (hidden, 1)
        for i, name in enumerate(("gate", "up")):
            step, start = (2, i) if interleaved else (1, i * rows)
            b.put(name, ((lo, hi), (0, hidden)), f"actor-{t}", at + start * row, (step * row, column))
    return b.build()


def padded_vocabulary(tp=1, vocab=13, hidden=3, multiple=8):
    """Rows padded to a multiple; a rank whose rows are all padding holds no piece, and its buffer is still there."""
    b = Builder({"embed": (vocab, hidden)})
    rows = -(-vocab // multiple) * multiple // tp
    for t in range(tp):
        at = b.reserve(f"actor-{t}", rows * hidden)
        lo, hi = t * rows, min((t + 1) * rows, vocab)
        if lo < hi:
            b.put("embed", ((lo, hi), (0, hidden)), f"actor-{t}", at, (hidden, 1))
    return b.build()


def stages(of_layer, pp, tied=True, hidden=4):
    """`of_layer[i]` is layer i's stage (uneven or interleaved); a tied embedding is on the first and the last."""
    layers = {f"layers.{i}": (hidden, hidden) for i in range(len(of_layer))}
    b = Builder({"embed": (9, hidden), **layers, **({} if tied else {"head": (9, hidden)})})
    b.add("embed", ((0, 9), (0, hidden)), "actor-0")
    for i, stage in enumerate(of_layer):
        b.add(f"layers.{i}", ((0, hidden), (0, hidden)), f"actor-{stage}")
    last = f"actor-{pp - 1}"
    if not tied:
        b.add("head", ((0, 9), (0, hidden)), last)
    elif pp > 1:
        b.add("embed", ((0, 9), (0, hidden)), last)
    return b.build()


def mamba2(tp=1, inner=8, state=3, groups=2, heads=4, hidden=5):
    """in_proj's rows are sections z, x, B, C, dt: z, x, dt cut by heads; B, C by groups, replicated where few."""
    rows = 2 * inner + 2 * groups * state + heads
    b = Builder({"in_proj": (rows, hidden), "conv": (inner + 2 * groups * state, 1, 4), "A_log": (heads,)})
    for t in range(tp):
        place, at, conv = f"actor-{t}", 0, []
        for n, unit in ((inner, 1), (inner, 1), (groups, state), (groups, state), (heads, 1)):
            lo, hi = share(n, tp, t) if n >= tp else (t * n // tp, t * n // tp + 1)
            b.add("in_proj", ((at + lo * unit, at + hi * unit), (0, hidden)), place)
            conv.append((at - inner + lo * unit, at - inner + hi * unit))
            at += n * unit
        for section in conv[1:4]:  # x, B, C
            b.add("conv", (section, (0, 1), (0, 4)), place)
        b.add("A_log", (share(heads, tp, t),), place)
    return b.build()


def lora(tp=1, rows=8, columns=6, rank=2):
    """A column-parallel linear's adapter: A replicated, B cut by rows; and a row-parallel one's the other way round."""
    b = Builder({"q.A": (rank, columns), "q.B": (rows, rank), "o.A": (rank, rows), "o.B": (columns, rank), "scale": ()})
    for t in range(tp):
        mine, place = share(rows, tp, t), f"actor-{t}"
        b.add("q.A", ((0, rank), (0, columns)), place)
        b.add("q.B", (mine, (0, rank)), place)
        b.add("o.A", ((0, rank), mine), place)
        b.add("o.B", ((0, columns), (0, rank)), place)
        b.add("scale", (), place)
    return b.build()


def llama4_experts(ep=1, etp=1, experts=4, hidden=5, ffn=6, on_disk=False):
    """Canonical [experts, hidden, 2 x ffn], gate columns then up columns. In actors each expert is transposed, with
    its own columns of gate and up stacked, as [local, 2 x ffn / etp, hidden]; on disk it is as it is."""
    shape = (experts, hidden, 2 * ffn)
    b = Builder({"gate_up": shape})
    if on_disk:
        b.add("gate_up", whole(shape), "file:disk")
        return b.build()
    for e in range(ep):
        first, last = share(experts, ep, e)
        for t in range(etp):
            lo, hi = share(ffn, etp, t)
            columns = 2 * (hi - lo)
            at = b.reserve(f"actor-{e * etp + t}", (last - first) * columns * hidden)
            for i in range(2):
                box = ((first, last), (0, hidden), (i * ffn + lo, i * ffn + hi))
                start = at + i * (hi - lo) * hidden
                b.put("gate_up", box, f"actor-{e * etp + t}", start, (columns * hidden, 1, hidden))
    return b.build()


def mixtral_experts(places=1, experts=8, hidden=4, ffn=3, uneven=None):
    """Canonical one tensor per expert and matrix; in actors stacked: w1 over w3 [local, 2 x ffn, hidden], and w2
    transposed. `uneven` lists how many experts each place has."""
    names = {f"experts.{e}.{w}": (hidden, ffn) if w == "w2" else (ffn, hidden) for e in range(experts) for w in WS}
    b = Builder(names)
    counts = uneven or [share(experts, places, p)[1] - share(experts, places, p)[0] for p in range(places)]
    e = 0
    for p, count in enumerate(counts):
        up, down = b.reserve(f"actor-{p}", count * 2 * ffn * hidden), b.reserve(f"actor-{p}", count * ffn * hidden)
        for k in range(count):
            for i, w in enumerate(("w1", "w3")):
                at = up + (2 * k + i) * ffn * hidden
                b.put(f"experts.{e}.{w}", ((0, ffn), (0, hidden)), f"actor-{p}", at, (hidden, 1))
            b.put(f"experts.{e}.w2", ((0, hidden), (0, ffn)), f"actor-{p}", down + k * ffn * hidden, (1, hidden))
            e += 1
    return b.build()


WS = ("w1", "w2", "w3")


def rope_permuted(tp=1, heads=4, dim=6, hidden=5, paired=True):
    """wq in the original Llama order: a head's rows are pairs (i, i + dim / 2): each half is a piece of stride two."""
    b = Builder({"wq": (heads * dim, hidden)})
    for t in range(tp):
        lo, hi = share(heads, tp, t)
        at = b.reserve(f"actor-{t}", (hi - lo) * dim * hidden)
        if not paired:
            b.put("wq", ((lo * dim, hi * dim), (0, hidden)), f"actor-{t}", at, (hidden, 1))
            continue
        for head in range(lo, hi):
            for half in range(2):
                rows = (head * dim + half * dim // 2, head * dim + (half + 1) * dim // 2)
                start = at + ((head - lo) * dim + half) * hidden
                b.put("wq", (rows, (0, hidden)), f"actor-{t}", start, (2 * hidden, 1))
    return b.build()


FAMILIES = {
    "fused qkv, fewer kv heads than ranks": [
        fused_qkv(1), fused_qkv(2), fused_qkv(4), fused_qkv(8), fused_qkv(2, dp=3), grouped_qkv(1, kv=2),
    ],
    "qkv by groups": [grouped_qkv(1), grouped_qkv(2), grouped_qkv(4), fused_qkv(2, kv=4), fused_qkv(8, kv=4)],
    "gate/up": [
        gate_up(tp, interleaved=i, transposed=t) for tp in (1, 3, 4) for i in (False, True) for t in (False, True)
    ],
    "padded vocabulary": [padded_vocabulary(tp) for tp in (1, 2, 4, 8)],
    "tied, uneven and interleaved stages": [
        stages([0] * 7, 1), stages([0, 0, 0, 1, 1, 1, 1], 2), stages([0, 0, 1, 1, 1, 2, 2], 3),
        stages([0, 1, 2, 0, 1, 2, 2], 3), stages([3, 2, 1, 0, 1, 2, 3], 4),
    ],
    "untied stages": [stages([0] * 5, 1, tied=False), stages([0, 1, 0, 1, 1], 2, tied=False)],
    "mamba-2 sections": [mamba2(1), mamba2(2), mamba2(4)],
    "lora": [lora(1), lora(2), lora(4)],
    "llama 4 stacked, transposed experts": [
        llama4_experts(on_disk=True), llama4_experts(1), llama4_experts(2), llama4_experts(4), llama4_experts(3),
        llama4_experts(2, 3), llama4_experts(1, 4),
    ],
    "mixtral split experts": [mixtral_experts(1), mixtral_experts(2), mixtral_experts(8)],
    "uneven experts, 8 to 3": [mixtral_experts(8), mixtral_experts(3, uneven=[3, 3, 2]), mixtral_experts(3)],
    "rope-permuted wq": [rope_permuted(tp, paired=paired) for tp in (1, 2, 4) for paired in (False, True)],
}  # fmt: skip


def zero_intervals(layout, ranks, buffer="weights"):
    """ZeRO-1: each buffer's shards, of equal length, for `ranks` new places per old one; returns (layout of the
    unsharded buffers at all those places, intervals)."""
    intervals, members = {}, {}
    for (place, name), n in layout.sizes.items():
        assert name == buffer
        step = -(-n // ranks)
        members[place] = tuple(f"{place}/{r}" for r in range(ranks))
        for r in range(ranks):
            intervals[f"{place}/{r}"] = [(min(r * step, n), min((r + 1) * step, n))]
    spread = {
        name: tuple(replace(p, places=tuple(m for place in p.places for m in members[place])) for p in held)
        for name, held in layout.pieces.items()
    }
    sizes = {(m, name): n for (place, name), n in layout.sizes.items() for m in members[place]}
    return Layout(layout.version, layout.tensors, spread, sizes), intervals


def numel(box):
    return math.prod(hi - lo for lo, hi in box)
