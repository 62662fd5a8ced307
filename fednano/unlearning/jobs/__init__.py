"""Unlearning jobs: signed requests, a durable queue, an atomic commit, receipts, tombstones, purge.

Nothing here computes a loss. A :class:`~fednano.unlearning.jobs.runner.Runner` does the unlearning; this package
decides who may ask for it, remembers what was asked, survives being killed, and proves afterwards what was done.
``docs/unlearning-jobs.md`` is the operator's page.
"""
