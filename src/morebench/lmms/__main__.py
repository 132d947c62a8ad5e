"""Print the folder of our tasks, for lmms-eval's --include_path.

    python -m lmms_eval --model morebench --model_args run=ID --batch_size 16 \\
        --include_path "$(python -m morebench.lmms)" --tasks llava_more_13_paper

The group llava_more_13_paper is gqa_paper, scienceqa_img_paper, textvqa_val_paper, ai2d_paper, pope_paper,
mme_paper, mmbench_cn_dev_paper, mmbench_en_dev_paper, seedbench_paper and mmmu_val_paper: questions,
limits, scorers and data of `python -m morebench.evaluate`. lmms-eval's own tasks need no --include_path.
"""

from collections.abc import Sequence
from pathlib import Path

from morebench import entry
from morebench.errors import EXIT_DONE, ConfigError

TASKS = Path(__file__).parent / "tasks"


def command(arguments: Sequence[str]) -> int:
    if arguments:
        raise ConfigError(f"expected no argument, found {' '.join(arguments)}. See --help.")
    print(TASKS)
    return EXIT_DONE


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
