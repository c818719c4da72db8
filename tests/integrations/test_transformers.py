"""`AttentionTransferTrainer` trains, evaluates, saves and resumes a model of transformers."""

import pytest
import torch
from toys import close

import attention_transfer as at

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
integration = pytest.importorskip("attention_transfer.integrations.transformers")

CLASSES, SIZE = 3, 32


def vit(seed, layers=2):
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def pixels(n=8):
    torch.manual_seed(1)
    return torch.rand(n, 3, SIZE, SIZE)


def make_trainer(folder, steps=4, arguments=None, **options):
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **(arguments or {}),
    )
    data = [{"pixel_values": x, "labels": i % CLASSES} for i, x in enumerate(pixels())]
    method = at.ActivationTransfer(3, convention="caffe", kind="attention", decay="linear")
    options = {"methods": [method], "train_dataset": data, "eval_dataset": data} | options
    return integration.AttentionTransferTrainer(
        vit(0), args, teacher=vit(1), example=pixels(), **options
    )


def test_the_loss_is_that_of_transfer(tmp_path):
    pairs = [("vit.layers.1", "vit.layers.1")]
    trainer = make_trainer(tmp_path, pairs=pairs)
    assert trainer.transfer_model.transfer.pairs == [("model.vit.layers.1", "model.vit.layers.1")]
    trainer.state.max_steps, trainer.state.global_step = 4, 1
    x, labels = pixels(4), torch.arange(4) % CLASSES
    student = trainer.student.train()
    loss = trainer.compute_loss(trainer.model, {"pixel_values": x, "labels": labels})
    outputs, ours = at.tap(student, ["vit.layers.1"], attention=True)(pixel_values=x, labels=labels)
    _, theirs = at.tap(vit(1).eval(), ["vit.layers.1"], attention=True)(pixel_values=x)
    term = at.at_loss(ours, theirs, kind="attention", convention="caffe")
    close(loss, outputs.loss + 0.75 * 3 * term, 1e-5)


def test_smoothed_labels_do_not_switch_the_transfer_off(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"label_smoothing_factor": 0.1})
    trainer.state.max_steps = 4
    x, labels = pixels(4), torch.arange(4) % CLASSES
    trainer.student.train()
    loss = trainer.compute_loss(trainer.model, {"pixel_values": x, "labels": labels})
    out = trainer.transfer_model.transfer(x, labels, 0.0)
    close(loss, out.loss, 1e-5)
    smoothed = torch.nn.functional.cross_entropy(out.logits, labels, label_smoothing=0.1)
    close(out.parts["ce"], smoothed, 1e-5)
    assert out.parts["at"] > 0


def test_a_training_batch_without_labels_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.transfer_model.train()
    with pytest.raises(at.UserError, match="lacks labels"):
        trainer.transfer_model(pixels(4))


def test_a_loss_function_of_the_users_is_refused(tmp_path):
    with pytest.raises(at.UserError, match="leave it out"):
        make_trainer(tmp_path, compute_loss_func=lambda outputs, labels: 0)


def test_trains_evaluates_and_saves_the_student(tmp_path):
    trainer = make_trainer(tmp_path)
    before = trainer.student.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.student.classifier.weight)
    trainer.save_model(tmp_path / "student")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        outputs = loaded(pixels(), labels=torch.arange(8) % CLASSES)
        close(outputs.logits, trainer.student.eval()(pixels()).logits, 1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_resumes_from_a_checkpoint(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    resumed = make_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        close(a, b, 2e-5)  # two steps move a weight by 1e-4


def test_the_best_model_is_loaded_at_the_end(tmp_path, monkeypatch):
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, arguments=arguments | {"metric_for_best_model": "loss"})

    def evaluate(**_):
        return {"eval_loss": float(trainer.state.global_step)}  # the first checkpoint is the best

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    last = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    for kept, a, b in zip(
        trainer.student.parameters(), best.parameters(), last.parameters(), strict=True
    ):
        assert torch.equal(kept, a) and not torch.equal(kept, b)


def test_data_parallel_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="start one process per GPU"):
        make_trainer(tmp_path)
