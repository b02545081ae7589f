"""Training a stage: statistics of frozen weights, LoRA adapters, and the Trainer over DeepSpeed."""
