"""Runs an action in a forked process that dies, without any clean-up, at its n-th step towards the disk."""

import os

STEPS = ("fsync", "replace", "truncate", "unlink", "rmdir")


def dies_at(step, action):
    """Returns True when ``action`` reached its ``step``-th disk operation (from 0) and was killed there, else False."""
    child = os.fork()
    if child == 0:
        _arm(step)
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the action failed with exit code {code}"
    return code == 9


def _arm(step):
    left = [step]

    def dying(operation):
        def wrapped(*arguments, **options):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return operation(*arguments, **options)

        return wrapped

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
