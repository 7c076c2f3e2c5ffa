"""Packaging. Versions that were tested together are in constraints.txt; the ranges here say what may work."""

from setuptools import find_packages, setup

setup(
    name="ds-plugin",
    version="0.1.0",
    description="Sequence length warmup, CompleteP and weight averaging for DeepSpeed and Megatron-core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["ds_plugin", "ds_plugin.*", "megatron_patches", "megatron_patches.*"]),
    package_data={"": ["*.md"]},
    install_requires=[
        # As wide as what is tested, so that a user's own torch is not replaced. NVIDIA's apex and TransformerEngine are
        # used when they can be imported and never required ("apex" on the package index is another project).
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.20",
        "pydantic>=2",
        "numpy",
        "safetensors",
        "tokenizers",
        "matplotlib",
        "rich",
        "psutil",
    ],
    extras_require={
        "monitor": ["tensorboard"],
        "test": ["pytest>=8", "pytest-timeout", "ruff", "mypy", "transformers>=5"],
    },
)
