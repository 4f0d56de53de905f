"""What can go wrong, each with the argument, the value and the fix in its message."""


class GrowthError(Exception):
    """Base of every error this library raises on purpose.

    Whenever one is raised, the model, the optimizer and the random state are as they were.
    """


class CandidateError(GrowthError):
    """A candidate names a site that does not exist, is not unique or cannot be served."""


class BlockError(GrowthError):
    """A block is not the identity at its pins, does not fit its site, or has dead multipliers."""


class DataError(GrowthError):
    """The data or the loss cannot be used: empty, one-shot, of the wrong form, not finite."""


class RuleError(GrowthError):
    """A decision rule was given, or returned, something that makes no sense."""


class RecordError(GrowthError):
    """A growth record does not fit the model, or cannot be rebuilt."""


class OptimizerError(GrowthError):
    """The optimizer cannot take the new parameters."""


class CheckpointError(GrowthError):
    """A checkpoint is damaged, foreign, or does not fit what it is to be loaded into."""


class TrainingError(GrowthError):
    """An argument of the training loop, or the order of its calls, makes no sense."""
