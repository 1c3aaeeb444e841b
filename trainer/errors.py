"""How a trial may fail, by whose fault it is. The error meant for a person who prepares data is `common.DataError`."""


class UsageError(Exception):
    """The call or the data is at fault, not the candidate."""


class ContractError(Exception):
    """The candidate broke the trainer's contract: its result is invalid."""


class TrainingFailure(Exception):
    """The candidate's training went wrong by itself, without an exception of its own."""


class Futile(Exception):
    """The candidate is too far behind at half of the budget: its training ends there."""
