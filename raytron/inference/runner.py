"""One rank's part of a step: inputs in, logits of the rows that are asked for out.

Rank 0 decides; the other ranks of a tensor- or pipeline-parallel engine wait for its orders in `follow`. An order is
one broadcast of a few hundred integers (two where it is longer); hidden states go from stage to stage, and the last
stage's logits to rank 0, which samples. Nothing else has to agree: the caches' blocks have the same numbers on every
rank.

Legend: T tokens of the step, S rows of the block tables, W rows of logits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytron.config import EngineConfig
from raytron.inference.types import WeightUpdateError
from raytron.models import load_weights
from raytron.models.base import ShardedModel, rank_name
from raytron.models.layers.cache import PagedSequences, block_bytes, make_caches
from raytron.parallel.checksum import checksums
from raytron.parallel.device_memory import Offer, take
from raytron.parallel.layout import only, owners
from raytron.parallel.progress import WriterGone
from raytron.parallel.shared import SharedReader, SharedWeights
from raytron.parallel.storage import view

__all__ = ["Runner", "Step"]

log = logging.getLogger(__name__)

_INLINE = 2048  # integers an order carries in its first message
_STEP, _TENSOR, _PATH, _TAKE, _WRITE, _HOLD, _STOP = range(7)
_SUMS_ONLY = -1


class Step(NamedTuple):
    """Inputs of a step, int32: tokens, rows of `tables` and positions [T]; tables [S, width]; wanted rows [W]."""

    tokens: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray


class Runner:
    """One rank of an engine.

    Args:
        model: this rank's part.
        config: how large the cache is.
        max_len: tokens of the longest sequence.

    Attributes:
        blocks: of the cache, the same on every rank.
    """

    def __init__(self, model: ShardedModel, config: EngineConfig, max_len: int) -> None:
        self.model, self.world = model, model.world
        layers, dtype = model.cached_layers, model.weights.dtype
        self.blocks = self._agree(int(config.kv_cache_mb * 2**20) // block_bytes(layers, config.block_size, dtype))
        # More than all sequences could ever hold would never be written.
        self.blocks = min(self.blocks, -(-max_len // config.block_size) * config.max_num_seqs)
        self._make_caches = partial(make_caches, layers, self.blocks, config.block_size, dtype, model.weights.device)
        self._caches = self._make_caches()
        self._rotary = model.rotary(max_len)
        self._held = only(model.layout(), places=[rank_name(self.world.rank)])
        self._reader: SharedReader | None = None

    def _agree(self, blocks: int) -> int:
        """The fewest that any rank has room for."""
        return int(self.world.axis("world").all_reduce_(torch.tensor([blocks]), "min"))

    # Orders, rank 0

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Logits [W, V] of the wanted rows. Rank 0."""
        if self.world.mesh.size > 1:
            arrays = (step.tokens, step.sequence, step.position, step.tables.ravel(), step.wanted)
            sizes = (len(step.tokens), *step.tables.shape, len(step.wanted))
            self._tell(_STEP, sizes, np.concatenate(arrays))
        return self._forward(step)

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """New values of some canonical tensors, whole; cast to the model's dtype. Rank 0.

        Raises WeightUpdateError for an unknown name or another shape, before anything is changed.
        """
        known = [(name, tensor) for name, tensor in weights.items() if self._check(name, tensor)]
        for name, tensor in known:
            tensor = tensor.to(self.model.weights.dtype).contiguous()
            if self.world.mesh.size > 1:
                text = np.frombuffer(name.encode(), dtype=np.uint8).astype(np.int32)
                self._tell(_TENSOR, (len(text),), text)
                self.world.axis("world").broadcast_(tensor)
            self._fill(name, tensor)

    def update_from(self, path: str) -> None:
        """All weights from a Hugging Face directory; every rank reads its own part. Rank 0.

        Raises WeightUpdateError if a rank could not.
        """
        if self.world.mesh.size > 1:
            text = np.frombuffer(path.encode(), dtype=np.uint8).astype(np.int32)
            self._tell(_PATH, (len(text),), text)
        self._load(path)

    def write(self, path: str) -> None:
        """All weights into a shared directory of this node, where other engines may load them from. Rank 0.

        Every rank writes its own part. Raises WeightUpdateError if one could not: it may be on another node.
        """
        if self.world.mesh.size > 1:
            text = np.frombuffer(path.encode(), dtype=np.uint8).astype(np.int32)
            self._tell(_WRITE, (len(text),), text)
        self._write(path)

    def take(self, path: str, turn: int | None) -> dict[str, int]:
        """What a push has changed, from a shared directory; checksums of all tensors that the ranks hold then. Rank 0.

        Every rank copies its own boxes. turn: None copies nothing.

        Raises WeightUpdateError if a rank could not, or holds another copy of a tensor than it should.
        Raises WriterGone if the push was not finished.
        """
        number = _SUMS_ONLY if turn is None else turn
        if self.world.mesh.size > 1:
            text = np.frombuffer(path.encode(), dtype=np.uint8).astype(np.int32)
            self._tell(_TAKE, (number,), text)
        return self._take(path, number)

    def written(self, path: str, turn: int) -> dict[str, int]:
        """Checksums that the writers of a push have left there. Rank 0. Raises WriterGone if it was not finished."""
        return self._from(path).shared.progress.sums(turn)

    def copy(self, offers: Sequence[Offer]) -> dict[str, int]:
        """All weights, out of the memory of ranks on this GPU; checksums of what is held. A rank without others."""
        self._forget()
        return take(offers, self._held, rank_name(self.world.rank), self.model.weights)

    def sums(self) -> dict[str, int]:
        """Checksums of what is held now. A rank without others."""
        return checksums(owners(self._held), {(rank_name(self.world.rank), "weights"): self.model.weights})

    def hold(self, cache: bool, weights: bool) -> None:
        """Have memory for the cache and for the weights, or give it back; what was in it is gone then. Rank 0."""
        if self.world.mesh.size > 1:
            self._tell(_HOLD, (int(cache), int(weights)), np.zeros(0, np.int32))
        self._hold(cache, weights)

    def stop(self) -> None:
        """Let the other ranks leave `follow`. Rank 0."""
        if self.world.mesh.size > 1:
            self._tell(_STOP, (), np.zeros(0, np.int32))

    def _tell(self, kind: int, sizes: tuple[int, ...], payload: np.ndarray) -> None:
        message = torch.zeros(_INLINE, dtype=torch.int32)
        message[: 2 + len(sizes)] = torch.tensor((kind, len(payload), *sizes))
        inline = len(payload) <= _INLINE - 8
        data = torch.from_numpy(payload.astype(np.int32))
        if inline:
            message[8 : 8 + len(data)] = data
        axis = self.world.axis("world")
        axis.broadcast_(message)
        if not inline:
            axis.broadcast_(data)

    # Orders, the other ranks

    def follow(self) -> None:
        """Carry out rank 0's orders until it says stop."""
        axis = self.world.axis("world")
        while True:
            message = torch.zeros(_INLINE, dtype=torch.int32)
            axis.broadcast_(message)
            kind, length, *sizes = message[:8].tolist()
            payload = message[8 : 8 + length]
            if length > _INLINE - 8:
                payload = axis.broadcast_(torch.zeros(length, dtype=torch.int32))
            if kind == _STOP:
                return
            if kind == _STEP:
                self._follow_step(payload.numpy(), *sizes[:4])
            elif kind == _HOLD:
                self._hold(*map(bool, sizes[:2]))
            else:
                text = payload.numpy().astype(np.uint8).tobytes().decode()
                self._follow_update(text, kind, sizes[0])

    @torch.inference_mode()
    def _follow_step(self, payload: np.ndarray, T: int, S: int, width: int, W: int) -> None:
        ends = np.cumsum((T, T, T, S * width, W))
        tokens, sequence, position, tables, wanted = np.split(payload, ends[:-1])
        self._forward(Step(tokens, sequence, position, tables.reshape(S, width), wanted))

    def _follow_update(self, text: str, kind: int, number: int) -> None:
        if kind == _TENSOR:
            tensor = torch.empty(self._specs()[text].shape, dtype=self.model.weights.dtype)
            self._fill(text, self.world.axis("world").broadcast_(tensor))
            return
        try:
            if kind == _TAKE:
                self._take(text, number)
            else:
                {_PATH: self._load, _WRITE: self._write}[kind](text)
        except (WeightUpdateError, WriterGone):
            log.exception("rank %d could not read or write %s", self.world.rank, text)

    # The work itself, every rank

    def _forward(self, step: Step) -> Tensor | None:
        model, axis, device = self.model, self.world.axis("pp"), self.model.weights.device
        to = lambda x: torch.from_numpy(x).to(device)  # noqa: E731
        rows = len(step.wanted)
        last_of_all = axis.index == axis.size - 1
        wanted = None if rows == len(step.tokens) else to(step.wanted).long()
        seq = PagedSequences(to(step.sequence), to(step.position), to(step.tables), self._caches, *self._rotary, wanted)
        if axis.index == 0:
            x = to(step.tokens)
        else:
            x = torch.empty((len(step.tokens), model.arch.hidden_size), dtype=model.weights.dtype, device=device)
            axis.irecv(x, axis.index - 1).wait()
        for chunk in model.chunks:
            x = chunk(x, seq)
        if not last_of_all:
            axis.isend(x, axis.index + 1).wait()
            return self._receive(rows) if axis.index == 0 and self.world.coords.tp == 0 and rows else None
        if not rows:
            return None
        logits = model.gather_logits(x)
        if axis.size > 1 and self.world.coords.tp == 0:
            axis.isend(logits.contiguous(), 0).wait()
        return logits

    def _receive(self, rows: int) -> Tensor:
        axis, model = self.world.axis("pp"), self.model
        logits = torch.empty((rows, model.arch.vocab_size), dtype=model.weights.dtype, device=model.weights.device)
        axis.irecv(logits, axis.size - 1).wait()
        return logits

    def _check(self, name: str, tensor: Tensor) -> bool:
        """Whether the model keeps such a tensor (a tied head's second name and rotary buffers are passed over)."""
        spec = self._specs().get(name)
        if spec is None:
            if name.endswith("rotary_emb.inv_freq") or (
                name == "lm_head.weight" and self.model.arch.tie_word_embeddings
            ):
                return False
            raise WeightUpdateError(f"{name}: the model has no such tensor")
        if tuple(tensor.shape) != tuple(spec.shape):
            raise WeightUpdateError(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(spec.shape)}")
        return True

    def _specs(self) -> Mapping:
        return self.model.layout().tensors

    def names(self) -> frozenset[str]:
        """Canonical names of all the model's tensors."""
        return frozenset(self._specs())

    def _fill(self, name: str, tensor: Tensor) -> None:
        flat = self.model.weights
        self._forget()
        for piece in self._held.pieces.get(name, ()):
            size = [stop - start for start, stop in piece.box]
            box = tuple(slice(start, stop) for start, stop in piece.box)
            flat.as_strided(size, piece.strides, piece.offset).copy_(tensor[box])

    def _load(self, path: str) -> None:
        problem = None
        self._forget()
        try:
            load_weights(self.model, path)
        except (ValueError, OSError) as error:
            problem = str(error)
        failed = self.world.axis("world").all_reduce_(torch.tensor([float(problem is not None)]))
        if failed:
            raise WeightUpdateError(problem or f"another rank could not load {path}; its log says why")

    def _write(self, path: str) -> None:
        problem, me = None, rank_name(self.world.rank)
        try:
            shared = SharedWeights(path)
            for name, piece in only(owners(self.model.layout()), places=[me]):
                shared.write(name, piece.box, view(self.model.weights, piece.box, piece.spot()), turn=1)
        except (ValueError, OSError) as error:
            problem = str(error)
        failed = self.world.axis("world").all_reduce_(torch.tensor([float(problem is not None)]))
        if failed:
            raise WeightUpdateError(problem or f"another rank could not write to {path}; its log says why")

    def _take(self, path: str, turn: int) -> dict[str, int]:
        names, problem, gone, sums = list(self._specs()), None, None, {}
        try:
            sums = self._from(path).take(None if turn == _SUMS_ONLY else turn)
        except (ValueError, OSError) as error:
            problem = str(error)
        except WriterGone as error:
            gone = str(error)
        # Sums of disjoint shares add up modulo 2^64, which is how signed 64-bit integers add up.
        told = [sums.get(name, 0) for name in names] + [problem is not None, gone is not None]
        told = torch.from_numpy(np.array(told, dtype=np.uint64).view(np.int64))
        *told, failed, unfinished = self.world.axis("world").all_reduce_(told).numpy().view(np.uint64).tolist()
        if failed:
            raise WeightUpdateError(problem or f"another rank could not take {path}; its log says why")
        if unfinished:
            raise WriterGone(gone or f"push {turn} was given up while another rank took it")
        return dict(zip(names, told, strict=True))

    def _from(self, path: str) -> SharedReader:
        """The way from that directory into this rank's weights; kept for the next push."""
        if self._reader is None or self._reader.shared.path != path:
            me, layout = rank_name(self.world.rank), self.model.layout()
            frozen = layout.tensors.keys() - self.model.trained_layout().tensors.keys()
            self._reader = SharedReader(path, layout, me, {(me, "weights"): self.model.weights}, frozen)
        return self._reader

    def _hold(self, cache: bool, weights: bool) -> None:
        if cache != bool(self._caches):
            self._caches = self._make_caches() if cache else {}
        if weights != bool(self.model.weights.numel()):
            self.model.allocate(weights)
            self._reader = None  # it knows where the weights were
        if self.model.weights.is_cuda and not (cache and weights):
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        """Weights have come another way: the next push is taken whole."""
        if self._reader is not None:
            self._reader.forget()
