"""What the images of a step need in memory, and what a machine or a cgroup has."""

import pytest

from util.errors import UserError
from util.run.memory import check_memory, machine_memory


@pytest.mark.parametrize(
    "sides, channels, n_x, n_u, bytes_needed",
    [
        ((224, 224), 3, 8, 40, 88 * 3 * 224**2 * 4),
        ((16, 8), 1, 2, 6, 4 * (8 * 16**2 + 6 * 8**2)),
        ((16, 16, 4), 1, 2, 6, 4 * (14 * 16**2 + 6 * 4**2)),
    ],
)
def test_images_that_fit_exactly_are_accepted(sides, channels, n_x, n_u, bytes_needed):
    check_memory(sides, channels, n_x, n_u, bytes_needed, "this machine")
    check_memory(sides, channels, n_x, n_u, None, "this machine")  # not known
    with pytest.raises(UserError, match="^the images of one step need .* this machine has .*: lower --batch"):
        check_memory(sides, channels, n_x, n_u, bytes_needed - 1, "this machine")


def test_images_that_cannot_fit_are_refused_with_what_to_lower():
    words = "need 662.3 GB, but the GPU has 24.0 GB: lower --batch-size or --mu, or --image-size if"
    with pytest.raises(UserError, match=words):
        check_memory((224, 224), 3, 100_000, 500_000, 24 * 10**9, "the GPU")


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
