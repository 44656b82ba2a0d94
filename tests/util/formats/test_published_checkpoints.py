"""Published layouts are detected, converted and converted back to the same bits, or refused by name."""

import copy

import pytest
import torch
import torchvision
from published_files import MoCo, contents, fixmatch, sgd, simmatch, simmatchv2

from models import build_method, build_optimizer
from models.network import BACKBONES, Network
from models.optimizer import parameter_groups
from util.config import Config
from util.errors import UserError
from util.formats import published_checkpoints, published_layouts
from util.run.checkpoint import load_module


@pytest.fixture(scope="module")
def published():
    """(module, its SGD, content of its file): the published SimMatch, 7 labeled images, 3 classes, D = 16."""
    torch.manual_seed(0)
    model = simmatch()
    optimizer = sgd(model)
    return model, optimizer, contents(model, "SimMatch", 12, optimizer)


def native(DA=True, labeled=7, backbone="resnet18_encoder", channels=3, **settings):
    """(native method, its SGD) of the same sizes."""
    config = Config(backbone=backbone, cls=3, dim=16, DA=DA, **settings)
    method = build_method(config, channels, torch.arange(labeled) % 3)
    groups = parameter_groups(method.student, config.wd, config.no_decay_bn)
    return method, torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)


def assert_same(a, b):
    """Compare nested values, tensors bit by bit and with their types and shapes."""
    assert type(a) is type(b) or isinstance(a, dict) and isinstance(b, dict)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def step_alike(student, optimizer, model, other):
    """Take one step of both SGDs with the same gradients. Returns whether all parameters are equal."""
    grads = {name: torch.randn_like(p) for name, p in student.named_parameters()}
    for net, sgd_ in ((student, optimizer), (model.main, other)):
        assert set(grads) == {name for name, _ in net.named_parameters()}
        for name, p in net.named_parameters():
            p.grad = grads[name].clone()
        sgd_.step()
    mine, others = dict(student.named_parameters()), dict(model.main.named_parameters())
    return all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    "make, kind",
    [
        (simmatch, "simmatch"),
        (lambda: simmatch(DA=False), "simmatch"),
        (simmatchv2, "simmatchv2"),
        (lambda: simmatchv2(norm=False), "simmatchv2"),
        (fixmatch, "fixmatch"),
        (lambda: fixmatch(eman=False), "fixmatch"),
        (MoCo, "moco"),
        (lambda: MoCo(layers=1), "moco"),
    ],
)
def test_every_layout_is_detected(make, kind, prefix):
    assert published_layouts.detect_kind(contents(make(), "any", prefix=prefix)) == kind


def test_the_native_layout_is_detected():
    assert published_layouts.detect_kind({"config": {}, "method": {}}) == "native"


