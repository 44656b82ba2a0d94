"""eval.py as a user runs it: on files of the published layouts, and exporting for other programs."""

import shutil
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from published_files import MoCo, contents, fixmatch, sgd, simmatch, simmatchv2
from torchvision.transforms import v2
from trees import imagenet

import eval as eval_script
from models import build_method
from util import config
from util.formats import published_checkpoints, published_layouts
from util.run import checkpoint


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    """ImageNet's val/ with 3 classes of 2 photographs; no train/, no lists."""
    root = imagenet(tmp_path_factory.mktemp("val") / "in", classes=3, train=0, val=2)
    shutil.rmtree(root / "train")
    return root


@pytest.fixture(scope="module")
def photos(val):
    """(x [6, 3, 224, 224], y [6]), read with torchvision's own transforms."""
    view = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted((val / "val").rglob("*.JPEG"))
    return torch.stack([view(Image.open(file)) for file in files]), torch.arange(6) // 2


@torch.no_grad()
def fit_classifier(net, photos, right):
    """Set the classifier of `net` so that it is right on the first `right` of the 6 photographs and wrong on
    the others. Returns the logits.
    """
    x, y = photos
    feature = net.eval().backbone(x)
    feature = net.norm(feature) if hasattr(net, "norm") else feature
    wanted = torch.nn.functional.one_hot(torch.where(torch.arange(6) < right, y, (y + 1) % 3), 3).double()
    one = torch.ones(6, 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(
        torch.cat([feature.double(), one], 1), wanted, driver="gelsd"
    ).solution  # [d+1, C]
    net.fc.weight.copy_(solution[:-1].T)
    net.fc.bias.copy_(solution[-1])
    logits = net(x)
    assert (logits.argmax(1) == y).sum() == right
    return logits


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Call the main of eval.py in this process with flags. Returns its output."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--workers", "0", "--device", "cpu", *map(str, flags)])
        capsys.readouterr()
        eval_script.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def simmatch_file(photos, tmp_path_factory):
    """(path, module, logits of the student [6, C], logits of the teacher [6, C])."""
    torch.manual_seed(0)
    model = simmatch()
    student, teacher = fit_classifier(model.main, photos, 5), fit_classifier(model.ema, photos, 3)
    path = tmp_path_factory.mktemp("published") / "simmatch-1p.pth"
    torch.save(contents(model, "SimMatch", 400, sgd(simmatch())), path)
    return path, model, student, teacher


def test_a_simmatch_file_is_evaluated_with_val_alone(simmatch_file, val, evaluate):
    assert evaluate("--checkpoint", simmatch_file[0], "--data", val, "--per-class").splitlines() == [
        "SimMatch as published, resnet18_encoder; epoch 400, 7 labeled images; 6 test images",
        "class n00000000: 100.000",
        "class n00000001: 100.000",
        "class n00000002: 50.000",
        "student: top-1 83.333 %, top-5 100.000 %",
        "teacher: top-1 50.000 %, top-5 100.000 %",
        "* Acc@1 83.333 Acc@5 100.000",
    ]


def test_simmatchv2_with_its_layernorm(photos, val, evaluate, tmp_path):
    torch.manual_seed(0)
    model = simmatchv2(labeled=12)
    fit_classifier(model.main, photos, 4)
    fit_classifier(model.ema, photos, 2)
    more = dict(best_acc1=71.9, best_acc5=90.0, scaler={"scale": 65536.0})
    torch.save(contents(model, "SimMatchV2", 300, **more), tmp_path / "v2.pth")
    lines = evaluate("--checkpoint", tmp_path / "v2.pth", "--data", val).splitlines()
    assert (
        lines[0] == "SimMatchV2 as published, resnet18_encoder; epoch 300, 12 labeled images; 6 test images"
    )
    assert lines[-2:] == ["teacher: top-1 33.333 %, top-5 100.000 %", "* Acc@1 66.667 Acc@5 100.000"]


