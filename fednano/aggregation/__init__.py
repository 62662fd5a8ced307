"""Merging updates: pure functions and streaming accumulators over named leaves.

Knows neither Flower nor gRPC. Start with `create_rule`, `Spec`, `Update` and `validate`.
"""

from fednano.aggregation.capability import algebra_name, check_combination, default_rule, rule_table
from fednano.aggregation.fixedpoint import FixedSum, Grid
from fednano.aggregation.registry import create_rule, rule_class, rule_names
from fednano.aggregation.rule import Aggregator, Capability, Rule, State
from fednano.aggregation.spec import LeafSpec, Product, Spec
from fednano.aggregation.update import Leaves, Reason, Refusal, Update, validate

__all__ = [
    "Aggregator",
    "Capability",
    "FixedSum",
    "Grid",
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
    "create_rule",
    "default_rule",
    "rule_class",
    "rule_names",
    "rule_table",
    "validate",
]
