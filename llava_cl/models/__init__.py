"""Model families behind one small contract."""

from llava_cl.models.contract import ImageSpec, LinearTarget, ModelFamily, family

__all__ = ["ImageSpec", "LinearTarget", "ModelFamily", "family"]
