"""The public names: each is where the documentation says, importable, documented, and in its package's `__all__`."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import raytron

PUBLIC = {
    "raytron.models": ("build", "from_pretrained", "PRESETS"),
    "raytron.checkpoint": ("save_pretrained",),
    "raytron.parallel": ("Mesh", "Layout", "plan"),
    "raytron.training": ("TrainEngine",),
    "raytron.inference": ("LLM", "SamplingParams", "Engine"),
    "raytron.actors": ("TrainerGroup",),
    "raytron.pretrain": ("run",),
    "raytron.sft": ("run",),
}
ROOMS = sorted(f"raytron.{room.name}" for room in pkgutil.iter_modules(raytron.__path__))


def is_documented(member: object) -> bool:
    """Whether a class or function says what it is; values (presets, type aliases) are described by their module."""
    if not (inspect.isclass(member) or inspect.isroutine(member)):
        return True
    doc = member.__doc__ or ""
    return bool(doc.strip()) and not doc.startswith(f"{member.__name__}(")  # what dataclass writes of itself


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_public_name(module: str, name: str):
    package = importlib.import_module(module)
    assert name in package.__all__
    assert is_documented(getattr(package, name))


@pytest.mark.parametrize("room", ROOMS)
def test_everything_a_room_exports_is_there_and_documented(room: str):
    package: ModuleType = importlib.import_module(room)
    assert package.__doc__, f"{room} has no docstring"
    names = package.__all__
    assert len(names) == len(set(names))
    missing = [name for name in names if not hasattr(package, name)]
    assert not missing, f"{room}.__all__ names {missing}, which it does not have"
    bare = [name for name in names if not is_documented(getattr(package, name))]
    assert not bare, f"{room} exports {bare} without a docstring"
