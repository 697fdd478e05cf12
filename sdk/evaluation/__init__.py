"""How good several bundles and checkpoints are, side by side, and what each of them costs.

    >>> from skipstone.evaluation import EvaluateOptions, evaluate
    >>> report = evaluate(("q8_0/", "q4_0/"), EvaluateOptions(Path("held_out.jsonl"), against="samples/models/coder"))
    >>> [(row.label, row.bytes, row.prediction.kl_divergence) for row in report.rows]

docs/evaluate.md says how every figure is defined. What the models predict `skipstone.exporters.evaluation` measures,
speed and memory `skipstone.benchmark`.
"""

from skipstone.evaluation.report import EvaluationReport
from skipstone.evaluation.run import EvaluateOptions, evaluate

__all__ = ["EvaluateOptions", "EvaluationReport", "evaluate"]
