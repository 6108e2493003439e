"""Export what image_classification.py has trained to int8 for OpenVINO: accuracy before and after, and latencies.

    python recipes/image_classification.py --granularity filter --target_sparsity 0.5  # digits, offline: a minute
    python recipes/export_int8.py                                                       # a quarter of one

Takes the config file and the arguments of the training: `output_dir` is where the model is, and where its int8 files
go. A model that was pruned by filters is shrunk first. Ranges are calibrated on training images; accuracies are those
on the test split, or on the validation split where there is none. Expect the accuracy to stay within a percent.
Needs hf_bimp[deploy].
"""

from pathlib import Path

import timm
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, set_seed

import hf_bimp
from hf_bimp.metrics import Accuracy
from hf_bimp.reporting.results import read_results
from image_classification import ARGUMENTS, DEFAULT_CONFIG, ModelArguments, input_statistics
from shared.cli import parse
from shared.image_data import ImageTransform, load_images
from shared.vision import Transformed, collate


def load(folder: Path, args: ModelArguments) -> nn.Module:
    if args.timm_model is not None:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return AutoModelForImageClassification.from_pretrained(folder).eval()


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    return Accuracy().compute(predictions=evaluated.predictions.argmax(-1), references=evaluated.label_ids)


def main() -> None:
    data_args, model_args, args = parse(ARGUMENTS, DEFAULT_CONFIG)
    set_seed(args.seed)
    folder = Path(args.output_dir)
    results = read_results(folder)
    if results is None:
        raise SystemExit(f"{folder} has no model: train it with image_classification.py and the same arguments.")
    model = load(folder, model_args)
    processor = None if model_args.timm_model else AutoImageProcessor.from_pretrained(folder)
    statistics = input_statistics(model_args, model, processor)
    images = load_images(data_args)

    def loader(split: str) -> DataLoader:
        transform = ImageTransform("none", model_args.channels, *statistics, training=False)
        rows = Transformed(images[split], transform)
        return DataLoader(rows, args.per_device_train_batch_size, shuffle=split == "train", collate_fn=collate)

    example = next(iter(loader("train")))["pixel_values"]
    inputs = example if model_args.timm_model else {"pixel_values": example}
    dense = None
    if results["granularity"] == "filter":
        dense, model = model, hf_bimp.shrink(model, inputs)
    report = hf_bimp.export(
        model,
        folder,
        inputs,
        "openvino",
        loader("train"),
        dense_model=dense,
        eval_dataset=loader("test" if "test" in images else "validation"),
        compute_metrics=accuracy,
    )
    print(f"{report.markdown()}\n\n{', '.join(report.files)}: {folder.absolute()}")


if __name__ == "__main__":
    main()
