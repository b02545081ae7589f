"""Continual-learning methods, one small file each; they see tensors, never models or process groups."""

from llava_cl.methods.contract import LayerStatistics, LoraFactors, Method, Methods, build_method, known_methods

__all__ = ["LayerStatistics", "LoraFactors", "Method", "Methods", "build_method", "known_methods"]
