"""Train and compare the variants of the paper's ablation tables at pocket scale, with equal numbers of updates."""
