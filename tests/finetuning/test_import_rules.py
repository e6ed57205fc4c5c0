"""Who may import whom, as the design says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TENSORS = ("torch", "transformers", "peft", "datasets", "accelerate")
HEAVY = (
    *TENSORS,
    "ray",
    "numpy",
    "pandas",
    "pyarrow",
    "huggingface_hub",
    "aiohttp",
    "alembic",
    "cryptography",
)


def imports(folder: str) -> Iterator[tuple[Path, str]]:
    """Each file of a package with each module that it names in an import, wherever in the file."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, name.name) for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module
                yield from ((path, f"{node.module}.{name.name}") for name in node.names)


def test_the_library_knows_nothing_of_the_service() -> None:
    wrong = [
        (path.name, name) for path, name in imports("comps/tuning") if name.startswith("comps.finetuning")
    ]
    assert wrong == []


def test_the_cores_know_nothing_of_tuning() -> None:
    others = ("comps.finetuning", "comps.tuning")
    wrong = [(path.name, name) for path, name in imports("comps/cores") if name.startswith(others)]
    assert wrong == []


@pytest.mark.parametrize("library", TENSORS)
def test_no_file_of_the_service_imports_a_tensor_library(library: str) -> None:
    wrong = [
        (path.name, name) for path, name in imports("comps/finetuning") if name.partition(".")[0] == library
    ]
    assert wrong == []


def test_importing_the_service_loads_nothing_heavy() -> None:
    code = "import sys, comps.finetuning.__main__; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in HEAVY if name in loaded] == []


def test_the_specs_can_be_imported_without_torch() -> None:
    modules = "comps.tuning.spec, comps.tuning.rundir, comps.tuning.errors"
    command = [sys.executable, "-c", f"import sys, {modules}; print('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def private_names(path: Path) -> Iterator[str]:
    """Private modules and names that a file imports from other distributions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        ours = ast.unparse(node).split()[1].startswith(("comps", "patches"))
        if not ours:
            yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


def test_only_patches_import_private_parts_of_libraries() -> None:
    paths = (ROOT / "comps").rglob("*.py")
    wrong = {path.name: found for path in paths if (found := list(private_names(path)))}
    assert wrong == {}
