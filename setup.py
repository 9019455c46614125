"""What pyproject.toml cannot say of the build: the framework's packages, from requirements.txt, and py.typed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REQUIREMENTS = Path(__file__).with_name("requirements.txt").read_text()
FRAMEWORK = REQUIREMENTS.partition("# What the tests")[0]  # the others are not what a user of the framework needs


class BuildWithTypes(build_py):
    """Adds rankseg_rma/py.typed, which tells type checkers that the module beside that folder has types.

    The marker lies where a package would have it. Python still finds rankseg_rma.py: folders without __init__.py come
    last.
    """

    def run(self) -> None:
        super().run()
        marker = Path(self.build_lib, "rankseg_rma", "py.typed")
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


setup(
    cmdclass={"build_py": BuildWithTypes},
    extras_require={"framework": [line for text in FRAMEWORK.splitlines() if (line := text.partition("#")[0].strip())]},
)
