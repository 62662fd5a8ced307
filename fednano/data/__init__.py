"""Data sets and their division among clients.

``load_dataset`` gives questions with answers by name, from a file or folder, or from the Hugging Face Hub;
``partition`` divides them among simulated clients. Slow imports (datasets, pyarrow, flwr-datasets, Pillow) happen on
first use.
"""

from fednano.data.easy_vqa import load_easy_vqa
from fednano.data.kinds import KINDS
from fednano.data.options import DataOptions
from fednano.data.partition import PartitionSummary, partition, split_holdout, summarise_partition
from fednano.data.registry import dataset_names, load_dataset
from fednano.data.sample import BadRow, Dataset, Sample, decode_image

__all__ = [
    "KINDS",
    "BadRow",
    "DataOptions",
    "Dataset",
    "PartitionSummary",
    "Sample",
    "dataset_names",
    "decode_image",
    "load_dataset",
    "load_easy_vqa",
    "partition",
    "split_holdout",
    "summarise_partition",
]
