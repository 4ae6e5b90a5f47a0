"""A process that dies in the middle: functions that work a few times together, then raise KeyboardInterrupt."""


class Mortal:
    """Lives for `calls` calls of the functions it wraps, all counted together; the next one kills."""

    def __init__(self, calls: int):
        self.left = calls

    def wrap(self, function):
        """The same function while there is life left."""

        def wrapped(*arguments, **named):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return function(*arguments, **named)

        return wrapped