@pytest.mark.parametrize("eman, prefix", [(True, True), (False, False)])
def test_fixmatch_with_and_without_a_teacher(eman, prefix, photos, val, evaluate, mistake, tmp_path):
    torch.manual_seed(0)
    model = fixmatch(eman=eman)
    fit_classifier(model.main, photos, 1)
    torch.save(
        contents(model, "FixMatch", 300, prefix=prefix, best_acc1=torch.tensor(63.0)), tmp_path / "f.pth"
    )
    out = evaluate("--checkpoint", tmp_path / "f.pth", "--data", val)
    assert out.endswith("* Acc@1 16.667 Acc@5 100.000\n") and ("teacher:" in out) == eman
    if not eman:
        flags = [
            "--checkpoint",
            tmp_path / "f.pth",
            "--teacher",
            "--export",
            tmp_path / "x",
            "--format",
            "timm",
        ]
        mistake(eval_script.main, flags, "has no teacher")


def test_the_number_of_labeled_images_identifies_the_list():
    assert published_layouts.describe({"epoch": 400}, "simmatch", "resnet50_encoder", 13000).endswith(
        "13000 labeled images (as many as simmatch-1p)"
    )


def test_predictions_of_a_published_file_are_class_numbers(simmatch_file, val, evaluate, tmp_path):
    evaluate("--checkpoint", simmatch_file[0], "--predict", val / "val", "--output", tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == [str(c) for c in simmatch_file[2].argmax(1).tolist()]
    evaluate(
        "--checkpoint",
        simmatch_file[0],
        "--predict",
        val / "val",
        "--output",
        tmp_path / "b.csv",
        "--teacher",
    )
    lines = (tmp_path / "b.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == [str(c) for c in simmatch_file[3].argmax(1).tolist()]


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_files_that_are_refused(simmatch_file, val, mistake, tmp_path):
    def refused(state, *words):
        torch.save(state, tmp_path / "a.pth")
        mistake(
            eval_script.main,
            ["--checkpoint", tmp_path / "a.pth", "--data", val, "--device", "cpu"],
            "a.pth",
            *words,
        )

    state = torch.load(simmatch_file[0], weights_only=True)
    values = state["state_dict"]
    refused({**state, "arch": Bomb(tmp_path / "boom")}, "refused", "could run code")
    assert not (tmp_path / "boom").exists()
    refused(contents(MoCo(), "MoCoEMAN", best_acc1=np.float64(60.5)), "MoCo", "no classifier", "--moco-path")
    refused(
        {**state, "state_dict": {key: torch.zeros(1) for key in ("online.a", "b", "c", "d")}},
        "'online.a'; 'b'; 'c'; and 1",
    )
    refused(
        {**state, "state_dict": {key: value for key, value in values.items() if "layer2.0.bn1." not in key}},
        "main.backbone.layer2.0.bn1.weight is missing; main.backbone.layer2.0.bn1.bias is missing; "
        "main.backbone.layer2.0.bn1.running_mean is missing; and 2 more",
    )
    refused(
        {**state, "state_dict": {**values, "module.ema.fc.weight": torch.zeros(4, 512)}},
        "ema.fc.weight is [4, 512], not [3, 512]",
    )
    refused(
        {"state_dict": {**values, "module.main.backbone.odd": torch.zeros(1)}}, "main.backbone.odd is unknown"
    )


def test_val_that_does_not_fit(simmatch_file, mistake, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    mistake(eval_script.main, ["--checkpoint", simmatch_file[0], "--device", "cpu"], "--data")
    root = imagenet(tmp_path / "in", classes=4, train=0, val=1)
    flags = ["--checkpoint", simmatch_file[0], "--data", root, "--device", "cpu"]
    mistake(eval_script.main, flags, "has 3 classes", "has 4")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--export", "x"], ["--format"]),
        (["--format", "onnx"], ["--export"]),
        (["--teacher"], ["--teacher"]),
        (["--export", "x", "--format", "published", "--teacher"], ["--teacher"]),
        (["--export", "x", "--format", "caffe"], ["'caffe'"]),
        (["--export", "no/such/folder/x", "--format", "timm"], ["cannot write"]),
    ],
)
def test_flags_that_do_not_go_together(simmatch_file, mistake, flags, words):
    mistake(eval_script.main, ["--checkpoint", simmatch_file[0], *flags], *words)


@pytest.mark.parametrize("teacher", [False, True])
def test_torchvision_loads_an_export(teacher, simmatch_file, photos, evaluate, tmp_path):
    flags = ["--checkpoint", simmatch_file[0], "--export", tmp_path / "x.pth", "--format", "torchvision"]
    evaluate(*flags, *["--teacher"] * teacher)
    net = torchvision.models.resnet18(num_classes=3).eval()
    net.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))  # strict
    with torch.no_grad():
        assert torch.equal(net(photos[0]), simmatch_file[3 if teacher else 2])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    assert f"replaces {tmp_path / 'x.pth'}" in evaluate(*flags)


