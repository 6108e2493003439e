"""Models that `model_init` makes, for every run and every trial of a search, are adapted and checked as given ones."""

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from helpers import classifier, run_arguments, tiny_t5, translation_items
from hf_bimp import BIMPArguments, BIMPTrainer
from trainers import make_trainer


def tiny_unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, encoder_depth=2, decoder_channels=[8, 8], classes=3)


def pixels(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 3, (count, 16, 16), generator=generator)
    return [{"image": image, "labels": mask} for image, mask in zip(images, labels, strict=True)]


def test_a_search_over_models_of_segmentation_models_pytorch(tmp_path) -> None:
    args = BIMPArguments(**run_arguments(tmp_path, target_sparsity=0.5, max_steps=2, label_smoothing_factor=0.1))
    trainer = BIMPTrainer(model_init=tiny_unet, args=args, train_dataset=pixels(), eval_dataset=pixels())
    made = []

    def objective(metrics: dict) -> float:
        made.append(trainer.model)
        return metrics["eval_loss"]

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        compute_objective=objective,
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert len({id(model) for model in made}) == 2
    for model in made:
        model.config.use_cache = False  # as Trainer does: a plain dict takes no attributes
        assert model.config["encoder_depth"] == 2
    assert trainer.results["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-4)


def adapted() -> nn.Module:
    import peft

    return peft.get_peft_model(tiny_t5(), peft.LoraConfig(target_modules=["q"], r=2))


REFUSED = {
    "adapters": (adapted, "PEFT models are not supported"),
    "nothing to prune": (lambda: nn.LayerNorm(8), "LayerNorm has no prunable weight"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own use of transformers
@pytest.mark.parametrize("make, complaint", REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_pruned_are_refused_at_once(tmp_path, make, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_trainer(tmp_path, items=translation_items(), model_init=make)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as above
@pytest.mark.parametrize("make, complaint", REFUSED.values(), ids=REFUSED)
def test_and_so_are_later_ones(tmp_path, make, complaint) -> None:
    """The first model is the trainer's own, and every run has another."""
    models = iter([classifier(), classifier(), make()])
    trainer = make_trainer(tmp_path, model_init=lambda: next(models))
    trainer.train()
    with pytest.raises(ValueError, match=complaint):
        trainer.train()
