"""One training run, without Ray: the step, the optimiser, the averaged weights, the checkpoint, the loop."""
