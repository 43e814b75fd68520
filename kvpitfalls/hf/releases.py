"""The releases of transformers that the tests are run on."""

from packaging.version import Version

OLDEST, NEWEST = "4.57.6", "5.24.0"


def described(version: str) -> str:
    """A version of transformers, and whether it lies outside those that were tried.

    Examples
    --------
    >>> described("5.24.0")
    '5.24.0'
    >>> described("99.0")
    '99.0, which was not tried: it is newer than 5.24.0; handle.verify() checks a model'
    """
    release = Version(version)
    if Version(OLDEST) <= release <= Version(NEWEST):
        return version
    how = f"newer than {NEWEST}" if release > Version(NEWEST) else f"older than {OLDEST}"
    return f"{version}, which was not tried: it is {how}; handle.verify() checks a model"
