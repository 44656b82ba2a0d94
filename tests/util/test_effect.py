"""What methods and data sets declare, compared with what their code takes."""

import inspect
from collections import Counter
from importlib import import_module

import pytest
import torch
import trees

from dataset import build, splits
from models import METHODS, build_method
from util import fields
from util.config import Config, changed_settings, parse, to_dict, to_yaml
from util.effect import ALWAYS_ACCEPTED
from util.errors import UserError
from util.fields import FIELDS, Declared

METHOD_FIELDS = {name: declared.uses for name, declared in fields.METHODS.items()}
DATASET_FIELDS = {name: declared.uses for name, declared in fields.DATASETS.items()}


def test_the_tables_have_every_method_and_data_set_and_only_fields():
    assert METHOD_FIELDS.keys() == METHODS.keys() and DATASET_FIELDS.keys() == build.DATASETS.keys()
    named = set().union(*METHOD_FIELDS.values(), *DATASET_FIELDS.values()) | ALWAYS_ACCEPTED
    for f in FIELDS.values():
        named |= {*f.replaced_by, *filter(None, [f.needs])}
    assert named <= FIELDS.keys()


def test_every_setting_is_declared_once():
    files = {target.partition(":")[0] for target in (*METHODS.values(), *build.DATASETS.values())}
    names = Counter(name for file in files for name in getattr(import_module(file), "SETTINGS", ()))
    assert names.keys() | fields.SETTINGS.keys() == FIELDS.keys()
    assert set(names.values()) == {1} and not names.keys() & fields.SETTINGS.keys()


def test_a_declaration_that_is_no_literal_is_named(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text('SETTINGS = {\n    "steps": (10**6, "number of steps")\n}\n')
    with pytest.raises(ValueError, match=f"{file}, line 1: SETTINGS must hold only literals"):
        fields._literals(str(file))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_settings_that_it_declares(name):
    config = Config(method=name, backbone="small_encoder", cls=3, dim=4, DA=True)
    assert build_method(config, 1, torch.arange(150) % 3)


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


@pytest.fixture
def toy(monkeypatch):
    """Register a method with other defaults."""
    defaults = {"lists": "simclr", "strong": "rand", "nesterov": True, "schedule": [5]}
    monkeypatch.setitem(fields.METHODS, "toy", Declared({}, {"lambda_u"}, defaults))


@pytest.mark.parametrize(
    "method, lists", [("simmatch", "simmatch"), ("fixmatch", "simmatch"), ("toy", "simclr")]
)
def test_a_method_chooses_whose_published_lists_a_share_means(method, lists, toy, monkeypatch, tmp_path):
    monkeypatch.setattr(splits, "load", lambda name: pytest.fail(name, pytrace=False))
    config = Config(method=method, data=str(trees.imagenet(tmp_path)), anno_percent=0.01)
    with pytest.raises(pytest.fail.Exception, match=f"^{lists}-1p$"):
        build.build_data(config, gpu=False)


def test_a_default_of_the_method_gives_way_to_the_file_and_to_a_flag(toy, tmp_path):
    (tmp_path / "own.yaml").write_text("method: toy\nstrong: stack\n")
    config = parse(["--config", str(tmp_path / "own.yaml"), "--schedule", "7"], "")
    assert (config.lists, config.strong, config.nesterov, config.schedule) == ("simclr", "stack", True, [7])
    other = parse(["--config", str(tmp_path / "own.yaml"), "--method", "simmatch"], "")
    assert (other.lists, other.strong, other.schedule) == ("simmatch", "stack", [120, 160])
    assert Config(method="toy").schedule == [5] and Config().schedule == [120, 160]


def test_the_defaults_of_the_method_are_in_config_yaml_and_are_no_change(toy, tmp_path):
    config = Config(method="toy", output_dir="run")
    text = to_yaml(config)
    assert {"lists: simclr", "strong: rand", "nesterov: true", "- 5"} <= set(text.splitlines())
    (tmp_path / "config.yaml").write_text(text)
    assert parse(["--config", str(tmp_path / "config.yaml")], "") == config
    assert changed_settings({"method": "toy"}, config) == []
    assert changed_settings({**to_dict(config), "nesterov": False}, config) == [
        "nesterov was False and is now True"
    ]


def test_a_default_of_the_method_that_has_no_effect_is_accepted_but_not_another_value(toy, mistake_of):
    digits = ["--config", "configs/digits.yaml", "--method", "toy", "--cos", "false"]
    assert parse([*digits, "--strong", "rand"], "").strong == "rand"
    assert "--strong has no effect" in mistake_of([*digits, "--strong", "moco"])


@pytest.fixture
def mistake_of():
    def call(argv):
        with pytest.raises(UserError) as error:
            parse(argv, "")
        return str(error.value)

    return call


def test_help_has_the_defaults_of_every_method(toy, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "")
    text = " ".join(capsys.readouterr().out.split())
    assert "; default: 'moco'; with toy: 'rand')" in text and "(default: False; with toy: True)" in text


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("lamda", 1.0, "is not a shared setting"),
        ("threshold", 0.5, "is not a shared setting"),
        ("lr", 1, "must be float, not 1"),
        ("momentum", 2.0, "must be between 0 and 1, not 2.0"),
        ("lists", "own", "must be simmatch or simclr, not 'own'"),
    ],
)
def test_a_default_that_cannot_be_is_an_error(name, value, problem):
    with pytest.raises(ValueError, match=f"^DEFAULTS of the method toy: '{name}' {problem}$"):
        fields._check_defaults("toy", {name: value})
