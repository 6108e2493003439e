"""Ranges for the fields of a `Config`: `Annotated[float, between(0, 1)]`."""

from collections.abc import Callable


def at_least(low: float) -> Callable[[float | None], None]:
    """Or None, where the field's type has that."""

    def check(value: float | None) -> None:
        if value is not None and not value >= low:
            raise ValueError(f"{value} must be at least {low}.")

    return check


def between(low: float, high: float) -> Callable[[float | None], None]:
    """Strictly; or None, where the field's type has that."""

    def check(value: float | None) -> None:
        if value is not None and not low < value < high:
            raise ValueError(f"{value} must lie strictly between {low} and {high}.")

    return check