@pytest.mark.parametrize(
    "state, words",
    [
        (
            {
                "state_dict": {
                    "conv1.weight": torch.zeros(2),
                    "b": torch.zeros(1),
                    "c": torch.zeros(1),
                    "d": torch.zeros(1),
                }
            },
            "its state_dict has 'conv1.weight'; 'b'; 'c'; and 1 more",
        ),
        ({"model": 1, "x": 2}, "it has no 'state_dict', but 'model'; 'x'"),
        ({"state_dict": {}}, "its state_dict has no key"),
        ({}, "but nothing"),
        ([1], "a list"),
        (torch.zeros(3), "a Tensor"),
    ],
)
def test_an_unknown_layout_is_a_user_error_with_three_keys(state, words):
    with pytest.raises(UserError) as error:
        published_layouts.detect_kind(state, "file x")
    message = str(error.value)
    assert (
        words in message
        and message.startswith("file x was not written by train_semi.py, nor by SimMatch")
        and "\n" not in message
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: [s.pop(f"module.{key}") for key in ("labels", "main.fc.weight", "main.head.2.weight")],
            "main.fc.weight is missing; main.head.2.weight is missing; labels is missing",
        ),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("module.ema")],
            "ema.backbone.* is missing; ema.fc.* is missing; ema.head.* is missing",
        ),
        (
            lambda s: s.update({f"module.{key}": torch.zeros(1) for key in "abcd"}),
            "a is unknown; b is unknown; c is unknown; and 1 more",
        ),
        (lambda s: s.update({"module.main.norm.weight": torch.zeros(1)}), "main.norm.weight is unknown"),
        (
            lambda s: s.update({"module.bank": torch.tensor(1), "module.main.fc.weight": 7}),
            "bank is not a tensor, or has no dimensions; main.fc.weight is not a tensor",
        ),
        (
            lambda s: s.update(
                {"module.main.fc.weight": torch.zeros(10**13, 0), "module.bank": torch.ones(7)}
            ),
            "main.fc.weight is [10000000000000, 0], without elements or not of 2 dimensions; bank is [7]",
        ),
    ],
)
def test_a_nearly_correct_simmatch_file_is_a_user_error(published, change, words):
    state = copy.deepcopy(published[2])
    change(state["state_dict"])
    with pytest.raises(UserError) as error:
        published_layouts.detect_kind(state)
    assert "not a complete checkpoint of SimMatch" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bank": torch.zeros(7, 16)}, "bank is [7, 16] float32, not [16, 16] float32"),
        ({"labels": torch.zeros(7)}, "labels is [7] float32, not [7] int64"),
        ({"labels": torch.zeros(8, dtype=torch.long)}, "labels is [8] int64, not [7] int64"),
        ({"DA_queue": torch.zeros(32, 3)}, "DA_queue is [32, 3] float32, not [256, 3] float32"),
        ({"DA_ptr": torch.zeros(1)}, "DA_ptr is [1] float32, not [1] int64"),
        ({"DA_ptr": None}, "DA_ptr is missing"),
    ],
)
def test_a_buffer_of_another_type_or_shape_is_a_user_error(published, change, words):
    state = {"state_dict": dict(published[2]["state_dict"])}
    for key, value in change.items():
        state["state_dict"][f"module.{key}"] = value
        if value is None:
            del state["state_dict"][f"module.{key}"]
    with pytest.raises(UserError) as error:
        published_checkpoints.to_method_state(state)
    assert words in str(error.value)


def test_a_published_file_loads_into_the_method_with_exact_keys(published, tmp_path):
    model, _, state = published
    torch.save(state, tmp_path / "a.pth")
    values = published_checkpoints.to_method_state(torch.load(tmp_path / "a.pth", weights_only=True))
    method, _ = native()
    load_module(method, values, tmp_path / "a.pth")
    assert list(values)[:-4] == [key for key in method.state_dict()][:-4]  # student and teacher in our order
    for name, own in (("main", method.student), ("ema", method.teacher.net)):
        for key, value in getattr(model, name).state_dict().items():
            assert torch.equal(own.state_dict()[key], value), (name, key)
    assert torch.equal(method.bank.z[3], model.bank[:, 3]) and values["bank.z"].is_contiguous()
    assert torch.equal(method.bank.labels, model.labels) and torch.equal(method.align.ring, model.DA_queue)
    assert method.align.ptr.tolist() == [5]
    plain, _ = native(DA=False)
    with pytest.raises(UserError, match="align.ring is unknown; align.ptr is unknown"):
        load_module(plain, values, tmp_path / "a.pth")


def test_training_resumes_from_a_published_file(published):
    model, published_sgd, state = copy.deepcopy(published)
    values, saved, epoch, steps = published_checkpoints.to_training_state(state, steps_per_epoch=30)
    assert (epoch, steps) == (12, 360)
    method, optimizer = native()
    method.load_state_dict(values)
    optimizer.load_state_dict(
        copy.deepcopy(saved)
    )  # a copy, as read from a file, and not the tensors of published_sgd
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert len(optimizer.state) == len(list(method.student.parameters()))
    torch.manual_seed(1)
    assert step_alike(method.student, optimizer, model, published_sgd)


def test_without_momentum_the_next_step_differs(published):
    """The comparison in the test above can fail."""
    model, published_sgd, state = copy.deepcopy(published)
    method, optimizer = native()
    method.load_state_dict(published_checkpoints.to_method_state(state))
    assert not step_alike(method.student, optimizer, model, published_sgd)


def test_published_to_native_and_back_is_the_same_file(published):
    _, _, state = published
    method, optimizer, epoch, _ = published_checkpoints.to_training_state(state, 1)
    assert_same(
        published_checkpoints.from_method_state(method, optimizer, epoch),
        {**state, "state_dict": dict(state["state_dict"])},
    )


