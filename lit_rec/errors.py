"""The one exception a user is meant to see."""

import errno

from lit_rec.secrets import hide

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a system says when a disk takes no more


class UserError(Exception):
    """Something the user can mend: shown as a message, never as a traceback.

    Args:
        what: What went wrong, in one sentence.
        where: File and line, config key or command-line argument.
        why: The cause, where it is not obvious.
        fix: What to do about it.

    Values of secret environment variables are shown nowhere: what a server or a library says may echo them.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = map(hide, (what, where, why, fix))
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [("where", self.where), ("why", self.why), ("fix", self.fix)]
        return "\n".join([self.what, *(f"  {name}: {text}" for name, text in parts if text)])
