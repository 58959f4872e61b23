"""Errors of transformers' loaders. Each kind of file raises its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from infoxlm_ds.config import UserError


@contextmanager
def loading(what: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn every error of the block into one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what}: {reason[:300]}") from error