@pytest.mark.parametrize("DA", [True, False])
def test_native_to_published_and_back_is_the_same_state(DA):
    torch.manual_seed(0)
    method, optimizer = native(DA)
    for k, p in enumerate(method.student.parameters()):
        p.grad = torch.randn_like(p) if k != 3 else None  # one parameter without momentum
    optimizer.step()
    file = published_checkpoints.from_method_state(method.state_dict(), optimizer.state_dict(), 4)
    assert (
        file["arch"] == "SimMatch"
        and file["epoch"] == 4
        and set(file) == {"epoch", "arch", "state_dict", "optimizer"}
    )
    values, saved, epoch, steps = published_checkpoints.to_training_state(file, 10)
    assert_same(values, dict(method.state_dict()))
    assert_same(saved, optimizer.state_dict())
    assert (epoch, steps) == (4, 40)


def native_v2(labeled=7, DA=True, unlabeled_per_step=10, **settings):
    """SimMatchV2, and its optimizer, of the size of `published_files.simmatchv2`."""
    config = Config(method="simmatchv2", backbone="resnet18_encoder", cls=3, dim=16, DA=DA, norm_feat=True)
    vars(config).update({"nesterov": True, "lr": 0.03, "k": 2, "topn": 3, **settings})
    method = build_method(config, 3, torch.arange(labeled) % 3, unlabeled_per_step)
    return method, build_optimizer(config, method.student)


def published_v2():
    """(module, its optimizer after a step, content of its file)"""
    torch.manual_seed(0)
    model = simmatchv2()
    model.u_labels[:12], model.da = torch.softmax(torch.randn(12, 3), 1), torch.tensor([[0.5, 0.3, 0.2]])
    model.ptr[0] = 12
    optimizer, more = sgd(model), {"best_acc1": 50.0, "best_acc5": 100.0, "scaler": {"scale": 65536.0}}
    return model, optimizer, contents(model, "SimMatchV2", 12, optimizer, **more)


@pytest.mark.parametrize("DA", [True, False])
def test_a_published_simmatchv2_file_is_resumed(DA):
    model, published_sgd, state = copy.deepcopy(published_v2())
    values, saved, epoch, steps = published_checkpoints.to_training_state(state, steps_per_epoch=30)
    method, optimizer = native_v2(DA=DA)
    assert (epoch, steps) == (12, 360) and method.fit_state(values) == ""
    load_module(method, values, "v2.pth")
    for network, own in (("main", method.student), ("ema", method.teacher.net)):
        assert_same(dict(own.state_dict()), dict(getattr(model, network).state_dict()))
    assert_same(method.bank.z, model.l_bank)
    assert method.bank.labels.tolist() == model.l_labels.argmax(1).tolist()
    assert_same(method.queue.z, model.u_bank)
    assert_same(method.queue.p, model.u_labels)
    assert method.queue.filled == method.queue.ptr.item() == 12
    assert not DA or method.prior.da.tolist() == model.da[0].tolist()
    optimizer.load_state_dict(copy.deepcopy(saved))
    torch.manual_seed(1)
    assert step_alike(method.student, optimizer, model, published_sgd)


def test_a_queue_of_another_number_of_ranks_is_filled_again():
    values = published_checkpoints.to_method_state(published_v2()[2])
    method, _ = native_v2(unlabeled_per_step=5)
    assert "the checkpoint's queue has 20 rows, but this run's has 10" in method.fit_state(values)
    load_module(method, values, "v2.pth")
    assert method.queue.filled == 0 and not method.queue.p.any() and method.queue.ptr.item() == 0


def test_published_simmatchv2_to_native_and_back_is_the_same_file():
    _, _, state = published_v2()
    method, optimizer, epoch, _ = published_checkpoints.to_training_state(state, 1)
    best = state["best_acc1"], state["best_acc5"]
    file = published_checkpoints.from_method_state(
        method, optimizer, epoch, scaler=state["scaler"], best=best
    )
    assert file.keys() == state.keys() and file["state_dict"].keys() == state["state_dict"].keys()
    for key, value in state.items():
        own = {name: file[key][name] for name in value} if key == "state_dict" else file[key]
        assert_same(own, dict(value) if key == "state_dict" else value)


