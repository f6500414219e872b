"""Reads the bodies of requests: a file, streamed to disk, a picture, or small JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from io import BytesIO
from typing import BinaryIO, TypeVar

from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from keyreel.render.pictures import upright
from keyreel.serve.security import ApiError
from keyreel.types import U8

M = TypeVar("M", bound=BaseModel)

IMAGE_BYTES = 32 << 20
IMAGE_PIXELS = 64_000_000
_JSON_BYTES = 64 << 10
_DROPPED_BYTES = 1 << 20
# Least bytes per second of a body after the first `idle_seconds`: small bodies, uploads.
_LEAST_RATE, UPLOAD_RATE = 1 << 10, 32 << 10
_FRAMING_BYTES = 16 << 10  # headers and boundaries around the file
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def is_upload(request: Request) -> bool:
    """Whether the body is multipart/form-data."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "multipart/form-data"


async def read_json(request: Request, model: type[M], *, idle_seconds: float) -> M:
    """Reads the body as JSON of this model.

    Raises:
        ApiError: 408, too slow; 413, too large; 422, not JSON.
        RequestValidationError: the JSON does not fit the model.
    """
    body = b"".join([chunk async for chunk in _body(request, _JSON_BYTES, idle_seconds)])
    try:
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(422, "invalid", f"the body is not JSON: {type(error).__name__}") from error


async def read_file(
    request: Request, target: BinaryIO, *, max_bytes: int, idle_seconds: float, least_rate: int = _LEAST_RATE
) -> str:
    """Writes the file of a multipart body into `target` as it arrives. Returns its file name.

    Raises:
        ApiError: 400, malformed or cut off; 408, nothing came for `idle_seconds`; 413, larger than `max_bytes`; 422, no
            part named "file".
    """
    parser = _Parser(request.headers, _body(request, max_bytes + _FRAMING_BYTES, idle_seconds, least_rate), target)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        raise ApiError(400, "invalid", f"the multipart body is malformed: {error}") from error
    file = form.get("file")
    if file is None or isinstance(file, str):
        # Starlette drops an unfinished part.
        raise ApiError(422 if form else 400, "invalid", "the body has no file named 'file', or ends too early")
    if (file.size or 0) > max_bytes:
        raise _too_large(max_bytes)
    return file.filename or ""


def picture(data: bytes) -> U8:
    """Decodes a picture as upright [H, W, 3] uint8 RGB.

    Raises:
        ApiError: 413, too many pixels; 422, not a picture.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            # Pillow has read the size from the header, and has not decoded yet.
            if image.width * image.height > IMAGE_PIXELS:
                raise ApiError(413, "too_large", f"{image.width} x {image.height} pixels, the limit is {IMAGE_PIXELS}")
            return upright(image)
    except ApiError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ApiError(413, "too_large", f"more pixels than the {IMAGE_PIXELS} allowed") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ApiError(422, "source", f"the file cannot be read as a picture: {type(error).__name__}") from error


class _Parser(MultiPartParser):
    """Starlette's parser, which writes the file to `target` instead of /tmp, which may be memory."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], target: BinaryIO) -> None:
        super().__init__(headers, stream, max_files=1, max_fields=16, max_part_size=_JSON_BYTES)
        self._target = target

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if (part := self._current_part.file) is not None:
            part.file.close()
            part.file = self._target


async def _body(
    request: Request, max_bytes: int, idle_seconds: float, least_rate: int = _LEAST_RATE
) -> AsyncGenerator[bytes, None]:
    """Yields the body in pieces. Raises ApiError if it is too large or too slow.

    It reads and drops a small excess: closing a connection with unread bytes would lose the answer.
    """
    length, size = request.headers.get("content-length", ""), 0
    if length.isdecimal() and int(length) > max_bytes + _DROPPED_BYTES:
        raise _too_large(max_bytes)
    body, waited = aiter(request.stream()), 0.0
    try:
        while True:
            began = time.monotonic()
            # Neither a silent nor a slow caller may hold its place for long.
            async with asyncio.timeout(min(idle_seconds, idle_seconds + size / least_rate - waited)):
                chunk = await anext(body)
            waited += time.monotonic() - began
            size += len(chunk)
            if size > max_bytes + _DROPPED_BYTES:
                raise _too_large(max_bytes)
            if size <= max_bytes:
                yield chunk
    except StopAsyncIteration:
        if size > max_bytes:
            raise _too_large(max_bytes) from None
    except TimeoutError as error:
        headers = {"Connection": "close"}
        slow = f"nothing came for {idle_seconds} s, or less than {least_rate} bytes a second"
        raise ApiError(408, "timeout", slow, headers=headers) from error
    except ClientDisconnect as error:
        raise ApiError(400, "invalid", "the caller left before the body ended") from error


def _too_large(max_bytes: int) -> ApiError:
    # The rest of the body is unread, so the connection cannot be reused.
    return ApiError(413, "too_large", f"larger than the {max_bytes} bytes allowed", headers={"Connection": "close"})
