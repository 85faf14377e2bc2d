"""The promises of the source: which way imports point, how long things are, where tests stand."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# The rooms, from the ground up: a file imports from its own layer and from those below it.
LAYERS = [
    {"runtime"},
    {"kernels", "diffusion", "text", "sharding", "pictures"},
    {"models"},
    {"lora", "quantisation"},
    {"checkpoints"},
    {"pipeline", ""},  # "": the face, sana_jax/__init__.py
    {"batch", "metrics", "data", "shapes"},
    {"training", "measure", "judges"},
    {"pages"},
]  # above them the commands: the files of the root that are no room

# Architecture and mathematics read no files, so they need nothing else of Python and of others.
PURE = {"models", "diffusion"}
PURE_IMPORTS = set(
    "collections dataclasses functools itertools math types typing"
    " einops flax jax jaxtyping numpy sana_jax".split()
)

LONGEST_FUNCTION = 80
LONGEST_FILE = 450


class Import(NamedTuple):
    module: str  # the file's own, sana_jax.data.loader
    line: int
    target: str  # what it imports: a module of sana_jax, or the name of another package
    runs: bool  # when the file is imported, rather than in a function or for type checkers
    explained: bool  # by a comment beside it or above it


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path) -> dict[str, Path]:
    return {module_of(path, root): path for path in sorted((root / "sana_jax").rglob("*.py"))}


def imports_of(path: Path, modules: dict[str, Path], root: Path) -> Iterator[Import]:
    source = path.read_text()
    lines = source.splitlines()
    module = module_of(path, root)
    package = module if path.stem == "__init__" else module.rpartition(".")[0]

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        for alias in node.names:
            if isinstance(node, ast.Import):
                name = alias.name
            else:
                stem = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                name = f"{stem}.{alias.name}"
                name = name if name in modules else stem
            yield name if name.startswith("sana_jax") else name.partition(".")[0]

    def visit(node: ast.AST, runs: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            above = lines[node.lineno - 2].strip() if node.lineno > 1 else ""
            explained = above.startswith("#") or "#" in lines[node.lineno - 1]
            for target in dict.fromkeys(targets(node)):
                yield Import(module, node.lineno, target, runs, explained)
            return
        is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_later |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, runs and not is_later)

    yield from visit(ast.parse(source), runs=True)


def all_imports(root: Path) -> list[Import]:
    modules = modules_of(root)
    return [found for path in modules.values() for found in imports_of(path, modules, root)]


def room_of(module: str) -> str:
    return (module + ".").split(".")[1]


def layer_of(module: str) -> int:
    room = room_of(module)
    return next((i for i, rooms in enumerate(LAYERS) if room in rooms), len(LAYERS))


def circles(root: Path) -> list[str]:
    """The shortest circle through each file, of imports inside functions too."""
    below: dict[str, set[str]] = {}
    for found in all_imports(root):
        if found.target.startswith("sana_jax"):
            below.setdefault(found.module, set()).add(found.target)
    shown = []
    for start in sorted(below):
        ways, seen = [[start]], set()
        while ways:  # breadth first: the shortest circle
            way = ways.pop(0)
            if start in below.get(way[-1], ()):
                shown.append(" -> ".join([*way, start]))
                break
            for target in sorted(below.get(way[-1], set()) - seen):
                seen.add(target)
                ways.append([*way, target])
    return shown


def imports_from_above(root: Path) -> list[str]:
    return [
        f"{found.module}:{found.line} imports {found.target}"
        for found in all_imports(root)
        if found.target.startswith("sana_jax")
        and layer_of(found.target) > layer_of(found.module)
        and (found.runs or not found.explained)
    ]


def impure_imports(root: Path) -> list[str]:
    return [
        f"{found.module}:{found.line} imports {found.target}"
        for found in all_imports(root)
        if room_of(found.module) in PURE and found.target.partition(".")[0] not in PURE_IMPORTS
    ]


def foreign_formats(root: Path) -> list[str]:
    """Functions of the pure rooms that translate between us and another library."""
    return [
        f"{module}:{node.lineno} {node.name}"
        for module, path in modules_of(root).items()
        if room_of(module) in PURE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("from_", "to_"))
    ]


def long_functions(root: Path) -> list[str]:
    return [
        f"{module}:{node.lineno} {node.name} has {length} lines"
        for module, path in modules_of(root).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]


def long_files(root: Path) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in modules_of(root).values()}
    return [f"{path} has {length}" for path, length in lengths.items() if length > LONGEST_FILE]


def sources_without_tests(root: Path) -> list[str]:
    """Files a/b.py without tests a/test_b.py or a/test_b_*.py; a kernel may share its folder's."""

    def named(source: Path) -> bool:
        folder = root / "tests" / source.parent
        names = [f"test_{source.stem}.py", f"test_{source.stem}_*.py"]
        return any(found for name in names for found in folder.glob(name))

    sources = (path.relative_to(root / "sana_jax") for path in modules_of(root).values())
    return [
        str(source)
        for source in sources
        if source.stem != "__init__"
        and not named(source)
        and not (source.parts[0] == "kernels" and named(source.parent))
    ]


