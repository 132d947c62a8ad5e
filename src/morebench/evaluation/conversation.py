"""Turns that are asked one after the other about one image, in the layout that training has."""

from collections.abc import Generator as Pieces
from dataclasses import dataclass, field

from morebench.data.chat import Encoded
from morebench.data.records import IMAGE_TOKEN, Turn
from morebench.errors import DataError
from morebench.evaluation.generate import Answer, Generator, Request
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import LoadedModel

DESCRIBE = "Describe this image."  # what the study's qualitative answers were given to


@dataclass
class Conversation:
    """Another image is another conversation: no training sample shows one in a later turn."""

    image: StoredImage | None
    max_new_tokens: int
    turns: list[Turn] = field(default_factory=list)
    notice: str | None = None  # what there is to say about the last answer

    def ask(self, model: LoadedModel, question: str) -> Pieces[str, None, None]:
        """The answer in pieces; with the last one the turn becomes part of the conversation.

        So does what was said until the iterator is closed. An empty answer leaves no turn behind: training
        has none. Raises DataError for a question that cannot be asked or has no room left, and
        NonFiniteError; the conversation is then as before.
        """
        self.notice = None
        question = _checked(question)
        prompt = self._prompt(model, question)
        length, positions = len(prompt.input_ids), model.mllm.llm.config.max_position_embeddings
        if (room := positions - length) < 1:
            raise DataError(
                f"With this question the conversation has {length} tokens; {model.llm.label} has {positions} "
                "positions, of which an answer needs one or more. Start a new conversation."
            )
        images = () if self.image is None else (self.image,)
        request = Request(prompt, images, min(self.max_new_tokens, room))
        stream, said = Generator(model).stream(request), list[str]()
        try:
            while True:
                said.append(next(stream))
                yield said[-1]
        except StopIteration as end:
            self.notice = self._notice(end.value, room, model.llm.label)
        except Exception:
            said.clear()
            raise
        finally:  # also when closed, and at Ctrl-C
            if text := "".join(said):
                self.turns.append(Turn(question, text))

    def _prompt(self, model: LoadedModel, question: str) -> Encoded:
        """As the record of this conversation: its image token stands in front of the first question."""
        turns = [*self.turns, Turn(question, "")]
        if self.image is not None:
            turns[0] = Turn(f"{IMAGE_TOKEN}\n{turns[0].question}", turns[0].answer)
        return model.chat.encode_conversation(
            turns[:-1], turns[-1].question, model.tokenizer, model.mllm.vision.num_visual_tokens
        )

    def _notice(self, answer: Answer, room: int, label: str) -> str | None:
        if not answer.ended and answer.num_tokens >= room:
            return f"cut: the conversation fills all positions that {label} has"
        if not answer.ended:
            return f"cut after max_new_tokens={self.max_new_tokens}"
        return None if answer.text else "empty answer"


def _checked(question: str) -> str:
    question = question.strip()
    if not question:
        raise DataError("The question is empty.")
    if IMAGE_TOKEN in question:
        raise DataError(
            f"The question holds {IMAGE_TOKEN}. Leave it out: the image comes in front of the first question."
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"Character {error.start} of the question is no text: a byte that is not UTF-8, or half a "
            "surrogate pair."
        ) from None
    return question
