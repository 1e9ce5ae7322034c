"""Header blocks, held against `hpack`'s encoder and decoder."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.frames.header_blocks import BlockReader, grpc_message, literal
from services.common.frames.wire import ErrorCode, Violation

NAMES = st.sampled_from(
    [b":path", b":method", b"te", b"content-type", b"authorization", b"x-a", b"x-b", b"grpc-timeout"]
)
VALUES = st.one_of(
    st.sampled_from([b"POST", b"/a/B", b"trailers", b"application/grpc"]), st.binary(max_size=300)
)
BLOCKS = st.lists(st.tuples(st.lists(st.tuples(NAMES, VALUES), max_size=8), st.booleans()), max_size=8)


@given(BLOCKS, st.lists(st.sampled_from([0, 40, 200, 4096]), max_size=4))
@settings(max_examples=80, deadline=None)
def test_reads_what_hpack_writes(
    blocks: list[tuple[list[tuple[bytes, bytes]], bool]], sizes: list[int]
) -> None:
    encoder, reader = Encoder(), BlockReader(1 << 20)
    for number, (fields, huffman) in enumerate(blocks):
        if number < len(sizes):
            encoder.header_table_size = sizes[number]
        assert reader.read(encoder.encode(fields, huffman=huffman)) == fields


@given(BLOCKS)
@settings(max_examples=60, deadline=None)
def test_the_same_bytes_say_the_same_while_nothing_changes(
    blocks: list[tuple[list[tuple[bytes, bytes]], bool]],
) -> None:
    encoder, reader = Encoder(), BlockReader(1 << 20)
    for fields, huffman in blocks:
        block = encoder.encode(fields, huffman=huffman)
        reader.read(block)
        before = reader.changes
        again = encoder.encode(fields, huffman=huffman)
        assert reader.read(again) == fields
        if reader.changes == before:
            assert reader.read(again) == fields


@given(st.lists(st.binary(max_size=60), max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_as_by_hpack_or_refused(blocks: list[bytes]) -> None:
    reader, decoder = BlockReader(1 << 20), Decoder(max_header_list_size=1 << 20)
    for block in blocks:
        try:
            expected = [tuple(field) for field in decoder.decode(block, raw=True)]
        except Exception:
            with pytest.raises(Violation) as refused:
                reader.read(block)
            assert refused.value.code is ErrorCode.COMPRESSION_ERROR
            return
        try:
            found = reader.read(block)
        except Violation:
            return  # `hpack` lets sizes between fields pass, and lengths with zeros before them
        assert found == expected


@pytest.mark.parametrize(
    "block",
    [
        b"\xff\xff\xff\xff\xff\xff\xff",
        b"\x80",
        b"\xbe",
        b"\x3f\xe2\x1f",
        b"\x88\x20",
        b"\x00\x01a",
        b"\x00\x05a",
        b"\x00\x01a\xff\xff\xff\xff\xff\xff\x00",
        b"\x00\x01a\x81\x00",
    ],
    ids=[
        "endless index",
        "index 0",
        "index beyond the table",
        "table larger than was told",
        "size behind a field",
        "no value",
        "name cut off",
        "endless length",
        "no Huffman code",
    ],
)
def test_refuses(block: bytes) -> None:
    with pytest.raises(Violation) as refused:
        BlockReader(1 << 16).read(block)
    assert refused.value.code is ErrorCode.COMPRESSION_ERROR


def test_too_many_fields_are_none_and_the_table_goes_on() -> None:
    encoder, reader = Encoder(), BlockReader(200)
    assert reader.read(encoder.encode([(b"x-a", b"a" * 100), (b"x-b", b"b" * 100)])) is None
    assert reader.read(encoder.encode([(b"x-b", b"b" * 100)])) == [(b"x-b", b"b" * 100)]
    bomb = encoder.encode([(b"x-b", b"b" * 100)]) * 1000
    assert reader.read(bomb) is None


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 400, 20_000])
def test_literals_need_no_table(size: int) -> None:
    block = literal(b"grpc-message", b"m" * size) + literal(b"n" * (size or 1), b"")
    decoder = Decoder(max_header_list_size=1 << 20)
    expected = [(b"grpc-message", b"m" * size), (b"n" * (size or 1), b"")]
    assert [tuple(field) for field in decoder.decode(block, raw=True)] == expected
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize(
    ("text", "said"), [("50% of x", "50%25 of x"), ("Straße\n", "Stra%C3%9Fe%0A"), ("a=b; {c}", "a=b; {c}")]
)
def test_messages_are_percent_encoded(text: str, said: str) -> None:
    assert grpc_message(text) == said
