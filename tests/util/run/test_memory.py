"""What a step certainly needs in memory, and what a machine or a cgroup has."""

import pytest

from util.config import Config
from util.errors import UserError
from util.run.memory import Need, check_memory, least_needs, machine_memory


def needs(sides=(224, 224), channels=3, n_x=8, n_u=40, labeled=13_000, **settings):
    found = least_needs(Config(**settings), sides, channels, n_x, n_u, labeled)
    return {need.what: need.bytes for need in found}


def test_images_bank_and_prior_of_a_step():
    assert needs() == {"images": 88 * 3 * 224**2 * 4, "bank": 13_000 * 128 * 4}
    assert needs(sides=(16, 8), channels=1, n_x=2, n_u=6)["images"] == 4 * (8 * 16**2 + 6 * 8**2)
    three = needs(sides=(16, 16, 4), channels=1, n_x=2, n_u=6)["images"]
    assert three == 4 * (14 * 16**2 + 6 * 4**2)
    assert needs(DA=True, da_len=32, cls=10)["prior"] == 32 * 10 * 4
    assert needs(dim=4, labeled=7)["bank"] == 112
    for method in ("fixmatch", "supervised"):
        assert needs(method=method, DA=True).keys() == {"images"}


@pytest.mark.parametrize(
    "settings, sizes, words",
    [
        (
            {},
            dict(n_x=100_000, n_u=500_000),
            "662.3 GB, most of it for its images, .* 24.0 GB: lower --batch-size, --mu or --image-size",
        ),
        (dict(dataset="cifar10"), dict(n_x=10**6, n_u=10**7), "lower --batch-size or --mu$"),
        (dict(dim=65536), dict(labeled=128_000), "33.6 GB, most of it for its bank, .*: lower --dim$"),
        (dict(DA=True, da_len=10**7), {}, "40.1 GB, most of it for its prior, .*: lower --da-len$"),
    ],
)
def test_a_step_that_cannot_fit_is_refused_with_what_to_lower(settings, sizes, words):
    sizes = {"sides": (224, 224), "channels": 3, "n_x": 8, "n_u": 40, "labeled": 13_000, **sizes}
    found = least_needs(Config(**settings), **sizes)
    with pytest.raises(UserError, match=f"one step needs at least .*{words}"):
        check_memory(found, 24 * 10**9, "this machine")
    check_memory(found, None, "this machine")  # not known


def test_a_step_that_fits_exactly_is_accepted():
    check_memory([Need("images", 3, ("mu",)), Need("bank", 4, ("dim",))], 7, "this machine")
    with pytest.raises(UserError):
        check_memory([Need("images", 4, ("mu",)), Need("bank", 4, ("dim",))], 7, "this machine")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"proc/meminfo": "nonsense\n"}, None),
        ({"proc/meminfo": "MemTotal:  1000 kB\nMemFree: 3 kB\n"}, 1_024_000),
        ({"proc/meminfo": "MemTotal:  1000 kB\n", "proc/self/cgroup": "0::/\n"}, 1_024_000),
        (
            {
                "proc/meminfo": "MemTotal:  1000 kB\n",
                "proc/self/cgroup": "0::/job/step/task\n",
                "sys/fs/cgroup/job/step/task/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.max": "5000\n",
                "sys/fs/cgroup/job/memory.max": "6000\n",
                "sys/fs/cgroup/other/memory.max": "1\n",
            },
            5000,
        ),
        (
            {
                "proc/meminfo": "MemTotal:  1000 kB\n",
                "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n2:cpu:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            7000,
        ),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "9\n"},
            9,
        ),
    ],
)
def test_the_memory_of_a_machine_is_limited_by_its_cgroups(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine_memory(tmp_path) == expected


def test_this_machine_has_memory():
    assert machine_memory() is None or machine_memory() > 10**8
