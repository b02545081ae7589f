"""The words of the word-level test tokenizer and their ids."""

SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
WORDS = [*SPECIAL, "USER", "ASSISTANT", ":", "<", ">", "image", "what", "is", "a", "cat", "dog"]
WORD_ID = {word: id_ for id_, word in enumerate(WORDS)}
SYSTEM_ID = len(WORDS)
