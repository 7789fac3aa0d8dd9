"""The import order of the house, held: rooms import leftwards only, and Ray stays in the rooms that drive it.

Every import statement counts, at module level, inside functions and under TYPE_CHECKING alike, and so does
`importlib.import_module` with a literal: a late import couples two rooms as well as an early one.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    {"config", "metrics"},
    {"parallel"},
    {"precision"},
    {"models"},
    {"data"},
    {"checkpoint"},
    {"training", "inference"},
    {"post_training"},
    {"actors"},
    {"pretrain"},
    {"sft", "rl", "serving"},
    {"cli"},
    {"recipes"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT_RAY = {"actors", "pretrain", "sft", "rl", "serving", "cli"}


def room_of(module: str) -> str | None:
    """The room of a dotted module: "models" of "raytron.models.llama", "" of raytron, None of other packages."""
    top, _, rest = module.partition(".")
    if top == "recipes":
        return "recipes"
    return rest.split(".")[0] if top == "raytron" else None


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Dotted names a file imports, with the line; `package` is what its relative imports are relative to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module == "raytron":  # `from raytron import models`: the room is in the names
                yield from ((f"raytron.{alias.name}", node.lineno) for alias in node.names if alias.name[0] != "_")
            else:
                yield module, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((arg.value, node.lineno) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What the file `module` imports and may not, as sentences."""
    room = room_of(module)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for name, line in imported(ast.parse(source), package):
        target = room_of(name)
        if name.split(".")[0] == "ray" and room not in MAY_IMPORT_RAY:
            found.append(f"{module}:{line} imports {name}; only {sorted(MAY_IMPORT_RAY)} import ray")
        elif room == "config" and name.split(".")[0] in ("torch", "numpy"):
            found.append(f"{module}:{line} imports {name}; config stays without it so that --help is instant")
        elif target and target != room and (not room or RANK[target] >= RANK[room]):
            found.append(f"{module}:{line} imports {name}; {room or 'raytron/__init__'} may not import {target}")
    return found


def files() -> list[tuple[Path, str]]:
    paths = sorted([*ROOT.glob("raytron/**/*.py"), *ROOT.glob("recipes/**/*.py")])
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return list(zip(paths, names, strict=True))


def test_every_room_is_in_the_order():
    rooms = {room_of(name) for _, name in files()} - {""}
    assert rooms <= RANK.keys(), f"rooms without a place in the import order: {sorted(rooms - RANK.keys())}"


def test_imports_go_leftwards_and_ray_stays_with_the_drivers():
    found = [
        sentence
        for path, name in files()
        for sentence in violations(path.read_text(), name, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("raytron.models.llama", "from raytron.data import chat"),
        ("raytron.models.llama", "def late():\n    import raytron.training.engine"),
        ("raytron.models.llama", "from ..checkpoint import save_pretrained"),
        ("raytron.models.llama", "import importlib\nimportlib.import_module('raytron.data')"),
        ("raytron.training.engine", "from raytron import inference"),
        ("raytron.metrics.sinks", "from raytron.config import RunConfig"),
        ("raytron.training.engine", "import ray.train"),
        ("raytron.parallel.mesh", "if TYPE_CHECKING:\n    from ray.actor import ActorHandle"),
        ("raytron.config", "import torch"),
        ("raytron.config", "from numpy.typing import NDArray"),
        ("raytron.pretrain", "from raytron.serving.app import build"),
        ("raytron.pretrain", "from raytron.sft import run"),
        ("raytron.rl.driver", "from raytron.sft import run"),
        ("raytron.actors.trainer", "from recipes.llama3 import config"),
        ("raytron.__init__", "from raytron.config import RunConfig"),
        ("recipes.simple_loop", "import ray"),
    ],
)
def test_the_check_sees_a_wrong_import(module, source):
    name = module.removesuffix(".__init__")
    assert violations(source, name, is_package=module != name)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("raytron.models.llama", "from raytron.parallel import Mesh\nfrom .layers import norm"),
        ("raytron.training", "from .engine import TrainEngine"),
        ("raytron.pretrain", "import ray\nfrom raytron import actors, __version__"),
        ("recipes.llama3", "from raytron.pretrain import run\nfrom recipes.quickstart import config"),
    ],
)
def test_the_check_passes_a_right_import(module, source):
    assert not violations(source, module, is_package=module == "raytron.training")


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` are loaded in a fresh interpreter after `statement`, other packages' imports included."""
    code = f"import sys\n{statement}\nprint(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_config_is_light():
    assert loaded_by("import raytron.config", ("torch", "ray", "numpy", "transformers")) == []


def test_engines_run_without_ray():
    """Ray must not come in by a third package either: transformers, for one, knows how to import it."""
    engines = [room for room in RANK if RANK[room] <= RANK["training"] and (ROOT / "raytron" / room).is_dir()]
    assert "training" in engines
    assert loaded_by("".join(f"import raytron.{room}\n" for room in engines), ("ray",)) == []
