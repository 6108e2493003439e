"""Package metadata of hf_bimp."""

from pathlib import Path

from setuptools import find_packages, setup

VISION = ["torchvision", "timm>=1.0.31", "segmentation-models-pytorch>=0.5", "scikit-learn"]

setup(
    name="hf_bimp",
    version="0.1.0",
    description="Iterative magnitude pruning with adaptive learning-rate restarts in the Hugging Face Trainer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_bimp", "hf_bimp.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.13",
        # The trainer overrides private methods, so only tested minors are admitted.
        "transformers>=5.23,<5.24",
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "sacrebleu>=2.6",
        "safetensors",
        "torch-pruning>=1.6",
    ],
    extras_require={
        "plots": ["matplotlib"],
        "vision": [*VISION, "matplotlib"],
        "recipes": ["babel", "filelock", "matplotlib", "optuna>=5", "pandas", "tokenizers"],
        "dev": [
            *VISION,
            "babel",
            "filelock",
            "fvcore",
            "hypothesis",
            "matplotlib",
            "optuna>=5",
            "pandas",
            "peft",
            "ptflops",
            "pytest",
            "pytest-xdist",
            "ruff",
            "tokenizers",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
