"""Process groups and dense data parallelism; the library works without either on one device."""
