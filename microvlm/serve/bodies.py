"""Bodies of requests: read within limits of size and time, parsed into records, with pictures out of data URLs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.serve.limits import MB, Limits
from microvlm.serve.refusal import Refusal, busy

T = TypeVar("T")
_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?:;[\w=.+-]+)*?;base64,", re.ASCII)
_MOST_DISCARDED = 8
"""Times the largest body that is read, and dropped, so that a client that still sends gets to read why."""


class Bodies:
    """Reads bodies; counts what is held of all of them."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._held = 0

    async def read(self, request: Request, kind: type[T]) -> T:
        """The JSON body of a request as a value of type `kind`. Raises Refusal."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "not_json", "send JSON, with 'Content-Type: application/json'.")
        content = await self._receive(request)
        try:
            return documents.parse(content, kind, "the request", "send it as docs/serve.md shows")
        except UserError as error:
            raise Refusal(400, "bad_request", str(error)) from None

    async def _receive(self, request: Request) -> bytes:
        limit, held, content, length = self._limits.body_bytes, 0, bytearray(), 0
        too_large = Refusal(
            413,
            "request_too_large",
            f"the request is larger than the {limit / MB:.0f} MB taken here: send a smaller picture, of at most "
            f"{self._limits.picture_bytes / MB:g} MB.",
        )
        try:
            async with asyncio.timeout(self._limits.receive_s):
                async for piece in request.stream():
                    length += len(piece)
                    if length > limit:
                        content.clear()
                        if length > _MOST_DISCARDED * limit:
                            raise too_large
                        continue
                    content += piece
                    held += len(piece)
                    self._held += len(piece)
                    if self._held > self._limits.received_bytes:
                        raise busy("too_much_at_once", "others send large pictures right now: try again.")
        except TimeoutError:
            sentence = f"the request did not come within {self._limits.receive_s:g} seconds: send it again."
            raise Refusal(408, "request_too_slow", sentence, headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise Refusal(400, "cut_off", "the request was cut off.") from None
        finally:
            self._held -= held
        if length > limit:
            raise too_large
        return bytes(content)


def picture_of(url: str | None, limits: Limits, param: str | None = None) -> bytes | None:
    """The bytes of a picture in a data URL, not yet decoded; None for None. Raises Refusal."""
    if url is None:
        return None
    match = _DATA_URL.match(url[:200])
    if match is None:
        is_remote = url[:8].lower().startswith(("http:", "https:", "ftp:", "file:"))
        sentence = (
            "pictures are not fetched from other places here: send the picture itself, as a data URL."
            if is_remote
            else "a picture is sent as a data URL, such as 'data:image/png;base64,...'."
        )
        raise Refusal(400, "remote_picture" if is_remote else "bad_picture_url", sentence, param)
    try:
        content = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "bad_base64", "the picture's base64 is damaged: send it again.", param) from None
    if len(content) > limits.picture_bytes:
        raise Refusal(
            413,
            "picture_too_large",
            f"the picture has {len(content) / MB:.1f} MB, more than the {limits.picture_bytes / MB:g} MB taken here: "
            "send a smaller one.",
            param,
        )
    if not content:
        raise Refusal(400, "empty_picture", "the picture is empty (0 bytes): choose it again.", param)
    return content
