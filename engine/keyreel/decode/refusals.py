"""Explains why a file cannot be opened, by its first bytes and FFmpeg's error."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import BinaryIO

import av

from keyreel.errors import CorruptStream, SourceError, SourceNotFound, UnsupportedCodec

HEAD_BYTES = 1024  # bytes that the functions below need
_PLAYLIST = re.compile(
    rb"\s*(#EXTM3U|ffconcat|\[playlist\]|\[reference\]|<asx|<\?xml.{0,300}<(MPD|SmoothStreaming))", re.I | re.S
)
_PICTURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n"),
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "HEIC or AVIF": re.compile(rb".{4}ftyp(heic|heix|mif1|msf1|avif|avis)", re.DOTALL),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "BMP": re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL),
    "SVG": re.compile(rb"\s*(<\?xml.{0,500})?<svg", re.DOTALL),
}
_SCRAMBLED_BYTES = 188 << 12  # packets of a transport stream to check


def refuse_playlists(name: str, head: bytes) -> None:
    """Raises SourceError for a file that would make FFmpeg open others."""
    if _PLAYLIST.match(head):
        raise SourceError(
            f"{name}: is a playlist; it names other files or hosts and is not opened. Allowed: files that hold the "
            "video themselves, such as MP4, MOV, MKV, WebM, AVI, TS.",
            hint="Give the video file itself, or join the parts with ffmpeg first.",
        )


def head_of_file(name: str, path: Path) -> bytes:
    """Reads the first bytes of a file.

    Raises:
        SourceError: not a regular file, empty, or not readable.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFound(f"{name}: no such file.", hint="Check the path.") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{name}: cannot be read: {error}.") from error
    if stat.S_ISDIR(mode):
        raise SourceError(f"{name}: is a folder, not a video file.", hint="Name the files in it.")
    if not stat.S_ISREG(mode):
        raise SourceError(f"{name}: is not a regular file.", hint="Pipe it in, and give '-' as the video.")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror or error}.") from error
    if not head:
        raise CorruptStream(f"{name}: empty file, 0 bytes.", hint="Copy or download it again.")
    return head


def refusal(name: str, error: Exception, head: bytes, *, remote: bool) -> SourceError:
    """Turns FFmpeg's error at opening into one that helps the user.

    Args:
        name: of the video.
        head: its first bytes; empty if `remote`, a URL.
    """
    if isinstance(error, av.error.ArgumentError):
        # EINVAL is from format_whitelist: FFmpeg knows the format, but it is not allowed.
        if picture := next((name for name, head_of in _PICTURES.items() if head_of.match(head)), None):
            return SourceError(
                f"{name}: a {picture} picture, not a video.",
                hint="A motion photo keeps its video in a separate file; the phone's gallery can export it.",
            )
        return SourceError(
            f"{name}: not a video file, but a playlist, a text or another format. Allowed: MP4, MOV, MKV, "
            " WebM, AVI, TS, MPEG, FLV, OGG, IVF and the like.",
            hint="Give the video file itself.",
        )
    if isinstance(error, FileNotFoundError):
        return SourceNotFound(f"{name}: no such file.", hint="Check the path.")
    reason = getattr(error, "strerror", None) or error
    if remote:
        return SourceNotFound(f"{name}: cannot be fetched: {reason}.", hint="Check the address.")
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return CorruptStream(
            f"{name}: not a video, or too damaged to open: {reason}.",
            hint="Check that it plays; copy or download it again.",
        )
    return SourceError(f"{name}: cannot be opened: {reason}.")


def encrypted(name: str) -> SourceError:
    """The error for an encrypted video."""
    return UnsupportedCodec(
        f"{name}: its video is encrypted.", hint="Give a copy without protection (DRM), or decrypt it first."
    )


def is_scrambled(file: BinaryIO) -> bool:
    """Whether a file is a transport stream with transport_scrambling_control set: ISO/IEC 13818-1, 2.4.3.3."""
    data = file.read(_SCRAMBLED_BYTES)
    if data[:1] + data[188:189] != b"GG":
        return False
    packets = [data[at : at + 4] for at in range(0, len(data) - 3, 188)]
    return any(packet[:1] == b"G" and packet[3] & 0x80 for packet in packets)
