"""The shape of the code: imports go down only, one file spells the mesh axes, files stay short."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mixtral_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room is a folder of the package, or a file directly in it. Each may import itself and these:
GROUND = {"checks", "config", "config_io", "command_line", "files", "hosts", "sharding"}
FLOORS: dict[str, set[str]] = {
    "checks": set(),
    "config": {"checks"},
    "config_io": {"checks", "config"},
    "command_line": {"config"},
    "files": {"config", "command_line"},
    "sharding": {"config"},
    "hosts": {"config"},
    "kernels": set(),  # arrays in, arrays out
    "model": {"kernels"} | GROUND,
    "data": GROUND,
    "interop": {"model", "data", "kernels"} | GROUND,  # checkpoints, those of training included
    "training": {"interop", "model", "data", "kernels"} | GROUND,
    "generation": {"interop", "model", "data", "kernels"} | GROUND,
    "analysis": {"generation", "training", "interop", "model", "data", "kernels"} | GROUND,
    "__init__": {"interop"},  # everything imports it; it imports when asked
}

ONLY_AXES = {"fsdp", "tensor"}  # words that can mean nothing but a mesh axis
AXES = ONLY_AXES | {"data", "expert"}  # these are ordinary words outside the calls below
SPELL_AXES = {"config.py", "sharding.py"}
CALLS_WITH_AXES = {
    *("PartitionSpec", "P", "psum", "pmean", "pmax", "pmin", "psum_scatter", "ppermute"),
    *("all_gather", "all_to_all", "ragged_all_to_all", "axis_index", "axis_size", "pcast", "pvary"),
}

LONGEST = 350
LONGER = {"config": 420}  # eighty keys, each with its meaning, read best in one place


def module_name(path: pathlib.Path) -> str:
    """model/router.py -> model.router; model/__init__.py -> model.__init__."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST, module: str) -> list[tuple[int, str]]:
    """Line and module of every import of the project, anywhere in a file, inside functions too."""
    package = ["mixtral_jax", *module.split(".")[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    prefix = "mixtral_jax."
    return [(line, name.removeprefix(prefix)) for line, name in found if name.startswith(prefix)]


def breaches(tree: ast.AST, module: str) -> list[str]:
    """The imports of a file that its floor does not allow."""
    room = module.split(".")[0]
    assert room in FLOORS, f"mixtral_jax/{room} has no floor: add it to FLOORS"
    wrong = []
    for line, name in imports(tree, module):
        if name.split(".")[0] not in {room} | FLOORS[room] and not name.startswith("__"):
            wrong.append(f"line {line} of {module}: {room} must not import {name}")
    return wrong


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that stand as statements: docstrings of modules, functions, classes and fields."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def spelled_axes(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and text of every string that names a mesh axis."""
    skipped = docstrings(tree)
    found = set()
    for node in ast.walk(tree):
        words, inside = ONLY_AXES, [node]
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in CALLS_WITH_AXES:
                words, inside = AXES, ast.walk(node)
        for part in inside:
            if isinstance(part, ast.Constant) and part.value in words and part not in skipped:
                found.add((part.lineno, part.value))
    return sorted(found)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path):
    wrong = breaches(ast.parse(path.read_text(encoding="utf-8")), module_name(path))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_mesh_axes_are_spelled_in_one_place(path):
    if str(path.relative_to(PACKAGE)) in SPELL_AXES:
        return
    found = spelled_axes(ast.parse(path.read_text(encoding="utf-8")))
    assert not found, f"{module_name(path)} spells mesh axes (take them from sharding.py): {found}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short(path):
    name = module_name(path)
    lines, most = len(path.read_text(encoding="utf-8").splitlines()), LONGER.get(name, LONGEST)
    assert lines <= most, f"{name} has {lines} lines, more than {most}: split it"


def test_rules_name_rooms_that_exist_in_the_rules():
    for room, below in FLOORS.items():
        assert below <= FLOORS.keys() - {room}
    order = list(FLOORS)
    assert all(order.index(low) < order.index(room) for room in FLOORS for low in FLOORS[room])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels.exchange", "from mixtral_jax import sharding"),
        ("kernels.exchange", "import mixtral_jax.config as c"),
        ("kernels.exchange", "from .. import model"),
        ("kernels.exchange", "from ..model.router import Routing"),
        ("model.moe", "def f():\n    from mixtral_jax.training import losses"),
        ("data.text", "from mixtral_jax.model import cache"),
        ("config", "import mixtral_jax.sharding"),
        ("generation.engine", "from mixtral_jax.training import loop"),
        ("interop.own", "from mixtral_jax.training import checkpoint"),
        ("generation.engine", "from mixtral_jax import training"),
        ("training.loop", "from mixtral_jax.generation import engine"),
    ],
)
def test_an_upward_import_is_seen(module, line):
    assert breaches(ast.parse(line), module)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels.exchange", "from mixtral_jax.kernels import grouped_matmul"),
        ("kernels.exchange", "from . import grouped_matmul"),
        ("kernels.exchange", "from .grouped_matmul import f\nimport jax.numpy as jnp"),
        ("sharding", "from mixtral_jax.config import MeshConfig"),
        ("training.loop", "from mixtral_jax.model.mixtral import Mixtral"),
        ("training.loop", "import mixtral_jax\nfrom mixtral_jax import __version__"),
        ("generation.engine", "from mixtral_jax.interop.own import find"),
        ("training.loop", "from mixtral_jax.interop import own"),
    ],
)
def test_a_downward_import_passes(module, line):
    assert not breaches(ast.parse(line), module)


def test_a_spelled_axis_is_seen():
    code = '''
"""fsdp"""
x = jax.lax.psum(x, ("data", "expert"))
spec = P(None, "tensor")
size = mesh.shape["fsdp"]
section = config["data"]
'''
    found = [(3, "data"), (3, "expert"), (4, "tensor"), (5, "fsdp")]
    assert spelled_axes(ast.parse(code)) == found
    assert spelled_axes(ast.parse('"""fsdp"""\nclass A:\n    x: int\n    """tensor"""')) == []
