"""What configuration files get wrong is told with the file, the name and what is allowed."""

import pytest

import image_classification
from comparison.recipe import load_recipe
from hf_bimp import BIMPArguments
from processes import run_recipe
from shared.cli import parse_config, read_config


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"caf\xe9: 1\n", "config.yaml cannot be read"),
        (b"1: a\n", "config.yaml: 1 is no name"),
        (b"a: [\n", "config.yaml cannot be read"),
        (b"[1, 2]\n", "config.yaml must hold names and values"),
        (b"", "config.yaml must hold names and values"),
    ],
)
def test_what_is_no_file_of_names_and_values(tmp_path, content, complaint) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_config(path)


def test_n_of_m_needs_no_quotes(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("granularity: 2:4\nlearning_rate: 5e-4\n")
    config = read_config(path) | {"output_dir": str(tmp_path), "use_cpu": True}
    (args,) = parse_config((BIMPArguments,), config)
    assert (args.granularity, args.goal, args.learning_rate) == ("2:4", 0.5, 5e-4)


def test_choices_hold_for_files_too(tmp_path) -> None:
    given = {"timm_model": "resnet10t", "augmentation": "mixup", "target_sparsity": 0.5}
    with pytest.raises(ValueError, match="augmentation='mixup' is none of"):
        parse_config(image_classification.ARGUMENTS, given | {"output_dir": str(tmp_path)})
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in given.items()) + f"output_dir: {tmp_path}\n")
    done = run_recipe("image_classification.py", path)
    assert done.returncode == 2 and f"{path}: augmentation='mixup' is none of" in done.stderr


def test_a_study_names_what_it_lacks(tmp_path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("recipe: image_classification\nseeds: [1]\n")
    done = run_recipe("retraining_study.py", path, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and f"{path} lacks base, dense, grids, final, model_key." in done.stderr
    with pytest.raises(ValueError, match="recipe='os' is none of image_classification"):
        load_recipe("os")
