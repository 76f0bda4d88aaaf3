"""hstu-gr: a training system for generative recommenders (HSTU, arXiv 2402.17152)."""

__version__ = "0.1.0"