def test_an_export_replaces_only_its_own_format(simmatch_file, evaluate, mistake, tmp_path):
    def flags(form):
        return ["--checkpoint", simmatch_file[0], "--export", tmp_path / "x.pth", "--format", form]

    assert "replaces /" not in evaluate(*flags("published"))
    assert f"replaces {tmp_path / 'x.pth'}, a file of --format published" in evaluate(*flags("published"))
    before = (tmp_path / "x.pth").read_bytes()
    for form in ("timm", "onnx"):
        mistake(eval_script.main, flags(form), f"x.pth exists and is not a file of --format {form}")
    assert (tmp_path / "x.pth").read_bytes() == before


def test_timm_loads_an_export(simmatch_file, photos, evaluate, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (tests/optional.txt)")
    evaluate("--checkpoint", simmatch_file[0], "--export", tmp_path / "x.pth", "--format", "timm")
    net = timm.create_model("resnet18", num_classes=3).eval()
    net.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))  # strict
    with torch.no_grad():
        torch.testing.assert_close(net(photos[0]), simmatch_file[2])


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet50(library, evaluate, tmp_path):
    torch.manual_seed(0)
    if library == "timm":
        make = pytest.importorskip("timm", reason="timm is not installed (tests/optional.txt)").create_model
    else:
        make = torchvision.models.get_model
    model = fixmatch("resnet50", classes=10, eman=False).eval()
    torch.save(contents(model, "FixMatch"), tmp_path / "f.pth")
    evaluate("--checkpoint", tmp_path / "f.pth", "--export", tmp_path / "x.pth", "--format", library)
    net, x = make("resnet50", num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    net.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))  # strict
    with torch.no_grad():
        assert torch.equal(net(x), model.main(x))


