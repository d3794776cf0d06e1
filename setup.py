"""Package metadata; tools are configured in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    name="var_jax",
    version="0.1.0",
    description="VAR, image generation by next-scale prediction, in JAX",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["var_jax", "var_jax.*"]),
    package_data={"var_jax": ["assets/*", "assets/emoji/**/*"]},
    # Above the highest version tried: what comes next may move what is used of it.
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.1",
        "etils[epath]>=1.12",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.15,<0.3",
        "jax>=0.10.2,<0.12",
        "jaxtyping>=0.3.2",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "numpy>=2.1",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "safetensors>=0.8,<0.9",
        "scikit-learn>=1.5",
        "tensorboardX>=2.6.2,<2.7",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "data": ["importlib_resources>=6", "tensorflow-datasets>=4.9.9"],  # for tfds:NAME
        "gcs": ["etils[epath-gcs]"],  # for gs:// folders
        "test": ["chex>=0.1.90", "pytest>=8", "ruff>=0.9", "pyright[nodejs]>=1.1.400"],
    },
)
