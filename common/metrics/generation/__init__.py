"""Metrics of generated images. Each has a pure function, and a class that adds up batches and processes."""

from common.metrics.generation.frechet import FeatureStatistics, Moments, frechet_distance
from common.metrics.generation.inception_score import InceptionScore
from common.metrics.generation.object_accuracy import (
    ObjectAccuracy,
    mentioned_classes,
    object_accuracy,
    object_captions,
)
from common.metrics.generation.r_precision import RPrecision, first_ranked, r_precision

__all__ = [
    "FeatureStatistics",
    "InceptionScore",
    "Moments",
    "ObjectAccuracy",
    "RPrecision",
    "first_ranked",
    "frechet_distance",
    "mentioned_classes",
    "object_accuracy",
    "object_captions",
    "r_precision",
]