def test_no_imports_go_in_a_circle():
    assert circles(ROOT) == []


def test_nothing_imports_from_a_layer_above():
    assert imports_from_above(ROOT) == []


def test_every_room_has_a_layer_and_every_layer_its_rooms():
    rooms = set().union(*LAYERS)
    folders = {path.parent.name for path in (ROOT / "sana_jax").glob("*/__init__.py")}
    assert folders - rooms == set()
    assert rooms - folders == {"sharding", "pictures", ""}


def test_models_and_diffusion_read_no_files_and_know_no_other_library():
    assert impure_imports(ROOT) == []
    assert foreign_formats(ROOT) == []


def test_no_function_and_no_file_is_too_long():
    assert long_functions(ROOT) == []
    assert long_files(ROOT) == []


def test_every_source_file_is_found_among_the_tests():
    assert sources_without_tests(ROOT) == []


def make_house(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "sana_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_circle_is_found_also_in_functions(tmp_path):
    files = {
        "data/sources.py": "def f():\n    from sana_jax.data import precomputed\n",
        "data/precomputed.py": "class Reader:\n    from sana_jax.data.sources import Record\n",
        "data/loader.py": "import sana_jax.data.precomputed\n",
    }
    sources, precomputed = "sana_jax.data.sources", "sana_jax.data.precomputed"
    assert circles(make_house(tmp_path, files)) == [
        f"{precomputed} -> {sources} -> {precomputed}",
        f"{sources} -> {precomputed} -> {sources}",
    ]


def test_an_import_from_above_is_found_unless_it_is_late_and_explained(tmp_path):
    files = {
        "metrics/a.py": "from sana_jax.training import loop  # why\n",
        "metrics/b.py": "def f():\n    from sana_jax.training import loop\n",
        "metrics/c.py": "def f():\n    # why\n    from sana_jax.training import loop\n",
        "metrics/d.py": "from sana_jax.sample import main\nfrom sana_jax.data import x\n",
        "training/loop.py": "from sana_jax.metrics import a\n",
        "sample.py": "from sana_jax.training import loop\n",
    }
    assert imports_from_above(make_house(tmp_path, files)) == [
        "sana_jax.metrics.a:1 imports sana_jax.training.loop",
        "sana_jax.metrics.b:2 imports sana_jax.training.loop",
        "sana_jax.metrics.d:1 imports sana_jax.sample",
    ]


def test_a_file_format_among_the_models_is_found(tmp_path):
    files = {
        "models/dit.py": "import jax.numpy\nimport json\n\n\ndef from_diffusers(): ...\n",
        "diffusion/flow.py": "def f():\n    import safetensors.numpy\n",
        "checkpoints/native.py": "import json\n",
    }
    house = make_house(tmp_path, files)
    assert impure_imports(house) == [
        "sana_jax.diffusion.flow:2 imports safetensors",
        "sana_jax.models.dit:2 imports json",
    ]
    assert foreign_formats(house) == ["sana_jax.models.dit:5 from_diffusers"]


def test_what_is_too_long_or_untested_is_found(tmp_path):
    files = {
        "data/a.py": "def f():\n" + "    pass\n" * LONGEST_FUNCTION,
        "data/b.py": "x = 1\n" * (LONGEST_FILE + 1),
        "data/c.py": "def f():\n" + "    pass\n" * (LONGEST_FUNCTION - 1),
        "kernels/norm/tpu.py": "",
    }
    house = make_house(tmp_path, files)
    assert long_functions(house) == ["sana_jax.data.a:1 f has 81 lines"]
    assert long_files(house) == [f"{tmp_path}/sana_jax/data/b.py has 451"]
    for name in (
        "data/test_a.py",
        "data/test_b_more.py",
        "data/test_cc.py",
        "kernels/test_norm.py",
    ):
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sources_without_tests(house) == ["data/c.py"]