@pytest.mark.parametrize("DA", [True, False])
def test_native_simmatchv2_to_published_and_back_is_the_same_state(DA):
    torch.manual_seed(0)
    method, optimizer = native_v2(DA=DA)
    for p in method.student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    method.queue.write(torch.randn(10, 16), torch.softmax(torch.randn(10, 3), 1))
    file = published_checkpoints.from_method_state(method.state_dict(), optimizer.state_dict(), 4)
    assert file["arch"] == "SimMatchV2" and {"best_acc1", "best_acc5", "scaler"} < file.keys()
    model = torch.nn.DataParallel(simmatchv2())
    model.load_state_dict(file["state_dict"])  # strict
    values, saved, epoch, steps = published_checkpoints.to_training_state(file, 10)
    method.fit_state(values)
    assert_same(values, dict(method.state_dict()))
    assert_same(saved, optimizer.state_dict())
    assert (epoch, steps) == (4, 40)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v: v.update(u_labels=v["u_labels"][:9]), "u_labels is"),
        (lambda v: v.update(l_labels=v["l_labels"].argmax(1)), "l_labels is"),
        (lambda v: v.update(ptr=v["ptr"].float()), "ptr is"),
        (lambda v: v.update(da=v["da"][0]), "da is"),
        (lambda v: v.pop("u_bank"), "u_bank is missing"),
    ],
)
def test_a_damaged_simmatchv2_file_is_a_user_error(change, words):
    _, _, state = published_v2()
    values = {key.removeprefix("module."): value for key, value in state["state_dict"].items()}
    change(values)
    with pytest.raises(UserError, match=f"not a complete checkpoint of SimMatchV2: .*{words}"):
        published_checkpoints.to_training_state({**state, "state_dict": values}, 1)


def test_an_exported_state_loads_into_the_published_modules_and_trains(tmp_path):
    torch.manual_seed(0)
    method, optimizer = native()
    for p in method.student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save(
        published_checkpoints.from_method_state(method.state_dict(), optimizer.state_dict(), 4),
        tmp_path / "a.pth",
    )
    file = torch.load(tmp_path / "a.pth", weights_only=True)
    model = simmatch()
    wrapped = torch.nn.DataParallel(model)
    wrapped.load_state_dict(file["state_dict"])  # strict
    shapes = {key: (value.shape, value.dtype) for key, value in wrapped.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in file["state_dict"].items()} == shapes
    assert file["state_dict"]["module.bank"].is_contiguous() and torch.equal(
        model.bank[:, 2], method.bank.z[2]
    )
    published_sgd = torch.optim.SGD(model.parameters(), 1.0)
    published_sgd.load_state_dict(file["optimizer"])
    assert step_alike(method.student, optimizer, model, published_sgd)


def test_an_optimizer_of_an_older_torch_in_the_first_epoch_is_converted():
    """Its parameters have other numbers, its group fewer settings, and the head has no momentum yet."""
    model = simmatch()
    optimizer = sgd(model, without_gradient="main.head")
    state = contents(model, "SimMatch", 1, optimizer)
    (group,) = state["optimizer"]["param_groups"]
    group["params"] = [key + 1000 for key in group["params"]]
    state["optimizer"]["state"] = {key + 1000: value for key, value in state["optimizer"]["state"].items()}
    for key in ("maximize", "foreach", "differentiable", "fused"):
        group.pop(key, None)
    values, saved, _, _ = published_checkpoints.to_training_state(state, 1)
    method, own = native()
    method.load_state_dict(values)
    own.load_state_dict(copy.deepcopy(saved))
    assert [name for name, p in method.student.named_parameters() if p not in own.state] == [
        "head.0.weight",
        "head.0.bias",
        "head.2.weight",
        "head.2.bias",
    ]
    assert step_alike(method.student, own, model, optimizer)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("optimizer"), "no 'optimizer' with one parameter group"),
        (lambda s: s["optimizer"].update(state=3), "no 'optimizer' with one parameter group"),
        (
            lambda s: s["optimizer"]["param_groups"].append(s["optimizer"]["param_groups"][0]),
            "no 'optimizer' with one parameter group",
        ),
        (
            lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
            "an optimizer with 131 parameters, but a student with 66",
        ),
        (
            lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)),
            "student.backbone.conv1.weight is [2]",
        ),
        (
            lambda s: s["optimizer"]["state"].update({70: {"momentum_buffer": torch.zeros(2)}}),
            "for the teacher is [2]",
        ),
        (lambda s: s.pop("epoch"), "'epoch' is None"),
        (
            lambda s: s["optimizer"]["param_groups"][0].update(momentum="high"),
            "no 'optimizer' with one parameter group",
        ),
        (
            lambda s: s["optimizer"]["state"][0].update(momentum_buffer=3),
            "no 'optimizer' with one parameter group",
        ),
        (
            lambda s: s["optimizer"]["state"][0]["momentum_buffer"].fill_(float("nan")),
            "an optimizer whose momentum for student.backbone.conv1.weight is not finite",
        ),
    ],
)
def test_a_file_from_which_training_cannot_resume_is_a_user_error(published, change, words):
    state = copy.deepcopy(published[2])
    change(state)
    with pytest.raises(UserError) as error:
        published_checkpoints.to_training_state(state, 1)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(da_len=32), "align.ring has 32 rows, not 256"),
        (dict(no_decay_bn=True), "this run has 2"),
        (dict(backbone="small_encoder"), "a backbone that is not a ResNet"),
        (dict(backbone="wrn_28_2"), "layers of 4+4+4+0 blocks, a stem of 16 channels"),
        (dict(channels=1), "images of 1 channels"),
        (dict(method="fixmatch"), "bank.z is missing; bank.labels is missing"),
    ],
)
def test_a_method_that_the_published_layout_cannot_hold_is_a_user_error(how, words):
    method, optimizer = native(**how)
    with pytest.raises(UserError) as error:
        published_checkpoints.from_method_state(method.state_dict(), optimizer.state_dict(), 1)
    assert words in str(error.value)


