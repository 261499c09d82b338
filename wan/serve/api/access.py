"""Who may ask: bearer tokens, of which each sees only its own jobs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from nabla import InputError
from wan.serve.api.errors import ApiError
from wan.serve.limits import Visitor

log = logging.getLogger("wan")

# Of 16 letters and digits one that was drawn is not guessed.
LEAST_CHARACTERS = 16
OWNER_CHARACTERS = 16


class Tokens:
    """The tokens that are taken; without any, everybody is.

    Only their digests are kept. Raises `InputError` for a token that is too short.
    """

    def __init__(self, tokens: Iterable[str] = ()):
        every = list(tokens)
        for token in every:
            if len(token) < LEAST_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
                raise InputError(
                    f"a token of {len(token)} characters cannot be used; give {LEAST_CHARACTERS} or more ASCII letters "
                    "and digits, as 'openssl rand -hex 16' draws them"
                )
        self._digests = [_digest(token) for token in every]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Those of a file, one a line; a line that begins with # is a comment. Raises `InputError`."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            is_open = bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"api_key_file {path} cannot be read ({getattr(error, 'strerror', error)})") from None
        tokens = [line for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise InputError(f"api_key_file {path} holds no token; write one a line")
        if is_open:
            log.warning("warning: others of this machine can read %s; chmod 600 keeps it yours", path)
        return cls(tokens)

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, authorization: str | None) -> str:
        """Whose a request is by its header: some letters of the token's digest, or empty where there are no tokens.

        Raises `ApiError`, 401.
        """
        if not self._digests:
            return ""
        bearer = re.fullmatch(r"bearer +(\S+)", (authorization or "").strip(), re.IGNORECASE)
        if bearer is None:
            raise _unknown("give a token: 'Authorization: Bearer TOKEN'", "missing_api_key")
        given = _digest(bearer[1])
        # All of them, so that the time says nothing of which one it is nearest to.
        if not sum(hmac.compare_digest(given, digest) for digest in self._digests):
            raise _unknown("this token is not known", "invalid_api_key")
        return given[:OWNER_CHARACTERS]


def source_of(owner: str, address: str | None) -> str:
    """Whose jobs are counted together: a token's, or a network address's."""
    return owner or Visitor.at(address, None).address


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _unknown(message: str, code: str) -> ApiError:
    return ApiError(401, message, code, headers={"WWW-Authenticate": "Bearer"})
