"""Ask a Hub until it answers, and say what is wrong when it does not.

Imports the standard library, huggingface_hub (0.36 and newer) and `errors`. What is worth another attempt: 408, 409,
425, 429, most of 5xx (RFC 9110, RFC 6585), no answer, and connections that broke; with exponentially growing,
jittered waits.
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

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ..errors import (
    AuthenticationError,
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    RemoteNotFoundError,
)

logger = logging.getLogger(__name__)

FIRST_WAIT = 1.0  # seconds before the second attempt; doubles with each further one
LONGEST_WAIT = 30.0
SHORTEST_LIMIT, LONGEST_LIMIT = 10.0, 60.0  # seconds without an answer after which one attempt is given up
FIRST_NOTE = 5.0  # seconds of waiting after which a line says so; doubles with each further one
PERMANENT = (501, 505, 506, 508, 510, 511)  # of the 5xx: the server cannot, and will not later
PUBLIC_HUB = "https://huggingface.co"
CREATE = "create the repository"

T = TypeVar("T")


def _http_errors() -> tuple[type[Exception], tuple[type[Exception], ...]]:
    """Return the base class of all errors of the HTTP library under huggingface_hub, and its errors for broken
    connections.

    huggingface_hub 0.36 stands on requests, later ones on httpx (under changing names): its own error says which.
    """
    base = [c for c in HfHubHTTPError.__mro__ if c.__module__.split(".")[0].startswith(("requests", "httpx"))][-1]
    library: Any = sys.modules[base.__module__.split(".")[0]]
    if hasattr(library, "TransportError"):
        return base, (library.TimeoutException, library.NetworkError, library.RemoteProtocolError, library.ProxyError)
    return base, (library.ConnectionError, library.Timeout, library.exceptions.ChunkedEncodingError)


_HTTP_ERROR, _BROKEN_CONNECTION = _http_errors()


class _NoAnswer(OSError):
    """A Hub that has accepted a request and stays silent."""


def _in_thread(what: str, request: Callable[[], T], limit: float) -> T:
    """Make a request in a thread of its own; say how long it has taken, and give it up after `limit` seconds.

    huggingface_hub sets no limit. A request that was given up goes on until the connection ends.

    Raises:
        _NoAnswer: after `limit` seconds.
        What the request raises.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(request())
        except BaseException as error:  # whatever it is, it is raised in the thread that waits
            future.set_exception(error)

    threading.Thread(target=work, name=f"hub: {what}", daemon=True).start()
    began, note = time.monotonic(), FIRST_NOTE
    while True:
        waited = time.monotonic() - began
        done, _ = concurrent.futures.wait([future], timeout=max(0.0, min(note, limit) - waited))
        if done:
            return future.result()
        waited = time.monotonic() - began
        if waited >= limit:
            raise _NoAnswer(f"no answer for {waited:.0f} s")
        if waited >= note:
            logger.warning("waiting for the Hub to %s, for %.0f s now", what, waited)
            note *= 2


