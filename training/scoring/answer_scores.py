"""Answers of a model as users run it: captions, answers about shown pictures, and answers from the memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from microvlm.errors import UserError
from microvlm.loaded_model import LoadedModel
from microvlm.memory.conversation import Chat
from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.ordinal_questions import ordinal_question
from microvlm.training.batches.conversation_rows import ConversationRows
from microvlm.training.scoring.held_out import Episode, Picture, Question, view
from microvlm.training.scoring.text_measures import Measure, is_exact, mean_of, word_f1, words_of

BATCH = 16
"""Answers that are decoded together."""
MOST_KINDS = 12
"""Kinds of questions that have a row of their own."""
MOST_EPISODES = 50
OWN_EPISODES, OWN_LENGTH = 8, 4
"""Episodes made of the split's captioned pictures, and pictures of each."""
Progress = Callable[[int], None]


class EpisodeAnswers(NamedTuple):
    """What the questions of episodes were answered with the memory and with an empty one."""

    questions: list[Question]
    remembered: list[str]
    empty: list[str]


def caption_pictures(loaded: LoadedModel, pictures: Sequence[Picture], progress: Progress) -> list[str]:
    """The model's caption of each picture."""
    vision = loaded.config.vision
    answers: list[str] = []
    for start in range(0, len(pictures), BATCH):
        views = [picture.view(vision) for picture in pictures[start : start + BATCH]]
        answers += loaded.generate(views)
        progress(len(answers))
    return answers


def fitting(loaded: LoadedModel, questions: Sequence[Question]) -> list[Question]:
    """The questions whose pictures, text and answer fit the model's positions."""
    rows = ConversationRows(loaded.processor)
    room = loaded.config.text.max_position_embeddings - 1 - loaded.processor.max_new_tokens

    def fits(question: Question) -> bool:
        try:
            return rows.prompts([_text(loaded, question)], len(question.images)).ids.shape[1] <= room
        except UserError:
            return False

    return [question for question in questions if fits(question)]


def answer_questions(loaded: LoadedModel, questions: Sequence[Question], progress: Progress) -> list[str]:
    """The model's answer to each question about shown pictures."""
    vision = loaded.config.vision
    answers: list[str] = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        views = [[view(q.key, image, vision) for image in q.images] for q in part]
        answers += loaded.generate(views, prompts=[_text(loaded, question) for question in part])
        progress(len(answers))
    return answers


def own_episodes(pictures: Sequence[Picture]) -> list[Episode]:
    """Episodes of captioned pictures, in which each picture is asked for by its place."""
    episodes = []
    for start in range(0, min(len(pictures), OWN_EPISODES * OWN_LENGTH) - 1, OWN_LENGTH):
        part = pictures[start : start + OWN_LENGTH]
        if len(part) < 2:
            continue
        questions = tuple(
            Question(part[0].key, ordinal_question(step), (), picture.captions)
            for step, picture in enumerate(part)
        )
        episodes.append(Episode(tuple(picture.image for picture in part), questions))
    return episodes


def answer_episodes(loaded: LoadedModel, episodes: Sequence[Episode], progress: Progress) -> EpisodeAnswers:
    """Show an episode's pictures in a conversation, which remembers its own captions of them, then ask.

    Questions do not change what is remembered.
    """
    prompt, vision = loaded.config.prompt.caption_prompt, loaded.config.vision
    result = EpisodeAnswers([], [], [])
    for number, episode in enumerate(episodes[:MOST_EPISODES]):
        questions = fitting(loaded, episode.questions)
        if questions:
            chat = Chat(loaded)
            for image in episode.images:
                chat.ask(prompt, view(questions[0].key, image, vision), new_image=True)
            texts = [_text(loaded, question) for question in questions]
            result.questions.extend(questions)
            result.remembered.extend(loaded.generate(prompts=texts, memory=chat))
            empty = EpisodicMemory.empty(loaded.runtime)
            result.empty.extend(loaded.generate(prompts=texts, memory=empty))
        progress(number + 1)
    return result


def exact_matches(questions: Sequence[Question], answers: Sequence[str]) -> Measure:
    """Share of the questions that are answered exactly; samples are resampled whole."""
    return _mean(is_exact, questions, answers)


def shared_words(questions: Sequence[Question], answers: Sequence[str]) -> Measure:
    """Mean F1 of words of the answers; samples are resampled whole."""
    return _mean(word_f1, questions, answers)


def _mean(
    score: Callable[[str, Sequence[str]], float], questions: Sequence[Question], answers: Sequence[str]
) -> Measure:
    values = [score(answer, question.answers) for question, answer in zip(questions, answers, strict=True)]
    return mean_of(values, [question.key for question in questions])


def question_kinds(questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of kinds of questions, the most frequent first: exact match beside what one answer to all of them gives."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        groups[" ".join(words_of(question.text or "")[:2])].append(number)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    rest = [number for _, group in ordered[MOST_KINDS:] for number in group]
    rows = []
    for kind, numbers in [*ordered[:MOST_KINDS], *([("others", rest)] if rest else [])]:
        part = [questions[number] for number in numbers]
        answer, share = commonest_answer(part)
        rows.append(
            {
                "kind": kind,
                "count": len(part),
                "exact_match": as_estimate(exact_matches(part, [answers[number] for number in numbers])),
                "commonest_answer": answer,
                "commonest": share,
            }
        )
    return rows


def commonest_answer(questions: Sequence[Question]) -> tuple[str, float]:
    """The answer that is right for most of the questions, and for which share."""
    counts = Counter(
        answer for q in questions for answer in sorted({" ".join(words_of(text)) for text in q.answers})
    )
    answer, count = counts.most_common(1)[0]
    return answer, count / len(questions)


def as_estimate(measure: Measure) -> dict[str, float]:
    """A score with its interval, as JSON."""
    return measure.interval()._asdict()


def _text(loaded: LoadedModel, question: Question) -> str:
    """A question's text, without special tokens, as training asks it."""
    return ConversationRows(loaded.processor).clean(question.text or loaded.config.prompt.caption_prompt)
