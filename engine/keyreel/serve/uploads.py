"""What callers send: a multipart body whose one file goes to disk as it comes, pictures, small JSON."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from keyreel.serve.refusals import Refused
from keyreel.types import U8

FIELD = "file"
_JSON_BYTES = 64 << 10
_FRAMING_BYTES = 16 << 10  # headers and boundaries around the file
_HELD_BYTES = 1 << 20  # gathered before a thread writes them
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def kind_of(request: Request) -> str:
    """The media type of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, *, idle_seconds: float) -> Any:
    """The body as JSON.

    Raises:
        Refused: 408, 413, 422.
    """
    body = io.BytesIO()
    async for chunk in _chunks(request, _JSON_BYTES, idle_seconds):
        body.write(chunk)
    try:
        return json.loads(body.getvalue())
    except (ValueError, RecursionError) as error:
        raise Refused(422, "invalid", f"the body is not JSON: {type(error).__name__}") from error


async def read_file(request: Request, target: BinaryIO, *, most_bytes: int, idle_seconds: float) -> str:
    """Writes the file of a multipart body into `target` as it arrives, and returns the name that came with it.

    Raises:
        Refused: 400 malformed or cut off, 408 nothing came for `idle_seconds`, 413 larger than `most_bytes`, 415 not
            multipart, 422 without a part named "file".
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Refused(415, "invalid", "the body must be multipart/form-data with a part named 'file'")
    part = _Part()
    try:
        parser = MultipartParser(boundary, part.callbacks())
        async for chunk in _chunks(request, most_bytes + _FRAMING_BYTES, idle_seconds):
            parser.write(chunk)
            if part.size > most_bytes:
                raise _too_large(most_bytes)
            if len(part.held) >= _HELD_BYTES:
                await asyncio.to_thread(target.write, part.take())
        parser.finalize()
    except (FormParserError, ValueError, UnicodeError) as error:
        raise Refused(400, "invalid", f"the multipart body is malformed: {error}") from error
    if part.name is None:
        raise Refused(422, "invalid", "the body has no part named 'file'")
    if not part.ended:
        raise Refused(400, "invalid", "the multipart body ends too early")
    await asyncio.to_thread(target.write, part.take())
    return part.name


def safe_name(name: str) -> str:
    """A file name that means nothing to any file system or shell; the ending stays."""
    base = re.split(r"[/\\]", name)[-1]
    base = re.sub(r"[^\w .,()+=@-]", "_", base).strip(" .-") or "video"
    stem, ending = os.path.splitext(base)
    return _cut(stem, 120) + _cut(ending, 16)


def picture(data: bytes, *, most_pixels: int) -> U8:
    """[H, W, 3] uint8 RGB, upright.

    Raises:
        Refused: 413 more pixels than allowed, 422 no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # The header says the size: nothing was unpacked yet.
            if image.width * image.height > most_pixels:
                raise Refused(413, "too_large", f"{image.width} x {image.height} pixels, allowed are {most_pixels}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(413, "too_large", f"more pixels than the {most_pixels} allowed") from error
    except Exception as error:  # its many decoders raise whatever they like
        raise Refused(422, "source", f"the file cannot be read as a picture: {type(error).__name__}") from error


def settle(file: BinaryIO) -> int:
    """Makes sure that what was written is on disk; returns its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def discard(path: Path) -> None:
    """Removes an upload with its folder."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        path.parent.rmdir()


def _cut(text: str, most: int) -> str:
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


class _Part:
    """Gathers the part named "file"; other parts are read over."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.ended = False
        self.size = 0
        self.held = bytearray()
        self._field, self._value = bytearray(), bytearray()
        self._wanted = False  # the part that is being read is the file

    def callbacks(self) -> Any:
        return {
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def take(self) -> bytes:
        data = bytes(self.held)
        self.held.clear()
        return data

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition" and self.name is None:
            _, options = parse_options_header(bytes(self._value))
            if options.get(b"name") == FIELD.encode():
                self.name = options.get(b"filename", b"").decode("utf-8", "replace")
                self._wanted = True
        self._field.clear()
        self._value.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            self.size += end - start
            self.held += data[start:end]

    def _end(self) -> None:
        self.ended |= self._wanted
        self._wanted = False


async def _chunks(request: Request, most_bytes: int, idle_seconds: float) -> AsyncIterator[bytes]:
    """The body, as long as it is not larger than allowed."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most_bytes:
        raise _too_large(most_bytes)
    size, body = 0, aiter(request.stream())
    try:
        while True:
            async with asyncio.timeout(idle_seconds):
                chunk = await anext(body)
            size += len(chunk)
            if size > most_bytes:
                raise _too_large(most_bytes)
            yield chunk
    except StopAsyncIteration:
        return
    except TimeoutError as error:
        raise Refused(408, "timeout", f"nothing came for {idle_seconds} s", headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise Refused(400, "invalid", "the caller left before the body ended") from error


def _too_large(most_bytes: int) -> Refused:
    # What is still on its way is not read: the connection cannot be used again.
    return Refused(413, "too_large", f"larger than the {most_bytes} bytes allowed", headers={"Connection": "close"})
