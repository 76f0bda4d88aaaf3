"""Full-corpus ranking, metrics, baselines, significance and the leak audit."""
