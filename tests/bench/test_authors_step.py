"""The baselines compute what ours compute: otherwise the ratios would compare different work."""

import torch

import attention_transfer as at
from attention_transfer.bench import loss
from attention_transfer.bench.authors import AuthorsInference, AuthorsStep


def test_the_authors_step_equals_ours():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    theirs = AuthorsStep("wrn-10-1", "wrn-10-2")
    student, teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-10-2", 10)
    student.load_state_dict({k: v.detach().clone() for k, v in theirs.student.items()})
    teacher.load_state_dict(theirs.teacher.params)
    methods = [at.ActivationTransfer(1e3), at.KnowledgeDistillation()]
    transfer = at.Transfer(student, teacher, methods, example=x)
    parameters = transfer.trainable_parameters()
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        value = transfer(x, y).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        torch.testing.assert_close(theirs(x, y).detach(), value.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(theirs.student[name], parameter, rtol=1e-3, atol=1e-4)


def test_the_authors_inference_equals_the_teacher():
    theirs = AuthorsInference("wrn-10-2")
    teacher = at.create_model("wrn-10-2", 10).eval()
    teacher.load_state_dict(theirs.params)
    x = torch.rand(2, 3, 32, 32)
    logits, groups = theirs(x)
    with torch.no_grad(), at.tap(teacher, ["group0", "group1", "group2"], x) as tapped:
        expected, features = tapped(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for group, feature in zip(groups, features.values(), strict=True):
        torch.testing.assert_close(group, feature, rtol=1e-4, atol=1e-4)


def test_the_authors_loss_equals_ours():
    student, teacher = loss.make_features(2, "fp32 channels_last", torch.device("cpu"))
    student, teacher = ([f.detach().double() for f in fs] for fs in (student, teacher))
    theirs = loss.authors_loss(student, teacher)
    torch.testing.assert_close(theirs, at.at_loss(student, teacher), rtol=1e-10, atol=0)
