"""Model families behind one small contract."""

from llava_cl.models.contract import (
    ClassifierFamily,
    ImageSpec,
    LanguageFamily,
    LinearTarget,
    ModelFamily,
    TokenImages,
    classifier_family,
    family,
    language_family,
)

__all__ = [
    "ClassifierFamily",
    "ImageSpec",
    "LanguageFamily",
    "LinearTarget",
    "ModelFamily",
    "TokenImages",
    "classifier_family",
    "family",
    "language_family",
]
