"""How replies are got: on-policy first, then steered for a stance that is missing. Steering never reaches the data.

A steering prompt is a system prompt, a few worked examples from other draws of the same template, and the scenario's
own prompt with a note in brackets that says what to reply. Only the scenario's plain prompt is trained on.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from dream import prompts
from dream.config import GenerateConfig
from dream.engine import Completion, Engine, Sampling
from dream.judge.transcript import is_clean
from dream.records import Message, Reply, Scenario, Side, Source, Stance, assistant, user
from dream.scenarios import draw
from dream.templates import Template, mentioned

LONGEST_TOKEN = 128
"""Characters; so long are the runs of spaces in large vocabularies."""
BACKGROUND_WORDS = range(5, 31)
ODD_WORDS = {"ai", "assistant", "chatbot", "human", "robot", "computer", "not", "cannot", "never", "you", "your"}
"""In a background sentence these show that the dreamer speaks of itself, or denies something."""


def steering(stance: Stance, prompt: str, aim: str, examples: Sequence[tuple[str, str, str]] = ()) -> list[Message]:
    """The chat that asks for one stance.

    Args:
        stance: `comply` or `push_back`.
        prompt: the scenario's plain prompt, or nothing where the note alone is to steer.
        aim: what the reply should do; empty for the stance's general wording.
        examples: worked examples as (prompt, aim, reply).
    """
    messages: list[Message] = [{"role": "system", "content": prompts.render("steering/system")}]
    for example_prompt, example_aim, reply in examples:
        messages.append(user(prompts.render(f"steering/{stance}", prompt=example_prompt, aim=example_aim)))
        messages.append(assistant(reply))
    messages.append(user(prompts.render(f"steering/{stance}", prompt=prompt, aim=aim)))
    return messages


def worked_examples(template: Template, stance: Stance, wording: int, count: int) -> list[tuple[Scenario, Side, str]]:
    """Worked replies of one stance as (scenario, side, reply), from other draws of the template, on both sides in turn.

    All have the wording of the same line of the template's examples: a 135M model copies one pattern with new values
    far better than it mixes several (docs/LOG.md). They are the same for every scenario of the template, so that the
    engine's prefix cache holds them.
    """
    found = []
    for number in range(count):
        other = draw(template, number, "example")
        side = other.sides[number % len(other.sides)]
        replies = other.side(side).examples[stance]
        found.append((other, side, replies[wording % len(replies)]))
    return found


def note(scenario: Scenario, side: Side, stance: Stance) -> str:
    """What asks for a stance where the prompt is not shown, with the slot values that the prompt speaks of."""
    prompt = scenario.prompt(side)[0]["content"]
    values = dict.fromkeys(str(value) for value in scenario.slots.values())
    details = ", ".join(value for value in values if mentioned(value, prompt))
    return prompts.render("steering/note", aim=scenario.side(side).aims[stance], details=details)


async def on_policy(engine: Engine, scenario: Scenario, side: Side, config: GenerateConfig, policy: str) -> list[Reply]:
    """What the policy really says to the plain prompt."""
    sampling = Sampling(config.samples, config.max_tokens, config.temperature, config.top_p, config.min_p)
    completions = await _sampled(engine, scenario.prompt(side), sampling)
    return _replies(completions, scenario, side, "on_policy", None, policy)


async def steered(
    engine: Engine,
    template: Template,
    scenario: Scenario,
    side: Side,
    stance: Stance,
    config: GenerateConfig,
    policy: str,
    attempt: int,
) -> list[Reply]:
    """One reply of the policy that is asked for one stance; nothing when it repeats an example.

    Each attempt follows the wording of another line of the template's examples.
    """
    shown = worked_examples(template, stance, scenario.seed + attempt, config.worked_examples)

    def turn(one: Scenario, side: Side) -> tuple[str, str]:
        """The prompt and the note that ask for the stance."""
        if config.steering == "prompt":
            return one.prompt(side)[0]["content"], one.side(side).aims[stance]
        return "", note(one, side, stance)

    examples = [(*turn(other, its_side), reply) for other, its_side, reply in shown]
    messages = steering(stance, *turn(scenario, side), examples)
    sampling = Sampling(1, config.max_tokens, config.temperature, config.top_p, config.min_p)
    completions = await _sampled(engine, messages, sampling)
    foreign = foreign_words(scenario, side, stance, [reply for _, _, reply in shown])
    replies = _replies(completions, scenario, side, "steered", stance, policy, attempt)
    return [
        reply.model_copy(update={"copied": next((w for w in _plain(reply.text).split() if w in foreign), "")})
        for reply in replies
        if _plain(reply.text) not in {_plain(text) for _, _, text in shown}
    ]


def foreign_words(scenario: Scenario, side: Side, stance: Stance, shown: Sequence[str]) -> set[str]:
    """Words of worked replies that are there for the other draw's sake: in a reply here they are out of place."""
    own = scenario.side(side)
    texts = [scenario.prompt(side)[0]["content"], *own.aims.values(), *own.examples[stance]]
    return set(_plain(" ".join(shown)).split()) - set(_plain(" ".join(texts)).split())


