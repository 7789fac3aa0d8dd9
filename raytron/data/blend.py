"""Blending datasets by weight: at every sample, draw from the one that is furthest behind its share.

Megatron's greedy rule (``helpers.cpp:build_blending_indices``), number for number: sample i comes from the dataset with
the largest ``weight * max(i, 1) - drawn so far``, the first one on a tie. Drawing at random by weight would need no
index, but neither bounds how far a short stretch strays from the weights nor says how many samples to build.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence

import numpy as np

from raytron.data.gpt import GPTDataset, Sample, cached_arrays

SURPLUS = 0.005  # Megatron's: what each dataset builds beyond its share, since the greedy rule may overdraw a little


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights as shares of 1. Raises ValueError unless they are positive and finite."""
    values = np.array(weights, np.float64)
    if not len(values) or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"data.blend: weights must be positive numbers, got {list(weights)}")
    return (values / np.sum(values)).tolist()


def blend_sizes(weights: Sequence[float], num_samples: int, surplus: float = 0.0) -> list[int]:
    """Samples each dataset contributes to (with `surplus`: builds for) a blend of `num_samples`."""
    return [math.ceil(math.ceil(num_samples * weight) * (1 + surplus)) for weight in weights]


def build_blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset (int16) and sample in that dataset (int64) of each of `size` samples."""
    return _greedy(list(weights), [size] * len(weights), size)


def build_exhaustive_blending_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same with shares in proportion to `sizes`, until every dataset is used up exactly."""
    total = sum(sizes)
    return _greedy([size / total for size in sizes], sizes, total)


def _greedy(shares: list[float], limits: Sequence[int], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Each choice depends on all before it, so this is a loop; plain floats are several times faster in it than
    arrays of a few entries, and round the same."""
    drawn = [0] * len(shares)
    dataset_index, dataset_sample_index = array("h", bytes(2 * total)), array("q", bytes(8 * total))
    for i in range(total):
        at = max(i, 1)
        behind = [share * at - count for share, count in zip(shares, drawn, strict=True)]
        chosen = behind.index(max(behind))
        dataset_index[i] = chosen
        dataset_sample_index[i] = drawn[chosen]
        drawn[chosen] += 1
        if drawn[chosen] == limits[chosen]:
            shares[chosen] = -math.inf  # used up
    return np.frombuffer(dataset_index, np.int16), np.frombuffer(dataset_sample_index, np.int64)


class BlendedDataset:
    """Samples of several GPT datasets in proportion to `weights` (None: every sample of each, exactly once).

    `size` samples; needed with weights. Raises IndexError where a dataset was built with fewer samples than are drawn.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float] | None,
        size: int | None = None,
        cache_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if not 0 < len(datasets) < 32767:
            raise ValueError(f"data.blend: {len(datasets)} datasets, a blend takes 1 to 32,766")
        if len({dataset.sequence_length for dataset in datasets}) != 1:
            raise ValueError("data.blend: all datasets need one sequence_length")
        if (weights is None) != (size is None):
            raise ValueError("data.blend: weights need a number of samples, and the exhaustive blend sets its own")
        self.datasets = tuple(datasets)
        self.sequence_length = datasets[0].sequence_length
        self.document_mask = datasets[0].document_mask
        self.restart_positions = datasets[0].restart_positions
        self.weights = normalize([len(d) for d in datasets] if weights is None else weights)
        sizes = [len(dataset) for dataset in datasets]
        self.description = {
            "class": "BlendedDataset",
            "datasets": [dataset.description for dataset in datasets],
            "weights": None if weights is None else self.weights,
            "size": sum(sizes) if size is None else size,
        }
        self.dataset_index, self.dataset_sample_index = cached_arrays(
            cache_path,
            self.description,
            f"BlendedDataset-{datasets[0].split}",
            ("dataset_index", "dataset_sample_index"),
            lambda: (
                build_exhaustive_blending_indices(sizes) if size is None else build_blending_indices(self.weights, size)
            ),
        )
        drawn = np.bincount(self.dataset_index, minlength=len(sizes))
        for dataset, have, need in zip(datasets, sizes, drawn.tolist(), strict=True):
            if need > have:
                raise IndexError(
                    f"data.blend: {need} samples are drawn from {dataset.description['source']}, which was built with"
                    f" {have}; build it with a larger surplus"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}; build it with more samples")
        return self.datasets[self.dataset_index[index]][int(self.dataset_sample_index[index])]

    def token_counts(self, minlength: int = 0) -> np.ndarray:
        """Expected occurrences of each id per epoch's worth of tokens of the blend (float64)."""
        single = [dataset.token_counts(minlength) for dataset in self.datasets]
        length = max(len(counts) for counts in single)
        counts = np.array([np.pad(c, (0, length - len(c))) for c in single], np.float64)
        shares = counts / counts.sum(axis=1, keepdims=True)
        return np.array(self.weights) @ shares * counts.sum()
