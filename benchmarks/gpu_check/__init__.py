"""Everything that only a GPU can show, in one unattended command: ``python -m benchmarks.gpu_check`` (see __main__)."""
