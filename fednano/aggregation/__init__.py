"""Merging updates: pure functions and streaming accumulators over named leaves.

Knows neither Flower nor gRPC. Start with `create_rule`, `Spec`, `Update` and `validate`.
"""

from fednano.aggregation.capability import algebra_name, check_combination, default_rule, rule_table
from fednano.aggregation.codecs import (
    Codec,
    codec_in_round,
    codec_names,
    create_codec,
    decode_fisher,
    encode_fisher,
)
from fednano.aggregation.fixedpoint import FixedSum, Grid
from fednano.aggregation.linear import Layout, layout_of, read_sum, vector_of
from fednano.aggregation.registry import create_rule, rule_class, rule_names
from fednano.aggregation.rule import Aggregator, Capability, Rule, State
from fednano.aggregation.spec import LeafSpec, Product, Spec
from fednano.aggregation.staleness import freshen, staleness_weight
from fednano.aggregation.update import Leaves, Reason, Refusal, Update, validate

__all__ = [
    "Aggregator",
    "Capability",
    "Codec",
    "FixedSum",
    "Grid",
    "Layout",
    "LeafSpec",
    "Leaves",
    "Product",
    "Reason",
    "Refusal",
    "Rule",
    "Spec",
    "State",
    "Update",
    "algebra_name",
    "check_combination",
    "codec_in_round",
    "codec_names",
    "create_codec",
    "create_rule",
    "decode_fisher",
    "default_rule",
    "encode_fisher",
    "freshen",
    "layout_of",
    "read_sum",
    "rule_class",
    "rule_names",
    "rule_table",
    "staleness_weight",
    "validate",
    "vector_of",
]
