"""A chat model behind an OpenAI-compatible endpoint as a judge."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.endpoint_options import EndpointOptions
from cluster.judges import NONE, Answer, JudgeFailed, NotAsked, read_verdict
from preferences.formats import PlainTemplate
from preferences.sources import shorten
from tokens.errors import UserError

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable that holds the key; endpoints on one's own machine need none."""
_TEXTS = """

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

[Better response]"""
_ASKED = """Here are a prompt and two responses to it, A and B. Which response is better, that is, more helpful, honest and
harmless? Do not let the order or the length of the responses decide. """
QUESTION = f"{_ASKED}Reply with one letter and nothing else: A or B.{_TEXTS}"
QUESTION_WITH_TIES = f"{_ASKED}Reply with one word and nothing else: A, B, or tie if neither is better.{_TEXTS}"
LONGEST_PAUSE_S = 30.0
LONGEST_LIMITED_S = 600.0
"""How long one request may be told to wait (status 429 with Retry-After), in all."""
RETRIES_PER_QUESTION = 0.1
"""What the budget of retries grows by with every question."""
REFUSED = (400, 413, 422)
"""Statuses that speak of one request: too long, or a content filter's."""


class EndpointJudge:
    """Asks a chat model, several questions at a time.

    Args:
        base_url: of the endpoint, up to /v1.
        model: its name there.
        options: how it is asked.
        budget: how many retries there may be in all, beside ``RETRIES_PER_QUESTION`` for each question.
        pause_s: before the first retry; doubles with each, unless the server says how long.
        ties: whether it may answer that neither response is better.

    Raises:
        UserError: if the URL is not usable.
    """

    template = PlainTemplate()

    def __init__(
        self,
        base_url: str,
        model: str,
        options: EndpointOptions,
        budget: int = 200,
        pause_s: float = 1.0,
        ties: bool = False,
    ) -> None:
        _check_url(base_url)
        if not model:
            raise UserError(f"the judge openai:{base_url} names no model: expected openai:BASE_URL#MODEL")
        from openai import OpenAI

        self.key = os.environ.get(KEY_VARIABLE)
        self.client = OpenAI(base_url=base_url, api_key=self.key or "none", timeout=options.timeout_s, max_retries=0)
        self.base_url, self.model, self.options = base_url, model, options
        self.budget, self.pause_s, self.lock = float(budget), pause_s, threading.Lock()
        self.batch_size = 4 * options.concurrency
        self.ties, self.question = ties, QUESTION_WITH_TIES if ties else QUESTION
        self.name = f"openai:{base_url}#{model}:{hashlib.sha256(self.question.encode()).hexdigest()[:12]}"

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def check(self) -> None:
        """Ask for one token, so that what is wrong with URL, key or model is said before any work is done.

        Raises:
            UserError: if nobody listens, or what answers is no chat endpoint that has the model. A server that is busy passes.
        """
        import openai
        from openai.types.chat import ChatCompletion

        try:
            answer: object = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "Reply with A."}], temperature=0.0, max_tokens=1
            )
        except openai.APIError as error:
            busy = isinstance(error, openai.APIStatusError) and (error.status_code in (408, 409, 429) or error.status_code >= 500)
            if busy:
                return
            raise UserError(
                f"the judge {self.model!r} at {self.base_url} cannot be asked: {self._reason(error)}. Start the server, or mend "
                "openai:BASE_URL#MODEL"
            ) from None
        if not isinstance(answer, ChatCompletion):
            raise UserError(self._no_chat(answer))

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``. A reply that is not clearly A or B is no answer."""
        stop = threading.Event()
        with self.lock:
            self.budget += RETRIES_PER_QUESTION * len(prompts)
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            try:
                futures = [pool.submit(self._ask, *texts, stop) for texts in zip(prompts, firsts, seconds, strict=True)]
                wait(futures)
            except BaseException:
                stop.set()
                raise
        failures = [error for future in futures if (error := future.exception()) is not None]
        if not failures:
            return [future.result() for future in futures]
        first = next((error for error in failures if not isinstance(error, _Stopped)), failures[0])
        raise JudgeFailed(self._words(first), [_answer(future) for future in futures]) from (
            None if isinstance(first, _RequestFailed) else first
        )

    def _ask(self, prompt: str, first: str, second: str, stop: threading.Event) -> Answer:
        try:
            return self._reply(self.question.format(prompt=prompt, first=first, second=second), stop)
        except BaseException:
            stop.set()  # the others need not begin
            raise

    def _reply(self, question: str, stop: threading.Event) -> Answer:
        import openai
        from openai.types.chat import ChatCompletion

        attempt, limited_since = 0, None
        while not stop.is_set():
            try:
                answer: object = self.client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0.0,
                    max_tokens=self.options.max_tokens,
                )
            except openai.APIError as error:
                if isinstance(error, openai.APIStatusError) and error.status_code in REFUSED:
                    return NotAsked(f"the endpoint refuses it: {self._reason(error)}")
                asked = _retry_after(error)
                if isinstance(error, openai.RateLimitError) and asked is not None:
                    limited_since = time.monotonic() if limited_since is None else limited_since
                    left = LONGEST_LIMITED_S - (time.monotonic() - limited_since)
                    if asked > left:
                        raise _RequestFailed(
                            f"it limits the rate for over {LONGEST_LIMITED_S:g} s ({self._reason(error)}): lower --concurrency "
                            "(in a run fresh.concurrency)"
                        ) from None
                    stop.wait(max(asked, self.pause_s))
                    continue
                if not self._may_retry(error, attempt):
                    raise _RequestFailed(f"{attempt + 1} attempt(s); the last: {self._reason(error)}") from None
                stop.wait(min(self.pause_s * 2**attempt if asked is None else asked, LONGEST_PAUSE_S))
                attempt += 1
                continue
            if not isinstance(answer, ChatCompletion):
                raise _RequestFailed(self._no_chat(answer))
            return self._read(answer)
        raise _Stopped

    def _read(self, answer: ChatCompletion) -> Answer:
        """What a reply says; no verdict is an answer only if the model had the room to give one."""
        if not answer.choices:
            return NONE
        verdict, reason = read_verdict(answer.choices[0].message.content, self.ties), answer.choices[0].finish_reason
        if verdict == NONE and reason == "length":
            cut = f"the reply was cut off at {self.options.max_tokens} tokens (finish_reason length)"
            wanted = "A, B or tie" if self.ties else "A or B"
            return NotAsked(f"{cut} before it said {wanted}: raise --max-tokens (in a run fresh.max_tokens)")
        if verdict == NONE and reason == "content_filter":
            return NotAsked("the endpoint's content filter withheld the reply")
        return verdict

    def _no_chat(self, answer: object) -> str:
        said = shorten(self._hide(str(answer)))
        return f"it answers, but not as a chat endpoint: {said}. Does BASE_URL end in /v1?"

    def _may_retry(self, error: openai.APIError, attempt: int) -> bool:
        """True if a request may be made once more; takes it from the budget."""
        import openai

        temporary = isinstance(error, openai.APIConnectionError)
        if isinstance(error, openai.APIStatusError):
            temporary = error.status_code in (408, 409, 429) or error.status_code >= 500
        if not temporary or attempt == self.options.retries:
            return False
        with self.lock:
            self.budget -= 1
            return self.budget >= 0

    def _words(self, error: BaseException) -> str:
        said = str(error) if isinstance(error, _RequestFailed) else f"{type(error).__name__}: {self._hide(str(error))}"
        text = f"the judge {self.model!r} at {self.base_url} did not answer: {said}"
        if self.budget < 0:
            text += ". The budget of retries for the whole data set is used up: the endpoint fails too often"
        return text

    def _reason(self, error: openai.APIError) -> str:
        """What a request died of; a line of what the server sent at most."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return "no answer in time (timeout)"
        if isinstance(error, openai.APIConnectionError):
            return f"no connection ({self._hide(str(error.__cause__ or error))})"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"status {error.status_code}: the key is missing or not accepted; set {KEY_VARIABLE}"
        status = f"status {error.status_code}: " if isinstance(error, openai.APIStatusError) else ""
        return f"{status}{shorten(self._hide(error.message), 200)}"

    def _hide(self, text: str) -> str:
        """The text without the key, should a server quote it."""
        return text if self.key is None else text.replace(self.key, "***")


class _RequestFailed(Exception):
    """A request that will not be tried again."""


class _Stopped(Exception):
    """A request that was not made, because another had failed."""


def _answer(future: Future[Answer]) -> Answer | None:
    return None if future.exception() is not None else future.result()


def _retry_after(error: openai.APIError) -> float | None:
    """Seconds that the server asks to wait; None where it does not say so in seconds."""
    import openai

    asked = error.response.headers.get("retry-after") if isinstance(error, openai.APIStatusError) else None
    return float(asked) if asked is not None and asked.replace(".", "", 1).isdigit() else None


def _check_url(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        parts, usable = None, False
    if parts is not None and (parts.username or parts.password or parts.query):
        raise UserError(
            "the judge's BASE_URL must hold no user name, password or query (they would be written down); "
            f"put a key into the environment variable {KEY_VARIABLE}"
        )
    if not usable:
        raise UserError(
            f"the judge's BASE_URL must be a URL such as http://localhost:8000/v1, got {shorten(base_url)}; "
            "expected openai:BASE_URL#MODEL"
        )