def test_onnx(simmatch_file, photos, evaluate, mistake, tmp_path):
    flags = ["--checkpoint", simmatch_file[0], "--export", tmp_path / "x.onnx", "--format", "onnx"]
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        mistake(eval_script.main, flags, "--format onnx needs onnx and onnxscript: pip install")
        assert not list(tmp_path.iterdir())
        pytest.skip(
            "onnx and onnxscript are not installed (tests/optional.txt): only their absence was tested"
        )
    output = evaluate(*flags)
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is not installed (tests/optional.txt)"
    )
    assert "onnxruntime's outputs differ by at most" in output and "replaces" not in output
    assert "replaces" in evaluate(*flags)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    logits, z = session.run(None, {"x": photos[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), simmatch_file[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(z).norm(dim=1), torch.ones(6))
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_networks_that_torchvision_does_not_have(mistake, tmp_path):
    torch.save(contents(simmatchv2(), "SimMatchV2"), tmp_path / "v2.pth")
    flags = ["--checkpoint", tmp_path / "v2.pth", "--export", tmp_path / "x", "--format"]
    for form, words in (("timm", "LayerNorm"), ("published", "no 'optimizer'")):
        mistake(eval_script.main, [*flags, form], words)
    settings = config.Config(backbone="wrn_28_2", cls=3, dim=4, method="fixmatch", dataset="cifar10")
    method = build_method(settings, 3, torch.arange(3))
    checkpoint.save(
        tmp_path / "ours.pth",
        {
            "config": config.to_dict(settings),
            "step": 3,
            "world": 1,
            "processes": 1,
            "batch_size": 8,
            "steps_per_epoch": 2,
            "best": {},
            "split": ("s", "0"),
            "data": "",
            "classes": list("abc"),
            "method": method.state_dict(),
            "optimizer": {},
            "scaler": {},
            "meter": {},
            "bad_images": [],
        },
    )
    flags[1] = tmp_path / "ours.pth"
    for form, words in (
        ("torchvision", "a wrn_28_2, which torchvision and timm do not have"),
        ("published", "method fixmatch"),
    ):
        mistake(eval_script.main, [*flags, form], words)
    assert not (tmp_path / "x").exists()


def test_a_published_file_exported_as_published_is_unchanged(simmatch_file, evaluate, tmp_path):
    output = evaluate("--checkpoint", simmatch_file[0], "--export", tmp_path / "x", "--format", "published")
    assert "400 whole epochs" in output
    before, after = (torch.load(path, weights_only=True) for path in (simmatch_file[0], tmp_path / "x"))
    before["state_dict"] = dict(before["state_dict"])  # the digests of OrderedDict and dict differ
    assert checkpoint.digest(before) == checkpoint.digest(after)


@pytest.mark.slow(10)
def test_a_run_of_ours_exported_and_evaluated_as_published(command, tmp_path):
    """The published modules load it with strict keys, and its accuracy is the same."""
    root = imagenet(tmp_path / "in", classes=3, train=8, val=4)
    run, out, cache = tmp_path / "run", tmp_path / "out.pth", {"SIMMATCH_CACHE": str(tmp_path / "cache")}
    done = command(
        "train_semi.py",
        "--config",
        "configs/imagenet_1p.yaml",
        "--data",
        root,
        "--labels-per-class",
        "2",
        "--cls",
        "3",
        "--backbone",
        "resnet18_encoder",
        "--batch-size",
        "2",
        "--mu",
        "2",
        "--epochs",
        "2",
        "--warmup-epoch",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--image-size",
        "64",
        "--print-freq",
        "1",
        "--output-dir",
        run,
        env=cache,
    )
    assert done.returncode == 0, done.stderr
    done = command(
        "eval.py", "--checkpoint", run / "last.pth", "--export", out, "--format", "published", env=cache
    )
    assert done.returncode == 0 and "2 whole epochs" in done.stdout, done.stderr
    ours, file = (torch.load(path, weights_only=True) for path in (run / "last.pth", out))
    model = torch.nn.DataParallel(simmatch(dim=128, labeled=6))
    model.load_state_dict(file["state_dict"])  # strict
    torch.optim.SGD(model.parameters(), 1.0).load_state_dict(file["optimizer"])
    values, optimizer, epoch, steps = published_checkpoints.to_training_state(file, 4)
    assert (epoch, steps) == (2, ours["step"]) == (2, 8)
    assert checkpoint.digest(values) == checkpoint.digest(ours["method"])
    assert checkpoint.digest(optimizer) == checkpoint.digest(ours["optimizer"])
    (root / "train").rename(tmp_path / "gone")
    flags = ["--workers", "0", "--device", "cpu", "--image-size", "64"]
    as_published = command("eval.py", "--checkpoint", out, "--data", root, *flags, env=cache)
    (tmp_path / "gone").rename(root / "train")
    as_ours = command("eval.py", "--checkpoint", run / "last.pth", *flags, env=cache)
    assert as_published.returncode == as_ours.returncode == 0, as_published.stderr + as_ours.stderr
    assert as_published.stdout.splitlines()[1:] == as_ours.stdout.splitlines()[1:]
