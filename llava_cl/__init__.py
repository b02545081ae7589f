"""Distributed continual instruction tuning of multimodal models without forgetting."""

__version__ = "0.1.0"
