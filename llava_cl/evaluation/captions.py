"""Scores of captions against several references each: the COCO metrics, and a word overlap without Java.

Both go through the package pycocoevalcap (extra `captions`). The COCO metrics also need a Java runtime, for
the Penn Treebank tokenizer and METEOR; the word overlap does not, and its numbers are not comparable.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_cl.errors import InputError, RunError

MAX_CHARACTERS = 300
"""A prediction is scored by its first so many code points."""

_LINE_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")  # each would start a new line for the tokenizer
_WORD = re.compile(r"\w+")
_PACKAGE = "pycocoevalcap"
_NO_PACKAGE = "caption scores need the package pycocoevalcap: pip install 'llava_cl[captions]'."
_NO_JAVA = (
    "the COCO caption metrics need a Java runtime (METEOR and the Penn Treebank tokenizer): install one, for "
    "example with 'apt-get install default-jre-headless', so that 'java' is on the PATH. Recorded predictions can be "
    "scored later. For BLEU and ROUGE-L of plain words, without Java, ask for the scorer caption_overlap: "
    "'llava-cl score --scorer caption_overlap', or 'llava-cl run --set evaluation.caption_scorer=caption_overlap'."
)

Tokens = dict[int, list[str]]
"""Item -> its sentences, each as tokens joined by one space."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        metrics: name -> corpus score, percent (CIDEr can exceed 100).
        score: mean of the metrics, percent.
        items: for every caption the mean of its own metrics, as a fraction. Corpus BLEU is no mean of
            sentences, so that their mean is not the score.
    """

    metrics: dict[str, float]
    score: float
    items: list[float]


def check_overlap_tools() -> None:
    """Raises InputError if the word overlap cannot be computed here, saying what to install."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise InputError(_NO_PACKAGE)


def check_coco_tools() -> None:
    """Raises InputError if the COCO metrics cannot be computed here, saying what to install."""
    problems = [] if importlib.util.find_spec(_PACKAGE) else [_NO_PACKAGE]
    if shutil.which("java") is None:
        problems.append(_NO_JAVA)
    if problems:
        raise InputError(*problems)


def coco_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """The mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, as the UCIT benchmark scores its caption tasks.

    The first 300 code points of a prediction count. Line breaks of any kind become spaces first: the
    tokenizer would shift all later captions by one at some of them.

    Args:
        predictions: one caption an item.
        references: for each item one caption or more.

    Raises:
        InputError: the package or Java is missing.
        RunError: a Java program failed.
    """
    check_coco_tools()
    from pycocoevalcap.cider.cider import Cider

    hypotheses = _penn_treebank_tokens([[text[:MAX_CHARACTERS]] for text in predictions])
    targets = _penn_treebank_tokens(references)
    metrics, items = _bleu_and_rouge(hypotheses, targets)
    meteor, meteor_items = _meteor(hypotheses, targets)
    cider, cider_items = Cider().compute_score(targets, hypotheses)
    metrics |= {"METEOR": meteor, "CIDEr": cider}
    items |= {"METEOR": meteor_items, "CIDEr": cider_items}
    order = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
    return _caption_scores({name: metrics[name] for name in order}, items)


def overlap_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """The mean of BLEU-1 to 4 and ROUGE-L over lower-cased words (runs of letters and digits); no Java.

    The metrics are named `Overlap_...`, since another tokenizer gives other numbers than `coco_scores`.

    Args:
        predictions: one caption an item, of which the first 300 code points count.
        references: for each item one caption or more.

    Raises:
        InputError: the package is missing.
    """
    check_overlap_tools()
    hypotheses = {item: [_words(text[:MAX_CHARACTERS])] for item, text in enumerate(predictions)}
    targets = {item: [_words(text) for text in texts] for item, texts in enumerate(references)}
    metrics, items = _bleu_and_rouge(hypotheses, targets)
    return _caption_scores({f"Overlap_{name}": value for name, value in metrics.items()}, items)


def _caption_scores(metrics: dict[str, float], items: dict[str, list[float]]) -> CaptionScores:
    percent = {name: 100 * float(value) for name, value in metrics.items()}
    per_item = [float(sum(values)) / len(items) for values in zip(*items.values(), strict=True)]
    return CaptionScores(percent, sum(percent.values()) / len(percent), per_item)


def _bleu_and_rouge(hypotheses: Tokens, targets: Tokens) -> tuple[dict[str, float], dict[str, list[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, bleu_items = Bleu(4).compute_score(targets, hypotheses, verbose=0)
    rouge, rouge_items = Rouge().compute_score(targets, hypotheses)
    names = [f"Bleu_{n}" for n in (1, 2, 3, 4)] + ["ROUGE_L"]
    return dict(zip(names, [*bleu, rouge], strict=True)), dict(zip(names, [*bleu_items, rouge_items], strict=True))


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _penn_treebank_tokens(items: Sequence[Sequence[str]]) -> Tokens:
    """Tokens of sentences, lower-cased, without punctuation; all pass through one Java process."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    archive = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(archive), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    sentences = [_LINE_BREAKS.sub(" ", sentence) for item in items for sentence in item]
    process = subprocess.run(command, input="\n".join(sentences).encode(), capture_output=True, check=False)
    if process.returncode:
        raise RunError(f"the Penn Treebank tokenizer failed: {process.stderr.decode(errors='replace').strip()}")
    lines = process.stdout.decode().split("\n")
    if len(lines) != len(sentences):
        raise RunError(
            f"the Penn Treebank tokenizer made {len(lines)} lines of {len(sentences)} captions, so that they "
            "cannot be told apart: a caption holds a character that it takes for a line break."
        )
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    tokens = iter(" ".join(w for w in line.rstrip().split(" ") if w not in punctuation) for line in lines)
    return {number: [next(tokens) for _ in item] for number, item in enumerate(items)}


def _meteor(hypotheses: Tokens, targets: Tokens) -> tuple[float, list[float]]:
    """METEOR 1.5 of the whole set and of every item, as fractions, from one Java process asked line by line.

    SCORE answers with one item's statistics; EVAL turns all of them into the items' scores and the whole's.
    """
    from pycocoevalcap.meteor import meteor

    archive = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    command = ["java", "-Xmx2G", "-jar", str(archive), "-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            statistics = []
            for item, references in targets.items():
                process.stdin.write(" ||| ".join(["SCORE", *references, hypotheses[item][0]]) + "\n")
                process.stdin.flush()
                statistics.append(process.stdout.readline().strip())
            process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
            process.stdin.flush()
            scores = [float(process.stdout.readline()) for _ in targets]
            return float(process.stdout.readline()), scores
    except (OSError, ValueError) as error:  # a closed pipe, or no number
        raise RunError(
            "METEOR's Java process stopped: it needs 2 GB of memory and a working 'java' command."
        ) from error
