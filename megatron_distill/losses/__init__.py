"""Pure functions of tensors and a tensor-parallel group: log-probs, divergences, estimators, reductions, chunks."""
