"""DINO and DINOv2 against the papers' equations (reference.py), and what must hold of their teacher and targets."""

import pytest
import torch
from accelerate import Accelerator
from builders import DINOV2, SEPARATE, SINKHORN, assert_close, build, differing, packed, views_of_batch, weights
from reference import Reference, hidden_patches
from torch import Tensor

from dino.methods.dino import DINO, build_networks
from dino.methods.losses import TERMS, Center
from dino.training.phases import views_at

PLAIN = {"objective.ibot_weight": 0, "objective.koleo_weight": 0, "optim.layer_decay": 1.0, "optim.patch_embed_lr": 1.0}
BY_MODULE = {"optim.clip_scope": "module", "optim.clip_grad": 0.05}
ARCHITECTURE = {"model.registers": 4, "model.layer_scale": 0.1, "model.ffn": "swiglu"}

OPTIONS = {
    "DINO": PLAIN,
    "DINO, Sinkhorn": PLAIN | SINKHORN,
    "DINO, no local crops": PLAIN | {"views.local_crops": 0},
    "DINO, local crops of the global size": PLAIN | {"views.local_size": 16},
    "DINO, tight clipping, learned prototype lengths": PLAIN
    | {"optim.clip_grad": 0.05, "objective.norm_last_layer": False},
    "shared head": {},
    "shared head, Sinkhorn": SINKHORN,
    "separate heads": SEPARATE,
    "separate heads, Sinkhorn": SEPARATE | SINKHORN,
    "separate heads of equal size": {"objective.ibot_head": "separate"},
    "registers, LayerScale, SwiGLU": ARCHITECTURE,
    "no local crops": {"views.local_crops": 0},
    "all crops masked": {"objective.mask_fraction": 1.0, "objective.mask_ratio": "[0.0,1.0]"},
    "one masked crop": {"objective.mask_fraction": 0.1},
    "one patch a crop": {  # those masked are then all alike, which KoLeo's definition has no number for
        "objective.koleo_weight": 0,
        "views.global_size": 8,
        "views.local_crops": 0,
        "model.patch_size": 8,
    },
    "KoLeo without masks": {"objective.ibot_weight": 0},
    "clipping by module": BY_MODULE,
    "clipping by module, separate heads, learned lengths": SEPARATE | BY_MODULE | {"objective.norm_last_layer": False},
    "prototypes that stand still at first": SEPARATE | {"objective.freeze_last_layer_steps": 2},
    "backbone that stands still at first": BY_MODULE | {"optim.freeze_backbone_steps": 1},
    "two micro-batches": {"train.accumulation": 2},
    "everything": SEPARATE | SINKHORN | BY_MODULE | ARCHITECTURE | {"train.accumulation": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_three_steps_are_those_of_the_papers(option, accelerator, tiny):
    config = tiny(DINOV2 | OPTIONS[option])
    step, method, optimizer = build(accelerator, config, exact=True)
    reference = Reference(config, method.student, method.teacher)
    gradients: dict[str, Tensor] = {}  # that the optimizer gets

    def keep(*_) -> None:
        gradients.clear()
        gradients.update({name: p.grad.clone() for name, p in method.student.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    for number in range(3):
        views = views_of_batch(config, number)
        expected = reference.step(number, views, hidden_patches(method, number, config))
        logged = step(number, packed(views, config.train.accumulation))
        assert {name: value.item() for name, value in logged.items()} == pytest.approx(expected, rel=1e-5)
        learned = {name: value.grad for name, value in reference.trained.items() if value.grad is not None}
        assert gradients.keys() == learned.keys()
        errors = {name: (gradients[name] - learned[name]).norm() / learned[name].norm() for name in learned}
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
    # Adam divides by the gradient's size: where that all but vanishes, fp32 losses tell by up to 1 % of a step.
    assert_close(dict(method.student.named_parameters()), reference.student, rtol=1e-4, atol=1e-4)
    assert_close(dict(method.teacher.named_parameters()), reference.teacher, rtol=1e-4, atol=1e-5)
    for centering, kind in ((method.centering, "class"), (method.patch_centering, "patch")):
        if isinstance(centering, Center):
            torch.testing.assert_close(centering.center[0].double(), reference.centers[kind], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "masked"),
    [("DINO", 0.5), ("DINO, Sinkhorn", 0.5), ("shared head", 0.05), ("separate heads, Sinkhorn", 0.5)],
)
def test_micro_batches_equal_one_large_batch(option, masked, fresh_accelerate, tiny):
    """Nothing of the step (teacher, center, balance, rates) may see single ones; some here have no masked crop.

    Without KoLeo, which looks for neighbours in a micro-batch.
    """
    changes = {"train.batch_size": 8, "objective.koleo_weight": 0, "objective.mask_fraction": masked}
    results = []
    for parts in (1, 2, 4):
        config = tiny(DINOV2 | OPTIONS[option] | changes | {"train.accumulation": parts})
        built = build(Accelerator(cpu=True, mixed_precision="no"), config, exact=True)
        losses = [built.take(number) for number in range(2)]
        assert {float(state["step"]) for state in built.optimizer.state.values()} == {2.0}
        results.append((losses, weights(*built.method.state().values())))
    whole_losses, whole = results[0]
    for losses, state in results[1:]:
        for of_parts, expected in zip(losses, whole_losses, strict=True):
            assert of_parts == pytest.approx(expected, rel=1e-5)
        assert_close(state, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position_size", [None, 32])
def test_steps_go_on_at_the_crop_size_of_another_phase(position_size, accelerator, tiny):
    """Masks cover the new grid, positions are interpolated, schedules go on."""
    phases = {"train.phases": "[{begin: 0.2, global_size: 24, local_size: 12}]"}
    config = tiny(DINOV2 | phases | {"model.position_size": position_size or "none"})
    step, method, _ = build(accelerator, config, exact=True)
    reference = Reference(config, method.student, method.teacher)
    for number, side in enumerate((16, 16, 24)):
        config.views = views_at(config, number)
        views = views_of_batch(config, number)
        assert views[0].shape[-1] == side
        expected = reference.step(number, views, hidden_patches(method, number, config))
        logged = {name: value.item() for name, value in step(number, packed(views)).items()}
        assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_settings_of_patches_change_no_bit_without_their_loss(centering, fresh_accelerate, tiny):
    unused = {"objective.mask_fraction": 0.9, "objective.mask_ratio": "[0.2,0.3]", "objective.koleo_scope": "all"}
    states = []
    for changes in ({}, unused | SEPARATE):
        config = tiny({"objective.centering": centering, "model.drop_path": 0.3} | changes)
        built = build(Accelerator(cpu=True, mixed_precision="no"), config)
        assert built.take(0, 1).keys() == {"loss/dino", "health/gradient_norm"}
        assert built.method.state().keys() == {"student", "teacher", "targets"}
        states.append(weights(*built.method.state().values()))
    assert differing(*states) == set()


def test_the_teacher_starts_as_the_student_and_gets_no_gradient(accelerator, tiny):
    built = build(accelerator, tiny({"model.drop_path": 0.3}))
    student, teacher = built.method.student, built.method.teacher
    assert built.method.result is teacher
    assert differing(weights(student), weights(teacher)) == set()
    assert (student.backbone.drop_path, teacher.backbone.drop_path) == (0.3, 0.0)
    built.take(0)
    assert all(value.grad is None and not value.requires_grad for value in teacher.parameters())


@pytest.mark.parametrize("changes", [{}, SINKHORN, {"views.local_size": 16}], ids=["center", "sinkhorn", "one size"])
def test_the_teacher_sees_only_global_crops(changes, fresh_accelerate, tiny):
    """Other local crops leave what it says, and with it targets and center, as it was."""
    config = tiny(changes)
    results = []
    for seed in (1, 2):
        step, method, _ = build(Accelerator(cpu=True, mixed_precision="no"), config)
        views = views_of_batch(config, 0)[:2] + views_of_batch(config, seed)[2:]
        loss = step(0, packed(views))["loss/dino"]
        results.append((loss, weights(method.centering) | {"targets": method.seen.targets}))
    assert differing(results[0][1], results[1][1]) == set()
    assert results[0][0] != results[1][0]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_prototypes_stand_still_while_frozen(steps, accelerator, tiny):
    """Neither gradients, nor weight decay, nor moments gathered meanwhile move them; all else moves."""
    built = build(accelerator, tiny({"objective.freeze_last_layer_steps": steps, "objective.norm_last_layer": False}))
    student = built.method.student
    for number in range(3):
        before = weights(student)
        built.take(number)
        frozen = {"0.head.last_layer.weight_v", "0.head.last_layer.weight_g"} if number < steps else set()
        assert before.keys() - differing(before, weights(student)) == frozen
        moments = [value for value in student.head.last_layer.parameters() if built.optimizer.state.get(value)]
        assert bool(moments) == (number >= steps)


@pytest.mark.parametrize("has_ibot", [True, False])
def test_heads_are_new_and_the_same_for_both(has_ibot, tiny):
    """Whatever the backbone: which they are follows torch's random state."""
    config = tiny(SEPARATE | {"objective.ibot_weight": float(has_ibot)})
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student, teacher = build_networks(config)
        assert (student.patch_head is not None) == has_ibot
        assert (student.backbone.mask_token is not None) == has_ibot
        assert differing(weights(student), weights(teacher)) == set()
        heads.append(weights(student.head, *([student.patch_head] if has_ibot else [])))
    by_chance = {name for name in heads[0] if not name.endswith(("bias", "weight_g"))}
    assert differing(*heads) == by_chance


@pytest.mark.parametrize("parts", [1, 2])
def test_a_term_has_student_teacher_and_batch_and_counts_with_its_weight(parts, accelerator, tiny, monkeypatch):
    """Patches of all crops of the student, of global ones of the teacher; a gradient flows to the student alone."""

    def gap(student, teacher, batch) -> Tensor:
        images = 8 // parts
        assert [patches.shape for patches in student.patches] == [(2 * images, 16, 16), (2 * images, 4, 16)]
        assert [patches.shape for patches in teacher.patches] == [(2 * images, 16, 16)]
        assert len(batch.rows) == images
        assert not teacher.patches[0].requires_grad
        return (student.patches[0] - teacher.patches[0]).square().mean()

    monkeypatch.setitem(TERMS, "gap", gap)
    built = build(accelerator, tiny({"train.accumulation": parts}), exact=True)
    built.step.config.objective.terms = {"gap": 3.0}
    logged = built.take(0)
    student, teacher = (network.backbone for network in (built.method.student, built.method.teacher))
    assert logged["loss/gap"] > 0
    assert student.blocks[0].mlp.fc1.weight.grad is None  # used up by the step
    assert all(value.grad is None for value in teacher.parameters())
    assert set(DINO.watched(built.step.config)) > {"loss/gap"}
