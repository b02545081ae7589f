"""The continual run: the orchestrator, the steps of a stage, launching, resuming, results."""
