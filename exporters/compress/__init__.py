"""Makes a checkpoint smaller before it is exported: steps in an order, each measured.

    >>> from skipstone.exporters.compress.run import compress
    >>> compress("samples/models/coder", "smaller/", parse_steps(["drop_layers:count=3"]))

A step (`steps.Step`) changes a model in place; a recipe (`recipe`) lists steps; `run` carries them out and writes an
ordinary Hugging Face folder, with compression.json beside the weights. A new step is one module with one class, and one
line in `steps.STEPS`.
"""
