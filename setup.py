"""Packaging: distribution ``hstu-gr``, import name ``gr``.

``kernels/``, ``launch/`` and ``configs/`` lie at the top of the checkout and are linked into ``gr/``, so
everything is imported as ``gr.*`` and a wheel owns nothing but ``gr/``. ``package_dir={"": "."}`` makes
an editable install one plain ``.pth`` line, which type checkers follow; they do not follow an import
hook.

torchrec and fbgemm are required too, but cannot be written below: torchrec's metadata asks for the CUDA
build of fbgemm by name, which the CPU build does not satisfy. ``make setup`` (launch/setup_env.py)
installs the right pair.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "gr" / "__init__.py").read_text(), re.MULTILINE)
README = HERE / "README.md"
NOT_PACKAGES = ["*.__pycache__", "*.__pycache__.*"]

setup(
    name="hstu-gr",
    version=VERSION.group(1) if VERSION else "0",
    description="A training system for generative recommenders (HSTU)",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The hstu-gr authors",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},
    packages=find_namespace_packages(include=["gr", "gr.*"], exclude=NOT_PACKAGES),
    package_data={"": ["py.typed", "*.yaml", "*.html.j2", "*.cpp"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton; platform_system == 'Linux'",
        "deepspeed; platform_system == 'Linux'",
        "ray[train,tune]",
        "numpy",
        "pyarrow",
        "scipy",
        "PyYAML",
        "packaging",
        "tensorboard",
        "matplotlib",
        "rich",
        "jinja2",
    ],
    extras_require={"dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff"]},
    entry_points={
        "console_scripts": [
            "gr-prepare=gr.prepare:cli",
            "gr-train=gr.train:cli",
            "gr-evaluate=gr.evaluate:cli",
            "gr-compare=gr.compare:cli",
            "gr-replay=gr.replay:cli",
            "gr-recommend=gr.inference.cli:cli",
            "gr-launch=gr.launch.cli:cli",
            "gr-plan=gr.launch.plan:cli",
            "gr-scaling=gr.scaling.cli:cli",
        ]
    },
)
