"""How much one client, and all together, may ask for; and the answer to whoever asks for more."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.errors import real, whole

# status -> OpenAI's name for the kind of error
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


class Refused(Exception):
    """A request that gets an error for an answer, in OpenAI's form. retry: seconds until it may be tried again."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """Each is a flag of `pyengine serve`. default_max_tokens: of a request that names none. requests: samples under way
    at once; queue: of these, those that wait for rows. request_timeout: seconds."""

    requests: int = 1024
    queue: int = 512
    k: int = 64
    n: int = 16
    max_tokens: int = 4096
    default_max_tokens: int = 256
    logprobs: int = 20
    body_bytes: int = 4 << 20
    request_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("requests", "queue", "k", "n", "max_tokens", "default_max_tokens", "logprobs", "body_bytes"):
            whole(getattr(self, name), _flag(name), 1)
        real(self.request_timeout, "--request-timeout", 1e-3)

    def at_most(self, name: str, value: int | None, field: str) -> None:
        """Refused, naming field, value and limit, where a request asks for more than that limit."""
        most = getattr(self, name)
        if value is not None and value > most:
            message = f"{field} is {value}, this server's limit is {most} ({_flag(name)})"
            raise Refused(400, message, field, "limit_exceeded")

    def room(self, live: int, waiting: int, more: int) -> None:
        """Refused where `more` samples would be too many beside those that are there, or ever."""
        for name, there, says in (("requests", live, "under way"), ("queue", waiting, "that wait")):
            most = getattr(self, name)
            limit = f"this server's limit is {most} ({_flag(name)})"
            if more > most:
                raise Refused(400, f"{more} samples in one request, {limit}", "n", "limit_exceeded")
            if there + more > most:
                raise Refused(429, f"{more} samples beside {there} {says}, {limit}", None, "too_many_requests", retry=1)


def _flag(name: str) -> str:
    """Of `pyengine serve`, by which a limit is set."""
    return "--" + ("" if name.startswith("default") else "max-") + name.removeprefix("max_").replace("_", "-")
