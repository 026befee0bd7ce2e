# SPDX-License-Identifier: Apache-2.0
"""CLIP's tokenizer against open_clip's, id by id; the emoji vocabulary; the text repair against ftfy."""

import importlib.util
import json
import pickle
import random
import tarfile
from collections import Counter
from pathlib import Path

import ftfy
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer, basic_clean, whitespace_clean
from tokenizers import Tokenizer

import fvm_fast.data
from fvm_fast.data.clean_text import clean_text
from fvm_fast.data.tokenizer import BPETokenizer, CLIPTokenizer, EmojiTokenizer, build_bpe, byte_symbols

DATA = Path(fvm_fast.data.__file__).parent
ROOT = DATA.parents[1]

AWKWARD = [
    "",
    "   \t\n ",
    "it’s a “curly” day ‘here’ ‚low‛ „dash‟ ʼn",
    "It&rsquo;s &amp; &amp;lt; &lt;b&gt; &#39;x&#39; &#x2019;s &copy x &nbsp; &frac12;",
    "<b>it&rsquo;s</b> &eacute;\nnext &rsquo; line",
    "first &rsquo; line\n<i>second &rsquo;</i>\nthird &rsquo;",
    "P&EACUTE;REZ &SZLIG; &FRAC12; &notit; &semi; &#59; &nTILDE; &unknown;",
    "naïve café ÉCOLE e\u0301cole İstanbul ΣΑΣ ſt K Å",
    "ﬁne ﬂow eﬀect oﬃce baﬄe ﬅ ﬆ ĳs ŉ ǅ",
    "ＦＵＬＬ　ｗｉｄｔｈ ｶﾀｶﾅ １２３！",
    "日本語のテキスト 한국어 텍스트 中文文本 ไทย हिन्दी עברית العربية",
    "🇫🇷 👩‍👩‍👧 ❤️ 👍🏽 🏴󠁧󠁢󠁷󠁬󠁳󠁿 #️⃣",
    "\x1b[31mred\x1b[0m \x00\x07bell\ufeff \u206a \ufff9\ufffc soft\u00adhyphen zero\u200bwidth",
    "\x93q\x94 \x85 \x81 \u0080",
    "\ud83d\ude00 \udc00 \ud800x",
    "a\r\nb\rc\u2028d\u2029e\u0085f\u00a0g\u3000h\x0bi\x0cj",
    "½ ²³ ٣٤ Ⅷ ① 1st 2nd 10,000.50 x²",
    "don't they're I'VE we'll He'D it'S 'quoted' rock'n'roll",
    "a<start_of_text>b .<start_of_text> <END_OF_TEXT> <end_of_text>! <start_of_tex>",
    "http://example.com/a_b?c=d&e=f#g user@example.org #tag @name $5 100%",
    "snake_case camelCase --- ... !!! ?!? :-) <3 \\o/ {}[]|~`^",
    "word " * 200,
    "x" * 400,
    "!" * 300,
    "日" * 150,
]
SCRIPTS = [(33, 126), (0xE0, 0xF6), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x905, 0x94D)]
SCRIPTS += [(0x2010, 0x206F), (0x2190, 0x27BF), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF01, 0xFFEF)]
SCRIPTS += [(0x1F300, 0x1F9FF)]


def emoji_captions():
    with tarfile.open(DATA / "emoji3" / "google.tar.gz") as tar:
        entries = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    return [text for entry in entries for text in (entry["caption"], *entry["tags"])]


