"""The direction of imports (README, "What to read, in which order"), read from the source, not from what
happens to be loaded.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"models", "dataset", "util"}


def imported(path):
    """Dotted names of every module that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: wildcard import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room):
    return sorted((ROOT / room).rglob("*.py"))


def test_dataset_and_util_import_nothing_of_models():
    for room in ("dataset", "util"):
        assert files(room)
        for path in files(room):
            assert not any(
                name.split(".")[0] in ("models", "train_semi", "eval") for name in imported(path)
            ), path


def test_util_imports_no_other_room():
    for path in files("util"):
        assert {name.split(".")[0] for name in imported(path)} & ROOMS <= {"util"}, path


def test_models_reach_ranks_through_one_file_and_nothing_else_of_other_rooms():
    for path in files("models"):
        for name in imported(path):
            assert name.split(".")[0] != "dataset", path
            if name.split(".")[0] == "util":
                assert name in ("util", "util.dist_utils"), (path, name)


def test_only_dist_utils_talks_to_torch_distributed():
    for path in [
        *files("models"),
        *files("dataset"),
        *files("util"),
        ROOT / "train_semi.py",
        ROOT / "eval.py",
    ]:
        if path.name != "dist_utils.py":
            assert not any(name.startswith("torch.distributed") for name in imported(path)), path


def test_models_neither_print_nor_choose_devices():
    for path in files("models"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                assert called not in ("print", "cuda", "get_rank", "rank"), (path, node.lineno)


def test_the_packages_of_requirements_are_all_that_is_imported():
    """… but for those of tests/optional.txt that a function imports where a user asks for what they do."""
    allowed = {
        "torch",
        "torchvision",
        "numpy",
        "yaml",
        "tensorboard",
        "PIL",
        "onnxruntime",
        "eval",
    } | ROOMS  # PIL: of torchvision
    import sys

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