class Retrier:
    """Makes requests to one Hub, again and again for `seconds`, with errors that never show the token.

    Args:
        seconds: how long one request may keep failing, or stay without an answer, before it is given up.
        token: hidden in all errors.
        endpoint: the Hub's address.
        token_source: where the token comes from, for advice about a wrong one: "argument", "HF_TOKEN" or "login".
        writes: whether the requests are made to write, for advice about a token that may not.
    """

    def __init__(
        self, *, seconds: float, token: str, endpoint: str, token_source: str = "login", writes: bool = True
    ) -> None:
        self._seconds = seconds
        self._token = token
        self._endpoint = endpoint
        self._token_source = token_source
        self._writes = writes

    def call(
        self,
        what: str,
        request: Callable[..., T],
        *args: Any,
        look: Callable[[], T | None] | None = None,
        transfer: float = 0.0,
        **kwargs: Any,
    ) -> T:
        """Make a request until it succeeds, fails for good, or has kept failing for `seconds`.

        Args:
            what: what the request is for, as in "could not {what}".
            request: called with the other arguments, in a thread, so that it can be given up.
            look: finds out, after a wait, whether a request whose answer was lost has done its work all the same.
                With it a failed precondition (412) counts as a lost answer.
            transfer: seconds more that it may take, for the bytes that it moves.

        Raises:
            AuthenticationError, RemoteNotFoundError, HubRefusedError: at once.
            HubUnavailableError: after `seconds`; at once in offline mode.
            Anything that is neither the Hub's nor the connection's doing, as it came.
        """
        started, limit = None, transfer + min(max(self._seconds, SHORTEST_LIMIT), LONGEST_LIMIT)
        for attempt in itertools.count():
            began = time.monotonic()
            try:
                return _in_thread(what, lambda: request(*args, **kwargs), limit)
            except GPT2ValueHubError:
                raise
            except (_HTTP_ERROR, OSError, ValueError, RuntimeError) as caught:
                error = caught
            # Our own errors are raised out here, so that they hold no reference to the HTTP library's, which holds
            # the request and with it the token.
            if not _may_pass(error) and not (look and status_of(error) == 412):
                raise self._refusal(what, error)
            now = time.monotonic()
            if started is None:
                started = now if transfer else began
            wait = _retry_after(error)
            if wait is None:
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            if now + wait > started + self._seconds:
                # a Hub that is silent would not answer this either
                if look and not isinstance(error, _NoAnswer) and (done := look()) is not None:
                    return done
                raise self._given_up(what, error, now - started)
            logger.warning(
                "could not %s yet (%s), for %.0f s now; again in %.1f s, until %.0f s have passed",
                what,
                self.text(error),
                now - started,
                wait,
                self._seconds,
            )
            time.sleep(wait)
            if look and (done := look()) is not None:
                return done
        raise AssertionError("unreachable")

    def _given_up(self, what: str, error: Exception, seconds: float) -> HubUnavailableError:
        public = self._endpoint.rstrip("/") == PUBLIC_HUB
        where = "see https://status.huggingface.co" if public else f"make sure that {self._endpoint} is well"
        return HubUnavailableError(
            f"could not {what}: the Hub kept failing for {seconds:.0f} s; last: {self.text(error)}",
            next_step=f"{where} and run the same again; what is already uploaded is not sent twice, and a commit that "
            "did land is not made twice",
        )

    def _way_in(self, what: str) -> str:
        """Return the advice for a token that may not do something."""
        if not self._writes:
            return "ask its owner for access; then " + other_token(self._token_source, "a token of your account")
        if what == CREATE:
            return (
                "create it under your own name, or with a token of its owner's; if it exists already, it is private, "
                "and this token cannot see it: ask its owner"
            )
        return (
            "ask the owner for write access, use a token with write permission for it, or push to a repository of "
            "your own; to propose the change instead pass create_pr=True (--create-pr)"
        )

    def text(self, error: BaseException) -> str:
        """Say what went wrong, in one line, without the token and without the signatures of upload addresses."""
        parts = [str(error)]
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
            parts.append(str(error.__cause__))
        text = " ".join(" ".join(parts).split()).replace(self._token, "[token]")
        text = re.sub(r"For more information check: \S+ ?", "", text)
        text = re.sub(r" Please make sure you specified the correct .*huggingface_hub/authentication", "", text)
        return re.sub(r"\?[^\s'\"]+", "?[...]", text)[:500] or type(error).__name__

    def _refusal(self, what: str, error: Exception) -> Exception:
        """Return the typed error for a failure that waiting does not mend."""
        status = status_of(error)
        text = f"could not {what}: {self.text(error)}"
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnavailableError(text, next_step="unset HF_HUB_OFFLINE and run the same again")
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            return AuthenticationError(
                text, expected=f"a token that {self._endpoint} accepts", next_step=other_token(self._token_source)
            )
        if status == 403:
            return AuthenticationError(text, expected="a token that may do this", next_step=self._way_in(what))
        if status == 404:
            return RemoteNotFoundError(
                text,
                expected=f"it to be on {self._endpoint}",
                next_step="check the name, and HF_ENDPOINT if you use another Hub; then run the same again",
            )
        if status is not None:
            return HubRefusedError(text, next_step="read the Hub's message above; nothing was committed")
        return error


def other_token(source: str, needed: str = "a token that the Hub accepts") -> str:
    """Return the advice for a token that will not do. A token that is passed, or set in HF_TOKEN, overrides the
    login's.

    Args:
        source: where it comes from, see `token_source`.
        needed: the token that would do, in words.
    """
    return {
        "argument": f"pass {needed} as token=...",
        "HF_TOKEN": f"set HF_TOKEN, which overrides the login, to {needed}; or unset it and log in: hf auth login",
    }.get(source, f"log in with {needed}: hf auth login; or pass it as token=... (or set HF_TOKEN)")


def checked_token(token: str | None) -> str:
    """The token, or the one that huggingface_hub knows.

    Raises:
        AuthenticationError: there is none, or no HTTP header can hold it.
    """
    token = (token or get_token() or "").strip()
    if not token:
        raise AuthenticationError(
            "no token",
            expected="a user access token with write permission",
            next_step="log in: hf auth login; or pass token=... (or set HF_TOKEN)",
        )
    if not re.fullmatch(r"[!-~]+", token):  # HTTP libraries quote a header that they refuse in their errors
        raise AuthenticationError(
            "the token holds white space or characters outside ASCII",
            expected="a user access token, as hf_...",
            next_step="copy it again, alone",
        )
    return token


def token_source(token: str | None) -> str:
    """Return where huggingface_hub takes the token from: "argument", "HF_TOKEN" or "login"."""
    if token:
        return "argument"
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") else "login"


def is_http(error: BaseException) -> bool:
    """Whether the Hub answered with an error, or the connection to it broke."""
    return status_of(error) is not None or any(isinstance(part, _BROKEN_CONNECTION) for part in _chain(error))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, if it has one."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _may_pass(error: BaseException) -> bool:
    status = status_of(error)
    if status is not None:
        return status in (408, 409, 425, 429) or (status >= 500 and status not in PERMANENT)
    # a gateway's HTML where the client wants JSON, or no answer at all
    return isinstance(error, (json.JSONDecodeError, _NoAnswer)) or is_http(error)


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error and its causes: an upload's failure comes wrapped in a RuntimeError."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _response(error: BaseException) -> Any:
    for part in _chain(error):
        response = getattr(part, "response", None) if isinstance(part, _HTTP_ERROR) else None
        if response is not None:
            return response
    return None


def _retry_after(error: BaseException) -> float | None:
    """Return how many seconds the Hub asked us to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    response = _response(error)
    value = "" if response is None else response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, when.timestamp() - time.time())