def test_a_state_that_is_not_finite_is_not_exported():
    method, optimizer = native()
    values = dict(method.state_dict())
    values["bank.z"] = values["bank.z"] / 0
    with pytest.raises(UserError, match="bank is not finite"):
        published_checkpoints.from_method_state(values, optimizer.state_dict(), 1)
    with pytest.raises(UserError, match="no valid 'optimizer'"):
        published_checkpoints.from_method_state(dict(method.state_dict()), {}, 1)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("resnet")])
def test_the_backbone_is_detected_from_the_shapes(name):
    with torch.device("meta"):
        main = Network(name, 3, 5, 4, norm=True).state_dict()
    spec = published_layouts.network_spec(
        {"state_dict": {f"main.{key}": value for key, value in main.items()}}
    )
    assert spec[1:] == (3, 5, 4, True, None)
    assert published_layouts.find_backbone(spec, BACKBONES, "it") == name


def test_the_architecture_is_detected_in_every_layout():
    for state, expected in (
        (contents(simmatch(), "SimMatch"), (3, 3, 16, False, 7)),
        (contents(simmatchv2(labeled=9), "x"), (3, 3, 16, True, 9)),
        (contents(fixmatch(), "resnet50"), (3, 3, 0, False, None)),
    ):
        spec = published_layouts.network_spec(state)
        assert spec == ((False, (2, 2, 2, 2), 64), *expected)
        assert published_layouts.find_backbone(spec, BACKBONES, "it") == "resnet18_encoder"
    cut = contents(fixmatch(), "x")
    cut["state_dict"] = {key: value for key, value in cut["state_dict"].items() if "layer3.1" not in key}
    spec = published_layouts.network_spec(cut)
    with pytest.raises(UserError, match=r"none of resnet18_encoder, .*: layers of 2\+2\+1\+2 blocks"):
        published_layouts.find_backbone(spec, BACKBONES, "it")


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_moco_file_gives_backbone_and_head(arch, prefix, tmp_path):
    torch.manual_seed(0)
    moco = MoCo(arch).eval()
    values = published_checkpoints.moco_backbone(contents(moco, arch, prefix=prefix))
    net = Network(f"{arch}_encoder", 3, 5, 16).eval()
    fc = {key: value for key, value in net.state_dict().items() if key.startswith("fc.")}
    load_module(net, {**values, **fc}, tmp_path / "a.pth")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x)[1], torch.nn.functional.normalize(moco.encoder_q(x), dim=1))


def test_moco_v1_gives_no_head_and_other_heads_are_user_errors():
    values = published_checkpoints.moco_backbone(contents(MoCo(layers=1), "resnet18"))
    names = torchvision.models.resnet18().state_dict()
    assert {f"backbone.{key}" for key in names if not key.startswith("fc.")} == set(values)
    with pytest.raises(UserError, match="encoder_q.fc.4.weight is unknown; encoder_q.fc.4.bias is unknown"):
        published_checkpoints.moco_backbone(contents(MoCo(layers=3), "resnet18"))
    with pytest.raises(UserError, match="not a checkpoint of MoCo, but of FixMatch"):
        published_checkpoints.moco_backbone(contents(fixmatch(), "FixMatch"))
    with pytest.raises(UserError, match="not a checkpoint of SimMatch or SimMatchV2, but of MoCo"):
        published_checkpoints.to_method_state(contents(MoCo(), "resnet18"))
