"""Tuning a checkpoint so that it exits well: the LayerSkip recipe under transformers' Trainer.

    >>> from skipstone.exporters.tune.run import TuneOptions, tune

`recipe` says what a run does, `objective` is the loss, `schedule` what changes with progress, `data` the
corpus, `evaluate` the figures of every exit. docs/tune.md explains the recipe.
"""
