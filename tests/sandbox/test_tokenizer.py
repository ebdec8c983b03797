"""One id per word, and texts survive the round trip."""

from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from sandbox.config import WorldConfig
from sandbox.tokenizer import make_tokenizer
from sandbox.world import World


def test_round_trip_through_a_directory(tmp_path: Path) -> None:
    world = World(WorldConfig(num_texts=200))
    make_tokenizer(world.vocabulary).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert len(tokenizer) == len(world.vocabulary) + 4
    for pair in world.corpus():
        for text in pair:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
            assert tokenizer(text).input_ids == ids
            assert tokenizer.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
            assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_unknown_words_and_streaming() -> None:
    tokenizer = make_tokenizer(World(WorldConfig(num_texts=100)).vocabulary)
    assert tokenizer("lorem the").input_ids[0] == tokenizer.unk_token_id
    stream = DecodeStream(skip_special_tokens=True)
    ids = [*tokenizer("thanks , the oven is great .").input_ids, tokenizer.eos_token_id]
    pieces = [stream.step(tokenizer.backend_tokenizer, index) for index in ids]
    assert "".join(piece for piece in pieces if piece) == "thanks , the oven is great ."
