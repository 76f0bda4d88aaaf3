"""Building blocks of models, one idea a file; all work on jagged tokens ``(T, D)``."""
