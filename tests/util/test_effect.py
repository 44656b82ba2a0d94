"""What methods and data sets declare, compared with what their code takes."""

import inspect
from collections import Counter
from importlib import import_module

import pytest
import torch
import trees

from dataset import build, splits
from models import METHODS, build_method
from util import declarations
from util.config import Config
from util.effect import ALWAYS_ACCEPTED, DATASET_FIELDS, METHOD_FIELDS
from util.fields import FIELDS, _Shared


def test_the_tables_have_every_method_and_data_set_and_only_fields():
    assert METHOD_FIELDS.keys() == METHODS.keys() and DATASET_FIELDS.keys() == build.DATASETS.keys()
    named = set().union(*METHOD_FIELDS.values(), *DATASET_FIELDS.values()) | ALWAYS_ACCEPTED
    for f in FIELDS.values():
        named |= {*f.metadata["replaced_by"], *filter(None, [f.metadata["needs"]])}
    assert named <= FIELDS.keys()


def test_every_setting_is_declared_once():
    files = {target.partition(":")[0] for target in (*METHODS.values(), *build.DATASETS.values())}
    names = Counter(name for file in files for name in getattr(import_module(file), "SETTINGS", ()))
    assert names.keys() | _Shared.__dataclass_fields__.keys() == FIELDS.keys()
    assert set(names.values()) == {1} and not names.keys() & _Shared.__dataclass_fields__.keys()


def test_a_declaration_that_is_no_literal_is_named(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text('SETTINGS = {\n    "steps": (10**6, "number of steps")\n}\n')
    with pytest.raises(ValueError, match=f"{file}, line 1: SETTINGS must hold only literals"):
        declarations._literals(str(file))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_settings_that_it_declares(name):
    config = Config(method=name, backbone="small_encoder", cls=3, dim=4, DA=True)
    assert build_method(config, 1, torch.arange(3))


@pytest.mark.parametrize("name", build.DATASETS)
def test_a_data_set_takes_the_settings_that_it_declares(name):
    taken = inspect.signature(import_module(build.DATASETS[name]).build).parameters.keys()
    elsewhere = {"device_views", "on_bad_image"}  # read for every data set; see the next test
    declared = set().union(*DATASET_FIELDS.values())
    assert taken & declared == DATASET_FIELDS[name] - elsewhere


def test_the_views_of_photos_read_device_views_and_files_can_be_bad():
    photos = {name for name, fields in DATASET_FIELDS.items() if "device_views" in fields}
    files = {name for name, fields in DATASET_FIELDS.items() if "on_bad_image" in fields}
    modules = {name: import_module(module) for name, module in build.DATASETS.items()}
    assert photos == {name for name in modules if hasattr(modules[name], "eval_view_for_files")}
    assert files == {name for name in modules if hasattr(modules[name], "searched_dirs")}


@pytest.mark.parametrize(
    "method, lists", [("simmatch", "simmatch"), ("fixmatch", "simmatch"), ("toy", "simclr")]
)
def test_a_method_chooses_whose_published_lists_a_share_means(method, lists, monkeypatch, tmp_path):
    toy = declarations.Declared({}, set(), {"split": "simclr"})
    monkeypatch.setitem(declarations.METHODS, "toy", toy)
    monkeypatch.setattr(splits, "load", lambda name: pytest.fail(name, pytrace=False))
    config = Config(method=method, data=str(trees.imagenet(tmp_path)), anno_percent=0.01)
    with pytest.raises(pytest.fail.Exception, match=f"^{lists}-1p$"):
        build.build_data(config, gpu=False)
