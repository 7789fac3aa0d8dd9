"""The dense decoder every Llama-like family is an instance of: blocks, chunks, and one rank's part of a model.

A model is cut into pp x virtual_stages chunks; rank p of the pipeline holds chunks p, p + pp, ... A chunk is an
ordinary module from tokens or hidden states to hidden states or logits, so one process, a pipeline executor and the
inference engine run the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.models.arch import DecoderConfig
from raytron.models.base import ShardedModel, chunk_layers
from raytron.models.layers.attention import Attention, Sequences
from raytron.models.layers.documents import Documents
from raytron.models.layers.mlp import SwiGLU
from raytron.models.layers.norm import RMSNorm
from raytron.models.layers.reproducible import ReproducibleSequences
from raytron.models.layers.rotary import frequencies, rotary_table
from raytron.parallel.collectives import Axis, World, gather_rows
from raytron.parallel.tensor import Replicated, VocabParallelEmbedding, VocabParallelHead

__all__ = ["Block", "Chunk", "Decoder", "ScoreHead"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Forward: x_TD -> x_TD."""

    def __init__(self, prefix: str, arch: DecoderConfig, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        norm = {"size": arch.hidden_size, "eps": arch.rms_norm_eps, "tp": tp, "partial": sequence_parallel}
        self.input_norm = RMSNorm(f"{prefix}input_layernorm", **norm)
        self.attention = Attention(f"{prefix}self_attn.", arch, tp, sequence_parallel)
        self.post_norm = RMSNorm(f"{prefix}post_attention_layernorm", **norm)
        self.mlp = SwiGLU(f"{prefix}mlp.", arch, tp, sequence_parallel)

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        x = x + self.attention(self.input_norm(x), seq)
        return x + self.mlp(self.post_norm(x))


class ScoreHead(Replicated):
    """x_TD -> scores [T, labels], on every tp rank alike: each sees all tokens, so its gradient is the whole one.

    It starts at zero, as a critic should that knows nothing yet.
    """

    start = 0

    def __init__(self, labels: int, size: int, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__("score.weight", (labels, size), tp, partial=False, std=0.0, added=True)
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.product = F.linear  # see `use_kernels`

    def forward(self, x: Tensor) -> Tensor:
        x = gather_rows(x, self.tp, summed=False) if self.sequence_parallel else x
        return self.product(x, self.weight.to(x.dtype))


class Chunk(nn.Module):
    """A run of layers, with the embedding in front of the first and norm and head behind the last.

    Forward: tokens_T (first chunk) or x_TD -> x_TD, or logits_TVt (last chunk; scores where the model gives those).
    """

    def __init__(
        self, arch: DecoderConfig, layers: Sequence[int], tp: Axis, sequence_parallel: bool, first: bool, last: bool
    ) -> None:
        super().__init__()
        self.first, self.last = first, last
        sharing = {"tp": tp, "sequence_parallel": sequence_parallel, "std": arch.initializer_range}
        vocabulary = (arch.vocab_size, arch.hidden_size)
        self.embed = VocabParallelEmbedding("model.embed_tokens", *vocabulary, **sharing) if first else None
        self.layers = nn.ModuleList(Block(f"model.layers.{i}.", arch, tp, sequence_parallel) for i in layers)
        if last:
            self.norm = RMSNorm("model.norm", arch.hidden_size, arch.rms_norm_eps, tp, partial=sequence_parallel)
            self.head = self._head(arch, vocabulary, sharing)

    def _head(self, arch: DecoderConfig, vocabulary: tuple[int, int], sharing: dict[str, Any]) -> nn.Module:
        if arch.num_labels:
            return ScoreHead(arch.num_labels, arch.hidden_size, sharing["tp"], sharing["sequence_parallel"])
        name = "model.embed_tokens" if arch.tie_word_embeddings else "lm_head"
        return VocabParallelHead(name, *vocabulary, **sharing, tied=self.embed if arch.tie_word_embeddings else None)

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        x = self.embed(x) if self.first else x
        for layer in self.layers:
            x = layer(x, seq)
        if not self.last:
            return x
        return self.head(self.norm(x if seq.wanted is None else x[seq.wanted]))


def document_starts(batch: int, length: int, positions_BS: Tensor | None, documents_BS: Tensor | None) -> Tensor:
    """bool [B * S], where a row or a document begins. ValueError unless positions are counted from there."""
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[:, 0] = True
    if documents_BS is not None:
        first[:, 1:] |= documents_BS[:, 1:] != documents_BS[:, :-1]
    index = torch.arange(length).expand(batch, -1)
    expected = index - torch.where(first, index, 0).cummax(dim=1).values
    if not torch.equal(expected, index if positions_BS is None else positions_BS.long()):
        raise ValueError(
            "reproducible mode counts positions from the start of every document; set data.reset_position_ids with "
            "data.document_mask, or neither of them"
        )
    return first.flatten()


class Decoder(ShardedModel):
    """One rank's part of a dense decoder. See `ShardedModel`."""

    arch: DecoderConfig

    def make_chunks(self, world: World) -> list[nn.Module]:
        arch, parallel = self.arch, self.parallel
        tp, stages = world.axis("tp"), world.mesh.pp
        layers = chunk_layers(arch.num_hidden_layers, stages, parallel.virtual_stages, parallel.layers_per_stage)
        sequence_parallel = parallel.sequence_parallel and tp.size > 1
        mine = range(world.coords.pp, len(layers), stages)
        chunks = [Chunk(arch, layers[i], tp, sequence_parallel, first=i == 0, last=i == len(layers) - 1) for i in mine]
        if self._tied and stages == 1 and len(chunks) > 1:
            chunks[-1].head.weight = chunks[0].embed.weight
        return chunks

    @property
    def _tied(self) -> bool:
        return self.arch.tie_word_embeddings and not self.arch.num_labels

    def tied_ends(self) -> nn.Parameter | None:
        """The embedding whose twin is at the other end of the pipeline; their gradients are to be summed."""
        if not self._tied or self.world.mesh.pp == 1:
            return None
        if self.chunks[0].first:
            return self.chunks[0].embed.weight
        return self.chunks[-1].head.weight if self.chunks[-1].last else None

    def sequences(
        self,
        batch: int,
        length: int,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        parents_BS: Tensor | None = None,
    ) -> Sequences | ReproducibleSequences:
        """What the layers must know of a micro-batch: rotary table at `positions_BS` (default 0..S-1), and the mask.

        With `documents_BS` (an id per token) attention does not cross documents, but for those that continue another
        one in front of them in the row, `parents_BS` (their own id if none): a prompt that several answers share.

        Raises ValueError in reproducible mode for positions that are not counted from the start of a document.
        """
        device = self.weights.device
        if positions_BS is None:
            key = (length, device)
            if key not in self._tables:
                positions = torch.arange(length, device=device)
                self._tables = {key: rotary_table(positions, self._inverse, self.compute_dtype)}
            cos, sin = self._tables[key]
        else:
            cos, sin = rotary_table(positions_BS, self._inverse, self.compute_dtype)
        blocked = documents = None
        if documents_BS is not None and device.type == "cpu" and not (self.compiled or self.reproducible):
            documents = Documents.of(documents_BS, parents_BS)
        elif documents_BS is not None:
            other = documents_BS[:, :, None] != documents_BS[:, None, :]
            if parents_BS is not None:
                other &= parents_BS[:, :, None] != documents_BS[:, None, :]
            future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
            blocked = (other | future).unsqueeze(1)
        plain = Sequences(batch, length, cos, sin, blocked, documents)
        if not self.reproducible:
            return plain
        starts = document_starts(batch, length, positions_BS, documents_BS)
        return ReproducibleSequences(plain, *self.rotary(length), starts)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0..length-1, fp32 [length, head_dim / 2] each: what the inference kernels take."""
        angle = torch.outer(torch.arange(length, dtype=torch.float32), self._inverse).to(self.weights.device)
        return angle.cos(), angle.sin()

    @property
    def cached_layers(self) -> list[Attention]:
        """The layers that keep keys and values, in model order: what the inference engine makes caches for."""
        return [layer.attention for chunk in self.chunks for layer in chunk.layers]

    def prepare(self) -> None:
        self._inverse = frequencies(self.arch.head_dim, self.arch.rope_theta, self.arch.rope_scaling)
        self._tables: dict = {}

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """tokens_BT int64 -> logits_BTV (or scores), whole rows on every rank. One cut over pp runs in a `Pipeline`.

        Raises ValueError if this rank does not hold every layer, or for a sequence longer than rope allows.
        """
        if self.world.mesh.pp > 1:
            raise ValueError(
                "this rank holds one pipeline stage; run the model through TrainEngine, or load it at pp=1"
            )
        batch, length = tokens_BT.shape
        self.arch.check_sequence(length)
        # Sequence parallelism shares the tokens out evenly; nothing before it sees what is put at the end.
        padded = length + (-length % self.world.mesh.tp if self.parallel.sequence_parallel else 0)
        given = (tokens_BT, positions_BT, documents_BT)
        tokens_BT, positions_BT, documents_BT = (x if x is None else F.pad(x, (0, padded - length)) for x in given)
        seq = self.sequences(batch, padded, positions_BT, documents_BT)
        x = tokens_BT.reshape(-1)
        for chunk in self.chunks:
            x = chunk(x, seq)
        return self.gather_logits(x).view(batch, padded, -1)[:, :length]

    def gather_logits(self, logits_TVt: Tensor) -> Tensor:
        """[T, Vt] of each tp rank -> [T, V]. Scores are whole already."""
        tp, vocab_size = self.world.axis("tp"), self.arch.vocab_size
        if tp.size == 1 or self.arch.num_labels:
            return logits_TVt
        rows = self.chunks[-1].head.weight.shape[0]
        padded = F.pad(logits_TVt, (0, rows - logits_TVt.shape[1]))
        return gather_rows(padded.t().contiguous(), tp, summed=False)[:vocab_size].t()
