"""How far early stopping may go: a threshold whose loss of quality stays under a bound with a stated confidence.

    >>> with skipstone.load("out/") as model:
    ...     samples = read_samples(Path("held_out.jsonl"), key_of(model.bundle.manifest), references=False)
    ...     outcome = calibrate(model, samples, CalibrationOptions(bound=RiskBound(max_loss=0.02, confidence=0.95)))
    >>> outcome.value                       # the lowest threshold that holds; None: never stop early
    0.6
    >>> store_calibration(Path("out/"), outcome.record(hash_file(Path("held_out.jsonl"))))

From then on `model.generate(source=…, adaptive=model.calibrated())` uses it. The two risks are those of CALM (arXiv
2207.07061, section 4), `skipstone.runtimes.risk` has the tests.
"""

from skipstone.bundle import hash_file, store_calibration
from skipstone.calibration.run import CalibrationOptions, Outcome, Trial, calibrate, check_samples
from skipstone.calibration.samples import Sample, key_of, read_samples
from skipstone.runtimes.risk import RiskBound

__all__ = [
    "CalibrationOptions",
    "Outcome",
    "RiskBound",
    "Sample",
    "Trial",
    "calibrate",
    "check_samples",
    "hash_file",
    "key_of",
    "read_samples",
    "store_calibration",
]
