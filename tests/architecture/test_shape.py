"""The package's shape: imports point down, light imports stay light, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "openembed"

LAYERS = [
    {
        "config",
        "files",
        "forks",
        "kernels",
        "records",
        "seeds",
        "progress",
        "documents",
        "shards",
        "locks",
        "report",
        "packaged",
        "layouts",
        "nano",
        "words",
        "versions",
    },
    {
        "representations",
        "packing",
        "similarity",
        "late_interaction",
        "losses",
        "vectors",
        "token_vectors",
        "encoded",
        "vector_files",
        "bulk_output",
    },
    {"tokenization", "backbones", "heads"},
    {"encoder"},
    {"checkpoints"},
    {
        "verify",
        "doctor",
        "bulk",
        "contributions",
        "terms",
        "rescoring",
        "ray_encode",
        "objectives",
        "index",
        "data",
        "rerankers",
    },
    {"train", "evaluation", "steps"},
    {"recipe", "recipes", "demo", "integrations"},
    {"cli", "server", "__main__"},
]
"""From the bottom up; a module may import its own layer and those below."""

LAZY_UPWARD = {("encoder", "checkpoints")}
"""``Encoder.save`` hands itself to the layer that knows file formats, inside the method."""

PERMITTED_LENGTH = 500
PERMITTED_FUNCTION = 80


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if "__pycache__" not in path.parts)


def part(path_or_name):
    return path_or_name.split(".")[1] if "." in path_or_name else "__init__"


def dotted(path):
    pieces = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def level(name):
    for number, members in enumerate(LAYERS):
        if name in members:
            return number
    raise AssertionError(f"{name} belongs to no layer: add it to LAYERS")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "openembed" else [node.module]


@pytest.mark.parametrize("path", modules(), ids=lambda p: dotted(p))
def test_imports_point_down(path):
    if dotted(path) == "openembed":
        return
    own = part(dotted(path))
    for name in imported(ast.parse(path.read_text())):
        if not name.startswith("openembed.") or part(name) in ("load", "build", "__version__"):
            continue
        other = part(name)
        allowed = level(other) <= level(own) or (own, other) in LAZY_UPWARD
        assert allowed, f"{dotted(path)} imports {name}, which lies above it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: dotted(p))
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= PERMITTED_LENGTH
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= PERMITTED_FUNCTION, f"{node.name} has {length} lines"


def test_most_functions_are_short():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[int(len(lengths) * 0.9)] <= 40


@pytest.mark.parametrize(
    "code",
    [
        "import openembed",
        "import openembed.cli",
        "import sys, openembed.cli\nsys.argv = ['openembed', '--help']\ntry: openembed.cli.main()\nexcept SystemExit: pass",
    ],
)
def test_light_imports_load_nothing_heavy(code):
    heavy = "torch", "transformers", "sklearn", "matplotlib", "mteb", "bm25s", "datasets", "qdrant_client", "psycopg", "ray"
    check = f"{code}\nimport sys\nfound = [m for m in {heavy!r} if m in sys.modules]\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    import openembed

    for name in openembed.__all__:
        assert getattr(openembed, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        openembed.nonsense  # noqa: B018


def test_no_model_name_decides_behaviour():
    """Nothing in the package compares a model's name with a literal."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node).lower()
                assert "name_or_path" not in text, f"{dotted(path)}: {text}"
