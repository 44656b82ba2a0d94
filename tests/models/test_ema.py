"""The three kinds of teacher."""

import pytest
import torch

from models.ema import Teacher
from tests.models import small


def pair(bn_mode):
    student = small.network()
    teacher = Teacher(student, momentum=0.9, bn_mode=bn_mode).train()
    with torch.no_grad():
        for p in student.parameters():
            p += 1
        student.backbone[1].running_mean += 2
        student.backbone[1].num_batches_tracked += 7
    return student, teacher


def test_the_teacher_starts_as_a_copy_without_gradient():
    student = small.network()
    teacher = Teacher(student, momentum=0.9, bn_mode="shuffle")
    torch.testing.assert_close(teacher.net.state_dict(), student.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(
        p.requires_grad for p in student.parameters()
    )


def test_ema_averages_parameters_only():
    student, teacher = pair("shuffle")
    before = {key: value.clone() for key, value in teacher.net.state_dict().items()}
    teacher.update(student)
    for name, p in teacher.net.named_parameters():
        torch.testing.assert_close(
            p.data, 0.9 * before[name] + 0.1 * dict(student.named_parameters())[name].data
        )
    for name, b in teacher.net.named_buffers():
        assert torch.equal(b, before[name]), name


def test_eman_averages_bn_statistics_too_and_copies_the_count():
    student, teacher = pair("average")
    teacher.update(student)
    bn = teacher.net.backbone[1]
    torch.testing.assert_close(bn.running_mean, torch.full((5,), 0.2, dtype=torch.float64))
    assert bn.num_batches_tracked == 7


def test_ema_runs_on_batch_statistics_and_collects_its_own():
    _, teacher = pair("shuffle")
    bn = teacher.net.backbone[1]
    teacher([small.batch(0).u_weak], step=0)
    assert teacher.net.training and bn.num_batches_tracked == 1
    ((alone, _),) = teacher([small.batch(0).u_weak[:1]], step=0)
    ((among, _),) = teacher([small.batch(0).u_weak], step=0)
    assert not torch.allclose(alone[0], among[0])  # an image's output depends on its neighbors


def test_copy_averages_parameters_and_takes_buffers_as_they_are():
    student, teacher = pair("copy")
    before = {name: p.clone() for name, p in teacher.net.named_parameters()}
    teacher.update(student)
    for name, p in student.named_parameters():
        torch.testing.assert_close(teacher.net.get_parameter(name).data, 0.9 * before[name] + 0.1 * p.data)
    bn = teacher.net.backbone[1]
    assert bn.running_mean.tolist() == [2.0] * 5 and bn.num_batches_tracked == 7
    student.backbone[1].running_mean += 1
    assert bn.running_mean.tolist() == [2.0] * 5  # a copy, not the student's own


def test_a_kind_that_does_not_exist_is_refused():
    for bn in (True, "eman"):
        with pytest.raises(ValueError, match="shuffle"):
            Teacher(small.network(), 0.9, bn)


@pytest.mark.parametrize("bn_mode", ["average", "copy"])
def test_eman_and_copy_stay_in_eval_mode_when_the_method_trains(bn_mode):
    _, teacher = pair(bn_mode)
    teacher.train()
    ((alone, _),) = teacher([small.batch(0).u_weak[:1]], step=0)
    ((among, _),) = teacher([small.batch(0).u_weak], step=0)
    torch.testing.assert_close(alone[0], among[0])
    assert not teacher.net.training and teacher.net.backbone[1].num_batches_tracked == 0


def test_a_new_teacher_is_in_its_own_mode():
    assert Teacher(small.network(), momentum=0.9, bn_mode="shuffle").net.training
    assert not Teacher(small.network(), momentum=0.9, bn_mode="average").net.training
    assert not Teacher(small.network(), momentum=0.9, bn_mode="copy").net.training


def test_evaluation_ends_with_train():
    _, teacher = pair("shuffle")
    teacher.eval()
    assert not teacher.net.training
    assert teacher.train().net.training
