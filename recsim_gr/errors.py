"""The errors a user can cause. Each carries one sentence: what was wrong, where, and what would do."""


class RecsimError(Exception):
    """Base of every error below; the command line prints its sentence and exits with 2."""


class ConfigError(RecsimError, ValueError):
    """A configuration value, or a combination of values, that makes no sense."""


class LogFormatError(RecsimError, ValueError):
    """A log, in memory or on disk, that is not a legal log; names the first offending row."""


class DataFileError(RecsimError, ValueError):
    """A file of real data that is missing, truncated, or not what it is taken for."""


class CheckpointError(RecsimError, ValueError):
    """A saved model that is missing, truncated, or belongs to something else."""


class RunDirectoryError(RecsimError):
    """A run directory that cannot be read, written, or that holds another configuration."""


class WorkerError(RecsimError, RuntimeError):
    """Work that could not be finished: a worker process died more than once on the same job."""


class UnknownNameError(RecsimError, KeyError):
    """A name that is in no registry; the sentence lists the names that are."""

    def __str__(self) -> str:  # KeyError would print the sentence in quotes
        return str(self.args[0])


class TrainingError(RecsimError, RuntimeError):
    """A training run that diverged: a loss or an objective that is not finite, or a loss that ended above its start."""


class MissingPropensitiesError(RecsimError, ValueError):
    """An algorithm that needs propensities was handed a log made without them."""


class EstimationError(RecsimError, ValueError):
    """Weights, propensities, scores or predictions that no off-policy estimator can use; names the first event."""


class PolicyError(RecsimError, ValueError):
    """An agent whose answer is no policy: wrong shape, not normalised, or weight on a seen title."""
