"""Forget samples of a tuned model: methods, the federated runner, metrics, jobs.

::

    from fednano.unlearning.outcome import UnlearnRequest
    from fednano.unlearning.runner import unlearn

    outcome = unlearn(UnlearnRequest(run="latest", client="client-001", samples=("easy-vqa/train/00017",)))
    outcome.leaves                    # the shadow adapter; the run's own is untouched

`fednano.unlearning.metrics` scores any model's numbers. Importing this package loads nothing.
"""
