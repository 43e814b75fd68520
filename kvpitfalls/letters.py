"""Letters of scripts that write no space between words, as ranges of a regular expression."""

HAN_AND_KANA = "\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
THAI_TO_KHMER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
UNSPACED = HAN_AND_KANA + THAI_TO_KHMER
