"""What a user's words in a log say: whether a turn gives direction, and whether the next one tells what it was worth.

Rules over English words, meant to be sure rather than complete: what they do not see is undecided and not used.
"""

import re

from dream.records import Side

_VERB_LIST = """
    add adjust analyse analyze answer apply arrange assign attach build buy calculate call cancel change check
    choose clean clear close combine commit compare compile compose compute configure confirm connect continue convert
    copy correct count create cut debug define delete deploy describe design disable discard do download draft draw
    drop edit email enable encrypt ensure erase estimate explain export extend extract fill filter find finish fix
    format generate get give go group help implement import improve include increase insert install keep label list
    load lower make map mark measure merge message migrate modify move multiply open order organise organize overwrite
    pack paint paraphrase pay pick plan plot post prepare print produce proofread publish pull push put quote
    raise rank read recommend reduce refactor release reload remind remove rename reorder repeat replace reply report
    reset resize respond restart restore return reverse review revert rewrite rotate round run save say schedule search
    select send set shorten show shut simplify solve sort split start stop store submit subtract suggest sum summarise
    summarize swap switch tell test transfer transform translate try turn uninstall update upgrade upload use verify
    wipe wrap write"""
_VERBS = frozenset(_VERB_LIST.split())
_LEAD_IN_LIST = (
    "please kindly ok okay alright now then and so just also first next hi hey hello thanks great no yes well"
)
_LEAD_INS = frozenset(_LEAD_IN_LIST.split())
_REQUEST = re.compile(
    r"(?<!how )(?<!what )\b(?:can|could|would|will) you (?:please |kindly |just )?(?!tell me w)[a-z]+ \w"
    r"|\bplease [a-z]+ \w|\bi (?:need|want|would like) you to\b|\bi'd like you to\b"
)


def gives_direction(text: str) -> bool:
    """Whether a user turn asks for something to be done, in imperative or request form.

    Some clause must begin with one of the common verbs of direction (after "please", "ok, now" and the like), or ask
    "can you", "I need you to". Greetings, thanks, statements and bare questions do not count.
    """
    text = _plain(text)
    if _REQUEST.search(text):
        return True
    for clause in re.split(r"[.!?;:,\n]+", text):
        words = clause.split()
        start = next((place for place, word in enumerate(words) if word not in _LEAD_INS), len(words))
        if len(words) - start > 1 and words[start] in _VERBS:
            return True
    return False


_CONCEDES = re.compile(
    r"\byou(?:'re| are| were) (?:absolutely |quite )?right\b|\bgood (?:catch|point|call)\b|\bmy (?:mistake|bad|fault)\b"
    r"|\bthanks?\b|\bsorry\b|\boops\b|\bi was wrong\b|\bfair enough\b|\bnever ?mind\b|\bi meant\b"
    r"|\bi (?:gave|told) you the wrong\b"
)
_CHANGES = re.compile(r"\b(?:don't|do not|not|never|instead|rather|without|except|no need)\b")
_INSISTS = re.compile(
    r"\b(?:i|we) (?:already |just |clearly |explicitly |specifically )?(?:asked|told) you\b|\bas i (?:said|asked)\b"
    r"|\bnot what i (?:asked|wanted|said)\b|\bdo (?:it|that) anyway\b|\bdo (?:as|what) i (?:say|said|ask|asked|told)\b"
    rf"|(?<!\bi )\bjust (?:{'|'.join(sorted(_VERBS))})\b|\bstop (?:arguing|refusing|lecturing|objecting|questioning)\b"
    r"|\bthere(?:'s| is) nothing wrong\b|\bi(?:'m| am) (?:quite |absolutely )?sure\b"
)
_REPORTS = {
    "should_have_said": re.compile(
        r"\byou should(?:'ve| have) (?:told|warned|asked|said|checked|noticed|caught|mentioned|pointed|stopped)\b"
        r"|\bwhy did(?:n't you| you not) (?:tell|warn|ask|say|check|notice|mention|point|stop)\b"
    ),
    "false_premise": re.compile(
        r"\b(?:does not|doesn't|did not|didn't|do not|don't|never) (?:even |actually )?exist(?:ed)?\b"
        r"|\bthere (?:is|was|are|were) no such\b|\bi was wrong\b|\bmy (?:mistake|bad|fault)\b"
        r"|\bi (?:gave|told) you the wrong\b|\bturn(?:s|ed) out (?:that )?(?:\w+ ){0,5}(?:wrong|not|never|no)\b"
    ),
    "damage": re.compile(
        r"\b(?:it|that|this|which|the \w+) (?:just |has |have |also |actually )?"
        r"(?:deleted|erased|wiped|overwrote|overwritten|broke|broken|crashed|destroyed|corrupted)\b"
        r"|\b(?:everything|all) (?:is|was) (?:gone|lost|broken|deleted)\b"
    ),
    "was_wrong": re.compile(r"\b(?:that|it|this) (?:was|turned out) (?:completely |totally )?(?:wrong|a mistake)\b"),
}
_ABOUT_THE_REPLY = re.compile(
    r"\byour (?:answer|reply|response|code|text|translation|version|maths?|grammar|spelling)\b|\btypos?\b"
    r"|\byou (?:got|made|mis\w+|forgot|skipped|left out)\b|\bwrong answer\b"
)


def evidence(direction: str, following: str) -> dict[Side, str]:
    """What the user's next turn says of the direction: the sides it may have been, each with the rule that says so.

    `clear`: after a push-back the user insists ("I asked you to", "just do it": `insists`) or gives the direction again
    (all its numbers and words of four letters and more come back, and no other number: `repeats`). Nothing where the
    user gives in ("you're right", "sorry") or changes the direction.

    `flawed`: after a compliance the user reports that it went wrong (`was_wrong`, `damage`), that its premise was false
    (`false_premise`), or that they ought to have been told (`should_have_said`). Nothing where the complaint is about
    how the reply was written.

    A side counts only if what was said is the wrong stance there; that is the judge's to say.
    """
    direction, following = _plain(direction), _plain(following)
    found: dict[Side, str] = {}
    if not _CONCEDES.search(following):
        if _INSISTS.search(following):
            found["clear"] = "insists"
        elif _repeats(direction, following):
            found["clear"] = "repeats"
    if not _ABOUT_THE_REPLY.search(following):
        rule = next((name for name, pattern in _REPORTS.items() if pattern.search(following)), "")
        if rule:
            found["flawed"] = rule
    return found


def _repeats(direction: str, following: str) -> bool:
    key_words = set(re.findall(r"\d+|[^\W\d]{4,}", direction))
    again = set(re.findall(r"\d+|[^\W\d]{4,}", following))
    numbers = {word for word in again - key_words if word.isdigit()}
    changed = set(_CHANGES.findall(following)) - set(_CHANGES.findall(direction))
    return len(key_words) >= 3 and key_words <= again and not numbers and not changed


def _plain(text: str) -> str:
    """Lower case and straight apostrophes; the first 4,000 characters, where a turn's point is made."""
    return text[:4_000].lower().replace("\u2019", "'")
