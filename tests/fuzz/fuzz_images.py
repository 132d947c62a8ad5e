"""Coverage-guided fuzzing of the inspection of images; CONTRIBUTING.md says how to run it."""

import sys

import atheris

with atheris.instrument_imports(include=["PIL", "morebench.data"]):
    from PIL import Image

    from morebench.data.findings import SampleError
    from morebench.data.images import FORMATS, decode_image
    from morebench.data.inspection import inspect_image

    Image.init()  # imports the readers


def one_input(data: bytes) -> None:
    found = inspect_image(data, "a.jpg")
    image, problem = None, None
    try:
        image = decode_image(data)
    except SampleError as error:
        problem = error.kind, error.reason
    assert found.problem == problem
    if problem is not None:
        assert problem[0].quarantines
        problem[1].encode()
    elif image is not None:
        assert (image.mode, image.size) == ("RGB", (found.width, found.height))
        assert found.format in FORMATS


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
