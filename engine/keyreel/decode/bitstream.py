"""What a coded picture says of itself before it is decoded: who refers to it, and of what size it is.

H.264 is ITU-T H.264, HEVC is ITU-T H.265, both with start codes (annex B); VP9 is the VP9 Bitstream Specification 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator

_START = b"\0\0\1"
_SEQUENCE = {"h264": 7, "hevc": 33}  # nal_unit_type of sequence parameter sets


def nal_units(codec: str, data: bytes) -> Iterator[tuple[int, int, int]]:
    """(nal_unit_type, first byte, byte after the last) of each unit, without start codes."""
    at = data.find(_START)
    while at >= 0:
        first = at + 3
        at = data.find(_START, first)
        stop = len(data) if at < 0 else at
        if first < stop:
            yield data[first] & 31 if codec == "h264" else data[first] >> 1 & 63, first, stop


def unreferenced(codec: str, data: bytes) -> bool:
    """True where no other picture refers to this one.

    H.264: nal_ref_idc is 0 in all slices (7.4.1). HEVC: sub-layer non-reference types (table 7-1), which says it where
    there is one temporal layer only.
    """
    if codec == "h264":
        slices = [data[first] >> 5 & 3 == 0 for kind, first, _ in nal_units(codec, data) if 1 <= kind <= 5]
    elif codec == "hevc":
        slices = [kind <= 14 and kind % 2 == 0 for kind, _, _ in nal_units(codec, data) if kind < 32]
    else:
        return False
    return bool(slices) and all(slices)


def formats(codec: str, data: bytes) -> set[object]:
    """Whatever in the packet decides the size and the format of pictures: parameter sets, or VP9 sizes.

    A stream in which more than one thing is found changes, or may change, in its middle.
    """
    if codec in _SEQUENCE:
        units = nal_units(codec, data)
        return {data[first:stop].rstrip(b"\0") for kind, first, stop in units if kind == _SEQUENCE[codec]}
    if codec == "vp9":
        return {size for frame in _vp9_frames(data) if frame and (size := _vp9_size(frame)) is not None}
    return set()


def _vp9_frames(data: bytes) -> list[bytes]:
    """The frames of a packet, hidden ones too: annex B, superframes."""
    marker = data[-1] if data else 0
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-2 - count * width :]
    if marker >> 5 != 6 or len(index) != 2 + count * width or index[0] != marker:
        return [data]
    frames, at = [], 0
    for n in range(count):
        size = int.from_bytes(index[1 + n * width : 1 + (n + 1) * width], "little")
        frames.append(data[at : at + size])
        at += size
    return frames


def _vp9_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) where the header states it, None where it is that of a frame before: 6.2, uncompressed header."""
    bits, at = int.from_bytes(frame[:24].ljust(24, b"\0"), "big"), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return bits >> 192 - at & (1 << count) - 1

    def color_config() -> None:
        if profile >= 2:
            read(1)  # ten_or_twelve_bit
        rgb = read(3) == 7
        read((0 if rgb else 1) + (profile & 1) * (1 if rgb else 3))

    read(2)  # frame_marker
    profile = read(1) | read(1) << 1
    if profile == 3:
        read(1)
    if read(1):  # show_existing_frame
        return None
    inter, shown, resilient = read(1), read(1), read(1)
    if not inter:
        read(24)  # frame_sync_code
        color_config()
    else:
        intra_only = 0 if shown else read(1)
        if not resilient:
            read(2)  # reset_frame_context
        if intra_only:
            read(24)
            if profile:
                color_config()
            read(8)  # refresh_frame_flags
        else:
            read(8 + 3 * 4)  # refresh_frame_flags, references and their signs
            if read(1) or read(1) or read(1):  # found_ref
                return None
    return read(16) + 1, read(16) + 1
