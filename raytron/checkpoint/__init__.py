"""Saving and loading: weights as Hugging Face directories, the whole training state as atomic checkpoints."""

from raytron.checkpoint.adapters import save_adapter
from raytron.checkpoint.huggingface import convert, save_pretrained
from raytron.checkpoint.manager import CheckpointManager
from raytron.checkpoint.saving import Saved
from raytron.checkpoint.storage import DamagedFile, Storage

__all__ = ["CheckpointManager", "DamagedFile", "Saved", "Storage", "convert", "save_adapter", "save_pretrained"]
