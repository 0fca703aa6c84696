"""Ask a Hub through huggingface_hub (0.36 and newer): typed errors without the token, bounded waits, repeated attempts.

What huggingface_hub lacks is a limit on how long its API waits for an answer, or sleeps on the Hub's word. So each
request runs in a thread, which can be given up. What is worth another attempt: 408, 409, 425, 429, most of 5xx
(RFC 9110, RFC 6585), no answer, and connections that broke; 412 as well, since an answer that was lost may have moved
the branch.
"""

from __future__ import annotations

import concurrent.futures
import email.utils
import itertools
import json
import logging
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .. import layout
from ..errors import (
    AuthenticationError,
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    OptionsError,
    RemoteNotFoundError,
    visible,
)

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds of failures and pauses after which an operation is given up
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts; doubles with each
ANSWER_WITHIN = 60.0  # seconds without an answer, or a byte of a download, after which a request is given up
SLOWEST = 16_000.0  # bytes a second, which a request may take in addition
FIRST_NOTE = 5.0  # seconds of waiting after which a line says so; doubles with each further one
PERMANENT = (501, 505, 506, 508, 510, 511)  # of the 5xx: the server cannot, and will not later
PUBLIC_HUB = "https://huggingface.co"

T = TypeVar("T")


def _http_errors() -> tuple[type[Exception], tuple[type[Exception], ...]]:
    """Return the base class of all errors of the HTTP library under huggingface_hub, and those of broken connections.

    huggingface_hub 0.36 stands on requests, later ones on httpx (under changing names): its own error says which.
    """
    base = [c for c in HfHubHTTPError.__mro__ if c.__module__.split(".")[0].startswith(("requests", "httpx"))][-1]
    library: Any = sys.modules[base.__module__.split(".")[0]]
    if hasattr(library, "TransportError"):
        return base, (library.TimeoutException, library.NetworkError, library.RemoteProtocolError, library.ProxyError)
    return base, (library.ConnectionError, library.Timeout, library.exceptions.ChunkedEncodingError)


_HTTP_ERROR, _BROKEN_CONNECTION = _http_errors()
# What huggingface_hub raises for a refusal, a broken connection, and an answer that is not what it expects.
_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError)
_UNRESOLVED = re.compile(r"(?i)getaddrinfo|name resolution|name or service|nodename|failed to resolve|unreachable")


class Passing(Exception):
    """A failure that may pass. `Hub.patiently` tries again, and raises HubUnavailableError in the end.

    Args:
        text: what failed.
        answered: whether a Hub answered.
        pause: seconds that the Hub asked us to wait.
        seconds: that the request took.
    """

    def __init__(self, text: str, *, answered: bool, pause: float | None = None, seconds: float = 0.0) -> None:
        super().__init__(text)
        self.answered, self.pause, self.seconds = answered, pause, seconds


