"""Ask a Hub through huggingface_hub (0.36 and newer): typed errors without the token, bounded waits, repeated attempts.

huggingface_hub has no limit on how long its API waits for an answer, or sleeps on the Hub's word. So each request runs
in a thread, which can be given up. What is worth another attempt: 408, 409, 425, 429, 5xx (RFC 9110, RFC 6585), no
answer, and connections that broke; 412 as well, since an answer that was lost may have moved the branch.
"""

from __future__ import annotations

import concurrent.futures
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .. import layout
from ..errors import (
    AuthenticationError,
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    RemoteNotFoundError,
    SaveFailedError,
    as_ours,
    visible,
)

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds of pauses and silence after which an operation is given up
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts; doubles with each
ANSWER_WITHIN = 60.0  # seconds without an answer after which a request is given up
SLOWEST = 16_000.0  # bytes a second, which a request may take in addition

_UNRESOLVED = re.compile(r"(?i)getaddrinfo|name resolution|name or service|nodename|failed to resolve|unreachable")
LOG_IN = "log in: hf auth login; or pass token=..., or set HF_TOKEN, which overrides the login"

T = TypeVar("T")


class Passing(Exception):
    """A failure that may pass. `Hub.patiently` tries again, and raises HubUnavailableError in the end.

    Args:
        text: what failed.
        pause: seconds that the Hub asked us to wait.
        silence: seconds that passed without an answer.
    """

    def __init__(self, text: str, *, pause: float = 0.0, silence: float = 0.0) -> None:
        super().__init__(text)
        self.pause, self.silence = pause, silence


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
                next_step="copy it again, alone",
            )
        self.api = HfApi(token=self.token, library_name="gpt2-value", library_version=layout.__version__)

    def ask(self, what: str, request: Callable[..., T], *args: Any, moves: float = 0, **options: Any) -> T:
        """Make one request, and return its answer.

        Args:
            what: what it is for, as in "could not {what}".
            request: called with the other arguments, in a thread, which goes on until the connection ends.
            moves: bytes that it sends or receives.

        Raises:
            Passing: it may succeed later.
            AuthenticationError, RemoteNotFoundError, HubRefusedError: it will not.
            HubUnavailableError: in offline mode.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(request(*args, **options))
            except BaseException as error:  # whatever it is, it is raised in the thread that waits
                future.set_exception(error)

        threading.Thread(target=work, name=f"hub: {what}", daemon=True).start()
        limit = ANSWER_WITHIN + moves / SLOWEST
        if concurrent.futures.wait([future], timeout=limit).not_done:
            raise Passing(f"could not {what}: no answer for {limit:.0f} s", silence=limit)
        if (error := future.exception()) is None:
            return future.result()
        # Not raised from theirs, so that our errors hold no reference to the HTTP library's, which holds the token.
        raise error if isinstance(error, GPT2ValueHubError) else self._translated(what, error)

    def patiently(self, what: str, operation: Callable[[], T]) -> T:
        """Do an operation of several requests, and do it again while it fails in ways that pass.

        Raises:
            HubUnavailableError: it failed for longer than PATIENCE, the Hub asks for a longer pause, or the Hub's name
                does not resolve.
            SaveFailedError: the system refuses to write a file.
            What the operation raises, except Passing.
        """

        def unwritable(gist: str) -> SaveFailedError:
            return SaveFailedError(
                f"could not {what}: {gist}",
                expected="space, and permission to write, in the Hub's cache and in the folder for temporary files",
                next_step="free some space, or name other folders: export HF_HOME=FOLDER TMPDIR=FOLDER",
            )

        left, usual = PATIENCE, FIRST_PAUSE
        while True:
            try:
                with as_ours(unwritable):
                    return operation()
            except Passing as caught:
                failure = caught
            pause = max(usual * random.uniform(0.5, 1.0), failure.pause)
            left -= pause + failure.silence
            if left < 0 or _UNRESOLVED.search(str(failure)):
                raise HubUnavailableError(
                    f"gave up: {failure}",
                    next_step=f"make sure that {self.api.endpoint} is well, and that you have a connection; wait "
                    f"{pause:,.0f} s or longer, and run the same again",
                )
            logger.warning("could not %s yet (%s); again in %.1f s", what, failure, pause)
            time.sleep(pause)
            usual = min(2 * usual, LONGEST_PAUSE)

    def _translated(self, what: str, error: BaseException) -> Exception:
        """Return our error for one of huggingface_hub's."""
        chain: list[Any] = [error]
        while chain[-1].__cause__ is not None:  # an upload's failure comes wrapped in a RuntimeError
            chain.append(chain[-1].__cause__)
        error = next((part for part in chain if getattr(part, "response", None) is not None), error)
        response: Any = getattr(error, "response", None)
        status = 0 if response is None else int(response.status_code)
        # one line that a terminal can show, without the token and without the signatures of upload addresses
        text = " ".join(str(error).split())
        text = text.replace(self.token, "[token]") if self.token else text
        text = re.sub(r" Please make sure you specified the correct .*huggingface_hub/authentication", "", text)
        text = visible(re.sub(r"\?[^\s'\"]+", "?[...]", text)[:500])
        text = f"could not {what}: {text if status else f'{type(error).__name__}: {text}'}"
        broken = any(type(part).__module__.startswith(("requests", "httpx")) for part in chain)
        if (broken and not status) or status in (408, 409, 412, 425, 429) or status >= 500:
            asked = response.headers.get("Retry-After", "").strip() if status else ""
            return Passing(text, pause=float(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0.0)
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnavailableError(text, next_step="unset HF_HUB_OFFLINE and run the same again")
        # the Hub answers 401 to strangers who ask for a repository that is not there
        if status == 404 or (status == 401 and isinstance(error, RepositoryNotFoundError)):
            return RemoteNotFoundError(
                f"{text} (not found, or not for this token)",
                expected=f"it to be on {self.api.endpoint}",
                next_step=f"check the name, the revision and HF_ENDPOINT; if it is private, {LOG_IN}",
            )
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            return AuthenticationError(
                text,
                expected="a token that the Hub accepts, of somebody who may do this",
                next_step=f"{LOG_IN}; if the repository is not yours, ask its owner for access",
            )
        return HubRefusedError(
            text,
            next_step=f"read the message above, and make sure that {self.api.endpoint} is a Hub; nothing was committed",
        )


def is_repository_id(text: Any) -> bool:
    """Whether `text` can be a repository's id: `owner/name`, or a `name` without an owner, as `gpt2`. Whether there is
    such a repository, only the Hub can tell."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return isinstance(text, str) and not text.endswith("\n")  # which their rule overlooks
