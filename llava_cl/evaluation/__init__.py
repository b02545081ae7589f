"""From a model to numbers: predictions, scores of tasks, and metrics of a stream."""
