"""The tables of the fields that methods and data sets use, compared with what their code reads."""

import pytest
import torch

from dataset import build
from dataset.loader import Data
from models import METHODS, build_network
from util.config import Config
from util.effect import ALWAYS_ACCEPTED, DATASET_FIELDS, METHOD_FIELDS, NEEDS, REPLACED_BY
from util.fields import FIELDS


class Recorder:
    """A config that remembers which fields are read."""

    def __init__(self, config):
        self.config, self.read = config, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.config, name)


def owned(table):
    """The fields that are not used by every method or data set."""
    return set().union(*table.values())


def test_the_tables_have_every_method_and_data_set_and_only_fields():
    assert METHOD_FIELDS.keys() == METHODS.keys() and DATASET_FIELDS.keys() == build.DATASETS.keys()
    named = owned(METHOD_FIELDS) | owned(DATASET_FIELDS) | ALWAYS_ACCEPTED | NEEDS.keys() | {*NEEDS.values()}
    named |= REPLACED_BY.keys() | {name for others in REPLACED_BY.values() for name in others}
    assert named <= FIELDS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_the_fields_of_its_table(name):
    recorder = Recorder(Config(method=name, backbone="small_encoder", cls=3, dim=4, DA=True))
    METHODS[name](recorder, build_network(recorder.config, 1), torch.arange(3))
    assert recorder.read & owned(METHOD_FIELDS) == METHOD_FIELDS[name]


@pytest.mark.parametrize("name", build.DATASETS)
def test_a_data_set_uses_the_fields_of_its_table(name, monkeypatch):
    from dataset import cifar

    for module in (build.digits, build.imagenet, build.folder, cifar):
        monkeypatch.setattr(module, "build", lambda *values: data)
    monkeypatch.setattr(build, "view_sides", lambda config: None)
    data = Data(*[None] * len(Data._fields))._replace(classes=[])
    recorder = Recorder(Config(dataset=name, cls=0))
    build.build_data(recorder, gpu=False)
    found = recorder.read & owned(DATASET_FIELDS)
    elsewhere = {"device_views", "on_bad_image"}  # read for every data set; see the next test
    assert found - elsewhere == DATASET_FIELDS[name] - elsewhere


def test_the_views_of_photos_read_device_views_and_files_can_be_bad():
    photos = {name for name, fields in DATASET_FIELDS.items() if "device_views" in fields}
    files = {name for name, fields in DATASET_FIELDS.items() if "on_bad_image" in fields}
    assert photos == build.EVAL_VIEWS.keys() and files == {"imagenet", "folder"}
