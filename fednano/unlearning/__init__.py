"""Forget samples of a tuned model: methods, the federated runner, metrics.

::

    request = UnlearnRequest(run="runs/latest", client="client-001", samples=("easy-vqa/train/00017",))
    outcome = unlearn(request)
    outcome.leaves                    # the shadow adapter; the run's own is untouched

`fednano.unlearning.metrics` scores any model's numbers. Importing this package is cheap.
"""
