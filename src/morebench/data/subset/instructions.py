"""What the human turn of a record asks; training discards it, as in the study."""

from morebench.data.records import IMAGE_TOKEN

INSTRUCTIONS = (
    "What can be seen here?",
    "Say what this picture shows.",
    "Put this image into words.",
    "Write a caption for this picture.",
    "How would you describe this image?",
    "What is this a picture of?",
    "Tell me what is in the image.",
    "Summarize the contents of this picture.",
)


def human_turn(number: int) -> str:
    """One instruction before or behind the image, chosen by any whole number."""
    instruction = INSTRUCTIONS[number // 2 % len(INSTRUCTIONS)]
    return f"{instruction}\n{IMAGE_TOKEN}" if number % 2 else f"{IMAGE_TOKEN}\n{instruction}"
