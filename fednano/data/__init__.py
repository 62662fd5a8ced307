"""Data sets and their division among clients.

``load_dataset`` gives questions with images by name or from a folder; ``partition`` divides them among
simulated clients. Slow imports (datasets, flwr-datasets, Pillow) happen on first use.
"""

from fednano.data.easy_vqa import load_easy_vqa
from fednano.data.partition import PartitionSummary, partition, split_holdout, summarise_partition
from fednano.data.registry import dataset_names, load_dataset
from fednano.data.sample import BadRow, Dataset, Sample, decode_image
from fednano.data.vqa_jsonl import load_vqa_jsonl

__all__ = [
    "BadRow",
    "Dataset",
    "PartitionSummary",
    "Sample",
    "dataset_names",
    "decode_image",
    "load_dataset",
    "load_easy_vqa",
    "load_vqa_jsonl",
    "partition",
    "split_holdout",
    "summarise_partition",
]
