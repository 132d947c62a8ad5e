"""How often does a 95 % interval hold the truth? Many synthetic evaluations whose true score is known.

    python benchmarks/interval_coverage.py        # about ten minutes

An image has a hidden difficulty, so its questions succeed together. Prints, for each shape of benchmark, the
share of intervals that hold the truth when images are resampled, and when questions are (the usual shortcut).
"""

import numpy as np

from morebench.reporting.stats import f1_of, mean_of, sums_interval

EVALUATIONS = 1_000
RESAMPLES = 1_000
SHAPES = (  # name, images, questions an image, how strongly an image decides its questions, mean score
    ("one question an image", 500, 1, 0.0, 0.6),
    ("digits_vqa", 200, 3, 0.3, 0.8),
    ("POPE", 500, 18, 0.3, 0.86),
    ("GQA", 398, 31, 0.3, 0.62),
    ("few images", 30, 4, 0.3, 0.7),
)


def main() -> None:
    generator = np.random.default_rng(0)
    print(f"{'shape':24}{'statistic':12}{'by image':>10}{'by question':>13}")
    for name, images, questions, pull, score in SHAPES:
        for statistic in ("mean", "f1"):
            held = np.mean(
                [_holds(generator, images, questions, pull, score, statistic) for _ in range(EVALUATIONS)],
                axis=0,
            )
            print(f"{name:24}{statistic:12}{held[0]:>10.1%}{held[1]:>13.1%}")


def _holds(
    generator: np.random.Generator, images: int, questions: int, pull: float, score: float, statistic: str
) -> tuple[bool, bool]:
    """One evaluation. Beta difficulties: `pull` is the correlation of two answers about one image."""
    if pull:
        total = 1 / pull - 1
        chance_I = generator.beta(score * total, (1 - score) * total, images)
    else:
        chance_I = np.full(images, score)
    right = generator.random((images, questions)) < chance_I[:, None]
    ids = [str(i) for i in range(images) for _ in range(questions)]
    if statistic == "mean":
        measured, truth = mean_of(right.ravel().astype(float).tolist()), score
    else:
        yes = generator.random((images, questions)) < 0.5
        answers = np.where(yes, "yes", "no").ravel().tolist()
        predictions = np.where(yes == right, "yes", "no").ravel().tolist()
        measured, truth = f1_of(answers, predictions), score  # balanced, one accuracy: F1 of yes equals it
    by_image = sums_interval(measured, ids, RESAMPLES, int(generator.integers(2**31)))
    singles = [str(i) for i in range(len(ids))]
    by_question = sums_interval(measured, singles, RESAMPLES, int(generator.integers(2**31)))
    return by_image.low <= truth <= by_image.high, by_question.low <= truth <= by_question.high


if __name__ == "__main__":
    main()