async def with_background(engine: Engine, scenario: Scenario, max_tokens: int = 40) -> Scenario:
    """The scenario with a sentence of the dreamer's on who asks and why, the same on both sides.

    What the dreamer writes may not touch the contrast: a sentence with digits, with words of the scenario's slots, of
    odd length, unfinished or not clean is left out, and the scenario stays as the template made it.
    """
    messages: list[Message] = []
    for domain, sentence in prompts.halves("dreamer/background_examples"):
        messages += [user(prompts.render("dreamer/background", domain=domain)), assistant(sentence)]
    known = {_plain(message["content"]) for message in messages}
    messages.append(user(prompts.render("dreamer/background", domain=scenario.domain)))
    sampling = Sampling(n=1, max_tokens=max_tokens, temperature=0.7, min_p=0.05)
    sentence = (await _sampled(engine, messages, sampling))[0].text.strip()
    words = set(re.findall(r"\w+", sentence.lower()))
    slots = {word for value in scenario.slots.values() for word in re.findall(r"\w{3,}", str(value).lower())}
    fits = (
        len(sentence.split()) in BACKGROUND_WORDS
        and sentence.endswith(".")
        and "\n" not in sentence
        and is_clean(sentence)
        and not re.search(r"\d", sentence)
        and not words & slots
        and _plain(sentence) not in known
        and words & {"i", "my", "we", "our"}
        and not words & ODD_WORDS
    )
    return scenario.model_copy(update={"background": sentence}) if fits else scenario


async def written(engine: Engine, scenario: Scenario, max_tokens: int = 256) -> Scenario | None:
    """The scenario with both directions in the dreamer's own words; None when its answer cannot be used.

    It has to be clean text, and the numbers of a direction, and the words in it that the template's `mentions` ask for,
    must still stand in it.
    """
    if scenario.flawed is None:
        return scenario
    rng = random.Random(f"voice/{scenario.scenario_id}")
    text = prompts.render(
        "dreamer/write",
        flaw=scenario.flaw,
        situation=scenario.situation,
        clear=scenario.clear.direction,
        flawed=scenario.flawed.direction,
        voice=rng.choice(prompts.lines("dreamer/voices")),
    )
    answer = (await _sampled(engine, [user(text)], Sampling(n=1, max_tokens=max_tokens)))[0]
    if not is_clean(answer.text) or answer.finish_reason == "length":
        return None
    sides = {}
    for side, label in (("clear", "SOUND"), ("flawed", "FLAWED")):
        found = [_unmarked(line) for line in re.findall(rf"^\W*{label}\W*:(.*\w.*)$", answer.text, re.MULTILINE)]
        old = scenario.side(side).direction  # type: ignore[arg-type]  # mypy widens the literal in the loop
        if len(found) != 1 or set(re.findall(r"\d+", old)) != set(re.findall(r"\d+", found[0])):
            return None
        needed = scenario.side(side).mentions.get("comply", ())  # type: ignore[arg-type]
        if any(mentioned(words, old) and not mentioned(words, found[0]) for words in needed):
            return None
        sides[side] = scenario.side(side).model_copy(update={"direction": found[0]})  # type: ignore[arg-type]
    if _plain(sides["clear"].direction) == _plain(sides["flawed"].direction):
        return None
    return scenario.model_copy(update=sides)


def _unmarked(line: str) -> str:
    """A line without the Markdown and the quotation marks that a model puts around it."""
    line = line.strip().strip("*_`").strip()
    return line[1:-1].strip() if line[:1] + line[-1:] in ('""', "“”", "''") else line


async def _sampled(engine: Engine, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
    """Completions that can be stored and judged: half characters, which no file takes, are marked as unreadable
    (U+FFFD), and a text that is longer than its tokens can be is cut off."""
    most, usable = sampling.max_tokens * LONGEST_TOKEN, []
    for one in await engine.generate(messages, sampling):
        text = re.sub("[\ud800-\udfff]", "\ufffd", one.text)
        ended = one.finish_reason if len(text) <= most else "length"
        usable.append(replace(one, text=text[:most], finish_reason=ended))
    return usable


def _replies(
    completions: Sequence[Completion],
    scenario: Scenario,
    side: Side,
    source: Source,
    asked: Stance | None,
    policy: str,
    first: int = 0,
) -> list[Reply]:
    label = asked or "free"
    return [
        Reply(
            reply_id=f"{scenario.scenario_id}/{side}/{label}/{number}",
            scenario_id=scenario.scenario_id,
            side=side,
            source=source,
            asked=asked,
            text=completion.text,
            tokens=completion.tokens,
            finish_reason=completion.finish_reason,
            policy=policy,
        )
        for number, completion in enumerate(completions, first)
    ]


def _plain(text: str) -> str:
    """Lower-case words only, for comparing texts."""
    return " ".join(re.findall(r"\w+", text.lower()))