class Hub:
    """The Hub that huggingface_hub is set to, as one token may use it.

    Args:
        token: a user access token; None takes the one that huggingface_hub knows, if there is one.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = (token or get_token() or "").strip() or None
        if self.token and not re.fullmatch(r"[!-~]+", self.token):  # HTTP libraries quote a header that they refuse
            raise AuthenticationError(
                "the token holds white space or characters outside ASCII",
                expected="a user access token, as hf_...",
                next_step="copy it again, alone",
            )
        self.api = HfApi(token=self.token, library_name="gpt2-value", library_version=layout.__version__)
        in_environment = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        self._source = "argument" if token else "environment" if in_environment else "login"
        self._heard = 0.0  # when a byte of a download arrived

    def hear(self) -> None:
        """Note that a byte has arrived: the request is not silent."""
        self._heard = time.monotonic()

    def ask(
        self, what: str, request: Callable[..., T], *args: Any, moves: float = 0, denied: str = "", **options: Any
    ) -> T:
        """Make one request, and return its answer.

        Args:
            what: what it is for, as in "could not {what}".
            request: called with the other arguments, in a thread, so that it can be given up.
            moves: bytes that it sends, or receives at a time.
            denied: the advice for a token that may not do it.

        Raises:
            Passing: it may succeed later.
            AuthenticationError, RemoteNotFoundError, HubRefusedError, OptionsError: it will not.
            HubUnavailableError: in offline mode.
        """
        began = time.monotonic()
        try:
            return self._in_thread(what, lambda: request(*args, **options), ANSWER_WITHIN + moves / SLOWEST)
        except GPT2ValueHubError:
            raise
        except _FAILURES as caught:
            error = caught
        # Raised out here, so that our errors hold no reference to the HTTP library's, which holds the token.
        raise self._translated(what, error, denied, time.monotonic() - began)

    def patiently(self, what: str, operation: Callable[[], T], *, seconds: float | None = None) -> T:
        """Do an operation of several requests, and do it again while it fails in ways that pass.

        Args:
            seconds: of failures and pauses after which it is given up; PATIENCE if left out.

        Raises:
            HubUnavailableError: it failed for longer than that, the Hub asks for a longer pause, or the Hub's name
                does not resolve.
            What the operation raises, except Passing.
        """
        spent, patience = 0.0, PATIENCE if seconds is None else seconds
        for attempt in itertools.count():
            try:
                return operation()
            except Passing as caught:
                failure = caught
            usual = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            pause = max(usual, failure.pause or 0.0)
            spent += failure.seconds + pause
            unresolved = not failure.answered and _UNRESOLVED.search(str(failure)) is not None
            if spent > patience or unresolved:
                raise self._given_up(what, failure, pause, attempts=attempt + 1)
            logger.warning("could not %s yet (%s); again in %.1f s", what, failure, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def text(self, error: BaseException) -> str:
        """Say what went wrong, in one line that a terminal can show, without the token and without the signatures of
        upload addresses."""
        parts = [str(error), *([str(error.__cause__)] if isinstance(error, RuntimeError) and error.__cause__ else [])]
        text = " ".join(" ".join(parts).split())
        text = text.replace(self.token, "[token]") if self.token else text
        text = re.sub(r"For more information check: \S+ ?", "", text)
        text = re.sub(r" Please make sure you specified the correct .*huggingface_hub/authentication", "", text)
        return visible(re.sub(r"\?[^\s'\"]+", "?[...]", text)[:500]) or type(error).__name__

    def other_token(self, needed: str = "a token that the Hub accepts") -> str:
        """Return the advice for a token that will not do. One that is passed, or set in HF_TOKEN, overrides the
        login's."""
        return {
            "argument": f"pass {needed} as token=...",
            "environment": f"set HF_TOKEN, which overrides the login, to {needed}; or unset it and log in: "
            "hf auth login",
        }.get(self._source, f"log in with {needed}: hf auth login; or pass it as token=... (or set HF_TOKEN)")

    def _in_thread(self, what: str, request: Callable[[], T], limit: float) -> T:
        """Make a request in a thread; say how long it has taken; after `limit` seconds of silence raise Passing. The
        thread goes on until the connection ends."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(request())
            except BaseException as error:  # whatever it is, it is raised in the thread that waits
                future.set_exception(error)

        threading.Thread(target=work, name=f"hub: {what}", daemon=True).start()
        began, note = time.monotonic(), FIRST_NOTE
        self._heard = began
        while True:
            silent_until = self._heard + limit
            concurrent.futures.wait([future], timeout=max(0.0, min(began + note, silent_until) - time.monotonic()))
            if future.done():
                return future.result()
            now = time.monotonic()
            if now >= self._heard + limit:
                raise Passing(f"could not {what}: no answer for {limit:.0f} s", answered=False, seconds=now - began)
            if now >= began + note:
                logger.warning("waiting for the Hub to %s, for %.0f s now", what, now - began)
                note *= 2

    def _translated(self, what: str, error: Exception, denied: str, seconds: float) -> Exception:
        """Return our error for one of huggingface_hub's."""
        text = f"could not {what}: {self.text(error)}"
        parts = _chain(error)
        responses = [part.response for part in parts if getattr(part, "response", None) is not None]
        status = int(responses[0].status_code) if responses else None
        broken = status is None and any(isinstance(part, _BROKEN_CONNECTION) for part in parts)
        passes = status in (408, 409, 412, 425, 429) or ((status or 0) >= 500 and status not in PERMANENT)
        # a gateway's HTML where the client wants JSON
        if passes or broken or (status is None and isinstance(error, json.JSONDecodeError)):
            return Passing(text, answered=not broken, pause=_retry_after(responses), seconds=seconds)
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnavailableError(text, next_step="unset HF_HUB_OFFLINE and run the same again")
        if isinstance(error, HFValidationError):
            return OptionsError(text, next_step="pass owner/name, of letters, digits, '-', '_' and '.'")
        if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError
            return AuthenticationError(
                f"{text} (it is gated)",
                expected="a token of somebody who was given access",
                next_step="ask for access on its page; then " + self.other_token("a token of your account"),
            )
        if isinstance(error, RevisionNotFoundError):
            return RemoteNotFoundError(
                f"{text} (the repository is there, and has no such revision)",
                expected="a branch, a tag or a commit of the repository",
                next_step="check the revision on the repository's page; without one, main is taken",
            )
        missing = isinstance(error, RepositoryNotFoundError) and "credentials" not in text.lower()
        if status == 404 or missing:  # the Hub answers 401 to strangers who ask for a repository that is not there
            return RemoteNotFoundError(
                f"{text} (not found, or not for this token)",
                expected=f"it to be on {self.api.endpoint}",
                next_step="check the name, and HF_ENDPOINT if you use another Hub; if it is private, "
                + self.other_token("a token that may see it"),
            )
        if status == 401:
            return AuthenticationError(
                text, expected=f"a token that {self.api.endpoint} accepts", next_step=self.other_token()
            )
        if status == 403:
            return AuthenticationError(
                text,
                expected="a token that may do this",
                next_step=denied or "ask its owner for access; then " + self.other_token("a token of your account"),
            )
        if status is not None:
            return HubRefusedError(text, next_step="read the Hub's message above; nothing was committed")
        return HubRefusedError(
            f"could not {what}: {type(error).__name__}: {self.text(error)}",
            expected="an answer that huggingface_hub can read, and a disk with space",
            next_step=f"make sure that {self.api.endpoint} is a Hub, then run the same again",
        )

    def _given_up(self, what: str, failure: Passing, pause: float, *, attempts: int) -> HubUnavailableError:
        where = self.api.endpoint
        advice = f"make sure that {where} is well{'' if failure.answered else ', and that you have a connection'}"
        if where.rstrip("/") == PUBLIC_HUB:
            advice += " (https://status.huggingface.co)"
        advice += "; then run the same again"
        if failure.pause and failure.pause >= pause:
            advice = f"the Hub asks to wait {failure.pause:,.0f} s: run the same again after that"
        return HubUnavailableError(
            f"could not {what}, after {attempts} attempt{'s' * (attempts > 1)}: {failure}", next_step=advice
        )


def is_repository_id(text: object) -> bool:
    """Whether `text` can be a repository's id: `owner/name`, or a `name` without an owner, as `gpt2`. Whether there is
    such a repository, only the Hub can tell."""
    if not isinstance(text, str) or text.endswith("\n"):  # which their rule overlooks
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def offline() -> bool:
    """Whether huggingface_hub was told to ask nobody (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def _chain(error: BaseException) -> list[Any]:
    """Return the error and its causes: an upload's failure comes wrapped in a RuntimeError."""
    return [error, *([] if error.__cause__ is None else _chain(error.__cause__))]


def _retry_after(responses: list[Any]) -> float | None:
    """Return how many seconds the Hub asked us to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    value = responses[0].headers.get("Retry-After", "").strip() if responses else ""
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
