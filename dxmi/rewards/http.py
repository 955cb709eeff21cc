"""Rewards that another process on the same machine computes, over HTTP.

A request is a POST of JSON: `shape` [b, *event], `samples`, their float32 values in row-major order, base64-encoded
(little endian; images are in [-1, 1]), and `labels`, a list of classes or null. The answer is JSON with `rewards`, a
list of b finite numbers.
"""

import base64
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from typing import Any

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.rewards.configs import HttpRewardConfig

_PAUSE = 0.5
"""Seconds before a failed request is repeated, doubled each time."""
_SHOWN = 200
_SERVER_ERROR = 500
"""The first status of errors after which a request is repeated."""
_MAX_ANSWER = 16 * 2**20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which could lead to another machine."""

    def redirect_request(self, *_: Any) -> None:
        """Return no new request, so that the redirect is an error."""


class HttpReward:
    """Rewards over HTTP, on the loopback interface.

    Args:
        config: Settings: address, time-out, retries and batch size.
    """

    def __init__(self, config: HttpRewardConfig) -> None:
        self._config = config
        # No proxy: the address is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample: [B].

        Raises:
            UserError: there is no valid answer.
        """
        size = self._config.batch_size
        labels = None if condition.labels is None else condition.labels.cpu()
        rewards: list[float] = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            rewards += self._ask(x[rows], None if labels is None else labels[rows].tolist())
        return torch.tensor(rewards, dtype=torch.float32, device=x.device)

    def _ask(self, x: Tensor, labels: list[int] | None) -> list[float]:
        raw = x.float().cpu().contiguous().numpy().astype("<f4").tobytes()
        body = {"shape": list(x.shape), "samples": base64.b64encode(raw).decode(), "labels": labels}
        request = urllib.request.Request(  # noqa: S310  (the config allows only http on this machine)
            self._config.url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return self._checked(self._answer(request), len(x))

    def _answer(self, request: urllib.request.Request) -> bytes:
        """The body of the answer, after repeating failed requests."""
        pause = _PAUSE
        for attempt in range(self._config.retries + 1):
            try:
                with self._opener.open(request, timeout=self._config.timeout) as response:
                    body: bytes = response.read(_MAX_ANSWER)
                    return body
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < _SERVER_ERROR:
                    raise UserError(
                        f"The reward at {self._config.url} answered with status {error.code}: correct its address or "
                        "its server."
                    ) from error
                if attempt == self._config.retries:
                    raise UserError(
                        f"The reward at {self._config.url} did not answer ({error}) after {attempt + 1} requests: "
                        "start its server, or raise reward.timeout."
                    ) from error
            time.sleep(pause)
            pause *= 2.0
        raise AssertionError

    def _checked(self, body: bytes, num: int) -> list[float]:
        try:
            answer: Any = json.loads(body)
            rewards = [float(value) for value in answer["rewards"]]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            shown = body[:_SHOWN].decode(errors="replace")
            raise UserError(
                f"The reward at {self._config.url} answered {shown!r}: it must be JSON with a list `rewards`."
            ) from error
        if len(rewards) != num or not all(math.isfinite(value) for value in rewards):
            raise UserError(
                f"The reward at {self._config.url} answered {len(rewards)} numbers for {num} samples, "
                f"{sum(not math.isfinite(value) for value in rewards)} of which are not finite."
            )
        return rewards
