"""The direction of imports (README, "What to read, in which order"). The tests read the source, since an
import inside a function may never run.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"models", "dataset", "util"}


def imported(path):
    """The dotted names of all modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: wildcard import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def test_dataset_and_util_import_nothing_of_models():
    for folder in ("dataset", "util"):
        assert files(folder)
        for path in files(folder):
            assert not any(
                name.split(".")[0] in ("models", "train_semi", "eval") for name in imported(path)
            ), path


def test_util_imports_no_other_folder():
    for path in files("util"):
        assert {name.split(".")[0] for name in imported(path)} & FOLDERS <= {"util"}, path


def test_models_import_only_dist_utils_of_other_folders():
    for path in files("models"):
        for name in imported(path):
            assert name.split(".")[0] != "dataset", path
            if name.split(".")[0] == "util":
                assert name in ("util", "util.dist_utils", "util.shuffle", "util.shuffle.Shuffle"), (
                    path,
                    name,
                )


def test_only_two_files_of_util_import_torch_distributed():
    for path in [
        *files("models"),
        *files("dataset"),
        *files("util"),
        ROOT / "train_semi.py",
        ROOT / "eval.py",
    ]:
        if path.name not in ("dist_utils.py", "process_groups.py"):
            assert not any(name.startswith("torch.distributed") for name in imported(path)), path


def test_models_neither_print_nor_choose_devices():
    for path in files("models"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                assert called not in ("print", "cuda", "get_rank", "rank"), (path, node.lineno)


def test_only_the_packages_of_requirements_are_imported():
    """The exception is a package of tests/optional.txt, imported in a function that a user asks for."""
    allowed = {
        "torch",
        "torchvision",
        "numpy",
        "yaml",
        "tensorboard",
        "PIL",
        "onnxruntime",
        "eval",
    } | FOLDERS  # torchvision requires PIL
    for path in [
        *files("models"),
        *files("dataset"),
        *files("util"),
        ROOT / "train_semi.py",
        ROOT / "eval.py",
    ]:
        for name in imported(path):
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, (path, name)
        at_the_top = [
            alias.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import)
            for alias in node.names
        ]
        assert "onnxruntime" not in at_the_top, path