def random_texts(count, seed=0):
    """Words of one script each, so that none looks like text read in a wrong encoding."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = []
        for _ in range(rng.randint(1, 8)):
            low, high = rng.choice(SCRIPTS)
            words.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))))
        texts.append(rng.choice([" ", "  ", "\n", "\t"]).join(words))
    return texts


@pytest.fixture(scope="module")
def oracle():
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def texts():
    captions = sorted(set(emoji_captions()))
    assert len(captions) > 3000
    return AWKWARD + captions + random_texts(1000)


def test_ids_are_open_clips(oracle, texts):
    tokenizer = CLIPTokenizer()
    different = [text for text in texts if tokenizer.encode(text) != oracle.encode(text)]
    assert not different, f"{len(different)} of {len(texts)}, the first: {ascii(different[:3])}"


@pytest.mark.parametrize("context_length", [None, 77, 16, 2])
def test_rows_are_open_clips(oracle, texts, context_length):
    some = AWKWARD + texts[-200:]
    rows = CLIPTokenizer()(some, context_length)
    assert rows.dtype == torch.int64 and rows.shape == (len(some), context_length or 77)
    assert torch.equal(rows, oracle(some, context_length))
    assert (rows.max(dim=1).values == 49407).all()  # long texts keep their end


def test_repair_is_ftfys(texts):
    """Every step but the repair of wrong encodings, which is left out on purpose."""
    for text in texts:
        fixed = ftfy.fix_text(text, fix_encoding=False)
        assert clean_text(text) == whitespace_clean(basic_clean(fixed)).lower(), ascii(text)


def test_mojibake_is_left_alone(oracle):
    assert clean_text("CafÃ©") == "cafã©"
    assert CLIPTokenizer().encode("CafÃ©") != oracle.encode("CafÃ©") == oracle.encode("café")


def test_attributes():
    tokenizer = CLIPTokenizer()
    assert (tokenizer.vocab_size, tokenizer.sot_token, tokenizer.eot_token) == (49408, 49406, 49407)
    assert tokenizer.context_length == 77 and CLIPTokenizer(32)("a").shape == (1, 32)
    small = EmojiTokenizer()
    assert (small.vocab_size, small.sot_token, small.eot_token, small.context_length) == (3072, 3070, 3071, 16)


@pytest.mark.parametrize("tokenizer", [CLIPTokenizer, EmojiTokenizer])
def test_decode_gives_the_words_back(tokenizer):
    tokenizer = tokenizer(40)
    for text in ["a red apple", "it's 日本 🇫🇷 café!", "qzx jkv"]:
        words = tokenizer.decode(tokenizer(text)[0])
        assert words.replace(" ", "") == text.replace(" ", "")
    assert tokenizer.decode(tokenizer("a red apple")[0]) == "a red apple"
    assert tokenizer.decode([]) == ""


def test_batches_of_any_size():
    tokenizer = EmojiTokenizer()
    assert tokenizer([]).shape == (0, 16)
    assert torch.equal(tokenizer("a red apple"), tokenizer(["a red apple"]))
    assert torch.equal(tokenizer(("a", "b"))[1:], tokenizer(["b"]))


def test_emoji_vocabulary_fits_its_captions_and_never_fails():
    tokenizer = EmojiTokenizer()
    lengths = [len(tokenizer.encode(caption)) for caption in emoji_captions()]
    assert sum(lengths) / len(lengths) < 4
    assert sum(length > 14 for length in lengths) < 0.002 * len(lengths)
    for text in [*AWKWARD, "".join(map(chr, range(1, 0x250)))]:
        ids = tokenizer.encode(text)
        assert max(ids, default=0) <= tokenizer.eot_token
        symbols = "".join(tokenizer._bpe.id_to_token(i) for i in ids).replace("</w>", "")
        if "of_text>" not in text.lower():
            spelled = [symbol for char in clean_text(text).replace(" ", "") for symbol in _symbols(char)]
            assert symbols == "".join(spelled)  # no byte is lost


def _symbols(char):
    return [byte_symbols()[byte] for byte in char.encode("utf-8")]


def test_tokenizer_json_serves_the_tokenizers_library_too():
    raw = Tokenizer.from_file(str(DATA / "bpe" / "emoji_tokenizer.json"))
    ours = EmojiTokenizer()
    for text in ["Red Apple", "FLAG: Côte d'Ivoire", "a cat, 3 dogs"]:
        assert raw.encode(text).ids == [ours.sot_token, *ours.encode(text), ours.eot_token]


def test_save_and_read_back(tmp_path):
    tokenizer = BPETokenizer.from_merges([("a", "b"), ("ab", "c</w>")], context_length=5)
    assert tokenizer.vocab_size == 512 + 2 + 2
    tokenizer.save(tmp_path / "tokenizer.json")
    again = BPETokenizer.from_file(tmp_path / "tokenizer.json", context_length=5)
    assert torch.equal(again("abc"), torch.tensor([[514, 513, 515, 0, 0]]))
    assert torch.equal(again("abc"), tokenizer("abc"))


def test_pickles_for_worker_processes():
    tokenizer = EmojiTokenizer(9)
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))("a red apple"), tokenizer("a red apple"))


def test_bad_input_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="context_length should be at least 2 .*, got 1"):
        EmojiTokenizer(1)
    with pytest.raises(TypeError, match="captions should be strings, got int"):
        EmojiTokenizer()([3])
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        BPETokenizer.from_file(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"broken.json: not a tokenizer.json \(.*; make one with BPETokenizer.save"):
        BPETokenizer.from_file(tmp_path / "broken.json")
    bpe = build_bpe([])
    bpe.add_tokens(["<mask>"])
    with pytest.raises(
        ValueError, match="last two of 515 entries should be <start_of_text> and <end_of_text>, got ids"
    ):
        BPETokenizer(bpe)


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_emoji_bpe", ROOT / "scripts" / "make_emoji_bpe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_merges_go_by_count_then_by_the_alphabet(maker):
    words = {("b", "c"): 2, ("a", "b", "c"): 3, ("x", "y"): 3, ("d",): 9}
    assert maker.count_pairs(words) == Counter({("b", "c"): 5, ("a", "b"): 3, ("x", "y"): 3})
    assert maker.train_merges(words, 3) == [("b", "c"), ("a", "bc"), ("x", "y")]
    assert maker.merge_pair(("a", "a", "a", "b", "a", "a"), ("a", "a")) == ("aa", "a", "b", "aa")
    with pytest.raises(SystemExit, match="expected 4 merges, the captions give 3"):
        maker.train_merges(words, 4)


def test_shipped_vocabulary_is_what_the_script_makes(maker):
    captions = maker.read_captions(DATA / "emoji3" / "google.tar.gz")
    first = maker.train_merges(maker.spell_words(captions), 100)
    shipped = json.loads((DATA / "bpe" / "emoji_tokenizer.json").read_text())["model"]["merges"]
    assert [tuple(pair) for pair in shipped[:100]] == first
